"""Examples: what batches are made of.

  n        number of examples
  B        batch size

A source of examples is whatever `Examples` asks for, and the streams of
`llqr_experiments.data.pipeline` know nothing else of it: what the keys of a batch are is between
the source and the model.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from llqr_experiments.data.dataset import Dataset

Batch = dict[str, np.ndarray]
Transform = Callable[..., Batch]
"""(batch, rng) -> batch. Where processes share a batch also with `of=(rows, B)`: the batch is those
rows of B, for all of which random numbers are drawn."""


class Examples(Protocol):
    """The examples of one split, which can be fetched in any order and from any thread.

    A batch is a dictionary of arrays with a first axis of B rows. "mask", (B,) bool, is the one
    key with a meaning here: rows where it is False do not count. A source may leave it out.
    """

    def __len__(self) -> int:
        """Return n."""
        ...

    def gather(self, index: np.ndarray) -> Batch:
        """Return the examples `index`, (B,) integers, as evaluation sees them: always the same."""
        ...

    def draw(
        self, index: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None = None
    ) -> Batch:
        """Return the examples `index`, (B,) integers, as training sees them.

        All randomness comes from `rng`, which must not be kept. Without augmentation it is
        `gather`. With `rows`, only these rows of the batch are returned, as they are in the whole:
        random numbers are drawn for all of them. Runs of one process do not ask for it.
        """
        ...


class Still:
    """Examples with labels of which nothing is random: a batch in training is `gather`."""

    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def gather(self, index: np.ndarray) -> Batch:
        """Return the examples `index`, (B,) integers."""
        raise NotImplementedError

    def draw(
        self, index: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None = None
    ) -> Batch:
        """Return the examples `index`, or some rows of them."""
        del rng
        return self.gather(index if rows is None else index[rows])


@dataclasses.dataclass(frozen=True)
class Source:
    """The examples of one split of a dataset in memory.

    Attributes:
      images: (n, h, w, c), raw pixels.
      labels: (n,), int32.
      mean, std, scale: as in `Dataset`.
      augment: random change of a normalised batch; it must keep the entries that it does not
        change. None: training sees what evaluation sees.
    """

    images: np.ndarray
    labels: np.ndarray
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    scale: float
    augment: Transform | None = None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        split: Literal["train", "test"],
        augment: Transform | None = None,
    ) -> "Source":
        """Return a split of `dataset`."""
        part = dataset.train if split == "train" else dataset.test
        constants = dataset.mean, dataset.std, dataset.scale
        return cls(part.images, part.labels, *constants, augment)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: np.ndarray) -> Batch:
        """Return the examples `index`, (B,) integers.

        Returns:
          "image": (B, h, w, c) float32, `(pixel / scale - mean) / std`; "label": (B,) int32.
        """
        image = normalized(self.images[index], self.mean, self.std, self.scale)
        return {"image": image, "label": self.labels[index].astype(np.int32)}

    def draw(
        self, index: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None = None
    ) -> Batch:
        """Return the examples `index` as `gather` does, augmented; of a batch some rows."""
        batch = self.gather(index if rows is None else index[rows])
        if self.augment is None:
            return batch
        if rows is None:
            return self.augment(batch, rng)
        return self.augment(batch, rng, of=(rows, len(index)))


def normalized(
    pixels: np.ndarray,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
    scale: float,
) -> np.ndarray:
    """Return `(pixel / scale - mean) / std`.

    Args:
      pixels: (..., w, c), of any type; not written to.
      mean: one number or c.
      std: one number or c.
      scale: one number.

    Returns:
      A new array of the shape of `pixels`, float32.

    Example:
      >>> normalized(np.array([[[0, 255]]], np.uint8), (0.5, 0.0), (0.5, 2.0), 255.0).tolist()
      [[[-1.0, 0.5]]]
    """
    result = pixels.astype(np.float32, order="C")
    # In place: one array of this size per batch and not four. Row by row of pixels, with the
    # constants repeated: numpy is slow where the innermost axis has c = 3 entries.
    width, channels = result.shape[-2:]
    rows = result.reshape(-1, width * channels)
    rows /= np.float32(scale)
    rows -= np.tile(np.broadcast_to(np.asarray(mean, np.float32), channels), width)
    rows /= np.tile(np.broadcast_to(np.asarray(std, np.float32), channels), width)
    return result
