"""The multilayer perceptron of the papers."""

import math
from collections.abc import Sequence
from itertools import pairwise

from flax import nnx

from llqr.typing import Array
from llqr_experiments.models.staged import Staged, call, classify, flat, log_softmax


def mlp(
    shape: Sequence[int], classes: int, *, hidden: Sequence[int] = (100, 300), rngs: nnx.Rngs
) -> Staged:
    """Return dense layers with ReLU between them, then log-softmax.

    Kernels are LeCun-normal, biases zero. A segment is a dense layer with its activation.

    Args:
      shape: of an input, without the batch; it is flattened.
      classes: number of outputs.
      hidden: widths of the hidden layers.
      rngs: random streams.

    Example:
      >>> import jax.numpy as jnp
      >>> mlp((8, 8, 1), 10, rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)
    """
    widths = [math.prod(shape), *hidden, classes]
    dense = [nnx.Linear(m, n, rngs=rngs) for m, n in pairwise(widths)]
    hows = [flat] + [call] * (len(dense) - 2)
    segments = [[(layer, how), nnx.relu] for layer, how in zip(dense, hows, strict=False)]
    return Staged([*segments, [dense[-1], log_softmax]])


def mlp_legacy(
    shape: Sequence[int], classes: int, *, hidden: Sequence[int] = (100, 300), rngs: nnx.Rngs
) -> Staged:
    """Return the same network with one stage for each dense layer and what belongs to it.

    Args:
      shape: of an input, without the batch; it is flattened.
      classes: number of outputs.
      hidden: widths of the hidden layers.
      rngs: random streams.
    """
    widths = [math.prod(shape), *hidden, classes]
    dense = [nnx.Linear(m, n, rngs=rngs) for m, n in pairwise(widths)]
    stages = [(layer, _activated) for layer in dense[:-1]]
    return Staged([[stage] for stage in [*stages, (dense[-1], classify)]])


def _activated(linear: nnx.Linear, x: Array) -> Array:
    return nnx.relu(linear(x.reshape(x.shape[0], -1)))
