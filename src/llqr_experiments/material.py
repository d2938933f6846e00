"""What tasks are made from: examples, streams of batches, and the sizes that models need."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast

import jax
import numpy as np

from llqr._errors import unknown
from llqr_experiments import data
from llqr_experiments.errors import ConfigError, DataError
from llqr_experiments.spec import Config, Dataset

Totals = Mapping[str, float]
"""Sums over the rows of a split: loss, correct, rows."""


@dataclass(frozen=True)
class Streams:
    """Batches of a run, each kind in an order that the seed decides.

    Attributes:
      training: (config) -> endless iterator with `get_state`, `set_state` and `close`.
      refits: (config) -> the same for refits, of its own order.
      evaluation: (split, batch size) -> every example of a split once; "train" is one.
      length: (config) -> training batches in an epoch; it need not be whole.
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


@dataclass(frozen=True)
class Material:
    """Data of one kind, ready for a model.

    Attributes:
      name: of the dataset.
      streams: its batches.
      sizes: examples by split: "train", and those that are evaluated. The first of those decides
        which checkpoint is the best.
      shape: of one input, without the batch.
      classes: outputs of a model.
      inputs: batch -> what a model sees.
      options: of a model, that the data decides.
      rates: what is reported of a split.
      best: metric of the best checkpoint, and whether more of it is better.
      milestones: accuracies in percent, the first step of which is recorded.
    """

    name: str
    streams: Streams
    sizes: dict[str, int]
    shape: tuple[int, ...]
    classes: int
    inputs: Callable[[dict[str, Any]], Any]
    options: dict[str, Any] = field(default_factory=dict)
    rates: Callable[[str, Totals], dict[str, float]] = rates
    best: tuple[str, bool] = ("test accuracy", True)
    milestones: tuple[float, ...] = ()

    @property
    def evaluated(self) -> list[str]:
        """Names of the splits that are evaluated."""
        return [name for name in self.sizes if name != "train"]


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
    micro = lambda config: config.batch_size * config.grad_acc_steps  # noqa: E731

    def training(config: Config) -> Any:
        return data.train_stream(
            train,
            batch_size=micro(config),
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
        return data.epoch_length(train, micro(config), partial=partial)

    def shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        one = train.gather(np.arange(1))
        return {
            name: jax.ShapeDtypeStruct((micro(config), *x.shape[1:]), x.dtype)
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
        example_streams(splits),
        {name: len(split) for name, split in splits.items()},
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
        example_streams(splits),
        {name: len(split) for name, split in splits.items()},
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
        example_streams(splits),
        {name: len(split) for name, split in splits.items()},
        (found.length,),
        found.vocabulary,
        inputs=lambda batch: batch["tokens"],
        rates=text_rates,
        best=("valid loss", False),
    )


_KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...], Callable[[Dataset], Material]], ...] = (
    (data.image_names(), ("dataset_dir", "augment", "imbalance", "truncate"), _images),
    (data.OPERATIONS, ("p", "train_fraction", "split_seed"), _grokking),
    (
        data.TEXTS,
        ("dataset_dir", "tokenizer", "tokenizer_dir", "vocabulary", "target_len", "held_out",
         "cache_dir"),
        _text,
    ),
)  # fmt: skip
"""Names, options besides `download`, and what makes the material."""
