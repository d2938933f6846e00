"""Where in the tree the matrices of a block are: members of a stack, axes in order, parts.

  leaf (24, 512, 3, 8, 64), rows=(1,), columns=(3, 4)      a stack of 24 x 3 matrices 512 x (8 x 64)

Models that scan over their layers keep them in one leaf with one more axis; experts, and fused
query, key and value, are stacks too. Each member has a matrix of its own, as if it were a leaf.
"""

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import jax.numpy as jnp

from llqr.tree import replicate
from llqr.typing import Array, Float

Axes: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """How a leaf is seen: as a stack of arrays, rows before columns.

    Attributes:
      leaf: position in the flattened parameters.
      name: its path.
      whole: its shape.
      order: its axes: those of the stack, then rows, then columns.
      stack: how many of them are the stack's.
      seldom: whether a batch may have few of its rows, as of embeddings.
      matrix: whether its steps are as long as a matrix's; else as a vector's.
    """

    leaf: int
    name: str
    whole: tuple[int, ...]
    order: Axes
    stack: int = 0
    seldom: bool = False
    matrix: bool = True

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one member: rows, then columns."""
        return tuple([self.whole[axis] for axis in self.order[self.stack :]])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the stack's axes."""
        return tuple([self.whole[axis] for axis in self.order[: self.stack]])

    @cached_property
    def straight(self) -> bool:
        """Whether its axes are in order as they are."""
        return self.order == tuple(range(len(self.whole)))

    def open(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the leaf with its axes in order: [*sizes, *shape]."""
        return x if self.straight else jnp.transpose(replicate(x), self.order)

    def close(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the leaf of these entries, in the order of `open`: its inverse."""
        x = x.reshape(*self.sizes, *self.shape)
        if self.straight:
            return x
        return jnp.transpose(x, sorted(range(len(self.order)), key=lambda i: self.order[i]))


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
class Cut:
    """A matrix in rectangles of one size; those at the ends are filled up with zeros.

    Attributes:
      whole: shape of the matrix.
      shape: of a rectangle.
    """

    whole: tuple[int, int]
    shape: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """How many rectangles there are, down and across."""
        down, across = (math.ceil(w / s) for w, s in zip(self.whole, self.shape, strict=True))
        return down, across

    @property
    def fills(self) -> bool:
        """Whether some rectangles are filled up."""
        return any(w % s for w, s in zip(self.whole, self.shape, strict=True))

    def lengths(self) -> list[tuple[int, int]]:
        """Return how many rows and columns of each rectangle lie in the matrix."""
        (down, across), (r, c) = self.grid, self.shape
        return [
            (min(r, self.whole[0] - i * r), min(c, self.whole[1] - j * c))
            for i, j in itertools.product(range(down), range(across))
        ]

    def open(self, x: Float[Array, "k m n"]) -> Float[Array, "parts r c"]:
        """Return the rectangles of each matrix, row by row."""
        (down, across), (r, c) = self.grid, self.shape
        ends = (down * r - self.whole[0], across * c - self.whole[1])
        x = jnp.pad(x, [(0, 0), (0, ends[0]), (0, ends[1])]) if any(ends) else x
        x = x.reshape(-1, down, r, across, c)
        return jnp.swapaxes(x, 2, 3).reshape(-1, r, c)

    def close(self, x: Float[Array, "parts r c"]) -> Float[Array, "k m n"]:
        """Return the matrices of these rectangles: the inverse of `open`."""
        (down, across), (r, c) = self.grid, self.shape
        x = jnp.swapaxes(x.reshape(-1, down, across, r, c), 2, 3)
        x = x.reshape(-1, down * r, across * c)
        return x[:, : self.whole[0], : self.whole[1]]


@dataclass(frozen=True)
class Source:
    """Where matrices come from: a leaf, or the leaves of a module as one column.

    Attributes:
      views: of its leaves, whose stacks have the same axes.
      cut: into which rectangles its matrix is cut; None: it is whole.
      first: number of its first matrix in the plan.
    """

    views: tuple[View, ...]
    cut: Cut | None
    first: int

    @property
    def leaf(self) -> int:
        """Position of the leaf at which its arrays are kept: the first."""
        return self.views[0].leaf

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """Shape of the stack of matrices; () where there is one."""
        return self.views[0].sizes + (self.cut.grid if self.cut else ())

    @cached_property
    def stacked(self) -> bool:
        """Whether its arrays have an axis of matrices."""
        return len(self.grid) > 0

    @cached_property
    def count(self) -> int:
        """How many matrices there are."""
        return math.prod(self.grid)

    @cached_property
    def seldom(self) -> bool:
        """Whether a batch may have few of the rows of its leaves."""
        return any(view.seldom for view in self.views)

    @property
    def kind(self) -> Hashable:
        """What sources have in common whose matrices can be one block."""
        shapes = tuple(view.shape for view in self.views) if len(self.views) > 1 else None
        return shapes, self.cut and self.cut.grid, self.seldom

    @property
    def labels(self) -> list[str]:
        """A name for each matrix: the path, its member and its part ("layers/kernel[3][0:1]")."""
        sizes, name = self.views[0].sizes, self.views[0].name
        found = []
        for at in itertools.product(*map(range, self.grid)):
            member, part = at[: len(sizes)], at[len(sizes) :]
            stack = f"[{','.join(map(str, member))}]" if member else ""
            found.append(name + stack + (f"[{part[0]}:{part[1]}]" if part else ""))
        return found

    def gather(
        self, leaves: Sequence[Float[Array, "..."]], shape: tuple[int, ...], *, sharded: bool
    ) -> Float[Array, "..."]:
        """Return its matrices, of a whole tree's leaves.

        Args:
          leaves: of the tree.
          shape: of a matrix, or of the leaf's view.
          sharded: over explicit mesh axes, leave leaves sharded where nothing is reshaped.

        Returns:
          [*shape]; with a stack or parts [count, *shape].
        """
        opened = [view.open(leaves[view.leaf]) for view in self.views]
        stack = math.prod(self.views[0].sizes)
        shape = (stack, *shape) if self.views[0].stack else shape
        if len(opened) == 1 and not self.cut:
            same = sharded and opened[0].shape == shape
            return opened[0] if same else replicate(opened[0]).reshape(shape)
        flat = [
            replicate(x).reshape(stack, math.prod(view.shape))
            for x, view in zip(opened, self.views, strict=True)
        ]
        x = jnp.concatenate(flat, 1) if len(flat) > 1 else flat[0]
        return self.cut.open(x.reshape(stack, *self.cut.whole)) if self.cut else x.reshape(shape)

    def scatter(self, x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
        """Return the leaves of which these are the matrices: the inverse of `gather`.

        Args:
          x: like the result of `gather`.
        """
        if self.cut:
            x = self.cut.close(x)
        if len(self.views) == 1:
            return [self.views[0].close(x)]
        stack, sizes = math.prod(self.views[0].sizes), [math.prod(v.shape) for v in self.views]
        ends = list(itertools.accumulate(sizes))[:-1]
        pieces = jnp.split(x.reshape(stack, sum(sizes)), ends, axis=1)
        return [view.close(piece) for view, piece in zip(self.views, pieces, strict=True)]
