"""What tasks are made from: examples, streams of batches, and the sizes that models need."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

import jax
import numpy as np

from llqr_experiments import data
from llqr_experiments.errors import ConfigError
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
        if config.name in names():
            _check_options(config, options)
            return build(config)
    raise data.unknown_dataset(config.name)


def _check_options(config: Dataset, known: tuple[str, ...]) -> None:
    known = ("name", *known)
    for option in fields(config):
        value = getattr(config, option.name)
        plain = option.default if option.default_factory is None else value
        if option.name not in known and value != plain:
            raise ConfigError(
                f"dataset.{option.name}={value}: {config.name} has no such option, only "
                f"{', '.join(known[1:])}."
            )
