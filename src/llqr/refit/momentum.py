"""The momentum of a streaming learner, and what P multiplies."""

import jax.numpy as jnp

from llqr.refit.options import Streaming
from llqr.typing import Array, Bool

MOMENTUM = "momentum"
"""Its slot."""


def is_usable(x: Array) -> Bool[Array, ""]:
    """Whether a gradient can be remembered: it is finite, and its squares are."""
    return jnp.isfinite(jnp.sum(x * x))


def momentum(options: Streaming, before: Array, seen: Array, usable: Bool[Array, ""]) -> Array:
    """Return m after one more gradient; as it was after one that is not finite."""
    return jnp.where(usable, options.momentum * before + seen, before)


def towards(options: Streaming, seen: Array, m: Array) -> Array:
    """Return v, what P multiplies: m or, with `nesterov`, G + mu m; not finite where G is not."""
    if options.nesterov:
        return seen + options.momentum * m
    return jnp.where(is_usable(seen), m, jnp.nan)
