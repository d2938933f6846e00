"""Where the arrays of an optimizer lie: each like the parameter that it belongs to."""

import math
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from llqr._tree import is_none, leaf_names
from llqr._types import Params, PyTree


def state_shardings(tx: optax.GradientTransformation, params: Params) -> PyTree:
    """Return the sharding of every array in the state of an optimizer.

    An array of a parameter's shape lies like the parameter: moments of the base optimizer,
    momentum, a spectrum. Of the other arrays of P, an axis as long as an axis of the parameter
    lies like that; what is left of the parameter's mesh axes goes to the longest axis that they
    divide. So the rows of a left side lie like the rows of its parameter, and a right side is
    spread as well. Vectors of a parameter that is not sharded, counts and what a refit reports
    lie everywhere.

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
    everywhere = NamedSharding(_mesh(params), PartitionSpec())
    state = jax.eval_shape(tx.init, params)

    def own(array: Any, param: Any) -> Sharding | None:
        if array is None:  # a block without this slot
            return None
        spec = matching(array.shape, param.shape, param.sharding)
        return NamedSharding(param.sharding.mesh, spec)

    def other(array: Any) -> Sharding | None:
        return None if array is None else everywhere

    return optax.tree.map_params(
        tx, own, state, params, transform_non_params=other, is_leaf=is_none
    )


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
