"""Which entries of a leaf a block sees: a member of a stack, with its axes in order, or a part.

  leaf (24, 512, 3, 8, 64), rows=(1,), columns=(3, 4)      a stack of 24 x 3 matrices 512 x (8 x 64)

Models that scan over their layers keep them in one leaf with one more axis; experts, and fused
query, key and value, are stacks too. Each member has a matrix of its own, as if it were a leaf.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax.numpy as jnp

from llqr._tree import replicate
from llqr._types import Array, Float

Axes: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """What a block sees of one leaf.

    Attributes:
      leaf: position in the flattened parameters.
      name: its path.
      whole: its shape.
      order: its axes: those of the stack, then rows, then columns.
      stack: how many of them are the stack's.
      member: where in the stack.
    """

    leaf: int
    name: str
    whole: tuple[int, ...]
    order: Axes
    stack: int = 0
    member: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is seen: rows, then columns."""
        return tuple(self.whole[axis] for axis in self.order[self.stack :])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the stack's axes."""
        return tuple(self.whole[axis] for axis in self.order[: self.stack])

    @property
    def label(self) -> str:
        """The path, and where in the stack: "layers/kernel[3]"."""
        return self.name + (f"[{','.join(map(str, self.member))}]" if self.stack else "")

    def take(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return what is seen of the leaf."""
        return self._ordered(x)[self.member] if self.stack else self._ordered(x)

    def _ordered(self, x: Array) -> Array:
        if self.order == tuple(range(len(self.whole))):
            return replicate(x) if self.stack else x
        return jnp.transpose(replicate(x), self.order)

    def assemble(self, members: Sequence[Float[Array, "..."]]) -> Float[Array, "..."]:
        """Return the leaf of which these are all the members, in order: the inverse of `take`."""
        x = members[0]
        if self.stack:
            x = jnp.stack(members).reshape(*self.sizes, *self.shape)
        if self.order == tuple(range(len(self.whole))):
            return x
        back = sorted(range(len(self.order)), key=lambda i: self.order[i])
        return jnp.transpose(x, back)


def split_axes(
    name: str,
    shape: tuple[int, ...],
    rows: Axes,
    columns: Axes,
) -> tuple[Axes, Axes, Axes]:
    """Return the axes of the stack, the rows and the columns, none negative.

    Args:
      name: path of the leaf.
      shape: of the leaf.
      rows: its axes that are rows; negative ones count from the end.
      columns: its axes that are columns.

    Raises:
      ValueError: an axis that is not there, or one that is named twice.

    Example:
      >>> split_axes("layers/kernel", (24, 512, 2048), rows=(-2,), columns=(-1,))
      ((0,), (1,), (2,))
    """
    rank, named = len(shape), [*rows, *columns]
    bad = [axis for axis in named if not -rank <= axis < rank]
    if bad:
        raise ValueError(f"rule for {name!r}: there is no axis {bad[0]} in the shape {shape}.")
    rows, columns = (tuple(axis % rank for axis in axes) for axes in (rows, columns))
    if len({*rows, *columns}) < len(named):
        raise ValueError(
            f"rule for {name!r}: rows={rows} and columns={columns} name an axis of the shape "
            f"{shape} twice."
        )
    stack = tuple(axis for axis in range(rank) if axis not in {*rows, *columns})
    return stack, rows, columns


@dataclass(frozen=True)
class Part:
    """A rectangle of a matrix, filled up with zeros to the size of all its siblings.

    Attributes:
      whole: shape of the matrix.
      shape: of the rectangle, filled up.
      at: its row and its column in the grid of rectangles.
    """

    whole: tuple[int, int]
    shape: tuple[int, int]
    at: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """How many rectangles there are, down and across."""
        rows, columns = (math.ceil(w / s) for w, s in zip(self.whole, self.shape, strict=True))
        return rows, columns

    def take(self, x: Float[Array, "m n"]) -> Float[Array, "r c"]:
        """Return the rectangle as it is: smaller at the ends."""
        (i, j), (r, c) = self.at, self.shape
        return x[i * r : (i + 1) * r, j * c : (j + 1) * c]

    def fill(self, x: Float[Array, "r c"]) -> Float[Array, "rows columns"]:
        """Return the rectangle with zeros behind it."""
        return jnp.pad(x, [(0, s - have) for s, have in zip(self.shape, x.shape, strict=True)])

    def assemble(self, parts: Sequence[Float[Array, "..."]]) -> Float[Array, "m n"]:
        """Return the matrix of which these are all the rectangles, row by row."""
        down, across = self.grid
        lines = [jnp.concatenate(parts[i * across : (i + 1) * across], 1) for i in range(down)]
        return jnp.concatenate(lines, 0)
