"""From a rule table and the parameters' shapes to blocks: who is preconditioned by what.

A `Plan` is static and hashable. It says which leaves form a block, which structure the
block has and how its leaves are seen as one matrix. The arrays themselves live outside,
one tree for each slot in the shape of the parameters (`pack`, `unpack`); a block over
several leaves keeps its arrays at its first leaf, and the matrices of one leaf (members of a
stack, parts of a matrix: `view`) are kept in one array, stacked. So are those of many leaves where
each device holds some of them (`owned`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from llqr._mesh import spread_stack, whole_stack
from llqr.structures import catalogue
from llqr.structures import matrix as mx
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays, Structure
from llqr.structures.rules import Rule, embedding_like
from llqr.structures.view import Cut, Source, View
from llqr.tree import accurate_dtype, leaf_names, replicate, shard_like
from llqr.typing import Array, PRNGKeyArray, PyTree

Plan: TypeAlias = tuple[Block, ...]


def make_plan(
    params: PyTree, table: Sequence[Rule], max_dim: int, block_size: int | None = None
) -> Plan:
    """Assign every leaf of `params` (arrays or shapes) to a block.

    Args:
      params: the parameters; only paths, shapes and dtypes are read.
      table: from `rule_table`.
      max_dim: a dense side longer than this becomes diagonal.
      block_size: one longer than this is cut into blocks of one length, at most this; None: it is
        not.

    Raises:
      ValueError: a rule's axes do not fit a leaf that it decides.
    """
    groups: dict[Any, tuple[Rule, list[int]]] = {}
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        which = next(k for k, rule in enumerate(table) if rule.matches(name, jnp.shape(leaf)))
        whole = catalogue.get(table[which].structure).view == "module"
        key = (which, name.rpartition("/")[0]) if whole else i
        groups.setdefault(key, (table[which], []))[1].append(i)
    plan: list[Block] = []
    first = 0
    for rule, members in groups.values():
        views = [rule.view(i, names[i], jnp.shape(leaves[i])) for i in members]
        dtype = accurate_dtype(leaves[members[0]]).name
        plan.append(_block(rule, views, dtype, max_dim, block_size, first))
        first += plan[-1].count
    return tuple(plan)


def _block(
    rule: Rule,
    found: list[tuple[View, int]],
    dtype: str,
    max_dim: int,
    block_size: int | None,
    first: int,
) -> Block:
    """The block of a leaf, or of the leaves of a module."""
    chosen, views = catalogue.get(rule.structure), tuple(view for view, _ in found)
    stacks = {view.name: view.sizes for view in views}
    if len(set(stacks.values())) > 1:
        raise ValueError(
            f"structure {chosen.name!r} takes all leaves of a module together, so that they must "
            f"have the same stack; there are {stacks}."
        )
    column = (sum(math.prod(view.shape) for view in views), 1)
    (view, rows), cut = found[0], None
    if chosen.elementwise:
        shape = view.shape if chosen.view == "leaf" else column
    else:
        matrix = (math.prod(view.shape[:rows]), math.prod(view.shape[rows:]))
        shape = matrix if chosen.view == "leaf" else column
        chosen = _limit(chosen.for_leaf(view.name), shape, max_dim)
        cut = None if chosen.view == "module" else _cut(chosen, shape, block_size)
    return Block((Source(views, cut, first),), dtype, chosen, cut.shape if cut else shape)


def _cut(chosen: Structure, whole: tuple[int, int], block_size: int | None) -> Cut | None:
    """How long dense sides cut a matrix; None where none is long."""
    if block_size is None:
        return None
    long = {
        slot
        for slot, size in zip(("left", "right"), whole, strict=True)
        if size > block_size and slot in chosen.sides and chosen.sides[slot].square
    }
    if not long:
        return None
    # Of one length, with little to fill up: 784 in blocks of at most 256 is 4 times 196.
    even = lambda size: math.ceil(size / math.ceil(size / block_size))  # noqa: E731
    rows, columns = (
        even(size) if slot in long else size
        for slot, size in zip(("left", "right"), whole, strict=True)
    )
    return Cut(whole, (rows, columns))


def size(plan: Sequence[Block]) -> int:
    """Return how many matrices there are."""
    return sum(block.count for block in plan)


def labels(plan: Plan) -> list[str]:
    """Return a name for each matrix, by its number."""
    found = [pair for block in plan for pair in zip(block.numbers, block.labels, strict=True)]
    return [label for _, label in sorted(found)]


def each(
    plan: Plan, function: Callable[..., Any], *arguments: Any, shared: tuple[Any, ...] = ()
) -> list[Any]:
    """Return function(*shared, block, *arguments) of every matrix, for each block.

    Args:
      plan: the blocks.
      function: of `shared`, a block and the arrays of one of its matrices.
      *arguments: a tree of arrays for each block.
      shared: what all matrices see: arrays that `function` must not close over.
    """

    def of(block: Block) -> Callable[..., Any]:
        return lambda *xs: function(*xs[: len(shared)], block, *xs[len(shared) :])

    return [
        block.each(of(block), *own, shared=shared)
        for block, *own in zip(plan, *arguments, strict=True)
    ]


@lru_cache(maxsize=64)
def merge(plan: Plan) -> Plan:
    """Return a plan in which matrices of one structure, shape and dtype are one block.

    A refit does much with few matrices, and a deep network has many that are alike: as one
    program, its size does not grow with depth. To apply P they stay apart, since each step would
    have to bring their arrays together.

    Args:
      plan: the blocks.
    """
    alike: dict[Any, list[Block]] = {}
    for block in plan:
        for source in block.sources:
            shapes, cut = [view.shape for view in source.views], source.cut
            what = tuple(shapes) if len(shapes) > 1 else None
            # What streaming refits keep of an embedding is not what they keep of a kernel.
            seldom = any(embedding_like(view.name) for view in source.views)
            key = (block.structure, block.shape, block.dtype, what, cut and cut.grid, seldom)
            alike.setdefault(key, []).append(replace(block, sources=(source,)))
    return tuple(
        replace(blocks[0], sources=tuple(block.sources[0] for block in blocks))
        for blocks in alike.values()
    )


@lru_cache(maxsize=64)
def owned(plan: Plan) -> Plan:
    """Return a plan in which like matrices are one block, of which each device holds a part.

    Not elementwise ones, which lie like their parameters, nor a matrix without its like.

    Args:
      plan: the blocks.
    """
    found: list[Block] = []
    for block in merge(plan):
        if block.structure.elementwise or block.count == 1:
            found += apart((block,))
        else:
            found.append(replace(block, owned=True))
    return tuple(found)


def apart(plan: Plan) -> Plan:
    """Return the plan before `merge` and `owned`: a block for each source."""
    found = [replace(b, sources=(s,), owned=False) for b in plan for s in b.sources]
    return tuple(sorted(found, key=lambda block: block.sources[0].first))


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


def _limit(chosen: Structure, shape: tuple[int, ...], max_dim: int) -> Structure:
    large = [
        s
        for s, d in zip(("left", "right"), shape, strict=True)
        if d > max_dim and s in chosen.sides and chosen.sides[s].square
    ]
    if not large:
        return chosen
    note = f"{chosen.name} ({' and '.join(large)} diagonal)"
    return replace(chosen, name=note, **dict.fromkeys(large, "diagonal"))


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


def multiply(plan: Plan, arrays: Sequence[Arrays], tree: PyTree) -> PyTree:
    """Return P applied to a tree, sigma included.

    Args:
      plan: the blocks.
      arrays: of each block.
      tree: shaped like the parameters; leaves keep their dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> from llqr.structures import rule_table
      >>> params = {"w": jnp.ones((3, 2))}
      >>> plan = make_plan(params, rule_table("kfac"), max_dim=100)
      >>> multiply(plan, identity(plan, 4.0), params)["w"].tolist()
      [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """
    return scatter(plan, products(plan, arrays, gather(plan, tree)), tree)


def products(plan: Plan, arrays: Sequence[Arrays], xs: Sequence[Array]) -> list[Array]:
    """Return P x of each block.

    Args:
      plan: the blocks.
      arrays: of each block.
      xs: as from `gather`.
    """
    return [block.multiply(own, x) for block, own, x in zip(plan, arrays, xs, strict=True)]


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
    slots_of: Callable[[Block], Sequence[str]] = lambda block: block.structure.slots,
) -> tuple[Arrays, ...]:
    """Return the arrays of each block: the inverse of `pack`.

    Args:
      plan: the blocks.
      trees: from `pack`.
      like: a tree with the structure of the parameters.
      slots_of: the slots that a block has; by default those of its structure.

    Raises:
      ValueError: trees of other containers, or stacks of other lengths.
    """
    treedef = jax.tree.structure(like)
    columns = {slot: treedef.flatten_up_to(tree) for slot, tree in trees.items()}

    def of_owned(block: Block, slot: str) -> Any:
        found = columns[slot][block.sources[0].leaf]
        if found is not None and jnp.shape(found)[:1] != (block.count,):
            raise ValueError(
                f"{block.names[0]!r}: {jnp.shape(found)} is no stack of {block.count}."
            )
        return found if found is None else spread_stack(found)

    def own(block: Block, slot: str) -> Any:
        if block.owned:
            return of_owned(block, slot)
        found = [columns[slot][source.leaf] for source in block.sources]
        if any(value is None for value in found):
            return None
        if not block.plain:
            found = [replicate(value) for value in found]
        for i, source in enumerate(block.sources):
            shape, grid = jnp.shape(found[i]), source.grid
            if shape[: len(grid)] != grid:
                name = source.views[0].name
                raise ValueError(f"{name!r}: {shape} is no stack of {grid}.")
            if len(grid) > 1:
                found[i] = found[i].reshape(source.count, *shape[len(grid) :])
        return block.concatenated(found)

    return tuple({slot: own(block, slot) for slot in slots_of(block)} for block in plan)
