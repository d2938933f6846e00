"""Trees to matrices, and back: what P acts on, and where the arrays of P are kept.

Arrays live in one tree for each slot, in the shape of the parameters (`pack`, `unpack`); a block
over several leaves keeps its arrays at its first leaf, and the matrices of one leaf (members of a
stack, parts of a matrix: `view`) are kept in one array, stacked. So are those of many leaves where
each device holds some of them (`plan.owned`).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from llqr._mesh import spread_stack, whole_stack
from llqr.structures import matrix as mx
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan, merge, size
from llqr.tree import replicate, shard_like
from llqr.typing import Array, PRNGKeyArray, PyTree


def gather(plan: Plan, tree: PyTree) -> list[Array]:
    """Return what P of each block acts on: [*shape], or [count, *shape], in the block's dtype.

    Args:
      plan: the blocks.
      tree: shaped like the parameters.
    """
    leaves = jax.tree.leaves(tree)
    return [block.gather(leaves) for block in plan]


def scatter(plan: Plan, arrays: Sequence[Array], like: PyTree) -> PyTree:
    """Return the tree of which these are the matrices: the inverse of `gather`.

    Args:
      plan: the blocks.
      arrays: as from `gather`.
      like: a tree with the structure, the dtypes and the shardings of the result.
    """
    leaves, treedef = jax.tree.flatten(like)
    out = list(leaves)
    for block, array in zip(plan, arrays, strict=True):
        if block.owned:
            array = whole_stack(array, [leaves[i] for i in block.leaves])
        for source, x in zip(block.sources, block.split(array), strict=True):
            for view, leaf in zip(source.views, source.scatter(x), strict=True):
                was = leaves[view.leaf]
                out[view.leaf] = shard_like(leaf.astype(was.dtype), was)
    return treedef.unflatten(out)


@lru_cache(maxsize=64)
def packed_shapes(plan: Plan) -> dict[tuple[int, str], tuple[int, ...]]:
    """Return (leaf, slot) -> shape of every array that `pack` makes of the arrays of P.

    Args:
      plan: the blocks.
    """
    found = {}
    for block in plan:
        for slot, own in mx.array_shapes(block.structure, block.shape).items():
            if block.owned:
                found[block.sources[0].leaf, slot] = block.shapes[slot]
                continue
            found |= {(source.leaf, slot): (*source.grid, *own) for source in block.sources}
    return found


def pack(
    plan: Plan, arrays: Sequence[Arrays], like: PyTree, slot_names: Sequence[str]
) -> dict[str, PyTree]:
    """Return one tree for each slot in the shape of `like`: an array or None for each leaf.

    Args:
      plan: the blocks.
      arrays: of each block.
      like: a tree with the structure of the parameters.
      slot_names: of the trees: at least the slots of all blocks.
    """
    treedef = jax.tree.structure(like)
    trees: dict[str, list[Array | None]] = {s: [None] * treedef.num_leaves for s in slot_names}
    for block, own in zip(plan, arrays, strict=True):
        for slot, values in own.items():
            if block.owned:
                trees[slot][block.sources[0].leaf] = values
                continue
            for source, value in zip(block.sources, block.split(values), strict=True):
                if len(source.grid) > 1:
                    value = value.reshape(*source.grid, *value.shape[1:])
                trees[slot][source.leaf] = value
    return {slot: treedef.unflatten(leaves) for slot, leaves in trees.items()}


def unpack(
    plan: Plan,
    trees: dict[str, PyTree],
    like: PyTree,
    slots_of: Callable[[Block], Sequence[str]] | None = None,
) -> tuple[Arrays, ...]:
    """Return the arrays of each block: the inverse of `pack`.

    Args:
      plan: the blocks.
      trees: from `pack`.
      like: a tree with the structure of the parameters.
      slots_of: the slots that a block has; None: those of its structure.

    Raises:
      KeyError: a slot without a tree.
      ValueError: trees of other containers, or stacks of other lengths.
    """
    treedef = jax.tree.structure(like)
    columns = {slot: treedef.flatten_up_to(tree) for slot, tree in trees.items()}
    found: list[Arrays] = []
    for block in plan:
        own: dict[str, Any] = {}
        for slot in block.structure.slots if slots_of is None else slots_of(block):
            own[slot] = _kept(block, columns[slot])
        found.append(own)
    return tuple(found)


def _kept(block: Block, leaves: list[Any]) -> Any:
    """The array of a block, of those that are kept at the leaves of one slot; None: there is none.

    Raises:
      ValueError: stacks of other lengths.
    """
    sources = block.sources[:1] if block.owned else block.sources
    found: list[Any] = []
    for source in sources:
        x, grid = leaves[source.leaf], (block.count,) if block.owned else source.grid
        if x is None:
            return None
        shape = jnp.shape(x)
        if shape[: len(grid)] != grid:
            raise ValueError(f"{source.views[0].name!r}: {shape} is no stack of {grid}.")
        if not (block.plain or block.owned):
            x = replicate(x)
        found.append(x.reshape(source.count, *shape[len(grid) :]) if len(grid) > 1 else x)
    return spread_stack(found[0]) if block.owned else block.concatenated(found)


def merged(plan: Plan, arrays: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Return the arrays of `merge(plan)`.

    Args:
      plan: the blocks, of one source each, or owned.
      arrays: of each block.
    """
    at = {block.sources[0].leaf: own for block, own in zip(plan, arrays, strict=True)}

    def joined(block: Block) -> Arrays:
        first = at[block.sources[0].leaf]
        if block.owned:
            return first
        return {
            slot: block.concatenated([at[source.leaf][slot] for source in block.sources])
            for slot in first
        }

    return tuple(map(joined, merge(plan)))


