"""Perceptrons with tanh for numbers; a physics-informed one carries its derivatives forward.

A state holds values, their gradients and their second derivatives along each coordinate of the
points, so that an equation of second order needs no differentiation of the network, and every layer
stays a stage.

  symbol     meaning                                               shape
  v, J, S    values, gradients, second derivatives of the units    [n, units], [n, units, d] twice

    linear   v W + b,  J W,  S W
    tanh     t = tanh v,  t' J,  t' S + t'' J^2                    t' = 1 - t^2,  t'' = -2 t t'
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from llqr.typing import Array
from llqr_experiments.models.staged import Part, Staged

Terms = Callable[[Array, Array, Array], Array]
"""Of values [n, K], gradients and second derivatives [n, K, d]: further terms, [n, more]."""


class Jet(NamedTuple):
    """State between two stages."""

    value: Array  # v
    gradient: Array  # J
    second: Array  # S
    operator: Array  # coefficients of the terms in each row, [n, terms]: what is asked


def pinn(
    shape: Sequence[int],
    classes: int,
    *,
    hidden: Sequence[int] = (32, 32),
    terms: Terms | None = None,
    rngs: nnx.Rngs,
) -> Staged:
    """Return dense layers with tanh between them, then for each row the sum of terms it asks for.

    The terms are value, gradient and second derivatives of the first output, and `terms`. Kernels
    are LeCun-normal, biases zero. Inputs are (points [n, d], operator [n, 1 + 2 d + more]).

    Args:
      shape: (d,), the dimension of the points.
      classes: unknown functions, K.
      hidden: widths of the hidden layers.
      terms: further terms of an equation; None: there are none.
      rngs: random streams.

    Example:
      >>> import jax.numpy as jnp
      >>> pinn((2,), 1, rngs=nnx.Rngs(0))((jnp.zeros((3, 2)), jnp.ones((3, 5)))).shape
      (3,)
    """
    layers = [nnx.Linear(m, n, rngs=rngs) for m, n in pairwise([*shape, *hidden, classes])]
    first, *others = [(layer, _linear) for layer in layers]
    segments: list[list[Part]] = [[_lift, first], *[[_tanh, layer] for layer in others]]
    segments[-1].append(partial(_asked, terms))
    return Staged(segments)


def _lift(inputs: tuple[Array, Array]) -> Jet:
    """Of the coordinates: gradients of length 1, no second derivatives."""
    x, operator = inputs
    gradient = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), (*x.shape, x.shape[-1]))
    return Jet(x, gradient, jnp.zeros_like(gradient), operator)


def _linear(layer: nnx.Linear, jet: Jet) -> Jet:
    kernel = layer.kernel[...]
    gradient, second = (jnp.einsum("nud,uw->nwd", x, kernel) for x in (jet.gradient, jet.second))
    return Jet(layer(jet.value), gradient, second, jet.operator)


def _tanh(jet: Jet) -> Jet:
    t = jnp.tanh(jet.value)
    slope, wide = 1 - t * t, t[..., None]
    second = slope[..., None] * (jet.second - 2 * wide * jet.gradient**2)
    return Jet(t, slope[..., None] * jet.gradient, second, jet.operator)


def _asked(terms: Terms | None, jet: Jet) -> Array:
    value, gradient, second, operator = jet
    found = [value[:, :1], gradient[:, 0], second[:, 0]]
    if terms is not None:
        found.append(terms(value, gradient, second))
    return jnp.sum(operator * jnp.concatenate(found, -1), -1)


def regressor(
    shape: Sequence[int], classes: int, *, hidden: Sequence[int] = (32, 32), rngs: nnx.Rngs
) -> Staged:
    """Return dense layers with tanh between them, and one number for each row.

    Args:
      shape: (d,), the columns of a table.
      classes: 1: there is one number to tell.
      hidden: widths of the hidden layers.
      rngs: random streams.

    Example:
      >>> import jax.numpy as jnp
      >>> regressor((4,), 1, rngs=nnx.Rngs(0))(jnp.zeros((3, 4))).shape
      (3,)
    """
    first, *others = [nnx.Linear(m, n, rngs=rngs) for m, n in pairwise([*shape, *hidden, classes])]
    segments: list[list[Any]] = [[first], *[[jnp.tanh, layer] for layer in others]]
    segments[-1].append(_single)
    return Staged(segments)


def _single(outputs: Array) -> Array:
    return outputs[:, 0]
