r"""A loss with sharp local minima on a gentle slope: where it pays to look at a neighbourhood.

symbol   meaning                                              shape
w        the variables                                        [2]
z        s * w, in which the loss is round                    [2]
c_i      centres of the potholes                              [n, 2]

    f(w) = k |z|^2 / 2 - a sum_i exp(-|z - c_i|^2 / (2 b^2))

On average over a neighbourhood f is the bowl; each pothole is a minimum of its own, a / b^2 =
18 times as sharp. s stretches one axis, so that there is a geometry to learn.
"""

import jax.numpy as jnp
import numpy as np

import llqr
from llqr.typing import Array, Float

STRETCH = (1.0, 3.0)
BOWL, DEPTH, WIDTH = 0.3, 0.4, 0.15
REACH, APART, FREE = 4.0, 0.9, 1.0
"""Half the side of the square with potholes, their least distance, and that from the minimum."""

TRAPPED = 0.1
"""Depth of the potholes at a point above which it lies in one."""


def centres() -> np.ndarray:
    """Return the centres of the potholes [n, 2]: random, apart, none near the minimum."""
    found: list[np.ndarray] = []
    for point in np.random.default_rng(0).uniform(-REACH, REACH, size=(400, 2)):
        clear = all(np.linalg.norm(point - other) > APART for other in found)
        if clear and np.linalg.norm(point) > FREE:
            found.append(point)
    return np.array(found)


def starts(number: int, seed: int) -> np.ndarray:
    """Return starting points w [number, 2], on the slope and in no pothole."""
    random, holes, found = np.random.default_rng(seed), centres(), []
    while len(found) < number:
        z = random.uniform(-REACH, REACH, 2)
        if np.linalg.norm(z) > 2.5 and np.linalg.norm(holes - z, axis=1).min() > 0.5:
            found.append(z / np.array(STRETCH))
    return np.array(found)


def depth(z: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """Return the potholes' part of the loss, >= 0."""
    distance = jnp.sum((z[..., None, :] - jnp.asarray(centres(), z.dtype)) ** 2, -1)
    return DEPTH * jnp.sum(jnp.exp(-distance / (2 * WIDTH**2)), -1)


def bowl(z: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """Return the loss without potholes."""
    return BOWL / 2 * jnp.sum(z**2, -1)


def stretched(params: dict[str, Array], _: None = None) -> Float[Array, "... 2"]:
    """Return z."""
    return params["w"] * jnp.asarray(STRETCH, params["w"].dtype)


def _loss(z: Array, _: None) -> Array:
    return bowl(z) - depth(z)


OBJECTIVE = llqr.Objective(stretched, _loss)
"""Of parameters {"w": [2]}; the batch is None."""
