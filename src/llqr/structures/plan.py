"""From a rule table and the parameters' shapes to blocks: who is preconditioned by what.

A `Plan` is static and hashable. It says which leaves form a block, which structure the
block has and how its leaves are seen as one matrix. The arrays themselves live outside,
one tree for each slot in the shape of the parameters (`pack`, `unpack`); a block over
several leaves keeps its arrays at its first leaf, and the blocks of one leaf (members of a
stack, parts of a matrix: `view`) keep theirs in one array, stacked.
"""

import itertools
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
from llqr.structures.view import Axes, Part, View, split_axes

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
      rows: which axes form the rows of the matrix view: a tuple, whose negative entries count
        from the end; or a number, of leading axes. None decides by shape: all but the last, and
        the first alone for attention's query, key and value.
      columns: with a tuple of rows, which axes form the columns. All other axes are a stack of
        matrices (of vectors, where there are no columns), each with a structure of its own:
        layers that are scanned over, experts, fused query, key and value.
      stack: these axes are the stack, and `rows`, None or a number, decides on the others.

    Raises:
      ValueError: columns without a tuple of rows, or with a stack; in `init`, axes that a leaf
        does not have, or leaves of one module with different stacks.

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
    rows: int | Axes | None = None
    columns: Axes | None = None
    stack: Axes = ()

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "stack"):  # lists are no part of a compilation key
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.stack and (isinstance(self.rows, tuple) or self.columns is not None):
            raise ValueError(
                f"rule {self.match!r}: `stack` leaves it to the shape what rows and columns are; "
                "give it, or axes of rows and columns."
            )
        if self.columns is not None and not isinstance(self.rows, tuple):
            raise ValueError(f"rule {self.match!r}: columns={self.columns} needs axes of rows too.")

    def matches(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether this rule decides for a leaf.

        Args:
          path: of the leaf, "encoder/0/kernel".
          shape: of the leaf.
        """
        if callable(self.match):
            return bool(self.match(path, shape))
        return self.match == "*" or re.search(self.match, path) is not None

    def view(self, leaf: int, path: str, shape: tuple[int, ...]) -> tuple[View, int]:
        """Return the first view of a leaf, and how many axes of what it sees are rows.

        Args:
          leaf: position in the flattened parameters.
          path: of the leaf.
          shape: of the leaf.
        """
        if isinstance(self.rows, tuple):
            stack, rows, columns = split_axes(path, shape, self.rows, self.columns or ())
        else:
            rest, stack, _ = split_axes(path, shape, self.stack, ())
            seen = tuple(shape[axis] for axis in rest)
            count = row_axes(path, seen, self.rows)
            rows, columns = rest[:count], rest[count:]
        first = (0,) * len(stack)
        return View(leaf, path, shape, (*stack, *rows, *columns), len(stack), first), len(rows)


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


@dataclass(frozen=True)
class _Unstacked:
    """A rule's match, asked about one member of a stack: a part of compilation keys."""

    match: str
    stack: Axes
    rule: Rule

    def __call__(self, path: str, shape: tuple[int, ...]) -> bool:
        gone = {axis % len(shape) for axis in self.stack} if shape else set()
        rest = tuple(size for axis, size in enumerate(shape) if axis not in gone)
        return re.search(self.match, path) is not None and self.rule.matches(path, rest)


def stacked(structure: StructureLike, match: str, stack: Axes = (0,)) -> list[Rule]:
    """Return rules for leaves that hold a stack: each member gets what it would get as a leaf.

    Args:
      structure: as for `llqr.llqr`: a name, a `Structure` or a rule table, asked about members.
      match: a regular expression searched in the leaf's path; other leaves are left to the rules
        that follow.
      stack: axes of the stack, such as that of the layers that a model scans over: 0 with
        `nnx.scan`, `nn.scan` and Equinox's `filter_vmap`, 1 with layouts like MaxText's; (0,) for
        experts [E, d, f].

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> table = [*llqr.stacked("kfac", match="layers/"), *llqr.structures.rule_table("kfac")]
      >>> tx = llqr.llqr(optax.sgd(0.1), structure=table)
      >>> params = {"layers": {"kernel": jnp.zeros((24, 8, 4)), "bias": jnp.zeros((24, 4))},
      ...           "head": jnp.zeros((4, 2))}
      >>> print(llqr.describe(tx, params))
      leaf            shape   seen as    structure  stored   memory  multiply-adds
      ----------------------------------------------------------------------------
      head            4x2     4x2        kfac           20     80 B             48
      layers/bias     24x4    24 of 4    diagonal       96    384 B             96
      layers/kernel   24x8x4  24 of 8x4  kfac        1,920  7.5 KiB          9,216
      ----------------------------------------------------------------------------
      872 parameters                                 2,036  8.0 KiB          9,360
    """
    return [
        replace(rule, match=_Unstacked(match, tuple(stack), rule), stack=tuple(stack))
        for rule in rule_table(structure)
    ]


def slots(table: Sequence[Rule]) -> tuple[str, ...]:
    """Every slot that the table can need: known without parameters, so the state's shape is too."""
    return tuple(sorted({slot for rule in table for slot in catalogue.get(rule.structure).slots}))


@dataclass(frozen=True)
class Block:
    """Leaves that share one structured matrix, or what it sees of one.

    Attributes:
      views: of its leaves.
      dtype: of the block's arrays: that of the first leaf, float32 at least.
      structure: after `max_dim`.
      shape: of the block as P sees it: [m, n], or that of the view for elementwise structures.
      part: of the view's matrix, where that is cut.
    """

    views: tuple[View, ...]
    dtype: str
    structure: Structure
    shape: tuple[int, ...]
    part: Part | None = None

    @property
    def leaves(self) -> tuple[int, ...]:
        """Positions in the flattened parameters."""
        return tuple(view.leaf for view in self.views)

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of the leaves."""
        return tuple(view.name for view in self.views)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of what is seen of the leaves."""
        return tuple(view.shape for view in self.views)

    @property
    def label(self) -> str:
        """Path of the first leaf, with the member and the part that is seen: a name of its own."""
        at = "" if self.part is None else f"[{self.part.at[0]}:{self.part.at[1]}]"
        return self.views[0].label + at

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the stack of blocks to which this one belongs; () where it is alone."""
        return self.views[0].sizes + (() if self.part is None else self.part.grid)

    @property
    def position(self) -> int:
        """Where in that stack."""
        at = self.views[0].member + (() if self.part is None else self.part.at)
        place = 0
        for index, size in zip(at, self.grid, strict=True):
            place = place * size + index
        return place

    def see(self, leaves: Sequence[Float[Array, "..."]]) -> list[Float[Array, "..."]]:
        """Return what the block sees of the leaves of a whole tree: an array for each view."""
        seen = [view.take(leaves[view.leaf]) for view in self.views]
        if self.part is None:
            return seen
        return [self.part.take(replicate(seen[0]).reshape(self.part.whole))]

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
        """Return P x for what the block sees, each in its own shape and dtype.

        Args:
          arrays: of the block.
          xs: one array in the shape of each view, as from `see`.
        """
        dtype = jnp.dtype(self.dtype)
        if self.structure.elementwise:
            out = [mx.multiply(self.structure, arrays, x.astype(dtype)) for x in xs]
        elif self.part is not None:
            y = mx.multiply(self.structure, arrays, self.matrix(xs[0]))
            out = [y[: xs[0].shape[0], : xs[0].shape[1]]]
        else:
            flat = jnp.concatenate([replicate(x.astype(dtype)).ravel() for x in xs])
            y = mx.multiply(self.structure, arrays, flat.reshape(self.shape)).ravel()
            ends = [math.prod(shape) for shape in self.shapes]
            out = jnp.split(y, [sum(ends[: i + 1]) for i in range(len(ends) - 1)])
            out = [part.reshape(shape) for part, shape in zip(out, self.shapes, strict=True)]
        return [y.astype(x.dtype) for y, x in zip(out, xs, strict=True)]

    def matrix(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return what P acts on, in the block's dtype: of what is seen of the block's one leaf.

        [m, n], filled up with zeros for a part; or the view's shape for elementwise structures.
        """
        x = x.astype(jnp.dtype(self.dtype))
        if self.structure.elementwise:
            return x
        return replicate(x).reshape(self.shape) if self.part is None else self.part.fill(x)

    def as_matrix(self, arrays: Arrays) -> Float[Array, "size size"]:
        """Return P as a dense matrix on the concatenated, flattened leaves."""
        shape = self.shape
        if self.structure.elementwise:
            shape = (sum(math.prod(s) for s in self.shapes),)
            arrays = {k: v.ravel() if v.ndim else v for k, v in arrays.items()}
        return mx.as_matrix(self.structure, arrays, shape)


Plan: TypeAlias = tuple[Block, ...]


def make_plan(
    params: PyTree, table: Sequence[Rule], max_dim: int, block_size: int | None = None
) -> Plan:
    """Assign every leaf of `params` (arrays or shapes) to a block, or to a stack of blocks.

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
    for rule, members in groups.values():
        views = [rule.view(i, names[i], jnp.shape(leaves[i])) for i in members]
        dtype = at_least_float32(jnp.result_type(leaves[members[0]]))
        plan += _blocks(rule, views, dtype.name, max_dim, block_size)
    return tuple(plan)


def _blocks(
    rule: Rule,
    found: list[tuple[View, int]],
    dtype: str,
    max_dim: int,
    block_size: int | None,
) -> list[Block]:
    """All blocks of a leaf, or of the leaves of a module."""
    chosen, views = catalogue.get(rule.structure), [view for view, _ in found]
    stacks = {view.name: view.sizes for view in views}
    if len(set(stacks.values())) > 1:
        raise ValueError(
            f"structure {chosen.name!r} takes all leaves of a module together, so that they must "
            f"have the same stack; there are {stacks}."
        )
    size = sum(math.prod(view.shape) for view in views)
    (first, rows), parts = found[0], [None]
    if chosen.elementwise:
        shape = first.shape if chosen.view == "leaf" else (size, 1)
    else:
        matrix = (math.prod(first.shape[:rows]), math.prod(first.shape[rows:]))
        shape = matrix if chosen.view == "leaf" else (size, 1)
        chosen = _limit(chosen.for_leaf(first.name), shape, max_dim)
        if chosen.view != "module":
            parts = _parts(chosen, shape, block_size)
    return [
        Block(
            tuple(replace(view, member=member) for view in views),
            dtype,
            chosen,
            shape if part is None else part.shape,
            part,
        )
        for member in itertools.product(*map(range, first.sizes))
        for part in parts
    ]


def _parts(chosen: Structure, whole: tuple[int, int], block_size: int | None) -> list[Part | None]:
    """The rectangles into which long dense sides cut a matrix; None alone where none is long."""
    if block_size is None:
        return [None]
    cut = {
        slot
        for slot, size in zip(("left", "right"), whole, strict=True)
        if size > block_size and slot in chosen.sides and chosen.sides[slot].square
    }
    if not cut:
        return [None]
    # Of one length, with little to fill up: 784 in blocks of at most 256 is 4 times 196.
    even = lambda size: math.ceil(size / math.ceil(size / block_size))  # noqa: E731
    shape = (
        even(whole[0]) if "left" in cut else whole[0],
        even(whole[1]) if "right" in cut else whole[1],
    )
    down, across = Part(whole, shape, (0, 0)).grid
    return [Part(whole, shape, at) for at in itertools.product(range(down), range(across))]


def at_least_float32(dtype: Any) -> jnp.dtype:
    """Return `dtype`, or float32 for one that is narrower."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


def row_axes(name: str, shape: tuple[int, ...], rows: int | None = None) -> int:
    """Return how many leading axes form the rows of the row-major matrix view of a leaf.

    Args:
      name: path of the leaf.
      shape: of the leaf.
      rows: that number; None decides by name and shape.

    Raises:
      ValueError: `rows` is negative or larger than the number of axes.

    Example:
      >>> row_axes("conv/kernel", (3, 3, 16, 32)), row_axes("attention/query/kernel", (64, 4, 16))
      (3, 1)
    """
    if rows is None:
        fan_out = len(shape) == 3 and _FAN_OUT.search(name) is not None
        rows = 1 if fan_out else max(len(shape) - 1, 0)
    if not 0 <= rows <= len(shape):
        raise ValueError(f"rule for {name!r}: rows={rows} does not fit the shape {shape}.")
    return rows


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
    leaves = jax.tree.leaves(tree)
    pieces = [
        block.multiply(values, block.see(leaves))
        for block, values in zip(plan, arrays, strict=True)
    ]
    return assemble(plan, pieces, tree)


def seen(plan: Plan, tree: PyTree) -> list[list[Array]]:
    """Return what each block sees of a tree: an array for each of its views."""
    leaves = jax.tree.leaves(tree)
    return [block.see(leaves) for block in plan]


def assemble(plan: Plan, pieces: Sequence[Sequence[Array]], like: PyTree) -> PyTree:
    """Return the tree of which these are the pieces: the inverse of `seen`.

    Args:
      plan: the blocks.
      pieces: one array for each view of each block.
      like: a tree with the structure, the shapes and the shardings of the result.
    """
    leaves, treedef = jax.tree.flatten(like)
    out = list(leaves)
    for stack in _stacks(plan):
        first = plan[stack[0]]
        for k, view in enumerate(first.views):
            found = [pieces[i][k] for i in stack]
            if first.part is not None:
                step = math.prod(first.part.grid)
                found = [
                    first.part.assemble(found[i : i + step]).reshape(view.shape)
                    for i in range(0, len(found), step)
                ]
            out[view.leaf] = shard_like(view.assemble(found), leaves[view.leaf])
    return treedef.unflatten(out)


def matrices(plan: Plan) -> list[list[int]]:
    """Positions of the blocks of each matrix: one, or its parts."""
    found: list[list[int]] = []
    for i, block in enumerate(plan):
        if block.part is None or block.part.at == (0, 0):
            found.append([])
        found[-1].append(i)
    return found


def without_parts(plan: Plan) -> Plan:
    """Return blocks that see what these see, each matrix in one piece."""
    whole = [b for b in plan if b.part is None or b.part.at == (0, 0)]
    return tuple(b if b.part is None else replace(b, shape=b.part.whole, part=None) for b in whole)


def _stacks(plan: Plan) -> list[list[int]]:
    """Positions of blocks that keep their arrays at the same leaf, in order."""
    stacks: dict[int, list[int]] = {}
    for i, block in enumerate(plan):
        stacks.setdefault(block.leaves[0], []).append(i)
    return list(stacks.values())


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
    for stack in _stacks(plan):
        first = plan[stack[0]]
        for slot, value in arrays[stack[0]].items():
            if first.grid:
                value = jnp.stack([arrays[i][slot] for i in stack])
                value = value.reshape(*first.grid, *value.shape[1:])
            trees[slot][first.leaves[0]] = value
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

    def own(block: Block, slot: str) -> Any:
        value = columns[slot][block.leaves[0]]
        if not block.grid or value is None:
            return value
        if jnp.shape(value)[: len(block.grid)] != block.grid:  # an index past the end would clamp
            raise ValueError(f"{block.names[0]!r}: {jnp.shape(value)} is no stack of {block.grid}.")
        return value.reshape(-1, *value.shape[len(block.grid) :])[block.position]

    return tuple({slot: own(block, slot) for slot in slots_of(block)} for block in plan)
