"""What tasks are made from: examples, streams of batches, and the sizes that models need."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import numpy as np

from llqr_experiments import data
from llqr_experiments.config.options import Config
from llqr_experiments.data import translation
from llqr_experiments.errors import ConfigError
from llqr_experiments.layout import WHOLE, Share

Totals = Mapping[str, float]
"""Sums over the rows of a split: loss, correct (of classes) or squares (of numbers), rows."""


@dataclass(frozen=True)
class Streams:
    """Batches of a run, each kind in an order that the seed decides.

    Attributes:
      training: (config, share) -> endless iterator with `get_state`, `set_state` and `close`; of
        every batch, the rows that belong to a share.
      refits: (config) -> the same for refits, of its own order; whole batches.
      evaluation: (split, batch size, share) -> every example of a split once; "train" is one.
      length: (config) -> training batches in an epoch; it need not be whole. Options that the
        data does not have are told here.
      shapes: (config) -> shapes and dtypes of a training batch.
    """

    training: Callable[..., Any]
    refits: Callable[[Config], Any]
    evaluation: Callable[..., Iterator[data.Batch]]
    length: Callable[[Config], float]
    shapes: Callable[[Config], dict[str, jax.ShapeDtypeStruct]]


def rates(split: str, totals: Totals) -> dict[str, float]:
    """Return loss (natural log) and accuracy (percent), named after their split."""
    loss, rows = totals["loss"] / totals["rows"], totals["rows"]
    return {f"{split} loss": loss, f"{split} accuracy": 100.0 * totals["correct"] / rows}


def text_rates(split: str, totals: Totals) -> dict[str, float]:
    """The same, and perplexity."""
    found = rates(split, totals)
    return found | {f"{split} perplexity": math.exp(min(found[f"{split} loss"], 700.0))}


def translation_rates(split: str, totals: Totals) -> dict[str, float]:
    """Loss, token accuracy, loss in bits, and perplexity, by the papers' names."""
    loss = totals["loss"] / totals["rows"]
    return {
        f"{split} loss": loss,
        f"{split} token_accuracy": 100.0 * totals["correct"] / totals["rows"],
        f"{split}_nll_loss": loss / math.log(2),
        f"{split}_ppl": math.exp(min(loss, 700.0)),
    }


def error_rates(split: str, totals: Totals) -> dict[str, float]:
    """Return the loss, half a mean square, and the L2 norm of the error by that of the labels.

    The second is left out where all labels are 0, as those of a batch may be.
    """
    found = {f"{split} loss": totals["loss"] / totals["rows"]}
    if not totals["squares"]:
        return found
    error = math.sqrt(2 * totals["loss"] / totals["squares"])
    return found | {f"{split} relative error": error}


@dataclass(frozen=True)
class Material:
    """Data of one kind, ready for a model.

    Attributes:
      name: of the dataset.
      kind: its name, see `kinds.KINDS`.
      streams: its batches.
      sizes: examples by split.
      evaluated: splits that are evaluated; the first decides which checkpoint is the best.
      shape: of one input, without the batch.
      classes: outputs of a model; 1 where labels are numbers.
      inputs: batch -> what a model sees.
      options: of a model, that the data decides.
      rates: what is reported of a split.
      best: metric of the best checkpoint, and whether more of it is better.
      milestones: accuracies in percent, the first step of which is recorded.
      pairs: of translation: sentences and vocabularies; None for other kinds.
      axes: names of the coordinates of an equation.
    """

    name: str
    kind: str
    streams: Streams
    sizes: dict[str, int]
    evaluated: tuple[str, ...]
    shape: tuple[int, ...]
    classes: int
    inputs: Callable[[dict[str, Any]], Any]
    options: dict[str, Any] = field(default_factory=dict)
    rates: Callable[[str, Totals], dict[str, float]] = rates
    best: tuple[str, bool] = ("test accuracy", True)
    milestones: tuple[float, ...] = ()
    pairs: translation.Translation | None = None
    axes: tuple[str, ...] = ()


# --- examples by number -----------------------------------------------------------------------


def example_streams(splits: Mapping[str, data.Examples]) -> Streams:
    """Return the streams of splits whose examples can be fetched by number."""
    train = splits["train"]
    examples = lambda config: config.batch_size * config.grad_acc_steps  # noqa: E731

    def training(config: Config, share: Share = WHOLE) -> Any:
        return data.train_stream(
            train,
            batch_size=examples(config),
            overlap=config.batch_overlap_fraction,
            partial=cast(data.Partial, config.partial_batch),
            seed=config.rng_seed,
            num_threads=config.data_threads,
            share=share,
        )

    def refits(config: Config) -> Any:
        size, seed = config.precond_batch_size, config.rng_seed
        return data.refit_stream(train, batch_size=size, seed=seed, num_threads=0)

    def evaluation(split: str, size: int, share: Share = WHOLE) -> Iterator[data.Batch]:
        return data.evaluation_batches(splits[split], size, share=share)

    def length(config: Config) -> float:
        partial = cast(data.Partial, config.partial_batch)
        return data.epoch_length(train, examples(config), partial=partial)

    def shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        one = train.gather(np.arange(1))
        return {
            name: jax.ShapeDtypeStruct((examples(config), *x.shape[1:]), x.dtype)
            for name, x in one.items()
        }

    return Streams(training, refits, evaluation, length, shapes)


def pair_streams(found: translation.Translation, coverage: float) -> Streams:
    """Return the streams of sentence pairs: batches of a few shapes, by the length of sentences."""
    train, bucketing = found.train, found.bucketing

    def check(config: Config) -> None:
        whole = {"grad_acc_steps": 1, "sam_groups": 1, "batch_overlap_fraction": 0.0}
        for name, plain in whole.items():
            if getattr(config, name) != plain:
                raise ConfigError(
                    f"{name}={getattr(config, name)}: batches of translation differ in shape; "
                    f"leave it at {plain} (dataset.max_tokens is the size of a batch)."
                )

    def training(config: Config, share: Share = WHOLE) -> Any:
        return translation.train_stream(
            train, bucketing, seed=config.rng_seed, num_threads=config.data_threads, share=share
        )

    def refits(config: Config) -> Any:
        return translation.refit_stream(
            train,
            bucketing,
            batch_size=config.precond_batch_size,
            seed=config.rng_seed,
            coverage=coverage,
        )

    def evaluation(split: str, size: int, share: Share = WHOLE) -> Iterator[data.Batch]:
        for batch in translation.evaluation_batches(
            getattr(found, split), bucketing, batch_size=size
        ):
            rows = slice(None) if share.whole else share.rows(size)
            yield {name: batch[name][rows] for name in ("source", "target_in", "label")}

    def length(config: Config) -> float:
        check(config)
        return translation.epoch_length(train, bucketing)

    def shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        widest = translation.Buckets(train, bucketing).shapes[-1]
        widths = {"source": widest.source, "target_in": widest.target, "label": widest.target}
        return {
            name: jax.ShapeDtypeStruct((widest.rows, width), np.int32)
            for name, width in widths.items()
        }

    return Streams(training, refits, evaluation, length, shapes)
