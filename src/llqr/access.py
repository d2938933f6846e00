"""From outside an optimizer: refit P now, multiply by it, read and install its arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from llqr import _loops
from llqr.errors import NoObjectiveError, unknown
from llqr.objective import BoundObjective
from llqr.preconditioning import OnlyRefit, check_unmasked
from llqr.state import LLQRState, blocks_of, closed, find, is_ours, opened, shapes_of, visited
from llqr.structures import trees
from llqr.structures.plan import labels
from llqr.structures.preconditioner import Preconditioner
from llqr.typing import Array, Float, Params, PyTree


def refresh(
    tx: optax.GradientTransformation,
    state: Any,
    params: Params,
    objective: BoundObjective | None,
) -> Any:
    """Refit P now, from outside the training step.

    The way to refit on CPU, and wherever the refit's data differs from the training batch:
    call the training step with refresh=False and this function when a refit is due. The
    count and the state of every other transformation stay as they are.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      state: its state.
      params: the current parameters.
      objective: the curvature objective on the refit batch; None where the way to learn P needs
        none (`Streaming(probe="gradient")`).

    Returns:
      The state with new blocks.

    Raises:
      ValueError: there is no LLQR state in `state`; or a wrapper drops the request or throws
        its result away. Inside `jit`, where nothing can be raised at run time, `RefitInfo.refits`
        shows the latter.
      TypeError: `objective` is not bound to a batch.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda w, x: x @ w, loss=lambda z, x: jnp.mean((z - 1.0) ** 2))
      >>> w, x = jnp.zeros((2, 1)), 2 * jnp.eye(2)
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="diagonal", metric="gauss_newton")
      >>> state = llqr.refresh(tx, tx.init(w), w, objective.bind(x))
      >>> llqr.find(state).refit.words
      ('updated',)
    """
    tx = optax.with_extra_args_support(tx)
    zeros = jax.tree.map(jnp.zeros_like, params)
    find(state)
    only = OnlyRefit()
    try:
        _, new = tx.update(zeros, state, params, objective=objective, refresh=only)
    except NoObjectiveError:
        if objective is None:
            raise
        raise ValueError(_UNREACHED) from None
    _check_reached(_ours(state), _ours(new), only)

    return jax.tree.map(lambda old, new: new if is_ours(old) else old, state, new, is_leaf=is_ours)


_UNREACHED = (
    "llqr.refresh reached no refit: a wrapper around llqr.llqr does not pass `objective` and "
    "`refresh` on, or holds updates back (optax.MultiSteps, optax.conditionally_transform). Let "
    "a wrapper of your own pass **extra on to `update`; or refit what is inside, with its own "
    "part of the state: llqr.refresh(inner_tx, state.inner_opt_state, params, objective)."
)


def _ours(state: Any) -> list[LLQRState]:
    return [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]


def _check_reached(old: list[LLQRState], new: list[LLQRState], only: OnlyRefit) -> None:
    """Raise ValueError if a preconditioner was not refitted."""
    known = {id(info) for info in only.reached}

    def refitted(o: LLQRState, n: LLQRState) -> bool:
        if id(n.refit) in known:  # no need to wait for the device
            return True
        if _loops.is_traced((o.refit, n.refit)):
            return bool(known)
        return int(n.refit.refits) > int(o.refit.refits)  # it went through a branch

    if len(new) != len(old) or not all(map(refitted, old, new)):
        raise ValueError(_UNREACHED)


def restore(tx: optax.GradientTransformation, params: PyTree, tree: PyTree) -> Any:
    """Return a state that was restored as dicts or lists, put back into its containers.

    Libraries for checkpoints give back trees of dicts where they were not told what to restore
    (Orbax without a target, `flax.serialization`). Leaves are found by their names, never by their
    order.

    Args:
      tx: the optimizer.
      params: the parameters, or their shapes.
      tree: the state, with the names of fields as keys of dicts; tuples may be lists, or dicts of
        their indices.

    Returns:
      A state like `tx.init(params)`, on the devices where its arrays are.

    Raises:
      ValueError: a name is missing or not known, an array has another shape, or a list is in the
        place of a dict: the order of its entries could not be trusted.

    Example:
      >>> import flax.serialization, jax.numpy as jnp, llqr
      >>> tx, params = llqr.streaming(0.1), {"w": jnp.ones((3, 2))}
      >>> tree = flax.serialization.to_state_dict(tx.init(params))
      >>> int(llqr.find(llqr.restore(tx, params, tree)).count)
      0
    """
    return _restored(shapes_of(tx, params), tree, "state")


_LATER = {"dropped"}
"""Counts that states of 0.2.0 do not have: none so far."""


def _restored(like: Any, given: Any, path: str) -> Any:
    """Put a tree into the containers of another, level by level."""
    if not jax.tree.leaves(like):
        return like
    if isinstance(like, jax.ShapeDtypeStruct):
        if not hasattr(given, "shape") and not isinstance(given, int | float | bool):
            raise ValueError(f"{path}: there must be an array, not a {type(given).__name__}.")
        if jnp.shape(given) != like.shape:
            raise ValueError(f"{path}: the shape is {jnp.shape(given)}, not {like.shape}.")
        return jnp.asarray(given, like.dtype)
    children, treedef = _children(like)
    names = [name for name, _ in children]
    if isinstance(given, (type(like), Mapping)):
        entries = given if isinstance(given, Mapping) else dict(_children(given)[0])
        found = {str(name): child for name, child in entries.items()}
    elif isinstance(given, list | tuple) and isinstance(like, list | tuple):
        if len(given) != len(names):
            raise ValueError(f"{path}: there are {len(given)} entries, not {len(names)}.")
        found = dict(zip(names, given, strict=True))
    else:
        raise ValueError(
            f"{path}: there must be a dict with {', '.join(names)}, not a {type(given).__name__}: "
            "which of its entries is which could not be told."
        )
    full = {name for name, child in children if jax.tree.leaves(child)}
    if missing := sorted(full - set(found) - _LATER):
        raise ValueError(f"{path}: {missing[0]!r} is missing; there are {', '.join(found)}.")
    if more := sorted(name for name in set(found) - set(names) if jax.tree.leaves(found[name])):
        raise ValueError(f"{path}: {unknown('entry', more[0], names)}")
    return treedef.unflatten(
        [_restored(child, found.get(name, 0), f"{path}/{name}") for name, child in children]
    )


def _children(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Name and value of what a container holds, and the container without them."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    named = [(jax.tree_util.keystr(keys, simple=True, separator="/"), x) for keys, x in found]
    return named, treedef


def precondition(tx: optax.GradientTransformation, state: Any, vector: Params) -> Params:
    """Return P v for the (first) preconditioner inside an optimizer, without a graft.

    `functools.partial(llqr.precondition, tx, state)` is the product that the oracle of `llqr.sam`
    takes as `precondition=`.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      state: its state.
      vector: v, a tree like the parameters.

    Raises:
      ValueError: there is no LLQR state in `state`, or `optax.masked` hides some of it.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac")
      >>> params = {"w": jnp.ones((3, 2))}
      >>> llqr.precondition(tx, tx.init(params), params)["w"].tolist()  # P is I before a refit
      [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    return preconditioner(tx, state, vector).product(vector)


def preconditioner(tx: optax.GradientTransformation, state: Any, params: Params) -> Preconditioner:
    """Return P of the (first) preconditioner inside an optimizer, as a linear operator.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      state: its state.
      params: the parameters, or a vector like them.

    Returns:
      A `llqr.operators.LinearOperator`: `product`, `as_matrix`, `in_structure`; a pytree.

    Raises:
      ValueError: there is no LLQR state in `state`, or `optax.masked` hides some of it.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac")
      >>> params = {"w": jnp.ones((2, 1))}
      >>> llqr.preconditioner(tx, tx.init(params), params).as_matrix().tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    found = find(state)
    check_unmasked(found.blocks)
    plan, learner = visited(tx, params)[0][:2]
    arrays = blocks_of(plan, found, params)
    return Preconditioner.on(plan, arrays, params, learner.setting.sigma)


def blocks(
    tx: optax.GradientTransformation, state: Any, params: PyTree
) -> dict[str, dict[str, Float[Array, "..."]]]:
    """Return the arrays of the (first) preconditioner inside an optimizer, to read or save them.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      state: its state.
      params: the parameters, or their shapes.

    Returns:
      Path of a block's first leaf ("layers/kernel[3]" for a member of a stack, "kernel[0:1]" for a
      part) -> slot ("left", "right", "spectrum", ...) -> array; what the
      arrays stand for is in `llqr.structures.catalogue`. P is stored as sigma P.

    Raises:
      ValueError: there is no LLQR state in `state`.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac")
      >>> params = {"w": jnp.ones((3, 2))}
      >>> {slot: a.shape for slot, a in llqr.blocks(tx, tx.init(params), params)["w"].items()}
      {'left': (3, 3), 'right': (2, 2)}
    """
    found = find(state)
    plan = visited(tx, params)[0].plan
    arrays = blocks_of(plan, found, params)
    apart = trees.per_matrix(plan, arrays)
    return {label: dict(own) for label, own in zip(labels(plan), apart, strict=True)}


def install(
    tx: optax.GradientTransformation,
    state: Any,
    params: PyTree,
    blocks: Mapping[str, Mapping[str, ArrayLike]],
) -> Any:
    """Return the state with other arrays in its (first) preconditioner; the rest stays.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      state: its state.
      params: the parameters, or their shapes.
      blocks: as `llqr.blocks` gives them; blocks and slots that are left out stay.

    Raises:
      ValueError: there is no LLQR state in `state`; or an array for a block or slot that
        does not exist, of another shape, or not finite.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="diagonal")
      >>> params = {"w": jnp.ones((2, 1))}
      >>> half = {"w": {"spectrum": jnp.full((2, 1), 0.5)}}
      >>> state = llqr.install(tx, tx.init(params), params, half)
      >>> llqr.precondition(tx, state, params)["w"].tolist()
      [[0.5], [0.5]]
    """
    found = find(state)
    plan, learner = visited(tx, params)[0][:2]
    known = {label: i for i, label in enumerate(labels(plan))}
    held = opened(learner, plan, found, params)
    arrays = trees.per_matrix(plan, held.arrays)
    for name, slots in blocks.items():
        if name not in known:
            raise ValueError(unknown("block (path of its first leaf)", name, known))
        own = arrays[known[name]]
        for slot, array in slots.items():
            if slot not in own:
                raise ValueError(f"block {name!r}: {unknown('slot', slot, own)}")
            if jnp.shape(array) != own[slot].shape:
                raise ValueError(
                    f"block {name!r}, slot {slot!r}: the array must have the shape "
                    f"{own[slot].shape}, not {jnp.shape(array)}."
                )
            if not _loops.is_traced(array) and not jnp.all(jnp.isfinite(array)):
                raise ValueError(f"block {name!r}, slot {slot!r}: the array is not finite.")
        cast = {slot: jnp.asarray(array, own[slot].dtype) for slot, array in slots.items()}
        arrays[known[name]] = own | cast
    held = learner.reexpress(plan, held, tuple(trees.from_matrices(plan, arrays)))
    new = closed(learner, plan, held, found, params)
    return jax.tree.map(lambda x: new if x is found else x, state, is_leaf=is_ours)
