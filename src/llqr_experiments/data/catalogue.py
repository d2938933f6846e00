"""The image sets by name, as training and evaluation see them."""

import dataclasses
from pathlib import Path

from llqr.errors import unknown
from llqr_experiments.data import cifar, imagenet, sources
from llqr_experiments.data.examples import Examples, Source
from llqr_experiments.data.photos import CROP
from llqr_experiments.data.variants import cifar_augmentation, long_tail, long_tailed, truncated
from llqr_experiments.errors import ConfigError, DataError

_IMAGENET = "imagenet"


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of labelled images; its batches are {"image": (B, h, w, c), "label": (B,)}.

    Attributes:
      name: the name it is loaded by.
      train: the split to fit.
      test: the split to report.
      num_classes: labels are in [0, num_classes).
      shape: (h, w, c) of an image.
      origin: where the data came from and what was done to it, for logs and reports.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int
    shape: tuple[int, int, int]
    origin: str


def image_names() -> tuple[str, ...]:
    """Return the names that `images` knows."""
    return tuple(sorted((*sources.names(), _IMAGENET)))


def images(
    name: str,
    dataset_dir: str | Path | None = None,
    *,
    download: bool = True,
    augment: bool = False,
    imbalance: float | None = None,
    truncate: int | None = None,
) -> Images:
    """Load a set of images by name.

    Args:
      name: one of `image_names()`.
      dataset_dir: folder with the official files; None: where `load` looks, and `./data/imagenet`.
      download: whether the network may be used.
      augment: whether training sees random changes: those of the CIFAR sets (reflected borders,
        crop, flip, cutout) or of ImageNet (one of two sizes, crop, flip).
      imbalance: ratio of a long tail, see `long_tailed`; None: as it is.
      truncate: how many first training examples to keep, before the long tail; None: all.

    Returns:
      The set.

    Raises:
      ConfigError: the set has no augmentation, or cannot be truncated.
      DataError: the name is unknown, or the files are missing or broken.

    Example:
      >>> digits = images("digits", truncate=100)
      >>> len(digits.train), digits.shape
      (100, (8, 8, 1))
    """
    if name not in image_names():
        raise DataError(unknown("dataset", name, image_names()))
    augmented = (*cifar.SETS, "digits32", _IMAGENET)
    if augment and name not in augmented:
        raise ConfigError(
            f"dataset.augment=true: {name} has no augmentation, only {', '.join(augmented)} "
            "have. Set it to false."
        )
    if name == _IMAGENET:
        return _imagenet(dataset_dir, augment, imbalance, truncate)
    dataset = sources.load(name, dataset_dir, download=download)
    if truncate is not None:
        dataset = truncated(dataset, truncate)
    if imbalance is not None:
        dataset = long_tailed(dataset, ratio=imbalance)
    change = cifar_augmentation(dataset.mean, dataset.std) if augment else None
    height, width, channels = dataset.train.images.shape[1:]
    return Images(
        name,
        Source.of(dataset, "train", change),
        Source.of(dataset, "test"),
        dataset.num_classes,
        (height, width, channels),
        dataset.origin,
    )


def _imagenet(
    dataset_dir: str | Path | None, augment: bool, imbalance: float | None, truncate: int | None
) -> Images:
    if truncate is not None:
        raise ConfigError(
            f"dataset.truncate={truncate}: the images of imagenet lie class by class, so that the "
            "first ones are of few classes. Set it to null; a folder with fewer images works."
        )
    train, test, num_classes, origin = imagenet.load(dataset_dir, augment)
    if imbalance is not None:
        kept = long_tail(train.index.label, num_classes, imbalance)
        train = dataclasses.replace(train, index=train.index.select(kept))
        origin += f", long tail of ratio {imbalance:g}"
    return Images(_IMAGENET, train, test, num_classes, (CROP, CROP, 3), origin)
