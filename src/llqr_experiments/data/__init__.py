"""Datasets and batches for the experiment runner.

`load` returns a checked `Dataset` of raw pixels, and `long_tailed` and `truncated` make smaller
ones of it; `train_stream`, `refit_stream` and `evaluation_batches` turn a `Source` (one split of
it) into normalised batches, which `cifar_augmentation` can change at random.
"""

from llqr_experiments.data.dataset import Dataset, Split, validate
from llqr_experiments.data.examples import Batch, Examples, Source, Transform
from llqr_experiments.data.idx import read_idx
from llqr_experiments.data.order import Partial, stride
from llqr_experiments.data.pipeline import (
    epoch_length,
    evaluation_batches,
    refit_seed,
    refit_stream,
    train_stream,
)
from llqr_experiments.data.sources import load, names
from llqr_experiments.data.variants import cifar_augmentation, long_tailed, truncated
from llqr_experiments.errors import DataError

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Examples",
    "Partial",
    "Source",
    "Split",
    "Transform",
    "cifar_augmentation",
    "epoch_length",
    "evaluation_batches",
    "load",
    "long_tailed",
    "names",
    "read_idx",
    "refit_seed",
    "refit_stream",
    "stride",
    "train_stream",
    "truncated",
    "validate",
]
