"""The order of an endless stream: which examples are in which batch.

  n          number of examples
  B          batch size
  r          stride: a batch has B - r examples of the one before it; r = B without overlap
  m          number of batches that start in an epoch, for "pad" and "drop"
  epoch e    one permutation of the n examples, a function of (seed, e)

  partial    examples of batch k, where (e, j) = divmod(k, m)
  straddle   k*r .. k*r + B - 1 of all epochs, one after the other: always B
  pad        j*r .. j*r + B - 1 of epoch e, as far as it goes: the last batch may have fewer
  drop       j*r .. j*r + B - 1 of epoch e: always B, the remainder of the epoch is not used

With overlap, a batch is a window of B / r micro-batches of r examples that moves on by one.
"""

import functools
from typing import Literal, get_args

import numpy as np

from llqr.errors import check_choice
from llqr_experiments.errors import DataError

Partial = Literal["straddle", "pad", "drop"]


def stride(batch_size: int, overlap: float = 0.0) -> int:
    """Return by how many examples a batch moves on from the one before it.

    It is r = clamp(round(B (1 - f)), 1, B), so that the overlap in effect is 1 - r / B.

    Args:
      batch_size: B, at least 1.
      overlap: f in [0, 1), the share of a batch that it has in common with the one before it.

    Returns:
      r, which divides B.

    Raises:
      ValueError: the overlap is out of range, or its r does not divide B.

    Example:
      >>> stride(128, 0.75)
      32
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}, expected at least 0 and less than 1.")
    step = min(max(round(batch_size * (1 - overlap)), 1), batch_size)
    if batch_size % step:
        divisors = [d for d in range(1, batch_size + 1) if batch_size % d == 0]
        near = max(d for d in divisors if d < step), min(d for d in divisors if d > step)
        fractions = " or ".join(f"{1 - d / batch_size:g} (stride {d})" for d in near)
        raise ValueError(
            f"overlap is {overlap}: its stride of {step} examples does not divide the batch size "
            f"{batch_size}. The nearest that do are {fractions}."
        )
    return step


def batches_per_epoch(
    n: int, batch_size: int, overlap: float = 0.0, partial: Partial = "straddle"
) -> float:
    """Return how many batches start in an epoch, which is whole unless they straddle epochs.

    Without overlap: n / B for "straddle", ceil(n / B) for "pad", floor(n / B) for "drop". With
    overlap: n / r; max(0, ceil((n - B) / r)) + 1; floor((n - B) / r) + 1.

    Args:
      n: number of examples, at least 1.
      batch_size: B, at least 1.
      overlap: f, see `stride`.
      partial: what becomes of the end of an epoch, see the table of this module.

    Returns:
      The number, above 0.

    Raises:
      DataError: "drop" leaves no batch, because n < B.
      ValueError: as `stride`, or the mode is unknown.

    Example:
      >>> [batches_per_epoch(10, 4, partial=mode) for mode in ("straddle", "pad", "drop")]
      [2.5, 3, 2]
    """
    check_choice("partial", partial, get_args(Partial))
    step = stride(batch_size, overlap)
    if partial == "straddle":
        return n / step
    if partial == "pad":
        return max(0, -((batch_size - n) // step)) + 1
    if n < batch_size:
        raise DataError(
            f"an epoch of {n} examples has no full batch of {batch_size}, and partial='drop' uses "
            f"no other. Set the batch size to {n} or less, or partial to 'pad' or 'straddle'."
        )
    return (n - batch_size) // step + 1


class Order:
    """The examples of each batch of an endless stream that is reshuffled every epoch.

    Args:
      n: number of examples, at least 1.
      batch_size: B, at least 1.
      seed: what the permutations depend on, at least 0.
      overlap: f, see `stride`.
      partial: what becomes of the end of an epoch.

    Raises:
      DataError, ValueError: as `batches_per_epoch`.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        overlap: float = 0.0,
        partial: Partial = "straddle",
    ) -> None:
        self._n = n
        self._batch_size = batch_size
        self._seed = seed
        self._stride = stride(batch_size, overlap)
        count = batches_per_epoch(n, batch_size, overlap, partial)
        self._per_epoch = None if partial == "straddle" else int(count)
        # Threads work on neighbouring batches, which lie in one epoch or two.
        self._permutation = functools.lru_cache(maxsize=4)(self._shuffle)

    def batch(self, k: int) -> np.ndarray:
        """Return the examples of batch k, (B,) int64; fewer at the end of an epoch of "pad"."""
        if self._per_epoch is None:
            return self._across(k * self._stride)
        epoch, j = divmod(k, self._per_epoch)
        start = j * self._stride
        return self._permutation(epoch)[start : start + self._batch_size]

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Return the order of an epoch, (n,) int64."""
        # RandomState and not Generator: numpy has frozen the stream of the former, so that a run
        # can be repeated with another version.
        sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch,))
        return np.random.RandomState(np.random.MT19937(sequence)).permutation(self._n)

    def _across(self, position: int) -> np.ndarray:
        """Return the B examples from a position of the stream on, across epochs."""
        stop = position + self._batch_size
        pieces = []
        while position < stop:
            epoch, offset = divmod(position, self._n)
            piece = self._permutation(epoch)[offset : offset + stop - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces)
