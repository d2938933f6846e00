"""The state of an LLQR transformation, and how to find it inside any optax composition."""

import warnings
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llqr.errors import LayoutWarning
from llqr.refit.learner import Blocks, Held, Learner
from llqr.refit.record import RefitInfo
from llqr.refit.ways import name_of
from llqr.structures import catalogue, trees
from llqr.structures.plan import Plan, make_plan, owned
from llqr.structures.rules import AUTO, rule_table, slots
from llqr.tree import all_like, leaf_names
from llqr.typing import Array, Int, PyTree


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

    plan: Plan
    learner: Learner
    shard: str | None
    doubts: tuple[str, ...] = ()  # what leaves were taken for by names and shapes, in words


recorder: ContextVar[list[Visited] | None] = ContextVar("recorder", default=None)


def note(plan: Plan, learner: Learner, shard: str | None, doubts: tuple[str, ...]) -> None:
    """Tell whoever visits an optimizer of a preconditioner inside it.

    A function by itself: what `init` names is pickled with it, and a ContextVar cannot be.
    """
    if (found := recorder.get()) is not None:
        found.append(Visited(plan, learner, shard, doubts))


def say(words: str) -> None:
    """Warn of a layout that was found out; not where an optimizer is only visited."""
    if recorder.get() is None:
        warnings.warn(f"llqr: {words}", LayoutWarning, stacklevel=2)


def visited(tx: optax.GradientTransformation, params: PyTree) -> tuple[Visited, ...]:
    """Return what `init` of every LLQR transformation inside `tx` has recorded.

    A composed optax transformation does not show its parts; its `init` visits them all.

    Args:
      tx: any optimizer.
      params: the parameters, or their shapes.

    Returns:
      In the order in which `init` comes by them; empty where there are none.
    """
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
    return _visit(tx, treedef, shapes)


@lru_cache(maxsize=64)
def _visit(tx: Any, treedef: Any, shapes: tuple[Any, ...]) -> tuple[Visited, ...]:
    return tuple(_traced(tx, treedef.unflatten(shapes))[1])


def shapes_of(tx: optax.GradientTransformation, params: PyTree) -> Any:
    """Return the shapes of an optimizer's state, without a word on layouts.

    Args:
      tx: any optimizer.
      params: the parameters, or their shapes.
    """
    return _traced(tx, params)[0]


def _traced(tx: optax.GradientTransformation, params: PyTree) -> tuple[Any, list[Visited]]:
    found: list[Visited] = []
    token = recorder.set(found)
    try:
        # A new function each time: eval_shape does not trace one that it knows again.
        return jax.eval_shape(lambda p: tx.init(p), params), found
    finally:
        recorder.reset(token)


def check_container(state: Any, expected: type, owner: str) -> None:
    """Raise TypeError if a state is not what `init` of its optimizer makes.

    Args:
      state: given to `update`.
      expected: its class.
      owner: name of the optimizer.
    """
    if isinstance(state, expected):
        return
    fields = ", ".join(expected._fields)  # pyright: ignore[reportAttributeAccessIssue]
    raise TypeError(
        f"{owner}: the state must be the {expected.__name__}({fields}) that tx.init(params) makes; "
        f"got a {type(state).__name__}, {_entries(state)}. A state of another optimizer cannot go "
        "on here; one that was restored as lists or dicts is put back by name with "
        "llqr.restore(tx, params, state)."
    )


def _entries(state: Any) -> str:
    if isinstance(state, tuple | list):
        return f"of {[type(x).__name__ for x in state]}"
    return f"with {sorted(map(str, state))}" if isinstance(state, dict) else "no such container"


def opened(learner: Learner, plan: Plan, state: LLQRState, like: PyTree) -> Held:
    """Return what a state holds, by block.

    Args:
      learner: of the optimizer.
      plan: likewise.
      state: its state.
      like: a tree with the structure of the parameters.

    Raises:
      ValueError: the state is of an optimizer with other options.
    """
    if not learner.owns(state.stream):
        raise ValueError(
            f"the optimizer has refit={learner.name}(...), and the state is of one with "
            f"{name_of(state.stream)}(...). Begin anew with tx.init(params)."
        )
    arrays = blocks_of(plan, state, like)
    return Held(arrays, learner.open(plan, state.stream, like), state.refit, [])


def closed(learner: Learner, plan: Plan, held: Held, before: LLQRState, like: PyTree) -> LLQRState:
    """Return the state with what is held: the inverse of `opened`.

    Args:
      learner: of the optimizer.
      plan: likewise.
      held: what it is to hold.
      before: the state that was opened, with its count and shardings.
      like: a tree with the structure of the parameters.
    """
    packed = trees.pack(plan, held.arrays, like, tuple(before.blocks))
    stream = learner.close(plan, held.memory, like)
    after = LLQRState(before.count, packed, held.info, stream)
    return all_like(after, before)


def blocks_of(plan: Plan, state: LLQRState, like: PyTree) -> Blocks:
    """Return the arrays of each block.

    Args:
      plan: of the optimizer.
      state: its state.
      like: a tree with the structure of the parameters.

    Raises:
      ValueError: the state was made with another structure, or for other parameters; both sides
        and the leaf are named.
    """
    why = _difference(plan, state, like)
    if why is not None:
        raise ValueError(
            f"the state does not fit the optimizer: {_made_with(state, like)} is given to one with "
            f"structure {_names(plan)}: {why}. Begin anew with tx.init(params), or make the "
            "optimizer as it was when the state was made, with the same `structure`, `max_dim`, "
            "`block_size` and `shard`."
        )
    return trees.unpack(plan, state.blocks, like)


def _difference(plan: Plan, state: LLQRState, like: PyTree) -> str | None:
    """What of the arrays of P is not there, is too much, or has another shape; None for nothing."""
    expected, structure = trees.packed_shapes(plan), jax.tree.structure(like)
    needed = {slot for _, slot in expected}
    if missing := sorted(needed - set(state.blocks)):
        return f"there is no slot {missing[0]!r}"
    names = leaf_names(like)
    for slot, tree in state.blocks.items():
        try:
            leaves = structure.flatten_up_to(tree)
        except ValueError:
            return "its trees have other leaves or containers than the parameters here"
        for leaf, array in enumerate(leaves):
            want = expected.get((leaf, slot))
            have = None if array is None else jnp.shape(array)
            if want != have:
                what = f"leaf {names[leaf]!r}, slot {slot!r}"
                if have is None:
                    return f"{what}: there is no array, where one of shape {want} should be"
                if want is None:
                    return f"{what}: there is an array of shape {have}, where none should be"
                return f"{what}: the shape is {have}, not {want}"
    return None


def _made_with(state: LLQRState, like: PyTree) -> str:
    """Name the structure of a state, where one has its slots and shapes, and what limits it."""
    sides = {n for tree in state.blocks.values() for x in jax.tree.leaves(tree) for n in x.shape}
    for name in (*catalogue.STRUCTURES, AUTO):
        table = rule_table(name)
        if slots(table) != tuple(sorted(state.blocks)):
            continue
        for block_size in (None, 1024, *sorted(sides)):
            plan = make_plan(like, table, 10_000, block_size)
            for found in (plan, owned(plan)):
                if _difference(found, state, like) is None:
                    more = "" if block_size is None else f" with block_size={block_size}"
                    return f"a state of structure {name!r}{more}"
    return f"a state with the slots {sorted(state.blocks)}"


def _names(plan: Plan) -> str:
    return ", ".join(sorted({repr(block.structure.name) for block in plan}))
