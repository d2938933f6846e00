"""What is minimised: a forward function and a loss on its outputs.

LLQR differs from a first-order optimizer in one input: it must see the model's outputs,
not only the loss, because its metrics are divergences between outputs. An `Objective`
keeps the two functions apart. The functions are static (they are part of the pytree's
structure, so a jitted function that takes an objective compiles once); the batch is data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llqr.tree import axis_devices, is_legacy_key, is_none, replicate, spread, widen
from llqr.typing import Array, Float, Int, Params, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Objective:
    """A model and its training loss.

    Define the functions once, at module level or before the training loop: a function
    made anew for each call is a new static value, and everything that depends on it
    compiles again.

    Args:
      forward: `(params, batch) -> outputs`. Outputs are an array of shape [..., classes]
        (logits or log-probabilities, one row for each prediction) or a pytree of arrays.
      loss: `(outputs, batch) -> scalar`. The training loss; it does its own masking.
      mask: `(batch) -> bool array`, or a pytree of them like the outputs. True marks the
        rows that count; its shape is the outputs' without the last axis. Rows that are
        False are excluded from the metric and from every row count. None: all rows count.
      batch_axes: `(batch) -> pytree prefix of the batch` with the axis of the examples for
        each leaf, None for what all examples share (batch statistics), as `jax.vmap`'s
        in_axes; "first" for what is said below. It is asked where a batch is split: in chunks, into
        examples, or for the probes of `llqr.Streaming`. None: nothing is said, so that it is found
        out. Where there are examples, they are on the first axis of every array that has one and is
        no random key; and whether there are is traced (`llqr.examples`): graphs, time-major
        sequences and models whose examples interact are not cut.

    Example:
      >>> import jax, jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda params, batch: batch["x"] @ params["w"],
      ...     loss=lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2),
      ... )
      >>> params = {"w": jnp.ones((3, 1))}
      >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.zeros((2, 1))}
      >>> loss, grads = jax.value_and_grad(objective)(params, batch)
      >>> float(loss)
      9.0
    """

    forward: Callable[[Params, Any], PyTree] = field(metadata={"static": True})
    loss: Callable[[PyTree, Any], Float[Array, ""]] = field(metadata={"static": True})
    mask: Callable[[Any], PyTree] | None = field(default=None, metadata={"static": True})
    batch_axes: Callable[[Any], PyTree] | None = field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        for name, value in (("forward", self.forward), ("loss", self.loss)):
            if not callable(value):
                raise TypeError(f"Objective: {name} must be a function, got {value!r}.")

    def __call__(self, params: Params, batch: Any) -> Float[Array, ""]:
        """Return the loss of `params` on `batch`.

        Args:
          params: the parameters.
          batch: what `forward`, `loss` and `mask` take.
        """
        return self.loss(self.forward(params, batch), batch)

    def bind(self, batch: Any) -> "BoundObjective":
        """Return the objective on one batch: what `update(..., objective=...)` takes.

        The batch may differ from the training batch (other examples, or more of them),
        and anything else that `forward` needs as data (batch statistics, a dropout key)
        travels in it. Strings and Python bools in it are options, not data: the functions see
        them as they are, and another value compiles anew.
        """
        return BoundObjective(self, jax.tree.map(_as_option, batch))


FIRST = "first"
"""In `batch_axes`: the first axis of what has examples, as where nothing is said."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Option:
    """A leaf of a batch that is no array: static, since JAX cannot trace a string."""

    value: str | bytes | bool = field(metadata={"static": True})


