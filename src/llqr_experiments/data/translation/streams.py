"""Batches of sentence pairs: an endless stream to train on, one for refits, one ordered pass.

A batch is a dictionary of int32 arrays, B rows of source width S and target width T:

  source      (B, S)  the source sentences
  target_in   (B, T)  what the decoder reads: `</s>`, and the target sentence less its end
  label       (B, T)  what it should say: the target sentence with its end

A place that no word fills is `PAD` (1) in the first two and `IGNORE` (-1) in `label`, and these are
nowhere else. A row that no pair fills is padding throughout.
"""

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import grain
import numpy as np

from llqr_experiments.data.order import Order
from llqr_experiments.data.pipeline import refit_seed
from llqr_experiments.data.translation.batching import Bucketing, Buckets, Shape, round_up
from llqr_experiments.data.translation.corpus import Pairs, Sentences
from llqr_experiments.data.translation.vocabulary import EOS, PAD
from llqr_experiments.data.windows import IGNORE
from llqr_experiments.errors import DataError
from llqr_experiments.layout import WHOLE, Share

Batch = dict[str, np.ndarray]

_log = logging.getLogger(__name__)


def assemble(pairs: Pairs, index: np.ndarray, shape: Shape, left_pad_source: bool) -> Batch:
    """Return the pairs `index`, (B,) integers or fewer, as a batch of the given shape."""
    source = _fill(pairs.source, index, shape.rows, shape.source, left=left_pad_source)
    label = _fill(pairs.target, index, shape.rows, shape.target, left=False)
    target_in = np.full_like(label, PAD)
    target_in[: len(index), 0] = EOS
    # The end itself is read by nobody.
    target_in[:, 1:] = np.where(label[:, 1:] == PAD, PAD, label[:, :-1])
    return {
        "source": source,
        "target_in": target_in,
        "label": np.where(label == PAD, np.int32(IGNORE), label),
    }


def _fill(side: Sentences, index: np.ndarray, rows: int, width: int, *, left: bool) -> np.ndarray:
    """Return sentences padded to (rows, width), int32."""
    result = np.full((rows, width), PAD, np.int32)
    for row, i in zip(result, index, strict=False):
        sentence = side[i]
        row[slice(width - len(sentence), None) if left else slice(len(sentence))] = sentence
    return result


def epoch_length(pairs: Pairs, bucketing: Bucketing) -> int:
    """Return the number of batches of `train_stream` in an epoch, in which each pair occurs once.

    Raises:
      DataError: there is no pair.
    """
    return Buckets(pairs, bucketing).per_epoch


