"""Variants of a dataset: fewer training examples, and random changes to them.

  long_tailed          classes of exponentially decreasing size
  truncated            the first training examples
  cifar_augmentation   random crop, flip and cutout, an `augment` of `Source`

The test split and the constants that normalise the pixels stay as they are.
"""

import dataclasses
import math

import numpy as np

from llqr_experiments.data.dataset import Dataset, Split
from llqr_experiments.data.examples import Batch, Transform
from llqr_experiments.errors import DataError


def long_tailed(dataset: Dataset, *, ratio: float = 100.0, seed: int = 42) -> Dataset:
    """Return a dataset whose training classes get smaller, exponentially, from the first on.

    Class c of K keeps n_c = max(1, round(n_max ratio^(-c / (K - 1)))) examples, where n_max is
    the size of the largest class; a class with fewer keeps them all.

    Args:
      dataset: at least two classes.
      ratio: n_0 / n_(K-1), at least 1; 1 evens out nothing and drops nothing.
      seed: the examples of class c are the first n_c of a shuffle with `seed + c`. Frozen: they
        are the same with every version of numpy.

    Returns:
      The dataset with fewer training examples, one class after the other.

    Raises:
      DataError: there is only one class.
      ValueError: the ratio is below 1 or not finite.

    Example:
      >>> from llqr_experiments.data import load
      >>> np.bincount(long_tailed(load("digits"), ratio=10).train.labels).tolist()
      [142, 113, 88, 68, 52, 41, 31, 24, 19, 15]
    """
    kept = long_tail(dataset.train.labels, dataset.num_classes, ratio, seed)
    train = Split(dataset.train.images[kept], dataset.train.labels[kept])
    return _with_training_split(dataset, train, f"long tail of ratio {ratio:g}")


def long_tail(labels: np.ndarray, num_classes: int, ratio: float, seed: int = 42) -> np.ndarray:
    """Return which examples `long_tailed` keeps.

    Args:
      labels: (n,) integers.
      num_classes: K.
      ratio: as for `long_tailed`.
      seed: as for `long_tailed`.

    Returns:
      Their places in `labels`, one class after the other, int64.

    Raises:
      As `long_tailed`.
    """
    sizes = long_tail_sizes(np.bincount(labels, minlength=num_classes), ratio)
    return np.concatenate(
        [
            # RandomState is the generator whose stream numpy has frozen.
            np.random.RandomState(seed + c).permutation(np.flatnonzero(labels == c))[:size]
            for c, size in enumerate(sizes)
        ]
    )


def long_tail_sizes(counts: np.ndarray, ratio: float) -> list[int]:
    """Return how many examples of each class `long_tailed` keeps.

    Args:
      counts: (K,), how many there are.
      ratio: at least 1.

    Returns:
      K numbers, none above its count.

    Raises:
      DataError: K is below 2.
      ValueError: the ratio is below 1 or not finite.

    Example:
      >>> long_tail_sizes(np.array([500, 500, 500]), 100)
      [500, 50, 5]
    """
    if not 1 <= ratio < math.inf:
        raise ValueError(f"ratio is {ratio}, expected a finite number of 1 or more.")
    last = len(counts) - 1
    if last < 1:
        raise DataError(f"a long tail of {len(counts)} class: expected 2 classes or more.")
    largest = int(max(counts))
    wanted = [max(1, round(largest * (1 / ratio) ** (c / last))) for c in range(len(counts))]
    return [min(size, int(count)) for size, count in zip(wanted, counts, strict=True)]


def truncated(dataset: Dataset, examples: int) -> Dataset:
    """Return a dataset with the first training examples only, in the order of the file.

    They are not drawn at random, so that there is one truncated set of each size: the papers'
    `truncated_mnist` is the first 10,000 images of MNIST.

    Args:
      dataset: what to truncate.
      examples: how many to keep, at least 1.

    Returns:
      The dataset with fewer training examples; they share memory with those of `dataset`.

    Raises:
      DataError: the training split has fewer.
      ValueError: `examples` is below 1.

    Example:
      >>> from llqr_experiments.data import load
      >>> len(truncated(load("digits"), 1000).train)
      1000
    """
    if examples < 1:
        raise ValueError(f"examples is {examples}, expected 1 or more.")
    found = len(dataset.train)
    if examples > found:
        raise DataError(
            f"{dataset.name}: cannot be truncated to {examples} training examples, there are "
            f"{found}."
        )
    train = Split(dataset.train.images[:examples], dataset.train.labels[:examples])
    return _with_training_split(dataset, train, f"first {examples} examples")


