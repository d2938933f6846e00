"""Batches: an endless shuffled stream to train on, and one ordered pass to evaluate on.

  n        number of examples
  B        batch size

Which examples batch k of the stream has is a pure function of (seed, k), see
`llqr_experiments.data.order`, so a stream resumes from its index alone and worker threads cannot
change it.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import grain
import numpy as np

from llqr_experiments.data.order import Order, Partial, batches_per_epoch
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


def epoch_length(
    source: Source, batch_size: int, *, overlap: float = 0.0, partial: Partial = "straddle"
) -> float:
    """Return the number of batches of `train_stream` in an epoch, one pass over the examples.

    Args:
      source: n examples.
      batch_size: B, at least 1.
      overlap: as for `train_stream`. An epoch gets longer with it: n / r batches of stride r.
      partial: as for `train_stream`.

    Returns:
      Without overlap n / B for "straddle", which need not be whole, ceil(n / B) for "pad" and
      floor(n / B) for "drop"; with overlap see `llqr_experiments.data.order.batches_per_epoch`.

    Raises:
      DataError: the source is empty, or "drop" leaves no batch.
      ValueError: as `train_stream`.

    Example:
      >>> from llqr_experiments.data import load
      >>> epoch_length(Source.of(load("digits"), "train"), 32, partial="pad")
      45
    """
    _check(source, batch_size)
    return batches_per_epoch(len(source), batch_size, overlap, partial)


def train_stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    overlap: float = 0.0,
    partial: Partial = "straddle",
    num_threads: int = 2,
    prefetch: int = 16,
) -> grain.DatasetIterator[Batch]:
    """Return an endless stream of shuffled, normalised batches of one shape.

    Each epoch contains every example once, in an order of its own. By default no remainder is
    dropped and every batch is full, because batches straddle epochs.

    Args:
      source: n examples.
      batch_size: B, at least 1; it may exceed n.
      seed: the only thing, with n, that the order depends on; a non-negative integer.
      transform: random augmentation of a normalised batch, `(batch, rng) -> batch`. `rng` is
        seeded by the seed and the batch's index, so that it too resumes. An example that two
        batches share is augmented anew in each. Other entries of the batch must be kept.
      overlap: share of a batch that it has in common with the one before it, in [0, 1). Its
        stride, round(B (1 - overlap)) clamped to [1, B], must divide B.
      partial: what becomes of the examples at the end of an epoch that fill no batch:
        "straddle": the batch goes on into the next epoch;
        "pad": the batch is filled up with copies of example 0, which "mask" tells apart;
        "drop": they are not used.
        "pad" and "drop" start each epoch with a batch that shares nothing with the one before.
      num_threads: worker threads that prepare batches ahead of time; 0 prepares each on demand.
      prefetch: number of batches kept ready.

    Returns:
      An iterator of {"image": (B, h, w, c) float32, "label": (B,) int32}, and for "pad" in every
      batch "mask": (B,) bool, False for the copies. `get_state()` returns a small JSON-able
      dictionary; `set_state()` continues from one, on a stream made with the same arguments.
      `close()` ends its threads.

    Raises:
      DataError: the source is empty, or "drop" leaves no batch because n < B.
      ValueError: the batch size is below 1, the seed below 0, the mode unknown, or the overlap
        out of range or with a stride that does not divide B.

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
    order = Order(len(source), batch_size, seed, overlap, partial)
    fill = functools.partial(_fill, source, batch_size)
    batches = (
        grain.MapDataset.range(sys.maxsize // batch_size)
        .map(order.batch)
        .map(fill if partial == "pad" else source.gather)
    )
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
    training batches, because refits take none of them. Its batches are full and do not overlap.

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
        yield _fill(source, batch_size, np.arange(start, min(start + batch_size, len(source))))


def _fill(source: Source, batch_size: int, index: np.ndarray) -> Batch:
    """Return the examples `index`, (B,) or fewer, filled up with copies of example 0."""
    mask = np.arange(batch_size) < len(index)
    padded = np.zeros(batch_size, np.int64)
    padded[: len(index)] = index
    return {**source.gather(padded), "mask": mask}


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
