"""Rules: which leaf gets which structure, and what its rows and columns are."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from llqr.errors import check_choice
from llqr.structures import catalogue, layouts
from llqr.structures.matrix import Structure
from llqr.structures.view import Axes, View, split_axes

Match: TypeAlias = str | Callable[[str, tuple[int, ...]], bool]

AUTO = "auto"
"""The name of a rule table, and of a rule's stack: as names and shapes say (`layouts`)."""


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
      stack: these axes are the stack, and `rows`, None or a number, decides on the others. "auto":
        those that names and shapes say, where they say some; `match` is asked about a member.
      seldom: whether a batch may have few of the leaf's rows, as of embeddings: streaming refits
        then do not take a missing gradient for disagreement, and structures with a diagonal side
        for a vocabulary have it there. None decides by name (`layouts.embedding_like`).
      length: with graft="rms", whether a step is as long as a "matrix"'s or a "vector"'s. None
        decides by shape and name: biases and scales are vectors, whatever their rank.

    Raises:
      ValueError: an unknown length; columns without a tuple of rows, or with a stack; in `init`,
        axes that a leaf does not have, or leaves of one module with different stacks.

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
    stack: Axes | Literal["auto"] = ()
    seldom: bool | None = None
    length: Literal["matrix", "vector"] | None = None

    def __post_init__(self) -> None:
        if self.length is not None:
            check_choice(f"rule {self.match!r}: length", self.length, ("matrix", "vector"))
        if isinstance(self.stack, str):
            check_choice(f"rule {self.match!r}: stack", self.stack, (AUTO,))
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

    @property
    def says_axes(self) -> bool:
        """Whether it says what is a stack, rows and columns, so that nothing is left to guess."""
        return self.stack != AUTO and (self.rows is not None or self.stack != ())

    def view(self, leaf: int, path: str, shape: tuple[int, ...]) -> tuple[View, int]:
        """Return the view of a leaf, and how many axes of what it sees are rows.

        Args:
          leaf: position in the flattened parameters.
          path: of the leaf.
          shape: of the leaf.

        `stack` is not "auto" any more.
        """
        assert not isinstance(self.stack, str)
        if isinstance(self.rows, tuple):
            stack, rows, columns = split_axes(path, shape, self.rows, self.columns or ())
        else:
            rest, stack, _ = split_axes(path, shape, self.stack, ())
            seen = tuple(shape[axis] for axis in rest)
            count = row_axes(path, seen, self.rows)
            rows, columns = rest[:count], rest[count:]
        order = (*stack, *rows, *columns)
        own = tuple(shape[axis] for axis in (*rows, *columns))
        seldom = layouts.embedding_like(path, own) if self.seldom is None else self.seldom
        matrix = matrix_like(path, own) if self.length is None else self.length == "matrix"
        return View(leaf, path, shape, order, len(stack), seldom, matrix), len(rows)


StructureLike: TypeAlias = str | Structure | Sequence[Rule | tuple[Match, str | Structure]]
"""A structure's name or "auto" (ready rule tables), a Structure, or a rule table."""


def matrix_like(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a leaf is seen as a matrix: two axes longer than 1, and not a bias or scale.

    Args:
      path: of the leaf.
      shape: of the leaf.

    Example:
      >>> matrix_like("dense/kernel", (4, 3)), matrix_like("attention/query/bias", (4, 16))
      (True, False)
    """
    return sum(side > 1 for side in shape) >= 2 and not layouts.vector_like(path)


def rule_table(rules: StructureLike) -> tuple[Rule, ...]:
    """Return a validated rule table.

    A name or a Structure becomes its ready table: matrices have that structure, all other
    leaves a diagonal (`catalogue.for_vectors`); structures of a whole module and elementwise
    ones take every leaf. "auto" is e-kfac, each member of what looks like a stack on its own, and
    without a dense side over a vocabulary of more than `catalogue.VOCABULARY`.

    Raises:
      ValueError: unknown structure, empty table, or no catch-all in the last line.

    Example:
      >>> [rule.structure.name for rule in rule_table([("bias$", "diagonal"), ("*", "kfac")])]
      ['diagonal', 'kfac']
    """
    if rules == AUTO:
        return tuple(replace(r, stack=AUTO) for r in rule_table(catalogue.AUTO))
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
    table, axes = rule_table(structure), tuple(stack)
    return [replace(r, match=_Unstacked(match, axes, r), stack=axes) for r in table]


def for_leaf(
    path: str, structure: StructureLike, stack: Axes = (), *, rows: int | None = None,
    seldom: bool | None = None,
) -> list[Rule]:  # fmt: skip
    """Return rules for one leaf, of which a framework's own metadata says what it is.

    Args:
      path: of the leaf.
      structure: asked about a member of its stack.
      stack: axes of the stack; () where there is none.
      rows: how many leading axes of a member form the rows; None decides by shape.
      seldom: see `Rule`; None decides by name.
    """
    found = stacked(structure, f"^{re.escape(path)}$", stack)
    return [replace(rule, rows=rows, seldom=seldom) for rule in found]


def slots(table: Sequence[Rule]) -> tuple[str, ...]:
    """Every slot that the table can need: known without parameters, so the state's shape is too."""
    return tuple(sorted({slot for rule in table for slot in catalogue.get(rule.structure).slots}))


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
        rows = 1 if layouts.fans_out(name, shape) else max(len(shape) - 1, 0)
    if not 0 <= rows <= len(shape):
        raise ValueError(f"rule for {name!r}: rows={rows} does not fit the shape {shape}.")
    return rows
