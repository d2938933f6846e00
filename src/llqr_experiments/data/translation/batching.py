"""Which sentence pairs are in which batch, and the shapes that batches have.

  n            number of pairs
  s_i, t_i     lengths of source and target of pair i, ends of sentences included
  w_1 < ...    boundaries: percentiles of all s and of all t, rounded up
  bucket i     the first boundary that is at least max(s_i, t_i)
  S_b, T_b     widths of bucket b: the first boundaries that hold every s, and every t, in it
  c_b          capacity of bucket b: max(1, max_tokens div max(S_b, T_b)) pairs

A batch has pairs of one bucket and the shape of that bucket, (c_b, S_b) and (c_b, T_b), whatever
is in it: rows that no pair fills are all padding. So the shapes are known before the first batch,
there are never more than boundaries, and a compiled step is compiled once for each.

Batch k of the stream is a pure function of (seed, k).
"""

import dataclasses
import functools

import numpy as np

from llqr_experiments.data.translation.corpus import Pairs
from llqr_experiments.errors import DataError


@dataclasses.dataclass(frozen=True)
class Bucketing:
    """How pairs are grouped by length.

    Attributes:
      max_tokens: most source or target words of a batch, padding included; at least 1. A sentence
        that is longer makes a batch by itself.
      percentiles: q: a boundary at each of the percentiles 100 j / q of each side's lengths. There
        are 2 q of them at most, and as many shapes.
      padding_factor: boundaries are rounded up to a multiple of this.
      left_pad_source: padding goes before a source sentence and not after it. A model that masks
        it does not see the difference.
    """

    max_tokens: int = 4096
    percentiles: int = 8
    padding_factor: int = 8
    left_pad_source: bool = True

    def __post_init__(self):
        for name in ("max_tokens", "percentiles", "padding_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of 1 or more.")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of every batch of one bucket.

    Attributes:
      rows: c_b.
      source: S_b.
      target: T_b.
    """

    rows: int
    source: int
    target: int


def boundaries(pairs: Pairs, bucketing: Bucketing) -> np.ndarray:
    """Return the boundaries w, (at most 2 q,) increasing; the last holds every sentence.

    A percentile is the length of some sentence, the lower where two are as near.

    Raises:
      DataError: there is no pair.
    """
    if len(pairs) == 0:
        raise DataError("the split is empty, expected at least one pair of sentences.")
    # In whole numbers: rounding would move some percentiles by one sentence.
    ranks = np.arange(1, bucketing.percentiles + 1) * (len(pairs) - 1) // bucketing.percentiles
    lengths = [np.sort(side.lengths)[ranks] for side in (pairs.source, pairs.target)]
    return np.unique(round_up(np.concatenate(lengths), bucketing.padding_factor))


def round_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Return the next multiples, int64.

    Example:
      >>> round_up(np.array([1, 8, 9]), 8).tolist()
      [8, 8, 16]
    """
    return -(-np.asarray(lengths, np.int64) // multiple) * multiple


class Buckets:
    """The buckets of a split, and the order of its batches in any epoch.

    Args:
      pairs: n pairs.
      bucketing: how to group them.
      rows: c_b for every bucket, instead of what `max_tokens` allows.

    Attributes:
      shapes: of each bucket that has a pair, narrowest first.
      per_epoch: batches in an epoch, the same in every one.

    Raises:
      DataError: there is no pair.
    """

    def __init__(self, pairs: Pairs, bucketing: Bucketing, rows: int | None = None) -> None:
        widths = boundaries(pairs, bucketing)
        self._source, self._target = pairs.source.lengths, pairs.target.lengths
        buckets = np.searchsorted(widths, np.maximum(self._source, self._target))
        # Only those that have a pair, numbered from 0.
        used, self._bucket = np.unique(buckets, return_inverse=True)
        self.shapes = []
        for b in range(len(used)):
            members = self._bucket == b
            source, target = (
                int(widths[np.searchsorted(widths, side[members].max())])
                for side in (self._source, self._target)
            )
            capacity = max(1, bucketing.max_tokens // max(source, target))
            self.shapes.append(Shape(rows or capacity, source, target))
        sizes = np.bincount(self._bucket)
        self.per_epoch = sum(
            -(-int(size) // shape.rows) for size, shape in zip(sizes, self.shapes, strict=True)
        )
        # Threads work on neighbouring batches, which lie in one epoch or two.
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffle)

    def batch(self, seed: int, k: int) -> tuple[Shape, np.ndarray]:
        """Return the shape of batch k, and the pairs in it: (rows,) int64 or fewer."""
        epoch, j = divmod(k, self.per_epoch)
        return self._epoch(seed, epoch)[j]

    def in_order(self) -> list[tuple[Shape, np.ndarray]]:
        """Return the batches of one pass in which nothing is random: narrowest first."""
        return self._cut(np.arange(len(self._bucket)))

    def _shuffle(self, seed: int, epoch: int) -> list[tuple[Shape, np.ndarray]]:
        """Return the batches of an epoch."""
        # RandomState and not Generator: numpy has frozen the stream of the former, so that a run
        # can be repeated with another version.
        sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
        random = np.random.RandomState(np.random.MT19937(sequence))
        batches = self._cut(random.permutation(len(self._bucket)))
        return [batches[i] for i in random.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[tuple[Shape, np.ndarray]]:
        """Cut pairs into batches of one bucket each.

        Sorted by source length, and among equals by target length; those that are alike in both
        stay in the order given, so that an epoch has other neighbours than the one before it.
        """
        order = order[np.lexsort((self._target[order], self._source[order]))]
        batches = []
        for b, shape in enumerate(self.shapes):
            members = order[self._bucket[order] == b]
            batches += [
                (shape, members[start : start + shape.rows])
                for start in range(0, len(members), shape.rows)
            ]
        return batches


def check_lengths(pairs: Pairs, split: str, limit: int) -> None:
    """Raise `DataError` if a sentence is longer than a model takes.

    Args:
      pairs: the split.
      split: what the message calls it.
      limit: most words of a sentence, its end included.
    """
    for language, side in (("source", pairs.source), ("target", pairs.target)):
        over = np.flatnonzero(side.lengths > limit)
        if len(over):
            raise DataError(
                f"{len(over)} {language} sentences of the {split} split are longer than the "
                f"model's {limit} words, end of sentence included; the first is line "
                f"{pairs.lines[over[0]] + 1}, with {side.lengths[over[0]]}. Remove those lines "
                "from both files, or use a model with more positions."
            )
