"""From a rule table and the parameters' shapes to blocks: who is preconditioned by what.

A `Plan` is static and hashable. It says which leaves form a block, which structure the
block has and how its leaves are seen as one matrix. The arrays themselves live outside,
one tree for each slot in the shape of the parameters (`pack`, `unpack`); a block over
several leaves keeps its arrays at its first leaf.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from llqr._tree import leaf_names, replicate, shard_like
from llqr._types import Array, Float, PRNGKeyArray, PyTree
from llqr.structures import catalogue
from llqr.structures import matrix as mx
from llqr.structures.matrix import Arrays, Structure

Match: TypeAlias = str | Callable[[str, tuple[int, ...]], bool]

# Per-channel parameters, whatever their rank: attention biases are matrices.
_VECTORS = re.compile(r"(^|[/_])(bias|scale|gamma|beta)$", re.IGNORECASE)
# Projections d -> (heads, dim): the input is the first axis alone.
_FAN_OUT = re.compile(r"(^|/)(query|key|value)(/|$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a rule table; the first line that matches a leaf decides.

    Args:
      match: a regular expression searched in the leaf's path ("encoder/0/kernel"), or a
        function (path, shape) -> bool. "*" is the catch-all, required as the last line.
      structure: a name or a `Structure`.
      rows: how many leading axes form the rows of the matrix view. None decides by shape:
        all but the last, and the first alone for attention's query, key and value.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> table = [llqr.Rule(match="embedding", structure="diagonal"),
      ...          llqr.Rule(match=lambda path, shape: len(shape) == 4, structure="kfac", rows=3),
      ...          ("*", "diagonal")]
      >>> tx = llqr.llqr(optax.sgd(0.1), structure=table)
      >>> params = {"embedding": jnp.zeros((9, 2)), "conv": jnp.zeros((3, 3, 2, 4))}
      >>> [(row.leaf, row.structure, row.view) for row in llqr.describe(tx, params).rows]
      [('conv', 'kfac', (18, 4)), ('embedding', 'diagonal', (9, 2))]
    """

    match: Match
    structure: str | Structure
    rows: int | None = None

    def matches(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether this rule decides for a leaf.

        Args:
          path: of the leaf, "encoder/0/kernel".
          shape: of the leaf.
        """
        if callable(self.match):
            return bool(self.match(path, shape))
        return self.match == "*" or re.search(self.match, path) is not None


StructureLike: TypeAlias = str | Structure | Sequence[Rule | tuple[Match, str | Structure]]
"""A structure's name (a ready rule table), a Structure, or a rule table."""


def matrix_like(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a leaf is seen as a matrix: two axes longer than 1, and not a bias or scale.

    Args:
      path: of the leaf.
      shape: of the leaf.

    Example:
      >>> matrix_like("dense/kernel", (4, 3)), matrix_like("attention/query/bias", (4, 16))
      (True, False)
    """
    return sum(side > 1 for side in shape) >= 2 and not _VECTORS.search(path)


def rule_table(rules: StructureLike) -> tuple[Rule, ...]:
    """Return a validated rule table.

    A name or a Structure becomes its ready table: matrices have that structure, all other
    leaves a diagonal (`catalogue.for_vectors`); structures of a whole module and elementwise
    ones take every leaf.

    Raises:
      ValueError: unknown structure, empty table, or no catch-all in the last line.

    Example:
      >>> [rule.structure.name for rule in rule_table([("bias$", "diagonal"), ("*", "kfac")])]
      ['diagonal', 'kfac']
    """
    if isinstance(rules, str | Structure):
        chosen = catalogue.get(rules)
        if chosen.view != "leaf" or chosen.elementwise:
            return (Rule(match="*", structure=chosen),)
        return (
            Rule(match=matrix_like, structure=chosen),
            Rule(match="*", structure=catalogue.for_vectors(chosen)),
        )
    table = tuple(r if isinstance(r, Rule) else Rule(match=r[0], structure=r[1]) for r in rules)
    table = tuple(replace(r, structure=catalogue.get(r.structure)) for r in table)
    if not table or table[-1].match != "*":
        raise ValueError(
            'the last rule must be a catch-all, ("*", structure), so that every leaf has a '
            f"structure; got {[r.match for r in table]}."
        )
    return table


def slots(table: Sequence[Rule]) -> tuple[str, ...]:
    """Every slot that the table can need: known without parameters, so the state's shape is too."""
    return tuple(sorted({slot for rule in table for slot in catalogue.get(rule.structure).slots}))


@dataclass(frozen=True)
class Block:
    """Leaves that share one structured matrix.

    Attributes:
      leaves: positions in the flattened parameters.
      names: their paths.
      shapes: their shapes.
      dtype: of the block's arrays: that of the first leaf, float32 at least.
      structure: after `max_dim`.
      shape: of the block as P sees it: [m, n], or the leaf's own for elementwise structures.
    """

    leaves: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    structure: Structure
    shape: tuple[int, ...]

    def init(self, sigma: float) -> Arrays:
        """Return the arrays for which P = sigma * identity, sigma > 0."""
        return mx.init(self.structure, self.shape, sigma, jnp.dtype(self.dtype))

    def start(self, arrays: Arrays, key: PRNGKeyArray) -> Arrays:
        """Return what a refit learns, at its start.

        Args:
          arrays: of the block, from which the refit starts.
          key: of fresh vectors.
        """
        return mx.start(self.structure, arrays, self.shape, key)

    def multiply(
        self, arrays: Arrays, xs: Sequence[Float[Array, "..."]]
    ) -> list[Float[Array, "..."]]:
        """Return P x for the block's leaves, each in its own shape and dtype.

        Args:
          arrays: of the block.
          xs: one array in the shape of each leaf.
        """
        dtype = jnp.dtype(self.dtype)
        if self.structure.elementwise:
            out = [mx.multiply(self.structure, arrays, x.astype(dtype)) for x in xs]
        else:
            flat = jnp.concatenate([replicate(x.astype(dtype)).ravel() for x in xs])
            y = mx.multiply(self.structure, arrays, flat.reshape(self.shape)).ravel()
            ends = [math.prod(shape) for shape in self.shapes]
            out = jnp.split(y, [sum(ends[: i + 1]) for i in range(len(ends) - 1)])
            out = [part.reshape(shape) for part, shape in zip(out, self.shapes, strict=True)]
        return [shard_like(y.astype(x.dtype), x) for y, x in zip(out, xs, strict=True)]

    def matrix(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the view of the block's one leaf on which P acts, in the block's dtype.

        [m, n], or the leaf's own shape for elementwise structures.
        """
        x = x.astype(jnp.dtype(self.dtype))
        return x if self.structure.elementwise else replicate(x).reshape(self.shape)

    def as_matrix(self, arrays: Arrays) -> Float[Array, "size size"]:
        """Return P as a dense matrix on the concatenated, flattened leaves."""
        shape = self.shape
        if self.structure.elementwise:
            shape = (sum(math.prod(s) for s in self.shapes),)
            arrays = {k: v.ravel() if v.ndim else v for k, v in arrays.items()}
        return mx.as_matrix(self.structure, arrays, shape)


Plan: TypeAlias = tuple[Block, ...]


def make_plan(params: PyTree, table: Sequence[Rule], max_dim: int) -> Plan:
    """Assign every leaf of `params` (arrays or shapes) to a block.

    Args:
      params: the parameters; only paths, shapes and dtypes are read.
      table: from `rule_table`.
      max_dim: a dense side longer than this becomes diagonal.

    Raises:
      ValueError: a rule's `rows` does not fit the shape of a leaf that it decides.
    """
    groups: dict[Any, tuple[Rule, list[int]]] = {}
    leaves, names = jax.tree.leaves(params), leaf_names(params)
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        which = next(k for k, rule in enumerate(table) if rule.matches(name, jnp.shape(leaf)))
        whole = catalogue.get(table[which].structure).view == "module"
        key = (which, name.rpartition("/")[0]) if whole else i
        groups.setdefault(key, (table[which], []))[1].append(i)
    return tuple(
        _block(rule, members, [names[i] for i in members], [leaves[i] for i in members], max_dim)
        for rule, members in groups.values()
    )


def _block(
    rule: Rule, members: list[int], names: list[str], leaves: list[Array], max_dim: int
) -> Block:
    chosen = catalogue.get(rule.structure)
    shapes = tuple(jnp.shape(leaf) for leaf in leaves)
    if chosen.elementwise:
        shape = shapes[0] if chosen.view == "leaf" else (sum(math.prod(s) for s in shapes), 1)
    elif chosen.view != "leaf":
        shape = (sum(math.prod(s) for s in shapes), 1)
    else:
        shape = matrix_view(names[0], shapes[0], rule.rows)
    if not chosen.elementwise:
        chosen = _limit(chosen.for_leaf(names[0]), shape, max_dim)
    dtype = at_least_float32(jnp.result_type(leaves[0]))
    return Block(tuple(members), tuple(names), shapes, dtype.name, chosen, shape)


def at_least_float32(dtype: Any) -> jnp.dtype:
    """Return `dtype`, or float32 for one that is narrower."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def matrix_view(name: str, shape: tuple[int, ...], rows: int | None = None) -> tuple[int, int]:
    """Return [m, n], the row-major matrix view of a leaf (`Rule.rows`).

    Args:
      name: path of the leaf.
      shape: of the leaf.
      rows: how many leading axes form the rows; None decides by name and shape.

    Raises:
      ValueError: `rows` is negative or larger than the number of axes.

    Example:
      >>> matrix_view("conv/kernel", (3, 3, 16, 32))
      (144, 32)
      >>> matrix_view("attention/query/kernel", (64, 4, 16))
      (64, 64)
    """
    if rows is None:
        fan_out = len(shape) == 3 and _FAN_OUT.search(name) is not None
        rows = 1 if fan_out else max(len(shape) - 1, 0)
    if not 0 <= rows <= len(shape):
        raise ValueError(f"rule for {name!r}: rows={rows} does not fit the shape {shape}.")
    return math.prod(shape[:rows]), math.prod(shape[rows:])


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
    keys = jax.random.split(key, max(len(plan), 1))
    return tuple(b.start(a, k) for b, a, k in zip(plan, arrays, keys, strict=True))


def install(plan: Plan, arrays: Sequence[Arrays], learned: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Return the arrays of every block with what was learned in them.

    Args:
      plan: the blocks.
      arrays: of each block, from which the refit started.
      learned: like the result of `start`.
    """
    return tuple(
        mx.install(b.structure, a, x) for b, a, x in zip(plan, arrays, learned, strict=True)
    )


def multiply(plan: Plan, arrays: Sequence[Arrays], tree: PyTree) -> PyTree:
    """Return P applied to a tree, sigma included.

    Args:
      plan: the blocks.
      arrays: of each block.
      tree: shaped like the parameters; leaves keep their dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones((3, 2))}
      >>> plan = make_plan(params, rule_table("kfac"), max_dim=100)
      >>> multiply(plan, identity(plan, 4.0), params)["w"].tolist()
      [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """
    leaves, treedef = jax.tree.flatten(tree)
    out = list(leaves)
    for block, values in zip(plan, arrays, strict=True):
        for i, y in zip(
            block.leaves, block.multiply(values, [leaves[i] for i in block.leaves]), strict=True
        ):
            out[i] = y
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
    for block, values in zip(plan, arrays, strict=True):
        for slot, value in values.items():
            trees[slot][block.leaves[0]] = value
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
    """
    treedef = jax.tree.structure(like)
    columns = {slot: treedef.flatten_up_to(tree) for slot, tree in trees.items()}
    return tuple(
        {slot: columns[slot][block.leaves[0]] for slot in slots_of(block)} for block in plan
    )
