"""Batches: an endless shuffled stream to train on, and one ordered pass to evaluate on.

  n        number of examples
  B        batch size

Which examples batch k of the stream has is a pure function of (seed, k), see
`llqr_experiments.data.order`, so a stream resumes from its index alone and worker threads cannot
change it.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import closing

import grain
import numpy as np

from llqr_experiments.data.examples import Batch, Examples
from llqr_experiments.data.order import Order, Partial, batches_per_epoch
from llqr_experiments.errors import DataError
from llqr_experiments.layout import WHOLE, Share

# Keys of the seeds derived from a stream's seed. An epoch's key is a single small integer, so a
# key of two integers meets none of them.
_DRAW_KEY = (0, 1)
_REFIT_KEY = (0, 2)


def epoch_length(
    source: Examples, batch_size: int, *, overlap: float = 0.0, partial: Partial = "straddle"
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
      >>> from llqr_experiments.data import Source, load
      >>> epoch_length(Source.of(load("digits"), "train"), 32, partial="pad")
      45
    """
    _check(source, batch_size)
    return batches_per_epoch(len(source), batch_size, overlap, partial)


def train_stream(
    source: Examples,
    *,
    batch_size: int,
    seed: int,
    overlap: float = 0.0,
    partial: Partial = "straddle",
    num_threads: int = 2,
    prefetch: int | None = None,
    share: Share = WHOLE,
) -> grain.DatasetIterator[Batch]:
    """Return an endless stream of shuffled batches, each of B rows.

    Each epoch contains every example once, in an order of its own. By default no remainder is
    dropped and every batch is full, because batches straddle epochs. Batches are made by
    `source.draw`, with a generator seeded by the seed and the batch's index, so that random
    augmentation resumes too. An example that two batches share is augmented anew in each.

    Args:
      source: n examples.
      batch_size: B, at least 1; it may exceed n.
      seed: the only thing, with n, that the order depends on; a non-negative integer.
      overlap: share of a batch that it has in common with the one before it, in [0, 1). Its
        stride, round(B (1 - overlap)) clamped to [1, B], must divide B.
      partial: what becomes of the examples at the end of an epoch that fill no batch:
        "straddle": the batch goes on into the next epoch;
        "pad": the batch is filled up with copies of example 0, which "mask" tells apart;
        "drop": they are not used.
        "pad" and "drop" start each epoch with a batch that shares nothing with the one before.
      num_threads: worker threads that prepare batches ahead of time; 0 prepares each on demand.
      prefetch: number of batches kept ready; None: two for each thread, since those of large
        images take hundreds of megabytes.
      share: of every batch, the rows that this process fetches: the same as they are in the
        whole, whose random numbers are all drawn. The stream's state is that of the whole.

    Returns:
      An iterator of batches of the source, and for "pad" in every batch "mask": (B,) bool, False
      for the copies. `get_state()` returns a small JSON-able dictionary; `set_state()` continues
      from one, on a stream made with the same arguments. `close()` ends its threads.

    Raises:
      DataError: the source is empty, or "drop" leaves no batch because n < B.
      ValueError: the batch size is below 1, the seed below 0, the mode unknown, or the overlap
        out of range or with a stride that does not divide B.

    Example:
      >>> from llqr_experiments.data import Source, load
      >>> stream = train_stream(Source.of(load("digits"), "train"), batch_size=32, seed=0)
      >>> next(stream)["image"].shape
      (32, 8, 8, 1)
    """
    _check(source, batch_size, seed)
    # Not grain's own `shuffle`, which walks the cycles of a cipher: 4 us per example for n =
    # 60,000, 320 us for n = 100. A permutation per epoch and a slice per batch cost below 1 us.
    order = Order(len(source), batch_size, seed, overlap, partial)
    draw = functools.partial(_draw, source, batch_size, partial == "pad", share)
    batches = (
        grain.MapDataset.range(sys.maxsize // batch_size)
        .map(order.batch)
        .random_map(draw, seed=_derive(seed, _DRAW_KEY))
    )
    return iter(batches.to_iter_dataset(_read_options(num_threads, prefetch)))


def refit_stream(
    source: Examples,
    *,
    batch_size: int,
    seed: int,
    num_threads: int = 2,
    prefetch: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Return the stream that refits of the preconditioner draw from.

    It is `train_stream` with `refit_seed(seed)`: a run with refits and one without see the same
    training batches, because refits take none of them. Its batches are full and do not overlap.

    Args:
      source: as for `train_stream`.
      batch_size: as for `train_stream`; the two may differ.
      seed: the seed of the run, the one its `train_stream` has.
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
        num_threads=num_threads,
        prefetch=prefetch,
    )


def refit_seed(seed: int) -> int:
    """Return the seed of the refit stream of a run.

    It is the first 32-bit word of `numpy.random.SeedSequence(seed, spawn_key=(0, 2))`, which is
    the same on every machine and version of numpy.
    """
    return _derive(seed, _REFIT_KEY)


def evaluation_batches(
    source: Examples, batch_size: int, *, num_threads: int = 2, share: Share = WHOLE
) -> Iterator[Batch]:
    """Return every example once, in order, in batches of B rows.

    The last batch is filled up with copies of example 0, so that a compiled function sees one
    shape; "mask" tells them apart.

    Args:
      source: n examples.
      batch_size: B, at least 1.
      num_threads: worker threads that prepare batches ahead of time; 0 prepares each on demand.
      share: as for `train_stream`.

    Returns:
      An iterator of ceil(n / B) batches of the source, and with "mask": (B,) bool, False for the
      copies.

    Raises:
      DataError: the source is empty.
      ValueError: the batch size is below 1.
    """
    # Checked here and not in the generator, which would run only at the first batch.
    _check(source, batch_size)
    return _in_order(source, batch_size, num_threads, share)


def _in_order(source: Examples, batch_size: int, num_threads: int, share: Share) -> Iterator[Batch]:
    n = len(source)
    rows = slice(None) if share.whole else share.rows(batch_size)

    def gather(start: int) -> Batch:
        index, mask = _filled(np.arange(start, min(start + batch_size, n)), batch_size)
        return _masked(source.gather(index[rows]), mask[rows])

    batches = grain.MapDataset.range(0, n, batch_size).map(gather)
    with closing(iter(batches.to_iter_dataset(_read_options(num_threads, None)))) as iterator:
        yield from iterator


def _draw(
    source: Examples,
    batch_size: int,
    fill: bool,
    share: Share,
    index: np.ndarray,
    rng: np.random.Generator,
) -> Batch:
    """Return the examples `index`, as training sees them; (B,) or, where they are filled, fewer."""
    index, mask = _filled(index, batch_size) if fill else (index, None)
    if share.whole:
        batch = source.draw(index, rng)
    else:
        rows = share.rows(batch_size)
        batch = source.draw(index, rng, rows)
        mask = None if mask is None else mask[rows]
    return batch if mask is None else _masked(batch, mask)


def _filled(index: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `index` filled up with zeros, (B,) int64, and where it is not, (B,) bool."""
    filled = np.zeros(batch_size, np.int64)
    filled[: len(index)] = index
    return filled, np.arange(batch_size) < len(index)


def _masked(batch: Batch, mask: np.ndarray) -> Batch:
    """Return `batch` with "mask"; a row that the source masks stays masked."""
    return {**batch, "mask": mask & batch["mask"] if "mask" in batch else mask}


def _read_options(num_threads: int, prefetch: int | None) -> grain.ReadOptions:
    ahead = 2 * num_threads if prefetch is None else prefetch
    return grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=ahead if num_threads else 0
    )


def _check(source: Examples, batch_size: int, seed: int = 0) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more.")
    if len(source) == 0:
        raise DataError("the source is empty, expected at least one example.")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more.")


def _derive(seed: int, key: tuple[int, ...]) -> int:
    """Return the 32-bit seed that `seed` and `key` name."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])
