"""VGG-16 with batch norm (Simonyan and Zisserman, arXiv 1409.1556), its classifier for 32x32."""

from collections.abc import Sequence
from functools import partial

from flax import nnx

from llqr.errors import check_integer, check_range
from llqr_experiments.models.images import flatten, image_shape
from llqr_experiments.models.staged import Part, Staged, log_softmax

_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)
_max_pool = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
LARGEST = 8
"""Channels of a block are at most this many times those of the first."""


def vgg16(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 3, 3, 3),
    hidden: Sequence[int] = (512, 512),
    dropout: float = 0.5,
    rngs: nnx.Rngs,
) -> Staged:
    """Return blocks of 3x3 convolutions, each halving the resolution, then dense layers.

    A segment is a block, or a dense layer with the dropout before and the activation after it.

    Args:
      shape: (height, width, channels) of an image.
      classes: number of outputs.
      width: channels of the first block; each further one has twice as many, up to 8 times.
      blocks: convolutions in each block.
      hidden: widths of the hidden dense layers.
      dropout: rate, before each of them.
      rngs: random streams.

    Raises:
      ValueError: images too small to be halved by every block.
    """
    side, other, channels = image_shape(shape)
    check_integer("width", width, low=1)
    for name, numbers in (("blocks", blocks), ("hidden", hidden)):
        for number in numbers:
            check_integer(f"every number of {name}", number, low=1)
    check_range("dropout", dropout, low=0, high=1)
    if (smallest := 2 ** len(blocks)) > min(side, other):
        raise ValueError(
            f"images of {side}x{other} pixels: its {len(blocks)} blocks halve the resolution each, "
            f"so both sides must be >= {smallest}; choose larger images or fewer blocks."
        )
    segments = []
    for i, number in enumerate(blocks):
        fan_out = width * min(2**i, LARGEST)
        segments.append(_block(channels, fan_out, number, rngs))
        channels = fan_out
    fan_in = channels * (side // smallest) * (other // smallest)
    before: list[Part] = [flatten]
    for fan_out in hidden:
        dense = nnx.Linear(fan_in, fan_out, rngs=rngs)
        segments.append([*before, nnx.Dropout(dropout, rngs=rngs), dense, nnx.relu])
        fan_in, before = fan_out, []
    return Staged([*segments, [*before, nnx.Linear(fan_in, classes, rngs=rngs), log_softmax]])


def _block(fan_in: int, fan_out: int, number: int, rngs: nnx.Rngs) -> list[Part]:
    parts: list[Part] = []
    for i in range(number):
        conv = nnx.Conv(fan_out if i else fan_in, fan_out, (3, 3), rngs=rngs)
        parts += [conv, _norm(fan_out, rngs=rngs), nnx.relu]
    return [*parts, _max_pool]
