"""What tasks are made from: examples, streams of batches, and the sizes that models need."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast

import jax
import numpy as np

from llqr._errors import unknown
from llqr_experiments import data
from llqr_experiments.config.options import Config, Dataset
from llqr_experiments.data import translation
from llqr_experiments.errors import ConfigError, DataError

Totals = Mapping[str, float]
"""Sums over the rows of a split: loss, correct, rows."""


@dataclass(frozen=True)
class Streams:
    """Batches of a run, each kind in an order that the seed decides.

    Attributes:
      training: (config) -> endless iterator with `get_state`, `set_state` and `close`.
      refits: (config) -> the same for refits, of its own order.
      evaluation: (split, batch size) -> every example of a split once; "train" is one.
      length: (config) -> training batches in an epoch; it need not be whole. Options that the
        data does not have are told here.
      shapes: (config) -> shapes and dtypes of a training batch.
    """

    training: Callable[[Config], Any]
    refits: Callable[[Config], Any]
    evaluation: Callable[[str, int], Iterator[data.Batch]]
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


@dataclass(frozen=True)
class Material:
    """Data of one kind, ready for a model.

    Attributes:
      name: of the dataset.
      kind: images, operations, text or translation.
      streams: its batches.
      sizes: examples by split.
      evaluated: splits that are evaluated; the first decides which checkpoint is the best.
      shape: of one input, without the batch.
      classes: outputs of a model.
      inputs: batch -> what a model sees.
      options: of a model, that the data decides.
      rates: what is reported of a split.
      best: metric of the best checkpoint, and whether more of it is better.
      milestones: accuracies in percent, the first step of which is recorded.
      pairs: of translation: sentences and vocabularies; None for other kinds.
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


def make(config: Dataset) -> Material:
    """Load the data.

    Raises:
      ConfigError: an option that this kind of data does not have.
      DataError: the data is missing, corrupt, empty or not what the config says.
    """
    for names, options, build in _KINDS:
        if config.name in names:
            _check_options(config, options)
            return build(config)
    known = [name for names, _, _ in _KINDS for name in names]
    raise DataError(unknown("dataset", config.name, known))


def _check_options(config: Dataset, known: tuple[str, ...]) -> None:
    for option in fields(config):
        value = getattr(config, option.name)
        plain = option.default
        if option.default_factory is not MISSING:
            plain = option.default_factory()
        if option.name not in ("name", "download", *known) and value != plain:
            raise ConfigError(
                f"dataset.{option.name}={value}: {config.name} has no such option, only "
                f"{', '.join(known)}."
            )


# --- examples by number -----------------------------------------------------------------------


def example_streams(splits: Mapping[str, data.Examples]) -> Streams:
    """Return the streams of splits whose examples can be fetched by number."""
    train = splits["train"]
    examples = lambda config: config.batch_size * config.grad_acc_steps  # noqa: E731

    def training(config: Config) -> Any:
        return data.train_stream(
            train,
            batch_size=examples(config),
            overlap=config.batch_overlap_fraction,
            partial=cast(data.Partial, config.partial_batch),
            seed=config.rng_seed,
            num_threads=config.data_threads,
        )

    def refits(config: Config) -> Any:
        size, seed = config.precond_batch_size, config.rng_seed
        return data.refit_stream(train, batch_size=size, seed=seed, num_threads=0)

    def evaluation(split: str, size: int) -> Iterator[data.Batch]:
        return data.evaluation_batches(splits[split], size)

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


def _images(config: Dataset) -> Material:
    found = data.images(
        config.name,
        config.dataset_dir,
        download=config.download,
        augment=config.augment,
        imbalance=config.imbalance,
        truncate=config.truncate,
    )
    splits = {"train": found.train, "test": found.test}
    return Material(
        found.name,
        "images",
        example_streams(splits),
        {name: len(split) for name, split in splits.items()},
        ("test",),
        found.shape,
        found.num_classes,
        inputs=lambda batch: batch["image"],
    )


def _grokking(config: Dataset) -> Material:
    found = data.grokking(
        config.name, p=config.p, train_fraction=config.train_fraction, seed=config.split_seed
    )
    splits = {"train": found.train, "test": found.test}
    return Material(
        found.name,
        "operations",
        example_streams(splits),
        {name: len(split) for name, split in splits.items()},
        ("test",),
        (found.length,),
        found.num_classes,
        inputs=lambda batch: batch["tokens"],
        options={"vocabulary": found.vocabulary},
        milestones=(95.0, 99.0),
    )


def _text(config: Dataset) -> Material:
    found = data.text(
        config.name,
        config.dataset_dir,
        tokenizer=config.tokenizer,
        tokenizer_dir=config.tokenizer_dir,
        vocabulary=config.vocabulary,
        target_len=config.target_len,
        held_out=config.held_out,
        download=config.download,
        cache_dir=config.cache_dir,
    )
    splits = {"train": found.train, "valid": found.valid, "test": found.test}
    return Material(
        found.name,
        "text",
        example_streams(splits),
        {name: len(split) for name, split in splits.items()},
        ("valid", "test"),
        (found.length,),
        found.vocabulary,
        inputs=lambda batch: batch["tokens"],
        rates=text_rates,
        best=("valid loss", False),
    )


def _translation(config: Dataset) -> Material:
    bucketing = translation.Bucketing(
        max_tokens=config.max_tokens,
        percentiles=config.percentiles,
        padding_factor=config.padding_factor,
    )
    found = translation.load(
        config.name,
        config.dataset_dir,
        bucketing=bucketing,
        max_length=config.max_length,
        cache_dir=config.cache_dir,
    )
    return Material(
        found.name,
        "translation",
        pair_streams(found, config.refit_coverage),
        {name: len(getattr(found, name)) for name in ("train", "valid", "test")},
        ("valid",),
        (),
        len(found.target),
        inputs=lambda batch: {name: batch[name] for name in ("source", "target_in")},
        options={"source_vocabulary": len(found.source)},
        rates=translation_rates,
        best=("valid loss", False),
        pairs=found,
    )


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

    def training(config: Config) -> Any:
        return translation.train_stream(
            train, bucketing, seed=config.rng_seed, num_threads=config.data_threads
        )

    def refits(config: Config) -> Any:
        return translation.refit_stream(
            train,
            bucketing,
            batch_size=config.precond_batch_size,
            seed=config.rng_seed,
            coverage=coverage,
        )

    def evaluation(split: str, size: int) -> Iterator[data.Batch]:
        for batch in translation.evaluation_batches(
            getattr(found, split), bucketing, batch_size=size
        ):
            yield {name: batch[name] for name in ("source", "target_in", "label")}

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


_KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Dataset], Material]], ...] = (
    (data.image_names(), ("dataset_dir", "augment", "imbalance", "truncate"), _images),
    (data.OPERATIONS, ("p", "train_fraction", "split_seed"), _grokking),
    (
        data.TEXTS,
        ("dataset_dir", "tokenizer", "tokenizer_dir", "vocabulary", "target_len", "held_out",
         "cache_dir"),
        _text,
    ),
    (
        translation.names(),
        ("dataset_dir", "cache_dir", "max_tokens", "padding_factor", "percentiles", "max_length",
         "refit_coverage"),
        _translation,
    ),
)  # fmt: skip
"""Names, options besides `download`, and what makes the material."""
