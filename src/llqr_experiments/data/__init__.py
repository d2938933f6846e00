"""Datasets and batches for the experiment runner.

`images` returns a set of images by its name: two splits that are `Examples`, which
`train_stream`, `refit_stream` and `evaluation_batches` make batches of. Underneath, `load` returns
a checked `Dataset` in memory, `long_tailed` and `truncated` make smaller ones of it, and `Source`
makes examples of a split, which `cifar_augmentation` can change at random. `Photos` are examples
that are decoded when they are asked for. `grokking`
and `text` return splits of tokens.
"""

from llqr_experiments.data.catalogue import Images, image_names, images
from llqr_experiments.data.dataset import Dataset, Split, validate
from llqr_experiments.data.examples import Batch, Examples, Source, Transform
from llqr_experiments.data.idx import read_idx
from llqr_experiments.data.language import TEXTS, Text, text
from llqr_experiments.data.operations import OPERATIONS, Grokking, grokking
from llqr_experiments.data.order import Partial, stride
from llqr_experiments.data.photos import Photos
from llqr_experiments.data.pipeline import (
    epoch_length,
    evaluation_batches,
    refit_seed,
    refit_stream,
    train_stream,
)
from llqr_experiments.data.sources import load, names
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
    "Examples",
    "Grokking",
    "Images",
    "Partial",
    "Photos",
    "Source",
    "Split",
    "Text",
    "Transform",
    "Windows",
    "cifar_augmentation",
    "epoch_length",
    "evaluation_batches",
    "grokking",
    "image_names",
    "images",
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
