"""Pyramidal residual networks (Han, Kim and Kim, arXiv 1610.02915) for images of 32x32."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx

from llqr.errors import check_integer, check_range
from llqr.typing import Array
from llqr_experiments.models.images import image_shape, preactivated_head
from llqr_experiments.models.resnet import conv
from llqr_experiments.models.staged import Part, Staged, add, fork, main, skip

_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)
# On an odd side, the last window has one pixel: it must be that pixel, not its half.
_halve = partial(
    nnx.avg_pool, window_shape=(2, 2), strides=(2, 2), padding="SAME", count_include_pad=False
)
STEM = 16
EXPANSION = 4
GROUPS = 3


def pyramidnet(
    shape: Sequence[int],
    classes: int,
    *,
    alpha: float = 270,
    depth: int = 110,
    rngs: nnx.Rngs,
) -> Staged:
    """Return bottleneck units that widen by alpha / (number of units) each.

    A unit has no activation after its sum, and its skip branch has no parameters. A segment is
    a unit.

    Args:
      shape: (height, width, channels) of an image.
      classes: number of outputs.
      alpha: how many inner channels the last unit has more than the stem's 16.
      depth: 9 n + 2, for n units in each of three groups.
      rngs: random streams.

    Raises:
      ValueError: another depth.
    """
    channels = image_shape(shape)[-1]
    check_integer("depth", depth, low=11)
    check_range("alpha", alpha, low=0)
    each, rest = divmod(depth - 2, 9)
    if rest:
        raise ValueError(
            f"depth={depth} must be 9 n + 2, for n units in each of three groups: choose "
            f"{9 * each + 2} or {9 * each + 11}."
        )
    stem: list[Part] = [conv(channels, STEM, 3, rngs=rngs), _norm(STEM, rngs=rngs)]
    segments, fan_in = [stem], STEM
    units = GROUPS * each
    for i in range(units):
        width = round(STEM + alpha * (i + 1) / units)  # half to even: 23.5 gives 24
        stride = 2 if i in (each, 2 * each) else 1
        segments.append(_unit(fan_in, width, stride, rngs))
        fan_in = EXPANSION * width
    head = preactivated_head(_norm(fan_in, rngs=rngs), nnx.Linear(fan_in, classes, rngs=rngs))
    return Staged([*segments, head])


def _unit(fan_in: int, width: int, stride: int, rngs: nnx.Rngs) -> list[Part]:
    fan_out = EXPANSION * width
    return [
        (_norm(fan_in, rngs=rngs), fork),
        (conv(fan_in, width, 1, rngs=rngs), main),
        (_norm(width, rngs=rngs), main),
        (nnx.relu, main),
        (conv(width, width, 3, stride, rngs=rngs), main),
        (_norm(width, rngs=rngs), main),
        (nnx.relu, main),
        (conv(width, fan_out, 1, rngs=rngs), main),
        (_norm(fan_out, rngs=rngs), main),
        *([(_halve, skip)] if stride == 2 else []),
        (partial(_widen, fan_out), skip),
        add,
    ]


def _widen(channels: int, x: Array) -> Array:
    """Channels of zeros, behind those that there are."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))
