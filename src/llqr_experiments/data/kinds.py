"""Kinds of data: each is one object that loads its sets and says what goes by kind."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from llqr.errors import unknown
from llqr_experiments import data
from llqr_experiments.config.options import Config, Dataset
from llqr_experiments.config.row import become, plain
from llqr_experiments.data import equations, problems, regression, translation
from llqr_experiments.data.material import (
    Material,
    error_rates,
    example_streams,
    pair_streams,
    text_rates,
    translation_rates,
)
from llqr_experiments.errors import ConfigError, DataError


def _examples(config: Config) -> str:
    parts = config.grad_acc_steps
    examples = f"{config.batch_size * parts} examples"
    return f"{examples} in {parts} micro-batches" if parts > 1 else examples


@dataclass(frozen=True)
class Kind:
    """One kind of data.

    Attributes:
      name: of the kind, as models say what they take.
      heading: above its runs in a report.
      sets: names of its datasets.
      splits: of its data.
      options: of `Dataset` that it has, besides the name and `download`.
      load: `(dataset) -> Material`.
      small: `(dataset) -> dataset` that needs no files, for smoke runs.
      batch: `(config) ->` in words what a training batch holds.
      decoded: whether its models answer in sentences, found by a beam search.
      long: whether its runs are told by orders of magnitude: steps on a logarithmic axis.
      numeric: whether its labels are numbers, not classes.
    """

    name: str
    heading: str
    sets: tuple[str, ...]
    splits: tuple[str, ...]
    options: tuple[str, ...]
    load: Callable[[Dataset], Material]
    small: Callable[[Dataset], Dataset]
    batch: Callable[[Config], str] = _examples
    decoded: bool = False
    long: bool = False
    numeric: bool = False

    def check(self, config: Dataset) -> None:
        """Raise ConfigError for an option that this kind does not have."""
        for option in fields(config):
            value = getattr(config, option.name)
            own = option.name in ("name", "download", *self.options)
            if not own and value != plain(option):
                raise ConfigError(
                    f"dataset.{option.name}={value}: {config.name} has no such option, only "
                    f"{', '.join(self.options) or 'none'}."
                )

    def given(self, config: Dataset) -> dict[str, Any]:
        """Return the options that it has, by name."""
        return {name: getattr(config, name) for name in self.options}


def make(config: Dataset) -> Material:
    """Load the data.

    Raises:
      ConfigError: an option that this kind of data does not have.
      DataError: the data is missing, corrupt, empty or not what the config says.
    """
    kind = of(config.name)
    if kind is None:
        known = [name for kind in KINDS.values() for name in kind.sets]
        raise DataError(unknown("dataset", config.name, known))
    kind.check(config)
    return kind.load(config)


def of(name: Any) -> Kind | None:
    """Return the kind of a dataset; None if none has such a name."""
    return next((kind for kind in KINDS.values() if name in kind.sets), None)


def _by_number(
    kind: Kind, found: Any, evaluated: tuple[str, ...], *rest: Any, **own: Any
) -> Material:
    """The material of a set whose splits have examples that can be fetched by number."""
    splits = {name: getattr(found, name) for name in kind.splits}
    sizes = {name: len(split) for name, split in splits.items()}
    return Material(found.name, kind.name, example_streams(splits), sizes, evaluated, *rest, **own)


# --- images -----------------------------------------------------------------------------------


def _images(config: Dataset) -> Material:
    found = data.images(config.name, download=config.download, **IMAGES.given(config))
    return _by_number(
        IMAGES,
        found,
        ("test",),
        found.shape,
        found.num_classes,
        inputs=lambda batch: batch["image"],
    )


IMAGES = Kind(
    "images",
    "Images",
    data.image_names(),
    ("train", "test"),
    ("dataset_dir", "augment", "imbalance", "truncate"),
    _images,
    lambda config: Dataset(name="digits32", truncate=200, augment=config.augment),
)


# --- operations -------------------------------------------------------------------------------


def _operations(config: Dataset) -> Material:
    found = data.grokking(
        config.name, p=config.p, train_fraction=config.train_fraction, seed=config.split_seed
    )
    return _by_number(
        OPERATIONS,
        found,
        ("test",),
        (found.length,),
        found.num_classes,
        inputs=lambda batch: batch["tokens"],
        options={"vocabulary": found.vocabulary},
        milestones=(95.0, 99.0),
    )


OPERATIONS = Kind(
    "operations",
    "Operations",
    data.OPERATIONS,
    ("train", "test"),
    ("p", "train_fraction", "split_seed"),
    _operations,
    lambda config: replace(config, p=7),
    long=True,
)


# --- text -------------------------------------------------------------------------------------


def _text(config: Dataset) -> Material:
    found = data.text(config.name, download=config.download, **TEXT.given(config))
    return _by_number(
        TEXT,
        found,
        ("valid", "test"),
        (found.length,),
        found.vocabulary,
        inputs=lambda batch: batch["tokens"],
        rates=text_rates,
        best=("valid loss", False),
    )


TEXT = Kind(
    "text",
    "Text",
    data.TEXTS,
    ("train", "valid", "test"),
    (
        "dataset_dir", "tokenizer", "tokenizer_dir", "vocabulary", "target_len", "held_out",
        "cache_dir",
    ),
    _text,
    lambda _: Dataset(name="python_topics", target_len=16),
)  # fmt: skip


# --- translation ------------------------------------------------------------------------------


def _translation(config: Dataset) -> Material:
    found = translation.load(
        config.name,
        config.dataset_dir,
        bucketing=translation.Bucketing(**become(config, "bucketing")),
        max_length=config.max_length,
        cache_dir=config.cache_dir,
    )
    return Material(
        found.name,
        TRANSLATION.name,
        pair_streams(found, config.refit_coverage),
        {name: len(getattr(found, name)) for name in TRANSLATION.splits},
        ("valid",),
        (),
        len(found.target),
        inputs=lambda batch: {name: batch[name] for name in ("source", "target_in")},
        options={"source_vocabulary": len(found.source)},
        rates=translation_rates,
        best=("valid loss", False),
        pairs=found,
    )


TRANSLATION = Kind(
    "translation",
    "Translation",
    translation.names(),
    ("train", "valid", "test"),
    (
        "dataset_dir", "cache_dir", "max_tokens", "padding_factor", "percentiles", "max_length",
        "refit_coverage",
    ),
    _translation,
    lambda _: Dataset(name="numbers_de_en", max_tokens=128),
    decoded=True,
    batch=lambda config: f"at most {config.dataset.max_tokens:,} words",
)  # fmt: skip


# --- equations ----------------------------------------------------------------------------------


def _equations(config: Dataset) -> Material:
    equation = problems.EQUATIONS[config.name]
    splits = {
        "train": _rows(equation, config),
        "test": equations.solution_rows(equation),
    }
    return Material(
        config.name,
        EQUATIONS.name,
        example_streams(splits),
        {name: len(split) for name, split in splits.items()},
        ("test",),
        (len(equation.box),),
        equation.unknowns,
        inputs=lambda batch: (batch["x"], batch["operator"]),
        options={"terms": equation.terms},
        rates=error_rates,
        best=("test relative error", False),
        axes=equation.axes,
    )


def _rows(equation: equations.Equation, config: Dataset) -> equations.Rows:
    """What is asked of an equation in training."""
    if equation.measured is None:
        for name in ("measurements", "noise"):
            if getattr(config, name) != getattr(Dataset(), name):
                raise ConfigError(
                    f"dataset.{name}={getattr(config, name)}: nothing of {config.name} is measured."
                )
    known = None
    if equation.measured is not None:
        known = equations.measurements(equation, config.measurements, config.noise)
    dim, faces, inside = len(equation.box), len(equation.faces), config.fresh
    if inside is None and dim > 2:
        inside = FRESH
    if inside is not None:
        boundary = config.boundary_points or -(-inside // 4)
        return equations.fresh(equation, inside, boundary, known)
    boundary = config.boundary_points or faces * config.points
    rows = equations.grid(equation, [config.points] * dim, equations.spread(boundary, faces))
    return rows if known is None else equations.joined(rows, known)


FRESH = 512
"""Points inside, where the variables are too many for squares."""


def _few(config: Dataset) -> Dataset:
    """The same equation at few points."""
    given = replace(config, points=4, boundary_points=None)
    return given if config.fresh is None else replace(given, fresh=16)


EQUATIONS = Kind(
    "equations",
    "Differential equations",
    tuple(problems.EQUATIONS),
    ("train", "test"),
    ("points", "boundary_points", "fresh", "measurements", "noise"),
    _equations,
    _few,
    numeric=True,
)

# --- tables -------------------------------------------------------------------------------------


def _tables(config: Dataset) -> Material:
    found = regression.load(config.name)
    return _by_number(
        TABLES,
        found,
        ("test",),
        (found.columns,),
        1,
        inputs=lambda batch: batch["x"],
        rates=error_rates,
        best=("test relative error", False),
    )


TABLES = Kind(
    "tables",
    "Tables of numbers",
    regression.NAMES,
    ("train", "test"),
    (),
    _tables,
    lambda config: config,
    numeric=True,
)

KINDS = {kind.name: kind for kind in (IMAGES, OPERATIONS, TEXT, TRANSLATION, EQUATIONS, TABLES)}
"""Every kind, by name."""
