"""A dataset in memory: labelled images, the constants that normalise them, and what is legal.

Pixels stay as they were published (uint8); `llqr_experiments.data.examples` normalises each
batch with the dataset's constants, so that 60,000 images of 28x28 take 47 MB and not 188 MB.
"""

import dataclasses
import math

import numpy as np

from llqr_experiments.errors import DataError


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
      images: (n, h, w, c), uint8 or float32, raw pixels.
      labels: (n,), int32, in [0, number of classes).
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test split with the constants that normalise their pixels.

    A model sees `(pixel / scale - mean) / std`.

    Attributes:
      name: the name it is loaded by.
      train: the split to fit.
      test: the split to report.
      num_classes: labels are in [0, num_classes).
      mean: mean of `pixel / scale` over the training split, one number or one per channel.
      std: standard deviation of the same, one number or one per channel.
      scale: the largest pixel value, which maps pixels to [0, 1].
      origin: where the data came from, for logs and reports.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    scale: float
    origin: str = ""


def narrow(labels: np.ndarray, where: str) -> np.ndarray:
    """Return integer labels as int32.

    Args:
      labels: (n,) integers of any width.
      where: they are from, for the message.

    Raises:
      DataError: one has more than 32 bits: cut off, it might be a legal one.
    """
    found = labels.astype(np.int32)
    wrong = np.flatnonzero(found != labels)
    if len(wrong):
        raise DataError(
            f"{where}: label {labels[wrong[0]]} of example {wrong[0]} has more than 32 bits; "
            "expected the number of a class, from 0."
        )
    return found


def validate(dataset: Dataset) -> None:
    """Check that a dataset can be trained on.

    Raises:
      DataError: the constants cannot normalise; the images of the splits differ in size; or a
        split is empty, has arrays of the wrong number of dimensions, labels that are no
        integers, not as many images as labels, a pixel that is NaN or infinite, or a label that
        is no class.
    """
    divisors = np.concatenate([np.ravel(dataset.std), np.ravel(dataset.scale)])
    constants = np.concatenate([np.ravel(dataset.mean), divisors])
    if not np.isfinite(constants).all() or (divisors <= 0).any():
        raise DataError(
            f"{dataset.name}: pixels cannot be normalised by mean {dataset.mean}, std "
            f"{dataset.std}, scale {dataset.scale}; expected finite numbers, std and scale above 0."
        )
    for which in ("train", "test"):
        _validate_split(f"{dataset.name}, {which} split", getattr(dataset, which), dataset)
    train, test = dataset.train.images.shape[1:], dataset.test.images.shape[1:]
    if train != test:
        raise DataError(
            f"{dataset.name}: images of {_size(train)} to train on and of {_size(test)} to test "
            "on, expected one size: the files are of two sets."
        )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _validate_split(where: str, split: Split, dataset: Dataset) -> None:
    """Raise `DataError` for the first fault of a split, which the message calls `where`."""
    images, labels = split.images, split.labels
    if images.ndim != 4 or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{where}: images of shape {images.shape} and {labels.dtype} labels of shape "
            f"{labels.shape}, expected (n, h, w, c) and integers (n,)."
        )
    if len(images) != len(labels):
        raise DataError(
            f"{where}: {len(images)} images but {len(labels)} labels, expected as many of each."
        )
    if len(images) == 0:
        raise DataError(f"{where}: empty, expected at least one example.")
    if np.issubdtype(images.dtype, np.floating):
        bad = np.argwhere(~np.isfinite(images))
        if len(bad):
            raise DataError(
                f"{where}: {len(bad)} of {math.prod(images.shape)} pixels are NaN or infinite, the "
                f"first at (example, row, column, channel) = {tuple(map(int, bad[0]))}."
            )
    outside = np.flatnonzero((labels < 0) | (labels >= dataset.num_classes))
    if len(outside):
        raise DataError(
            f"{where}: labels go from {labels.min()} to {labels.max()}, expected 0 to "
            f"{dataset.num_classes - 1} for {dataset.num_classes} classes; the first of "
            f"{len(outside)} outside is example {outside[0]}, with label {labels[outside[0]]}."
        )
