"""A block: structured matrices of one kind and shape, and where in the tree they act."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from llqr._mesh import over_devices, spread_stack, whole_stack
from llqr.structures import matrix as mx
from llqr.structures.matrix import Arrays, Structure
from llqr.structures.view import Source
from llqr.tree import replicate
from llqr.typing import Array, Float, PyTree

AT_ONCE = 2**26
"""Entries of matrices that run at once; more of them run one batch after the other."""


@dataclass(frozen=True)
class Block:
    """A structured matrix, or several of one structure and shape, that run as one program.

    Where there are several (`batched`), every array has one more axis in front, of `count`: a
    stack of layers, the parts of a matrix, or, in a refit, all like matrices (`merge`).

    Attributes:
      sources: where in the tree they are.
      dtype: of the block's arrays: that of the first leaf, float32 at least.
      structure: after `max_dim`.
      shape: of what one P acts on: [m, n], or that of the view for elementwise structures.
      owned: whether each device of a mesh holds some of the matrices and works on these alone;
        their arrays are then kept together, at the first leaf.
    """

    sources: tuple[Source, ...]
    dtype: str
    structure: Structure
    shape: tuple[int, ...]
    owned: bool = False

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Positions in the flattened parameters."""
        return tuple([view.leaf for source in self.sources for view in source.views])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Paths of the leaves."""
        return tuple(view.name for source in self.sources for view in source.views)

    @cached_property
    def kind(self) -> Hashable:
        """What is the same of blocks for which one program does."""
        sources = tuple((s.kind, s.cut, s.count, s.stacked) for s in self.sources)
        return self.structure, self.shape, self.dtype, self.owned, sources

    @property
    def labels(self) -> list[str]:
        """A name for each matrix: its leaf's path, with the member and the part that is seen."""
        return [label for source in self.sources for label in source.labels]

    @property
    def numbers(self) -> list[int]:
        """Position in the plan's list of matrices, of each."""
        return [source.first + i for source in self.sources for i in range(source.count)]

    @cached_property
    def count(self) -> int:
        """How many matrices there are."""
        return sum([source.count for source in self.sources])

    @cached_property
    def seldom(self) -> bool:
        """Whether a batch may have few of the rows of its leaves, as of embeddings."""
        return self.sources[0].seldom  # alike in all of them

    @cached_property
    def batched(self) -> bool:
        """Whether arrays have an axis of matrices."""
        return self.sources[0].stacked or len(self.sources) > 1

    @cached_property
    def plain(self) -> bool:
        """Whether arrays and what P acts on have the axes of their leaves, sharded or not."""
        whole = all(len(source.grid) <= 1 for source in self.sources)
        return whole and self.structure.elementwise and self.structure.spectrum == "full"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each of its arrays, by slot."""
        found = mx.array_shapes(self.structure, self.shape).items()
        return {slot: (self.count, *s) if self.batched else s for slot, s in found}

    @cached_property
    def bases(self) -> dict[str, int]:
        """Sides that may be any square matrix, and their lengths: streaming refits set them."""
        sides = self.structure.sides.items()
        free = [slot for slot, side in sides if side.streams == "basis"]
        return {slot: self.shape[slot == "right"] for slot in free}

    def gather(self, leaves: Sequence[Float[Array, "..."]]) -> Float[Array, "..."]:
        """Return what P acts on, in the block's dtype: [*shape], or [count, *shape].

        Args:
          leaves: of a tree shaped like the parameters.
        """
        plain = self.owned or self.plain
        found = [
            source.gather(leaves, self.shape, sharded=plain).astype(jnp.dtype(self.dtype))
            for source in self.sources
        ]
        x = self.concatenated(found)
        return spread_stack(whole_stack(x, found)) if self.owned else x

    def concatenated(self, found: Sequence[Array]) -> Array:
        """Return the arrays of all sources as one: the inverse of `split`.

        Args:
          found: an array of each source, as it is kept at its leaf.
        """
        if len(self.sources) == 1:
            return found[0]
        shape = found[0].shape[self.sources[0].stacked :]
        if self._end_to_end(shape):
            return end_to_end(found, [source.count for source in self.sources], shape)
        found = [x if s.stacked else x[None] for x, s in zip(found, self.sources, strict=True)]
        if len({str(jax.typeof(x).sharding.spec) for x in found}) > 1:
            found = [replicate(x) for x in found]
        return jnp.concatenate(found)

    def split(self, x: Array) -> list[Array]:
        """Return the arrays of each source.

        Args:
          x: an array of the block, of all its matrices.
        """
        if len(self.sources) == 1:
            return [x]
        shape, counts = x.shape[1:], [source.count for source in self.sources]
        if self._end_to_end(shape):
            found = parted(x, counts)
            return [
                x.reshape(s.count, *shape) if s.stacked else x
                for x, s in zip(found, self.sources, strict=True)
            ]
        found = jax.lax.split(x, counts)
        return [x if s.stacked else x[0] for x, s in zip(found, self.sources, strict=True)]

    def _end_to_end(self, shape: tuple[int, ...]) -> bool:
        """Whether arrays of a matrix are joined at their first axis: no operation for each leaf.

        Not numbers, nor matrices whose first axis may be sharded.
        """
        if self.owned:
            return False
        return len(shape) == 1 or (len(shape) > 1 and not self.structure.elementwise)

    def each(
        self, function: Callable[..., Any], *arguments: PyTree, shared: tuple[Any, ...] = ()
    ) -> Any:
        """Return function(*shared, *arguments) of every matrix.

        All at once, up to `AT_ONCE` entries; where matrices are owned, each device its own.

        Args:
          function: of `shared` and the arrays of one matrix.
          *arguments: trees of arrays of the block.
          shared: what all matrices see: arrays that `function` must not close over.
        """
        if not self.batched:
            return function(*shared, *arguments)
        run = partial(self._each, function)
        if self.owned:
            return over_devices(run, self.count, arguments, shared)
        return run(arguments, shared)

    def _each(
        self, function: Callable[..., Any], arguments: tuple[PyTree, ...], shared: tuple[Any, ...]
    ) -> Any:
        one = partial(function, *shared)
        held = [math.prod(s) for s in mx.array_shapes(self.structure, self.shape).values()]
        most = max(1, AT_ONCE // max(1, math.prod(self.shape), *held))
        if self.structure.elementwise:
            return jax.vmap(one)(*arguments)
        return in_batches(one, arguments, most)

    def repeated(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return an array for every matrix, all alike.

        Args:
          x: of one matrix.
        """
        return jnp.broadcast_to(x, (self.count, *x.shape)) if self.batched else x

    def init(self, sigma: float) -> Arrays:
        """Return the arrays for which P = sigma * identity, sigma > 0."""
        made = mx.init(self.structure, self.shape, sigma, jnp.dtype(self.dtype))
        return {slot: self.repeated(x) for slot, x in made.items()}

    def start(self, arrays: Arrays, keys: Array) -> Arrays:
        """Return what a refit learns, at its start.

        Args:
          arrays: of the block, from which the refit starts.
          keys: of fresh vectors, one for each matrix of the plan.
        """
        own = keys[jnp.asarray(self.numbers, jnp.int32)] if self.batched else keys[self.numbers[0]]
        return self.each(lambda a, k: mx.start(self.structure, a, self.shape, k), arrays, own)

    def product(self, arrays: Arrays, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return P x of every matrix.

        Args:
          arrays: of the block.
          x: as from `gather`.
        """
        if self._fills:
            return self.each(self._product, arrays, x, *self._lengths())
        return self.each(partial(mx.product, self.structure), arrays, x)

    def within(self, y: Array) -> Array:
        """Zero behind the ends of matrices that were cut."""
        return self.each(self._inside, y, *self._lengths()) if self._fills else y

    @cached_property
    def _fills(self) -> bool:
        return any(s.cut is not None and s.cut.fills for s in self.sources)

    def _product(self, arrays: Arrays, x: Array, rows: Array, columns: Array) -> Array:
        return self._inside(mx.product(self.structure, arrays, x), rows, columns)

    def _inside(self, y: Array, rows: Array, columns: Array) -> Array:
        inside = (jnp.arange(self.shape[0]) < rows)[:, None] & (jnp.arange(self.shape[1]) < columns)
        return jnp.where(inside, y, 0)

    def _lengths(self) -> list[Array]:
        """How many rows and how many columns of each matrix lie in what was cut."""
        lengths: list[tuple[int, int]] = []
        for source in self.sources:
            assert source.cut is not None
            lengths += source.cut.lengths() * math.prod(source.views[0].sizes)
        return [jnp.asarray(sizes) for sizes in zip(*lengths, strict=True)]

    def as_matrix(self, arrays: Arrays) -> Float[Array, "..."]:
        """Return P as a dense matrix on the flattened x: [size, size], or [count, size, size]."""
        return self.each(lambda a: mx.as_matrix(self.structure, a, self.shape), arrays)


def in_batches(function: Callable[..., Any], arguments: tuple[PyTree, ...], most: int) -> Any:
    """Return function(*arguments) of each member of a stack, `most` of them at a time.

    Args:
      function: of the arrays of one member.
      arguments: trees of arrays with an axis of members in front.
      most: at least 1.
    """
    if jax.tree.leaves(arguments)[0].shape[0] <= most:
        return jax.vmap(function)(*arguments)
    return jax.lax.map(lambda xs: function(*xs), arguments, batch_size=most)


def end_to_end(found: Sequence[Array], counts: Sequence[int], shape: tuple[int, ...]) -> Array:
    """Return arrays joined at the first axis of their members: no operation for each of them.

    Args:
      found: arrays of one member, or of a stack of them.
      counts: of members in each.
      shape: of a member.
    """
    flat = [
        replicate(x).reshape(count * shape[0], *shape[1:])
        for x, count in zip(found, counts, strict=True)
    ]
    return jnp.concatenate(flat).reshape(sum(counts), *shape)


def parted(x: Float[Array, "count ..."], counts: Sequence[int]) -> list[Array]:
    """Return what `end_to_end` has joined, each with its members end to end."""
    sizes = [count * x.shape[1] for count in counts]
    return list(jax.lax.split(x.reshape(sum(sizes), *x.shape[2:]), sizes))
