"""Photographs that are decoded and cropped one by one, when a batch asks for them.

  training     resize to 256x256 or 480x480, each with probability 1/2; a 224x224 crop at a
               uniform offset; flip left to right with probability 1/2: anew for each image
  evaluation   resize to 256x256, the 224x224 crop in the middle

Resizing does not keep the aspect ratio; it is bilinear, over the whole area that falls on a pixel
where it makes an image smaller. Only the pixels of the crop are computed.

A JPEG of at least four times the size that it is resized to, in both directions, is decoded at
half the size or less, never below twice what it is resized to: libjpeg leaves out the highest
frequencies, which resizing would have averaged away. Pixels differ by about one level of 255.
"""

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image

from llqr_experiments.data.examples import Batch, normalized
from llqr_experiments.data.index import Index
from llqr_experiments.errors import DataError

SIDES = (256, 480)
CROP = 224


@dataclasses.dataclass(frozen=True)
class Photos:
    """The examples of one split of a set of photographs.

    Attributes:
      root: folder that the index is of.
      index: where the n images are.
      mean, std: of `pixel / 255`, one number per channel.
      augment: whether training sees random crops; otherwise it sees what evaluation sees.
    """

    root: Path
    index: Index
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False

    def __len__(self) -> int:
        return len(self.index)

    def gather(self, index: np.ndarray) -> Batch:
        """Return the central crops of the images `index`, (B,) integers.

        Returns:
          "image": (B, 224, 224, 3) float32, `(pixel / 255 - mean) / std`; "label": (B,) int32.

        Raises:
          DataError: an image is missing or corrupt.
        """
        middle = (SIDES[0] - CROP) // 2
        images = np.empty((len(index), CROP, CROP, 3), np.float32)
        first: dict[int, int] = {}  # a batch that is filled up has many copies of one example
        for row, i in enumerate(index.tolist()):
            seen = first.setdefault(i, row)
            images[row] = images[seen] if seen < row else self._view(i, SIDES[0], (middle, middle))
        return self._batch(index, images)

    def draw(
        self, index: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None = None
    ) -> Batch:
        """Return crops of the images `index`, (B,) integers, each at random; or of some rows."""
        held = slice(None) if rows is None else rows
        if not self.augment:
            return self.gather(index[held])
        count = len(index)
        sides = np.where(rng.random(count) < 0.5, *SIDES)
        corners = rng.integers(0, sides[:, None] - CROP + 1, (count, 2))
        flipped = rng.random(count) < 0.5
        index, sides, corners, flipped = (x[held] for x in (index, sides, corners, flipped))
        images = np.empty((len(index), CROP, CROP, 3), np.float32)
        for row, i in enumerate(index):
            image = self._view(i, sides[row], corners[row])
            images[row] = image[:, ::-1] if flipped[row] else image
        return self._batch(index, images)

    def _view(self, i: int, side: int, corner: np.ndarray | tuple[int, int]) -> np.ndarray:
        content = self.index.read(self.root, i)
        try:
            pixels = crop(content, side, corner)
        # Broken bytes can make a decoder raise anything.
        except Exception as error:
            raise DataError(
                f"{self.index.where(self.root, i)}: cannot be decoded ({error or type(error)}). "
                "Get the file again from where the set is from; an image in a folder can also be "
                "deleted, and the run will do without it."
            ) from error
        return normalized(pixels, self.mean, self.std, 255.0)

    def _batch(self, index: np.ndarray, images: np.ndarray) -> Batch:
        return {"image": images, "label": self.index.label[index]}


def crop(content: bytes, side: int, corner: np.ndarray | tuple[int, int]) -> np.ndarray:
    """Decode an image, resize it to a square and return a crop of that.

    Args:
      content: an image file; grey, CMYK and transparent images become RGB.
      side: of the square.
      corner: first row and column of the crop in the square, in [0, side - 224].

    Returns:
      (224, 224, 3) uint8.
    """
    top, left = int(corner[0]), int(corner[1])
    with Image.open(io.BytesIO(content)) as file:
        file.draft(None, (2 * side, 2 * side))  # for JPEG files; it never goes below this size
        image = _rgb(file)
    width, height = image.size
    # In this order, so that the last row and column end where the image does, to the bit.
    box = (
        left * width / side,
        top * height / side,
        (left + CROP) * width / side,
        (top + CROP) * height / side,
    )
    return np.asarray(image.resize((CROP, CROP), Image.Resampling.BILINEAR, box=box))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