def separated(plan: Plan, arrays: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Return the arrays of each block: the inverse of `merged`.

    Args:
      plan: the blocks, of one source each, or owned.
      arrays: of each block of `merge(plan)`.
    """
    at: dict[int, Arrays] = {source.leaf: {} for block in plan for source in block.sources}
    for block, own in zip(merge(plan), arrays, strict=True):
        if block.owned:
            at[block.sources[0].leaf] = own
            continue
        for slot, x in own.items():
            for source, part in zip(block.sources, block.split(x), strict=True):
                at[source.leaf][slot] = part
    return tuple(at[block.sources[0].leaf] for block in plan)


def in_order(plan: Plan, values: Sequence[Array]) -> Array:
    """Return one number for each matrix, in the order of the plan that was merged.

    Args:
      plan: the blocks.
      values: of each block, a number or [count].
    """
    numbers = [number for block in plan for number in block.numbers]
    flat = [replicate(x).ravel() for x in values]
    found = jnp.concatenate(flat) if flat else jnp.zeros(0)
    back = sorted(range(len(numbers)), key=numbers.__getitem__)
    return found if back == list(range(len(back))) else found[jnp.asarray(back)]


def per_matrix(plan: Plan, arrays: Sequence[PyTree]) -> list[PyTree]:
    """Return the arrays of each matrix, in the order of the plan that was merged.

    Args:
      plan: the blocks.
      arrays: of each block.
    """
    found: dict[int, PyTree] = {}
    for block, own in zip(plan, arrays, strict=True):
        own = jax.tree.map(replicate, own) if block.owned else own
        for i, number in enumerate(block.numbers):
            found[number] = jax.tree.map(lambda x, i=i: x[i], own) if block.batched else own
    return [found[number] for number in range(len(found))]


def from_matrices(plan: Plan, arrays: Sequence[PyTree]) -> list[PyTree]:
    """Return the arrays of each block: the inverse of `per_matrix`.

    Args:
      plan: the blocks.
      arrays: of each matrix.
    """
    found = [[arrays[number] for number in block.numbers] for block in plan]

    def stack(block: Block, *arrays: Array) -> Array:
        return spread_stack(jnp.stack(arrays)) if block.owned else jnp.stack(arrays)

    return [
        jax.tree.map(partial(stack, block), *own) if block.batched else own[0]
        for block, own in zip(plan, found, strict=True)
    ]


def identity(plan: Plan, sigma: float) -> tuple[Arrays, ...]:
    """Return arrays for which every block is sigma * identity.

    Args:
      plan: the blocks.
      sigma: > 0.
    """
    return tuple(block.init(sigma) for block in plan)


def start(plan: Plan, arrays: Sequence[Arrays], key: PRNGKeyArray) -> tuple[Arrays, ...]:
    """Return what a refit learns, block by block.

    Args:
      plan: the blocks.
      arrays: of each block, from which the refit starts.
      key: of fresh vectors.
    """
    keys = jax.random.split(key, max(size(plan), 1))
    return tuple(b.start(a, keys) for b, a in zip(plan, arrays, strict=True))


def install(plan: Plan, arrays: Sequence[Arrays], learned: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Return the arrays of every block with what was learned in them.

    Args:
      plan: the blocks.
      arrays: of each block, from which the refit started.
      learned: like the result of `start`.
    """
    return tuple(
        b.each(partial(mx.install, b.structure), a, x)
        for b, a, x in zip(plan, arrays, learned, strict=True)
    )


def product(plan: Plan, arrays: Sequence[Arrays], xs: Sequence[Array]) -> list[Array]:
    """Return P x of each block, sigma included.

    Args:
      plan: the blocks.
      arrays: of each block.
      xs: as from `gather`.
    """
    return [block.product(own, x) for block, own, x in zip(plan, arrays, xs, strict=True)]
