"""How sharp a loss is at a point: its top Hessian eigenvalue, and how far it rises nearby."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh

from llqr.typing import Array, Float, Params

Loss = Callable[[Params], Float[Array, ""]]
"""A hashable pytree, such as an `llqr.BoundObjective`: its data are not compiled in."""

SMALL = 32
"""Parameters up to which the Hessian is formed."""


@dataclass(frozen=True)
class Sharpness:
    """What `measure` found.

    Attributes:
      loss: at the point.
      eigenvalue: the algebraically largest of the Hessian.
      rises: radius -> (largest rise found in the ball, mean rise on its sphere).
    """

    loss: float
    eigenvalue: float
    rises: dict[float, tuple[float, float]]


def measure(
    loss: Loss, params: Params, radii: Sequence[float], *, steps: int = 20, draws: int = 32
) -> Sharpness:
    """Return how sharp a loss is.

    Args:
      loss: of the parameters.
      params: where.
      radii: of the balls, in the Euclidean length of all parameters together.
      steps: of the ascent in each ball.
      draws: random points on each sphere.
    """
    rises = {}
    for radius in map(float, radii):
        mean = float(mean_rise(loss, params, radius, jax.random.key(1), draws))
        rises[radius] = (worst_rise(loss, params, radius, steps=steps), mean)
    value = float(jax.jit(_call)(loss, params))
    return Sharpness(value, top_eigenvalue(loss, params), rises)


def top_eigenvalue(loss: Loss, params: Params, *, tolerance: float = 1e-3) -> float:
    """Return the algebraically largest eigenvalue of the Hessian, by Lanczos iterations (ARPACK).

    Args:
      loss: of the parameters.
      params: where.
      tolerance: relative, of the eigenvalue.
    """
    flat, unravel = ravel_pytree(params)
    size, kind = flat.size, flat.dtype
    if size <= SMALL:
        columns = jax.vmap(lambda v: ravel_pytree(_hessian_product(loss, params, unravel(v)))[0])
        return float(jnp.linalg.eigvalsh(columns(jnp.eye(size, dtype=kind)))[-1])

    def product(vector: np.ndarray) -> np.ndarray:
        v = unravel(jnp.asarray(vector.reshape(-1), kind))
        return np.asarray(ravel_pytree(_hessian_product(loss, params, v))[0])

    operator = LinearOperator((size, size), matvec=product, dtype=np.dtype(kind))  # type: ignore[call-arg]
    start = np.random.default_rng(0).normal(size=size).astype(kind)
    options: Any = {"tol": tolerance, "v0": start, "return_eigenvectors": False}
    found = eigsh(operator, k=1, which="LA", **options)
    return float(found[0])


def _call(loss: Loss, params: Params) -> Array:
    return loss(params)


@jax.jit
def _hessian_product(loss: Loss, params: Params, vector: Params) -> Params:
    return jax.jvp(jax.grad(loss), (params,), (vector,))[1]


def worst_rise(loss: Loss, params: Params, radius: float, *, steps: int = 20) -> float:
    """Return the largest rise of a loss that ascent finds at a distance of `radius`; at least 0.

    Each step goes to where the gradient points from the centre, eps <- r g(theta + eps) / |g|,
    the step of Frank and Wolfe in a ball. It starts in the direction of the gradient at the
    centre and in a random one; the best point of both ascents counts.

    Args:
      loss: of the parameters.
      params: the centre.
      radius: in the Euclidean length of all parameters together.
      steps: of each ascent.
    """
    flat, _ = ravel_pytree(params)
    zero = jnp.zeros_like(flat)
    centre, slope = _value_and_slope(loss, params, zero)
    best = 0.0
    for eps in (slope, jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)):
        for _ in range(steps + 1):
            eps = _on_sphere(eps, radius)
            value, eps = _value_and_slope(loss, params, eps)
            best = max(best, float(value - centre))
    return best


@jax.jit
def _value_and_slope(loss: Loss, params: Params, eps: Array) -> tuple[Array, Array]:
    flat, unravel = ravel_pytree(params)
    return jax.value_and_grad(lambda e: loss(unravel(flat + e)))(eps)


def _on_sphere(v: Array, radius: float) -> Array:
    return radius * v / jnp.maximum(jnp.linalg.norm(v), 1e-30)


@partial(jax.jit, static_argnames="draws")
def mean_rise(
    loss: Loss, params: Params, radius: float | Array, key: Array, draws: int
) -> Float[Array, ""]:
    """Return the mean rise of a loss over random points at a distance of `radius`."""
    flat, unravel = ravel_pytree(params)

    def at(key: Array) -> Array:
        v = jax.random.normal(key, flat.shape, flat.dtype)
        return loss(unravel(flat + radius * v / jnp.linalg.norm(v)))

    return jnp.mean(jax.lax.map(at, jax.random.split(key, draws))) - loss(params)