def _as_option(leaf: Any) -> Any:
    return Option(leaf) if isinstance(leaf, str | bytes | bool) else leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundObjective:
    """An `Objective` with its batch: a function of the parameters only.

    Args:
      objective: forward function, loss and mask.
      batch: any pytree; data, so that a new batch of the same shapes compiles nothing.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda w, x: x @ w, loss=lambda z, x: jnp.mean(z**2))
      >>> bound = objective.bind(jnp.eye(2))
      >>> float(bound(jnp.array([3.0, 1.0]))), bound.outputs(jnp.array([3.0, 1.0])).tolist()
      (5.0, [3.0, 1.0])
    """

    objective: Objective
    batch: Any

    @property
    def given(self) -> Any:
        """The batch as it was bound, with its strings and Python bools."""
        is_option = lambda x: isinstance(x, Option)  # noqa: E731
        value = lambda x: x.value if is_option(x) else x  # noqa: E731
        return jax.tree.map(value, self.batch, is_leaf=is_option)

    def __call__(self, params: Params) -> Float[Array, ""]:
        """Return the loss of `params`."""
        return self.objective(params, self.given)

    def outputs(self, params: Params) -> PyTree:
        """Return the model's outputs at `params`."""
        return self.objective.forward(params, self.given)

    def loss(self, outputs: PyTree) -> Float[Array, ""]:
        """Return the loss of given outputs, like those of `outputs`."""
        return self.objective.loss(outputs, self.given)

    def mask(self) -> PyTree | None:
        """Return which rows count, or None if all do."""
        return None if self.objective.mask is None else self.objective.mask(self.given)

    def widened(self, params: Params) -> tuple["BoundObjective", Params]:
        """Return the parameters in float32 at least, and the objective that takes them.

        The model runs in the parameters' own dtypes: its carries, masks and data may be in half
        precision too. What is computed with its derivatives then has float32's.
        """
        dtypes = tuple(jnp.result_type(p).name for p in jax.tree.leaves(params))
        wide = widen(params)
        if all(x.dtype.name == d for x, d in zip(jax.tree.leaves(wide), dtypes, strict=True)):
            return self, params
        forward = InDtypes(self.objective.forward, dtypes)
        return replace(self, objective=replace(self.objective, forward=forward)), wide

    def split(self, size: int) -> "Chunks":
        """Return the batch in equal chunks of at most `size` examples.

        Chunk i of n holds the examples i, i + n, ...: with a batch that is sharded over devices,
        every device holds its share of every chunk. Where chunks do not divide the batch, the last
        example fills them up.

        Args:
          size: bound on the examples of a chunk, >= 1; the chunks are as even as it allows.

        Raises:
          ValueError: no leaf has examples, or leaves disagree on their number.
        """
        axes, counts = self._examples()
        if len(counts) != 1:
            raise ValueError(
                "to split a batch, every leaf with examples must have the same number of them, "
                f"not {sorted(counts)}; Objective(batch_axes=...) says where they are."
            )
        leaves, treedef = jax.tree.flatten(self.batch, is_leaf=is_none)
        examples = counts.pop()
        size = -(-examples // -(-examples // size))  # as few in each as the count allows
        stacked = [
            x if a is None else _stack(jnp.moveaxis(x, a, 0), size, a)
            for x, a in zip(leaves, axes, strict=True)
        ]
        return Chunks(self.objective, tuple(stacked), tuple(axes), treedef, size, examples)

    def part(self, share: float, number: int | Int[Array, ""]) -> "BoundObjective":
        """Return the objective on a share of the examples, of which numbers in turn take another.

        Args:
          share: in (0, 1], of the examples: a chunk has at most this part, rounded up to whole
            ones, as the whole is cut into equal chunks; above 1/2 and below 1 it is half.
          number: of the part; may be traced.

        Returns:
          The chunk that `split` makes; the whole where that is all examples, and where the leaves
          do not agree on a number of them.

        Example:
          >>> import jax.numpy as jnp, llqr
          >>> objective = llqr.Objective(lambda w, x: w * x, lambda z, x: z.mean())
          >>> bound = objective.bind(jnp.arange(8.0))
          >>> [bound.part(0.25, number).batch.tolist() for number in (0, 1, 4)]
          [[0.0, 4.0], [1.0, 5.0], [0.0, 4.0]]
        """
        _, counts = self._examples()
        examples = max(counts, default=0)
        size = math.ceil(share * examples)
        if len(counts) != 1 or size == examples:
            return self
        chunks = self.split(size)
        return chunks[number % len(chunks)]

    @property
    def is_told(self) -> bool:
        """Whether `batch_axes` says where all examples are, so that nothing is found out."""
        choose = self.objective.batch_axes
        return choose is not None and FIRST not in jax.tree.leaves(choose(self.given))

    def axes(self) -> list[int | None]:
        """Return the axis of the examples in each leaf of the batch; None where it has none."""
        choose = self.objective.batch_axes
        return example_axes(FIRST if choose is None else choose(self.given), self.batch)

    def examples(self) -> set[int]:
        """Return how many examples the leaves have that have some: one number, if they agree."""
        return self._examples()[1]

    def _examples(self) -> tuple[list[int | None], set[int]]:
        """Return the axis of the examples in each leaf, and how many these leaves have."""
        leaves, axes = jax.tree.leaves(self.batch, is_leaf=is_none), self.axes()
        return axes, {x.shape[a] for x, a in zip(leaves, axes, strict=True) if a is not None}


def example_axes(said: PyTree, batch: PyTree) -> list[int | None]:
    """Return the axis of the examples in each leaf of a batch; None where it has none.

    Args:
      said: prefix of the batch, as `Objective.batch_axes` gives it.
      batch: the batch.
    """
    leaves = jax.tree.leaves(batch, is_leaf=is_none)
    return [
        _first(x) if a == FIRST else a for x, a in zip(leaves, spread(said, batch), strict=True)
    ]


def _first(leaf: Any) -> int | None:
    """Where the examples of a leaf are of which nothing is said."""
    if leaf is None or not jnp.ndim(leaf) or is_legacy_key(leaf):
        return None
    return 0


@dataclass(frozen=True)
class InDtypes:
    """A forward function that casts its parameters first: `BoundObjective.widened`."""

    forward: Callable[[Params, Any], PyTree]
    dtypes: tuple[str, ...]  # of the parameters' leaves, in order

    def __call__(self, params: Params, batch: Any) -> PyTree:
        """Return the outputs.

        Args:
          params: in any dtypes.
          batch: what the function takes.
        """
        leaves, treedef = jax.tree.flatten(params)
        cast = [x.astype(dtype) for x, dtype in zip(leaves, self.dtypes, strict=True)]
        return self.forward(treedef.unflatten(cast), batch)

    @property
    def rematerialized(self) -> Callable[[Any], "InDtypes"] | None:
        """How to cut the function at its stages, where it has some."""
        cut = getattr(self.forward, "rematerialized", None)
        return None if cut is None else lambda policy: replace(self, forward=cut(policy))


def _stack(x: Array, size: int, axis: int) -> Array:
    """[examples, ...] -> [chunks, ...] with `size` examples on `axis` of each chunk.

    Example number j * chunks + i is number j of chunk i.
    """
    chunks = -(-x.shape[0] // size)
    return jnp.moveaxis(strided(x, chunks, "edge"), 1, axis + 1)


def row(x: Array, i: int | Int[Array, ""]) -> Array:
    """x[i], whose sharding over explicit mesh axes is known for a traced i too."""
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def at_most(x: Array, n: int) -> Array:
    """x[:n]."""
    return x if len(x) == n else replicate(x)[:n]


def strided(x: Array, chunks: int, fill: str = "constant") -> Array:
    """[n, ...] -> [chunks, size, ...]: row j * chunks + i is number j of chunk i.

    Args:
      x: an array [n, ...].
      chunks: their number; size is n / chunks, rounded up.
      fill: how the last chunks are filled up, as `jnp.pad` says it: zeros or the last row.
    """
    size = -(-x.shape[0] // chunks)
    if size * chunks != x.shape[0] or size % max(axis_devices(x), 1):
        x = replicate(x)  # over explicit axes, rows must divide evenly
    if size * chunks != x.shape[0]:
        if fill == "edge":  # whatever the dtype: random keys cannot be padded
            last = jnp.broadcast_to(x[-1:], (size * chunks - x.shape[0], *x.shape[1:]))
            x = jnp.concatenate([x, last])
        else:
            x = jnp.pad(x, [(0, size * chunks - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return jnp.moveaxis(x.reshape(size, chunks, *x.shape[1:]), 1, 0)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves"],
    meta_fields=["objective", "axes", "treedef", "size", "examples"],
)
@dataclass(frozen=True)
class Chunks:
    """A batch cut into chunks of equal size; see `BoundObjective.split`.

    Attributes:
      objective: of every chunk.
      leaves: of the batch, [chunks, ...] (strided) where `axes` is not None.
      axes: of the examples in each leaf.
      treedef: of the batch.
      size: examples in a chunk.
      examples: in the whole batch; the last of some chunks may be a repetition.
    """

    objective: Objective
    leaves: tuple[Any, ...]
    axes: tuple[int | None, ...]
    treedef: Any
    size: int
    examples: int

    def __len__(self) -> int:
        return -(-self.examples // self.size)

    def __getitem__(self, i: int | Int[Array, ""]) -> BoundObjective:
        """Return the objective on chunk i; i may be traced."""
        leaves = [
            x if a is None else row(x, i) for x, a in zip(self.leaves, self.axes, strict=True)
        ]
        return BoundObjective(self.objective, self.treedef.unflatten(leaves))
