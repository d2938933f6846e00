"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146) for images of 32x32."""

from collections.abc import Sequence
from functools import partial

from flax import nnx

from llqr.errors import check_integer, check_range
from llqr_experiments.models.images import image_shape, preactivated_head
from llqr_experiments.models.resnet import conv
from llqr_experiments.models.staged import Part, Staged, add, fork, main, skip, twice

_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)
STEM = 16


def wide_resnet(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 10,
    units_per_group: int = 4,
    dropout: float = 0.0,
    rngs: nnx.Rngs,
) -> Staged:
    """Return three groups of pre-activated units; a segment is a unit.

    The canonical WRN-28-10 has four units in each group. The papers ran five
    (`units_per_group=5`), which is a WRN-34-10.

    Args:
      shape: (height, width, channels) of an image.
      classes: number of outputs.
      width: widening factor k: the groups have 16 k, 32 k and 64 k channels.
      units_per_group: residual units in each group; the depth is 6 times that plus 4.
      dropout: rate, between the convolutions of a unit.
      rngs: random streams.
    """
    channels = image_shape(shape)[-1]
    check_integer("width", width, low=1)
    check_integer("units_per_group", units_per_group, low=1)
    check_range("dropout", dropout, low=0, high=1)
    segments: list[list[Part]] = [[conv(channels, STEM, 3, rngs=rngs)]]
    fan_in = STEM
    for i in range(3):
        fan_out = STEM * width * 2**i
        segments.append(_first(fan_in, fan_out, 2 if i else 1, dropout, rngs))
        segments.extend(_unit(fan_out, dropout, rngs) for _ in range(units_per_group - 1))
        fan_in = fan_out
    head = preactivated_head(_norm(fan_in, rngs=rngs), nnx.Linear(fan_in, classes, rngs=rngs))
    return Staged([*segments, head])


def _first(fan_in: int, fan_out: int, stride: int, dropout: float, rngs: nnx.Rngs) -> list[Part]:
    """The unit that starts a group: both branches take the activated state."""
    return [
        _norm(fan_in, rngs=rngs),
        (nnx.relu, twice),
        (conv(fan_in, fan_out, 3, stride, rngs=rngs), main),
        *_second_half(fan_out, dropout, rngs),
        (conv(fan_in, fan_out, 1, stride, rngs=rngs), skip),
        add,
    ]


def _unit(width: int, dropout: float, rngs: nnx.Rngs) -> list[Part]:
    """A unit whose skip branch is the identity."""
    return [
        (_norm(width, rngs=rngs), fork),
        (nnx.relu, main),
        (conv(width, width, 3, rngs=rngs), main),
        *_second_half(width, dropout, rngs),
        add,
    ]


def _second_half(width: int, dropout: float, rngs: nnx.Rngs) -> list[Part]:
    return [
        (_norm(width, rngs=rngs), main),
        (nnx.relu, main),
        (nnx.Dropout(dropout, rngs=rngs), main),
        (conv(width, width, 3, rngs=rngs), main),
    ]