def train_stream(
    pairs: Pairs,
    bucketing: Bucketing,
    *,
    seed: int,
    num_threads: int = 2,
    prefetch: int = 16,
    share: Share = WHOLE,
) -> grain.DatasetIterator[Batch]:
    """Return an endless stream of batches of similar lengths, in a few shapes.

    Each epoch contains every pair once, in batches and in an order of its own; see
    `llqr_experiments.data.translation.batching`. The shapes are `Buckets(...).shapes`.

    Args:
      pairs: n pairs.
      bucketing: how they are grouped.
      seed: the only thing, with the pairs and the grouping, that the order depends on; a
        non-negative integer.
      num_threads: worker threads that prepare batches ahead of time; 0 prepares each on demand.
      prefetch: number of batches kept ready.
      share: of every batch, the rows that this process holds; rows of padding are added, until
        the parts of the share divide them.

    Returns:
      An iterator of batches. `get_state()` returns a small JSON-able dictionary; `set_state()`
      continues from one, on a stream made with the same arguments. `close()` ends its threads.

    Raises:
      DataError: there is no pair.
      ValueError: the seed is below 0.
    """
    _check_seed(seed)
    buckets = Buckets(pairs, bucketing)

    def batch(k: int) -> Batch:
        shape, index = buckets.batch(seed, k)
        rows = -(-shape.rows // share.parts) * share.parts
        found = assemble(pairs, index, replace(shape, rows=rows), bucketing.left_pad_source)
        if share.whole:
            return found
        return {name: x[share.rows(rows)] for name, x in found.items()}

    return _iterate(grain.MapDataset.range(sys.maxsize).map(batch), num_threads, prefetch)


def refit_stream(
    pairs: Pairs,
    bucketing: Bucketing,
    *,
    batch_size: int,
    seed: int,
    coverage: float = 0.95,
    num_threads: int = 0,
    prefetch: int = 16,
) -> grain.DatasetIterator[Batch]:
    """Return the stream that refits of the preconditioner draw from: full batches of one shape.

    It takes no batch of the training stream, and its order is that of `refit_seed(seed)`.

    Sentences of any length in one shape would be padding for the most part, so the longest are
    left out: the width of a side is the `coverage` quantile of its lengths, rounded up as the
    boundaries are. The share of pairs that is kept is logged.

    Args:
      pairs: as for `train_stream`.
      bucketing: its `padding_factor` and `left_pad_source` are used.
      batch_size: sentences of a batch, at least 1.
      seed: the seed of the run, the one its `train_stream` has.
      coverage: in (0, 1]; 1 leaves no pair out.
      num_threads: as for `train_stream`.
      prefetch: as for `train_stream`.

    Returns:
      As `train_stream`.

    Raises:
      DataError: there is no pair, or none that fits the widths of both sides.
      ValueError: `batch_size` or `seed` is too small, or `coverage` is out of range.
    """
    _check_seed(seed)
    _check_batch_size(batch_size)
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage is {coverage}, expected more than 0 and at most 1.")
    kept, shape = _covered(pairs, bucketing, batch_size, coverage)
    order = Order(len(kept), batch_size, refit_seed(seed))

    def batch(k: int) -> Batch:
        return assemble(pairs, kept[order.batch(k)], shape, bucketing.left_pad_source)

    batches = grain.MapDataset.range(sys.maxsize // batch_size).map(batch)
    return _iterate(batches, num_threads, prefetch)


def evaluation_batches(pairs: Pairs, bucketing: Bucketing, *, batch_size: int) -> Iterator[Batch]:
    """Return every pair once, the shortest first, in batches of a few shapes.

    Args:
      pairs: n pairs.
      bucketing: how they are grouped; `max_tokens` is not used.
      batch_size: sentences of a batch, at least 1.

    Returns:
      An iterator of batches as those of `train_stream`, and with "index": (B,) int32, which pair
      each row is, or -1 for a row that no pair fills. Pairs are in the order of the files.

    Raises:
      DataError: there is no pair.
      ValueError: the batch size is below 1.
    """
    # Checked here and not in the generator, which would run only at the first batch.
    _check_batch_size(batch_size)
    return _in_order(pairs, Buckets(pairs, bucketing, rows=batch_size), bucketing.left_pad_source)


def _in_order(pairs: Pairs, buckets: Buckets, left_pad_source: bool) -> Iterator[Batch]:
    for shape, members in buckets.in_order():
        index = np.full(shape.rows, -1, np.int32)
        index[: len(members)] = members
        yield {**assemble(pairs, members, shape, left_pad_source), "index": index}


def _covered(
    pairs: Pairs, bucketing: Bucketing, batch_size: int, coverage: float
) -> tuple[np.ndarray, Shape]:
    """Return the pairs that refits use, and the shape of their batches."""
    if len(pairs) == 0:
        raise DataError("the split is empty, expected at least one pair of sentences.")
    lengths = pairs.source.lengths, pairs.target.lengths
    quantiles = np.array([np.quantile(side, coverage, method="lower") for side in lengths])
    source, target = map(int, round_up(quantiles, bucketing.padding_factor))
    kept = np.flatnonzero((lengths[0] <= source) & (lengths[1] <= target))
    if len(kept) == 0:
        raise DataError(
            f"none of {len(pairs)} pairs has a source of {source} words or fewer and a target of "
            f"{target} or fewer, the {coverage:g} quantiles. Set the coverage of refits to 1."
        )
    _log.info(
        "refits use %.2f%% of the training pairs, of %d source and %d target words at most",
        100 * len(kept) / len(pairs),
        source,
        target,
    )
    return kept, Shape(batch_size, source, target)


def _iterate(
    batches: grain.MapDataset[Batch], num_threads: int, prefetch: int
) -> grain.DatasetIterator[Batch]:
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
    )
    return iter(batches.to_iter_dataset(options))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more.")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more.")


def fill_rate(pairs: Pairs, bucketing: Bucketing) -> float:
    """Return the share of the places of an epoch's batches that hold a word, in (0, 1]."""
    places = sum(
        shape.rows * (shape.source + shape.target)
        for shape, _ in Buckets(pairs, bucketing).in_order()
    )
    return math.fsum((len(pairs.source.words), len(pairs.target.words))) / places
