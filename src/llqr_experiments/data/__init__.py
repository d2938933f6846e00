"""Datasets and batches for the experiment runner.

`load` returns a checked `Dataset` of raw pixels, and `long_tailed` and `truncated` make smaller
ones of it; `train_stream`, `refit_stream` and `evaluation_batches` turn a `Source` (one split of
it) into normalised batches, which `cifar_augmentation` can change at random. `grokking` and `text`
return splits of tokens.
"""

from llqr_experiments.data.idx import read_idx
from llqr_experiments.data.language import TEXTS, Text, text
from llqr_experiments.data.operations import OPERATIONS, Grokking, grokking
from llqr_experiments.data.order import Partial, stride
from llqr_experiments.data.pipeline import (
    Batch,
    Source,
    Transform,
    epoch_length,
    evaluation_batches,
    refit_seed,
    refit_stream,
    train_stream,
)
from llqr_experiments.data.sources import Dataset, Split, load, names, validate
from llqr_experiments.data.variants import cifar_augmentation, long_tailed, truncated
from llqr_experiments.data.windows import IGNORE, Windows
from llqr_experiments.errors import DataError

__all__ = [
    "IGNORE",
    "OPERATIONS",
    "TEXTS",
    "Batch",
    "DataError",
    "Dataset",
    "Grokking",
    "Partial",
    "Source",
    "Split",
    "Text",
    "Transform",
    "Windows",
    "cifar_augmentation",
    "epoch_length",
    "evaluation_batches",
    "grokking",
    "load",
    "long_tailed",
    "names",
    "read_idx",
    "refit_seed",
    "refit_stream",
    "stride",
    "text",
    "train_stream",
    "truncated",
    "validate",
]
