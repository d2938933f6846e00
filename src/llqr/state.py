"""The state of an LLQR transformation, and how to find it inside any optax composition."""

from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llqr._types import Array, Int, Params, PyTree
from llqr.refit.record import RefitInfo
from llqr.refit.setup import Blocks
from llqr.structures import plan as plans


class LLQRState(NamedTuple):
    """State of `scale_by_llqr`: arrays only."""

    count: Int[Array, ""]  # update calls so far
    # slot -> tree shaped like params: an array of the slot's own shape, or None; a block
    # over several leaves keeps its arrays at its first leaf
    blocks: dict[str, PyTree]
    refit: RefitInfo  # what the last refit did
    stream: Any = ()  # with streaming refits a StreamState


def find(state: Any) -> LLQRState:
    """Return the (first) LLQR state inside an optimizer's state.

    Raises:
      ValueError: there is none.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = optax.chain(optax.clip(1.0), llqr.llqr(optax.adam(1e-3)))
      >>> int(llqr.find(tx.init(jnp.ones(2))).count)
      0
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if not found:
        raise ValueError(
            "no LLQR state found: the optimizer must contain llqr.llqr or llqr.scale_by_llqr."
        )
    return found[0]


def is_ours(x: Any) -> bool:
    """Whether it is the state of an LLQR transformation."""
    return isinstance(x, LLQRState)


class Visited(NamedTuple):
    """What a composed transformation does not show of an LLQR transformation inside."""

    plan: plans.Plan
    identity_scaling: float


recorder: ContextVar[list[Visited] | None] = ContextVar("recorder", default=None)


def note(plan: plans.Plan, identity_scaling: float) -> None:
    """Tell whoever visits an optimizer of a preconditioner inside it.

    A function by itself: what `init` names is pickled with it, and a ContextVar cannot be.
    """
    if (found := recorder.get()) is not None:
        found.append(Visited(plan, identity_scaling))


def plans_of(tx: optax.GradientTransformation, params: PyTree) -> tuple[plans.Plan, ...]:
    """Return the plan of every LLQR transformation inside `tx`, however it is composed.

    A composed optax transformation does not show its parts; its `init` visits them all.

    Args:
      tx: any optimizer.
      params: the parameters, or their shapes.

    Returns:
      The plans in the order in which `init` comes by them; empty where there are none.
    """
    return tuple(found.plan for found in visited(tx, params))


def visited(tx: optax.GradientTransformation, params: PyTree) -> tuple[Visited, ...]:
    """Return what `init` of every LLQR transformation inside `tx` has recorded.

    Args:
      tx: any optimizer.
      params: the parameters, or their shapes.
    """
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
    return _visit(tx, treedef, shapes)


@lru_cache(maxsize=64)
def _visit(tx: Any, treedef: Any, shapes: tuple[Any, ...]) -> tuple[Visited, ...]:
    found: list[Visited] = []
    token = recorder.set(found)
    try:
        # A new function each time: eval_shape does not trace one that it knows again.
        jax.eval_shape(lambda p: tx.init(p), treedef.unflatten(shapes))
    finally:
        recorder.reset(token)
    return tuple(found)


def product(plan: plans.Plan, blocks: Blocks, identity_scaling: float, vector: Params) -> Params:
    """Return P v, where sigma P is stored.

    Args:
      plan: the blocks.
      blocks: their arrays, for sigma P.
      identity_scaling: sigma > 0.
      vector: v, like the parameters.
    """
    stored = plans.multiply(plan, blocks, vector)
    if identity_scaling == 1:
        return stored
    return jax.tree.map(lambda u: (u / identity_scaling).astype(u.dtype), stored)
