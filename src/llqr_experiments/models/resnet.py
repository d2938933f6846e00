"""ResNet-18 for images of 32x32 and ResNet-50 for 224x224 (He et al., arXiv 1512.03385)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from flax import nnx

from llqr_experiments.models.staged import (
    Part,
    Staged,
    add_relu,
    fork,
    main,
    pool_and_classify,
    skip,
)

_norm = partial(nnx.BatchNorm, momentum=0.99, epsilon=1e-5)
STAGES = 4


def conv(fan_in: int, fan_out: int, window: int, stride: int = 1, *, rngs: nnx.Rngs) -> nnx.Conv:
    """A square convolution with SAME padding and no bias."""
    return nnx.Conv(fan_in, fan_out, (window, window), stride, use_bias=False, rngs=rngs)


def resnet18(
    shape: Sequence[int], classes: int, *, width: int = 64, depth: int = 2, rngs: nnx.Rngs
) -> Staged:
    """Return the residual network of basic blocks whose stem keeps the resolution.

    Args:
      shape: (height, width, channels) of an image.
      classes: number of outputs.
      width: channels of the first of four stages; each further one has twice as many.
      depth: blocks in each stage.
      rngs: random streams.
    """
    stem: list[Part] = [conv(shape[-1], width, 3, rngs=rngs), _norm(width, rngs=rngs), nnx.relu]
    return _residual([stem], _basic, width, width, [depth] * STAGES, classes, rngs)


def resnet50(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 64,
    depth: int | None = None,
    rngs: nnx.Rngs,
) -> Staged:
    """Return the residual network of bottleneck blocks, with the stride on the 3x3 (v1.5).

    Args:
      shape: (height, width, channels) of an image.
      classes: number of outputs.
      width: inner channels of the first of four stages; blocks return four times as many.
      depth: blocks in each stage; None: 3, 4, 6, 3.
      rngs: random streams.
    """
    stem: list[Part] = [conv(shape[-1], width, 7, 2, rngs=rngs), _norm(width, rngs=rngs), nnx.relu]
    pool = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")
    blocks = [3, 4, 6, 3] if depth is None else [depth] * STAGES
    return _residual([[*stem, pool]], _bottleneck, width, width, blocks, classes, rngs)


def _residual(
    segments: list[list[Part]],
    block: Any,
    fan_in: int,
    width: int,
    blocks: Sequence[int],
    classes: int,
    rngs: nnx.Rngs,
) -> Staged:
    """Stem, stages of blocks, head."""
    for i, number in enumerate(blocks):
        for j in range(number):
            stride = 2 if i > 0 and j == 0 else 1
            parts, fan_in = block(fan_in, width * 2**i, stride, rngs=rngs)
            segments.extend(parts)
    return Staged([*segments, [(nnx.Linear(fan_in, classes, rngs=rngs), pool_and_classify)]])


def _projection(fan_in: int, fan_out: int, stride: int, rngs: nnx.Rngs) -> list[Part]:
    """The skip branch where shapes change: a strided 1x1 convolution; else nothing."""
    if stride == 1 and fan_in == fan_out:
        return []
    return [
        (conv(fan_in, fan_out, 1, stride, rngs=rngs), skip),
        (_norm(fan_out, rngs=rngs), skip),
    ]


def _basic(fan_in: int, width: int, stride: int, *, rngs: nnx.Rngs) -> tuple[list[list[Part]], int]:
    """Two 3x3 convolutions; returns the segments and the channels that come out."""
    first: list[Part] = [
        (conv(fan_in, width, 3, stride, rngs=rngs), fork),
        (_norm(width, rngs=rngs), main),
        (nnx.relu, main),
    ]
    second: list[Part] = [
        (conv(width, width, 3, rngs=rngs), main),
        (_norm(width, rngs=rngs), main),
        *_projection(fan_in, width, stride, rngs),
        add_relu,
    ]
    return [first, second], width


def _bottleneck(
    fan_in: int, width: int, stride: int, *, rngs: nnx.Rngs
) -> tuple[list[list[Part]], int]:
    """1x1, 3x3 with the stride, 1x1 to four times the width; as `_basic`."""
    fan_out = 4 * width
    first: list[Part] = [
        (conv(fan_in, width, 1, rngs=rngs), fork),
        (_norm(width, rngs=rngs), main),
        (nnx.relu, main),
    ]
    second: list[Part] = [
        (conv(width, width, 3, stride, rngs=rngs), main),
        (_norm(width, rngs=rngs), main),
        (nnx.relu, main),
    ]
    third: list[Part] = [
        (conv(width, fan_out, 1, rngs=rngs), main),
        (_norm(fan_out, rngs=rngs), main),
        *_projection(fan_in, fan_out, stride, rngs),
        add_relu,
    ]
    return [first, second, third], fan_out
