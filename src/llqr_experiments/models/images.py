"""What the models of images share."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from llqr.typing import Array
from llqr_experiments.models.staged import Part, log_softmax


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (height, width, channels).

    Raises:
      ValueError: the inputs are no images.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"inputs of shape {tuple(shape)}: it needs images, (height, width, channels); choose "
            "a dataset of images."
        )
    height, width, channels = shape
    return height, width, channels


def pool(x: Array) -> Array:
    """The mean over all places: [batch, 1, 1, channels]."""
    return jnp.mean(x, (1, 2), keepdims=True)


def flatten(x: Array) -> Array:
    """Each example as one vector."""
    return x.reshape(x.shape[0], -1)


def preactivated_head(norm: nnx.BatchNorm, classifier: nnx.Linear) -> list[Part]:
    """The head after residual units that end with their sum, which is not activated yet."""
    return [norm, nnx.relu, pool, flatten, classifier, log_softmax]