def _with_training_split(dataset: Dataset, train: Split, how: str) -> Dataset:
    """Return `dataset` with another training split; its origin, which is logged, says `how`."""
    origin = f"{dataset.origin}, {how}" if dataset.origin else how
    return dataclasses.replace(dataset, train=train, origin=origin)


def cifar_augmentation(
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
    *,
    pad: int = 4,
    cutout: int = 16,
) -> Transform:
    """Return the augmentation of the CIFAR sets.

    Each image of a batch, independently of the others: padded by reflection and cropped to its
    size at a uniform offset; flipped left to right with probability 1/2; with probability 1/2, a
    square around a uniform pixel, clipped at the borders, made black.

    Args:
      mean: of the dataset; a batch is normalised before it gets here, and a raw pixel of zero is
        `-mean / std` by then.
      std: of the dataset.
      pad: pixels added on each side, at least 0; 0 crops nothing.
      cutout: side of the square, at least 0; 0 cuts nothing out. The square starts `cutout // 2`
        pixels above and left of its centre.

    Returns:
      An `augment` for `Source`; it changes "image", (B, h, w, c), and keeps the rest.

    Raises:
      ValueError: `pad` or `cutout` is below 0.

    Example:
      >>> augment = cifar_augmentation((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
      >>> batch = {"image": np.zeros((2, 32, 32, 3), np.float32)}
      >>> augment(batch, np.random.default_rng(0))["image"].shape
      (2, 32, 32, 3)
    """
    for name, value in (("pad", pad), ("cutout", cutout)):
        if value < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more.")
    # In float32 and in this order, as `examples.normalized` does it, so that it is the same number.
    black = (np.float32(0) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)

    def augment(
        batch: Batch, rng: np.random.Generator, of: tuple[np.ndarray, int] | None = None
    ) -> Batch:
        images = batch["image"]
        held, height, width = images.shape[:3]
        rows, count = (slice(None), held) if of is None else of
        offsets = rng.integers(0, 2 * pad + 1, (count, 2))[rows]
        flipped = (rng.random(count) < 0.5)[rows]
        cut = (rng.random(count) < 0.5)[rows]
        centres = rng.integers(0, (height, width), (count, 2))[rows]
        images = _crop_and_flip(images, offsets, flipped, pad)
        hole = _squares(centres, cutout, height, width) & cut[:, None, None]
        return {**batch, "image": np.where(hole[..., None], black, images)}

    return augment


def _crop_and_flip(
    images: np.ndarray, offsets: np.ndarray, flipped: np.ndarray, pad: int
) -> np.ndarray:
    """Return a crop of each padded image, flipped or not.

    The padded images are never made: each pixel is fetched from where reflection put it.

    Args:
      images: (B, h, w, c).
      offsets: (B, 2) integers in [0, 2 pad], row and column of the crop in the padded image.
      flipped: (B,) bool.
      pad: pixels on each side.

    Returns:
      (B, h, w, c), a new array.
    """
    count, height, width = images.shape[:3]
    rows, columns = (
        np.pad(np.arange(size), pad, mode="reflect")[start[:, None] + np.arange(size)]
        for size, start in zip((height, width), offsets.T, strict=True)
    )
    columns = np.where(flipped[:, None], columns[:, ::-1], columns)
    return images[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _squares(centres: np.ndarray, side: int, height: int, width: int) -> np.ndarray:
    """Return the pixels inside a square per image.

    Args:
      centres: (B, 2) integers, row and column.
      side: side of the squares.
      height: of the images.
      width: of the images.

    Returns:
      (B, h, w) bool.
    """
    start = centres - side // 2
    rows, columns = (
        (first[:, None] <= np.arange(size)) & (np.arange(size) < first[:, None] + side)
        for size, first in zip((height, width), start.T, strict=True)
    )
    return rows[:, :, None] & columns[:, None, :]
