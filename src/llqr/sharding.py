"""Where the arrays of an optimizer lie: each like its parameter, or each device its own blocks."""

import math
from typing import Any, Literal, TypeAlias

import jax
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from llqr._mesh import AnyMesh, stack_axes
from llqr.refit.learner import Learner
from llqr.state import LLQRState, is_ours, shapes_of, visited
from llqr.structures.block import Block
from llqr.structures.plan import Plan
from llqr.tree import is_none, leaf_names
from llqr.typing import Params, PyTree

Shard: TypeAlias = Literal["params", "blocks"]
"""Where P lies: like the parameters, or on each device blocks of its own. See `scale_by_llqr`."""


def state_shardings(tx: optax.GradientTransformation, params: Params) -> PyTree:
    """Return the sharding of every array in the state of an optimizer.

    An array of a parameter's shape lies like the parameter: moments of the base optimizer,
    momentum, a spectrum. Of the other arrays of P, an axis as long as an axis of the parameter
    lies like that; what is left of the parameter's mesh axes goes to the longest axis that they
    divide. So the rows of a left side lie like the rows of its parameter, and a right side is
    spread as well. Vectors of a parameter that is not sharded, counts and what a refit reports
    lie everywhere.

    That is shard="params" of `llqr.llqr`. With shard="blocks", a stack of like matrices is spread
    over devices, as many as divide it; with shard=None, P lies everywhere.

    Args:
      tx: any optimizer, with LLQR in it or without.
      params: the parameters, sharded; or their shapes with shardings
        (`jax.ShapeDtypeStruct(shape, dtype, sharding=...)`), over concrete or abstract meshes.

    Returns:
      A tree like `tx.init(params)`: what `jax.jit(tx.init, out_shardings=...)` takes, and, for
      states that a compiled step returns, `jax.lax.with_sharding_constraint`.

    Raises:
      ValueError: a parameter without a `NamedSharding`, or parameters on different meshes.

    Example:
      >>> import jax, jax.numpy as jnp, optax, llqr
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
      >>> rows = NamedSharding(mesh, PartitionSpec("fsdp", None))
      >>> params = {"w": jax.device_put(jnp.ones((4, 2)), rows)}
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac")
      >>> shardings = llqr.state_shardings(tx, params)
      >>> shardings.preconditioner.blocks["left"]["w"].spec == PartitionSpec("fsdp", None)
      True
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    """
    mesh = _mesh(params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = shapes_of(tx, params)

    def own(array: Any, param: Any) -> Sharding | None:
        if array is None:  # a block without this slot
            return None
        spec = matching(array.shape, param.shape, param.sharding)
        return NamedSharding(param.sharding.mesh, spec)

    def other(array: Any) -> Sharding | None:
        return None if array is None else everywhere

    found = optax.tree.map_params(
        tx, own, state, params, transform_non_params=other, is_leaf=is_none
    )
    inside = iter(visited(tx, params))

    def of_ours(lies: Any, arrays: Any) -> Any:
        if not is_ours(arrays):
            return lies
        plan, learner, shard = next(inside)[:3]
        change = lambda trees: trees_of(plan, shard, trees, params, mesh)  # noqa: E731
        return _with_trees(learner, lies, change, arrays)

    return jax.tree.map(of_ours, found, state, is_leaf=is_ours)


def _with_trees(learner: Learner, state: LLQRState, change: Any, arrays: LLQRState) -> LLQRState:
    """The state with the trees of its slots changed, as those of `arrays` say."""
    stream = learner.with_trees(state.stream, change(learner.trees(arrays.stream)))
    return state._replace(blocks=change(arrays.blocks), stream=stream)


def trees_of(
    plan: Plan, shard: str | None, trees: dict[str, PyTree], params: Params, mesh: AnyMesh
) -> dict[str, PyTree]:
    """Return where the arrays of P lie: one tree for each slot.

    Args:
      plan: the blocks.
      shard: see `scale_by_llqr`.
      trees: from `trees.pack`, arrays or shapes.
      params: with shardings over `mesh`.
      mesh: the devices.
    """
    leaves, treedef = jax.tree.flatten(params)
    at = {source.leaf: block for block in plan for source in block.sources}

    def lies(i: int, array: Any) -> NamedSharding | None:
        if array is None:
            return None
        where = _placed(at[i], shard, array.shape, leaves[i], mesh)
        return NamedSharding(mesh, where)

    return {
        slot: treedef.unflatten(map(lies, range(len(leaves)), treedef.flatten_up_to(tree)))
        for slot, tree in trees.items()
    }


def _placed(
    block: Block, shard: str | None, shape: tuple[int, ...], param: Any, mesh: AnyMesh
) -> PartitionSpec:
    if shard is None:
        return PartitionSpec()
    axes = stack_axes(mesh, block.count) if block.owned else ()
    if axes:
        return PartitionSpec(axes)
    known = _known(param)
    assert known is not None
    return matching(shape, param.shape, known)


def place(
    plan: Plan, learner: Learner, shard: str | None, state: LLQRState, params: Params
) -> LLQRState:
    """Return a state whose arrays of P lie where `state_shardings` says, as far as that is known.

    Nothing changes without a mesh, nor over automatic axes inside `jax.jit`, where the shardings
    of parameters are the compiler's: there `state_shardings` is for `out_shardings`.

    Args:
      plan: the blocks.
      learner: of the optimizer.
      shard: see `scale_by_llqr`.
      state: of the preconditioner.
      params: the parameters.
    """
    leaves = jax.tree.leaves(params)
    meshes = {known.mesh for known in map(_known, leaves) if known is not None}
    if len(meshes) != 1 or any(_known(leaf) is None for leaf in leaves):
        return state
    mesh = meshes.pop()
    if mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return state

    def moved(trees: dict[str, PyTree]) -> dict[str, PyTree]:
        return jax.tree.map(_move, trees, trees_of(plan, shard, trees, params, mesh))

    return _with_trees(learner, state, moved, state)


def _known(leaf: Any) -> NamedSharding | None:
    """The sharding of a parameter, where that can be known."""
    if isinstance(leaf, Tracer):
        found = jax.typeof(leaf).sharding
        return found if AxisType.Explicit in found.mesh.axis_types else None
    found = getattr(leaf, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def _move(x: Any, where: NamedSharding) -> Any:
    if isinstance(x, Tracer) or AxisType.Explicit in where.mesh.axis_types:
        return jax.sharding.reshard(x, where)
    return jax.device_put(x, where)


def matching(shape: tuple[int, ...], of: tuple[int, ...], sharding: NamedSharding) -> PartitionSpec:
    """Return how an array lies that belongs to a parameter.

    Args:
      shape: of the array.
      of: of the parameter.
      sharding: of the parameter.

    Example:
      >>> from jax.sharding import AbstractMesh
      >>> rows = NamedSharding(AbstractMesh((2,), ("d",)), PartitionSpec(None, "d"))
      >>> tuple(matching((3, 4), (3, 4), rows)), tuple(matching((6, 6), (5, 4), rows))
      ((None, 'd'), ('d', None))
    """
    if shape == of:
        return sharding.spec
    spec = [*sharding.spec, *[None] * (len(of) - len(sharding.spec))]
    found: list[Any] = [None] * len(shape)
    left = []
    for size, names in zip(of, spec, strict=True):
        if names is None:
            continue
        same = [i for i, n in enumerate(shape) if n == size and found[i] is None]
        if same:
            found[same[0]] = names
        else:
            left.append(names)
    for names in left:
        parts = math.prod(sharding.mesh.shape[name] for name in _tuple(names))
        free = [i for i, n in enumerate(shape) if found[i] is None and n % parts == 0]
        if free:
            found[max(free, key=lambda i: (shape[i], -i))] = names
    return PartitionSpec(*found)


def _tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _mesh(params: Params) -> Any:
    """The mesh that all parameters are on."""
    meshes = {}
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"parameter {name!r} has the sharding {sharding}, and must have a NamedSharding: "
                "put all parameters on one mesh first, jax.device_put(params, shardings)."
            )
        meshes.setdefault(sharding.mesh, name)
    if len(meshes) != 1:
        found = ", ".join(f"{name!r} on {mesh}" for mesh, name in meshes.items())
        raise ValueError(f"the parameters must be on one mesh, and are not: {found or 'no leaf'}.")
    return next(iter(meshes))
