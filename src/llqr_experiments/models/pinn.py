"""A physics-informed network: a tanh perceptron that carries its derivatives forward.

A state holds values, their gradients and their Laplacians in the coordinates of the points, so that
an equation of second order needs no differentiation of the network, and every layer stays a stage.

  symbol     meaning                                        shape
  v, J, L    values, gradients, Laplacians of the units     [n, units], [n, units, d], [n, units]

    linear   v W + b,  J W,  L W
    tanh     t = tanh v,  t' J,  t' L + t'' |J|^2            t' = 1 - t^2,  t'' = -2 t t'
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from llqr.typing import Array
from llqr_experiments.models.staged import Part, Staged


class Jet(NamedTuple):
    """State between two stages."""

    value: Array  # v
    gradient: Array  # J
    laplacian: Array  # L
    operator: Array  # (a, b) of each row, [n, 2]: what is asked of the last unit


def pinn(
    shape: Sequence[int], classes: int, *, hidden: Sequence[int] = (32, 32), rngs: nnx.Rngs
) -> Staged:
    """Return dense layers with tanh between them, then a u - b Laplacian u for each row.

    Kernels are LeCun-normal, biases zero. Inputs are (points [n, d], operator [n, 2]).

    Args:
      shape: (d,), the dimension of the points.
      classes: 1: there is one unknown function.
      hidden: widths of the hidden layers.
      rngs: random streams.

    Example:
      >>> import jax.numpy as jnp
      >>> pinn((2,), 1, rngs=nnx.Rngs(0))((jnp.zeros((3, 2)), jnp.ones((3, 2)))).shape
      (3,)
    """
    layers = [nnx.Linear(m, n, rngs=rngs) for m, n in pairwise([*shape, *hidden, classes])]
    first, *others = [(layer, _linear) for layer in layers]
    segments: list[list[Part]] = [[_lift, first], *[[_tanh, layer] for layer in others]]
    segments[-1].append(_residual)
    return Staged(segments)


def _lift(inputs: tuple[Array, Array]) -> Jet:
    """Of the coordinates: gradients of length 1, no Laplacian."""
    x, operator = inputs
    gradient = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), (*x.shape, x.shape[-1]))
    return Jet(x, gradient, jnp.zeros_like(x), operator)


def _linear(layer: nnx.Linear, jet: Jet) -> Jet:
    kernel = layer.kernel[...]
    gradient = jnp.einsum("nud,uw->nwd", jet.gradient, kernel)
    return Jet(layer(jet.value), gradient, jet.laplacian @ kernel, jet.operator)


def _tanh(jet: Jet) -> Jet:
    t = jnp.tanh(jet.value)
    slope = 1 - t * t
    squares = jnp.sum(jet.gradient**2, -1)
    laplacian = slope * (jet.laplacian - 2 * t * squares)
    return Jet(t, slope[..., None] * jet.gradient, laplacian, jet.operator)


def _residual(jet: Jet) -> Array:
    a, b = jet.operator[:, 0], jet.operator[:, 1]
    return a * jet.value[:, 0] - b * jet.laplacian[:, 0]
