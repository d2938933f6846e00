"""Datasets and batches for the experiment runner.

`load` returns a checked `Dataset` of raw pixels; `train_stream`, `refit_stream` and
`evaluation_batches` turn a `Source` (one split of it) into normalised batches.
"""

from llqr_experiments.data.idx import read_idx
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
from llqr_experiments.errors import DataError

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Source",
    "Split",
    "Transform",
    "epoch_length",
    "evaluation_batches",
    "load",
    "names",
    "read_idx",
    "refit_seed",
    "refit_stream",
    "train_stream",
    "validate",
]
