"""Who gets what: from a rule table and the parameters' shapes to blocks.

A `Plan` is static and hashable. It says which leaves form a block, which structure the
block has and how its leaves are seen as one matrix. The arrays themselves live outside
(`trees`), one tree for each slot in the shape of the parameters.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from llqr.structures import catalogue, layouts
from llqr.structures.block import Block
from llqr.structures.layouts import vocabulary_side
from llqr.structures.matrix import Structure
from llqr.structures.rules import AUTO, Rule
from llqr.structures.view import Cut, Source, View
from llqr.tree import accurate_dtype, is_traced, leaf_names
from llqr.typing import PyTree

Plan: TypeAlias = tuple[Block, ...]

LIKE_A_VOCABULARY = 1000
"""An axis that is so long may be one over words; inputs of a perceptron are shorter, mostly."""


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
    leaves, treedef = jax.tree.flatten(params)
    types = tuple(zip(map(jnp.shape, leaves), map(jnp.result_type, leaves), strict=True))
    try:
        return _make_plan(treedef, types, tuple(table), max_dim, block_size)
    except TypeError:  # a container, or a rule's function, that cannot be hashed
        return _make_plan.__wrapped__(treedef, types, tuple(table), max_dim, block_size)


@lru_cache(maxsize=256)  # asked at every update that is traced or not compiled
def _make_plan(
    treedef: Any,
    types: tuple[tuple[tuple[int, ...], Any], ...],
    table: tuple[Rule, ...],
    max_dim: int,
    block_size: int | None,
) -> Plan:
    groups: dict[Any, list[tuple[int, Rule]]] = {}
    shapes = [shape for shape, _ in types]
    names = leaf_names(treedef.unflatten(range(len(types))))
    deciding = decisions(names, shapes, table)
    for i, (name, (which, rule)) in enumerate(zip(names, deciding, strict=True)):
        whole = catalogue.get(rule.structure).view == "module"
        key = (which, name.rpartition("/")[0]) if whole else i
        groups.setdefault(key, []).append((i, rule))
    plan: list[Block] = []
    first = 0
    for members in groups.values():
        views = [rule.view(i, names[i], shapes[i]) for i, rule in members]
        i, rule = members[0]
        dtype = accurate_dtype(jax.ShapeDtypeStruct(*types[i])).name
        plan.append(_block(rule, views, dtype, max_dim, block_size, first))
        first += plan[-1].count
    return tuple(plan)


def decisions(
    names: Sequence[str], shapes: Sequence[tuple[int, ...]], table: Sequence[Rule]
) -> list[tuple[int, Rule]]:
    """Return which rule decides for each leaf, by number, and it with the stack that it finds.

    Args:
      names: paths of all leaves.
      shapes: of all leaves.
      table: from `rule_table`.
    """
    seen: dict[int, layouts.Stack] = {}
    if any(rule.stack == AUTO for rule in table):
        seen = layouts.stacks(names, shapes)
    found = []
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        axes = seen[i].axes if i in seen else ()
        member = tuple(size for axis, size in enumerate(shape) if axis not in axes)
        for which, rule in enumerate(table):
            auto = rule.stack == AUTO
            if rule.matches(name, member if auto else shape):
                found.append((which, replace(rule, stack=axes) if auto else rule))
                break
    return found


def doubts(params: PyTree, table: Sequence[Rule]) -> list[str]:
    """Return in words what leaves were taken for by their names and shapes alone.

    Args:
      params: the parameters, or their shapes.
      table: from `rule_table`.
    """
    names, shapes = leaf_names(params), [jnp.shape(x) for x in jax.tree.leaves(params)]
    seen, said, vocabulary = layouts.stacks(names, shapes), [], False
    stacked: list[tuple[str, tuple[int, ...], layouts.Stack, str]] = []
    for i, (which, rule) in enumerate(decisions(names, shapes, table)):
        view, rows = rule.view(i, names[i], shapes[i])
        vocabulary = vocabulary or vocabulary_side(view.name, view.seldom) is not None
        plain = catalogue.get(rule.structure).elementwise or len(shapes[i]) < 3
        if i not in seen or table[which].says_axes or plain:
            continue
        auto = table[which].stack == AUTO
        matrix = f"{math.prod(view.shape[:rows])}x{math.prod(view.shape[rows:])}"
        stacked.append((names[i], shapes[i], seen[i], "" if auto else matrix))
    if (words := layouts.doubts(stacked)) is not None:
        said.append(words)
    asked = [s.name for s in (catalogue.get(r.structure) for r in table) if s.vocabulary == 0]
    sizes = {name: max(shape) for name, shape in zip(names, shapes, strict=True) if len(shape) == 2}
    longest = max(sizes, key=sizes.__getitem__, default="")
    if asked and not vocabulary and sizes.get(longest, 0) >= LIKE_A_VOCABULARY:
        said.append(
            f"structure {asked[0]!r} keeps sides over a vocabulary diagonal, and no leaf has the "
            f"name of an embedding or of a head. If {longest!r}, with {sizes[longest]} entries on "
            f"one axis, is one: llqr.Rule(match=..., structure={asked[0]!r}, seldom=True) before "
            "the other rules."
        )
    return said


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
        side = vocabulary_side(view.name, view.seldom)
        chosen = chosen.for_vocabulary(side, shape[side == "right"])
        chosen = _limit(chosen, shape, max_dim)
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
    found, programs = [], {}
    many = Counter(block.kind for block in plan) if is_traced((arguments, shared)) else {}
    for block, *own in zip(plan, *arguments, strict=True):

        def run(shared: tuple[Any, ...], *own: Any, block: Block = block) -> Any:
            def one(*xs: Any) -> Any:
                return function(*xs[: len(shared)], block, *xs[len(shared) :])

            return block.each(one, *own, shared=shared)

        if many.get(block.kind, 0) > 1:  # a deep network has many: traced once
            # Inlined: calls that are left to XLA make steps slower by a tenth on CPU.
            run = programs.setdefault(block.kind, jax.jit(run, inline=True))
        found.append(run(shared, *own))
    return found


@lru_cache(maxsize=64)
def merge(plan: Plan) -> Plan:
    """Return a plan in which like matrices are one block: of one structure, shape and dtype.

    From sources of one kind too (`Source.kind`): parts of matrices are joined with parts of as
    many, rows that are seldom in a batch with their like. A refit does much with few matrices, and
    a deep network has many that are alike: as one program, its size does not grow with depth. To
    apply P they stay apart, since each step would have to bring their arrays together.

    Args:
      plan: the blocks.
    """
    alike: dict[Hashable, list[Block]] = {}
    for block in plan:
        for source in block.sources:
            key = (block.structure, block.shape, block.dtype, source.kind)
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
