"""Batches: an endless shuffled stream to train on, and one ordered pass to evaluate on.

  n        number of examples
  B        batch size
  epoch e  positions e*n .. (e+1)*n - 1 of the stream: one permutation of the n examples
  batch k  positions k*B .. (k+1)*B - 1 of the stream: it may straddle epochs, and is full

The order is a pure function of (seed, position), so a stream resumes from its index alone and
worker threads cannot change it.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import grain
import numpy as np

from llqr_experiments.data.sources import Dataset
from llqr_experiments.errors import DataError

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, np.random.Generator], Batch]

# Keys of the seeds derived from a stream's seed. An epoch's key is a single small integer, so a
# key of two integers meets none of them.
_TRANSFORM_KEY = (0, 1)
_REFIT_KEY = (0, 2)


@dataclasses.dataclass(frozen=True)
class Source:
    """The examples of one split with the constants that normalise them.

    Attributes:
      images: (n, h, w, c), raw pixels.
      labels: (n,), int32.
      mean, std, scale: as in `Dataset`.
    """

    images: np.ndarray
    labels: np.ndarray
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    scale: float

    @classmethod
    def of(cls, dataset: Dataset, split: Literal["train", "test"]) -> "Source":
        """Return a split of `dataset`."""
        part = dataset.train if split == "train" else dataset.test
        return cls(part.images, part.labels, dataset.mean, dataset.std, dataset.scale)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: np.ndarray) -> Batch:
        """Return the examples `index`, (B,) integers.

        Returns:
          "image": (B, h, w, c) float32, `(pixel / scale - mean) / std`; "label": (B,) int32.
        """
        image = self.images[index].astype(np.float32)
        # In place: one array of this size per batch and not four.
        image /= np.float32(self.scale)
        image -= np.asarray(self.mean, np.float32)
        image /= np.asarray(self.std, np.float32)
        return {"image": image, "label": self.labels[index].astype(np.int32)}


def epoch_length(source: Source, batch_size: int) -> float:
    """Return the number of batches in an epoch, which need not be whole."""
    return len(source) / batch_size


def train_stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    num_threads: int = 2,
    prefetch: int = 16,
) -> grain.DatasetIterator[Batch]:
    """Return an endless stream of shuffled, normalised, full batches.

    Each epoch contains every example once, in an order of its own; no remainder is dropped,
    because batches straddle epochs.

    Args:
      source: n examples.
      batch_size: B, at least 1; it may exceed n.
      seed: the only thing, with n, that the order depends on; a non-negative integer.
      transform: random augmentation of a normalised batch, `(batch, rng) -> batch`. `rng` is
        seeded by the seed and the batch's index, so that it too resumes.
      num_threads: worker threads that prepare batches ahead of time; 0 prepares each on demand.
      prefetch: number of batches kept ready.

    Returns:
      An iterator of {"image": (B, h, w, c) float32, "label": (B,) int32}. `get_state()` returns a
      small JSON-able dictionary; `set_state()` continues from one, on a stream made with the same
      arguments. `close()` ends its threads.

    Raises:
      DataError: the source is empty.
      ValueError: the batch size is below 1 or the seed below 0.

    Example:
      >>> from llqr_experiments.data import load
      >>> stream = train_stream(Source.of(load("digits"), "train"), batch_size=32, seed=0)
      >>> next(stream)["image"].shape
      (32, 8, 8, 1)
    """
    _check(source, batch_size, seed)
    # grain's own `shuffle` orders examples one by one by walking the cycles of a cipher: 4 us per
    # example for n = 60,000, 31 us for n = 1,437, 320 us for n = 100. One permutation per epoch
    # and one slice per batch cost less than 1 us per example.
    order = _EpochOrder(len(source), batch_size, seed)
    batches = grain.MapDataset.range(sys.maxsize // batch_size).map(order.batch).map(source.gather)
    if transform is not None:
        batches = batches.random_map(transform, seed=_derive(seed, _TRANSFORM_KEY))
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
    )
    return iter(batches.to_iter_dataset(options))


def refit_stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    num_threads: int = 2,
    prefetch: int = 16,
) -> grain.DatasetIterator[Batch]:
    """Return the stream that refits of the preconditioner draw from.

    It is `train_stream` with `refit_seed(seed)`: a run with refits and one without see the same
    training batches, because refits take none of them.

    Args:
      source: as for `train_stream`.
      batch_size: as for `train_stream`; the two may differ.
      seed: the seed of the run, the one its `train_stream` has.
      transform: as for `train_stream`.
      num_threads: as for `train_stream`.
      prefetch: as for `train_stream`.

    Returns:
      As `train_stream`.

    Raises:
      As `train_stream`.
    """
    _check(source, batch_size, seed)
    return train_stream(
        source,
        batch_size=batch_size,
        seed=refit_seed(seed),
        transform=transform,
        num_threads=num_threads,
        prefetch=prefetch,
    )


def refit_seed(seed: int) -> int:
    """Return the seed of the refit stream of a run.

    It is the first 32-bit word of `numpy.random.SeedSequence(seed, spawn_key=(0, 2))`, which is
    the same on every machine and version of numpy.
    """
    return _derive(seed, _REFIT_KEY)


def evaluation_batches(source: Source, batch_size: int) -> Iterator[Batch]:
    """Return every example once, in order, in batches of one shape.

    The last batch is filled up with copies of example 0, so that a compiled function sees one
    shape; "mask" tells them apart.

    Args:
      source: n examples.
      batch_size: B, at least 1.

    Returns:
      An iterator of ceil(n / B) batches as those of `train_stream`, and with "mask": (B,) bool,
      False for the copies.

    Raises:
      DataError: the source is empty.
      ValueError: the batch size is below 1.
    """
    # Checked here and not in the generator, which would run only at the first batch.
    _check(source, batch_size)
    return _in_order(source, batch_size)


def _in_order(source: Source, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(source), batch_size):
        index = np.arange(start, start + batch_size)
        mask = index < len(source)
        yield {**source.gather(np.where(mask, index, 0)), "mask": mask}


def _check(source: Source, batch_size: int, seed: int = 0) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more.")
    if len(source) == 0:
        raise DataError("the source is empty, expected at least one example.")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more.")


def _derive(seed: int, key: tuple[int, ...]) -> int:
    """Return the 32-bit seed that `seed` and `key` name."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


class _EpochOrder:
    """The examples of each batch of an endless stream that is reshuffled every epoch."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self._n = n
        self._batch_size = batch_size
        self._seed = seed
        # Threads work on neighbouring batches, which lie in one epoch or two.
        self._permutation = functools.lru_cache(maxsize=4)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        """Return the order of an epoch, (n,) int64."""
        # RandomState and not Generator: numpy has frozen the stream of the former, so that a run
        # can be repeated with another version.
        sequence = np.random.SeedSequence(self._seed, spawn_key=(epoch,))
        return np.random.RandomState(np.random.MT19937(sequence)).permutation(self._n)

    def batch(self, k: int) -> np.ndarray:
        """Return the examples of batch k, (B,) int64."""
        position, stop = k * self._batch_size, (k + 1) * self._batch_size
        pieces = []
        while position < stop:
            epoch, offset = divmod(position, self._n)
            piece = self._permutation(epoch)[offset : offset + stop - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces)
