r"""The quadratic model of the loss under a metric: the fused route.

  symbol    meaning                                             shape
  u         control: a perturbation of the parameters           like params
  g         gradient of the loss                                like params
  J         Jacobian of the outputs in the parameters           outputs x params
  c         gradient of the loss in the outputs                 like outputs
  Q         Hessian of the metric's potential in the outputs    outputs x outputs
  C         curvature in the parameters                         params x params
  lambda    damping                                             []

    J(u) = g.u + 1/2 u.(C + lambda I) u

with C = J^T Q J, or the full Hessian for metrics such as newton. This equals the cost of
the layerwise linear-quadratic regulator for every u, not only for small ones (Layerwise
LQR, arXiv 2605.04230): no cross-layer term is dropped. One linearisation of the network
serves the value, the gradient and the product: a value with its gradient in u costs one
tangent sweep and one transpose sweep.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from llqr import metrics
from llqr._tree import check_inexact, vdot
from llqr._types import Array, Float, Number, Params, PyTree
from llqr.metrics import Reduction
from llqr.objective import BoundObjective


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuadraticModel:
    """J(u) = g.u + 1/2 u.(C + lambda I) u at one point, on one batch.

    Made by `linearize`. A pytree whose leaves are the residuals of the linearisation: it
    crosses `jax.jit`, so a loop over controls can compile its step once.

    Attributes:
      loss: the loss at the current parameters.
      gradient: g.
      cotangent: c for a metric on outputs, None for a full Hessian.
      tangent: u -> J u, or u -> C u for a full Hessian.
      curvature: v -> Q v on output tangents; None for a full Hessian.
      damping: lambda.
    """

    loss: Float[Array, ""]
    gradient: Params
    cotangent: PyTree | None
    tangent: Callable[[Params], PyTree]
    curvature: Callable[[PyTree], PyTree] | None
    damping: Number
    full: bool = field(metadata={"static": True})

    def value(self, u: Params) -> Float[Array, ""]:
        """Return J(u)."""
        if self.full:
            return self._full(u)[0]
        v = self.tangent(u)
        return self._output_value(v, self.curvature(v)) + 0.5 * self.damping * vdot(u, u)

    def value_and_gradient(self, u: Params) -> tuple[Float[Array, ""], Params]:
        """Return J(u) and dJ/du = g + (C + lambda I) u, from one tangent sweep and one transpose."""
        if self.full:
            value, gradient = self._full(u)
        else:
            v = self.tangent(u)
            q = self.curvature(v)
            value = self._output_value(v, q) + 0.5 * self.damping * vdot(u, u)
            gradient = self._pull_back(jax.tree.map(jnp.add, self.cotangent, q))
        return value, jax.tree.map(lambda d, x: d + self.damping * x, gradient, u)

    def product(self, u: Params) -> Params:
        """Return (C + lambda I) u."""
        curved = self.tangent(u) if self.full else self._pull_back(self.curvature(self.tangent(u)))
        return jax.tree.map(lambda d, x: d + self.damping * x, curved, u)

    def _output_value(self, v: PyTree, q: PyTree) -> Float[Array, ""]:
        return vdot(self.cotangent, v) + 0.5 * vdot(v, q)

    def _full(self, u: Params) -> tuple[Float[Array, ""], Params]:
        curved = self.tangent(u)
        value = vdot(self.gradient, u) + 0.5 * vdot(u, curved)
        value = value + 0.5 * self.damping * vdot(u, u)
        return value, jax.tree.map(jnp.add, self.gradient, curved)

    def _pull_back(self, cotangent: PyTree) -> Params:
        return jax.linear_transpose(self.tangent, self.gradient)(cotangent)[0]


def linearize(
    objective: BoundObjective,
    params: Params,
    metric: metrics.MetricLike = "ngd",
    *,
    damping: Number = 0.0,
    divergence_reduction: Reduction = "sum",
) -> QuadraticModel:
    """Return the quadratic model of a bound objective at `params`.

    Args:
      objective: forward function, loss and batch.
      params: the current parameters; floating-point leaves only.
      metric: see `llqr.metrics`.
      damping: lambda >= 0, added to the curvature of every parameter.
      divergence_reduction: "sum" or "mean" over rows; no effect on newton and gauss_newton,
        which take the loss as it is.

    Raises:
      TypeError: a parameter that is not floating-point.
      ValueError: unknown metric, or a mask whose shape does not fit the outputs' rows.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda params, x: x @ params, loss=lambda z, x: jnp.mean(z**2))
      >>> model = llqr.linearize(objective.bind(jnp.eye(2)), jnp.ones((2, 1)), "gauss_newton")
      >>> model.product(jnp.ones((2, 1))).tolist()
      [[1.0], [1.0]]
    """
    check_inexact(params)
    metric = metrics.resolve(metric)
    build = _full_hessian if metrics.is_full(metric) else _output_curvature
    return build(objective, params, metric, damping, divergence_reduction)


def _output_curvature(
    objective: BoundObjective, params: Params, metric: PyTree, damping: Number, reduction: Reduction
) -> QuadraticModel:
    """C = J^T Q J: the potential's Hessian is taken in the outputs alone."""
    outputs, tangent = jax.linearize(objective.outputs, params)
    loss, cotangent = jax.value_and_grad(objective.loss)(outputs)

    def potential(z: PyTree) -> Float[Array, ""]:
        if metrics.uses_loss(metric):
            return objective.loss(z)
        return metrics.potential(metric, z, outputs, objective.mask(), reduction)

    _, curvature = jax.linearize(jax.grad(potential), outputs)
    gradient = jax.linear_transpose(tangent, params)(cotangent)[0]
    return QuadraticModel(loss, gradient, cotangent, tangent, curvature, damping, full=False)


def _full_hessian(
    objective: BoundObjective, params: Params, metric: PyTree, damping: Number, reduction: Reduction
) -> QuadraticModel:
    """C = second derivative in the parameters of the loss, or of a divergence."""
    if metrics.uses_loss(metric):
        (loss, gradient), tangent = jax.linearize(jax.value_and_grad(objective), params)
        second = _Second(tangent)
    else:
        loss, gradient = jax.value_and_grad(objective)(params)
        reference = jax.lax.stop_gradient(objective.outputs(params))

        def potential(p: Params) -> Float[Array, ""]:
            z = objective.outputs(p)
            return metrics.potential(metric, z, reference, objective.mask(), reduction)

        _, second = jax.linearize(jax.grad(potential), params)
    return QuadraticModel(loss, gradient, None, second, None, damping, full=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Second:
    """The gradient's half of a linearised (loss, gradient): u -> C u."""

    tangent: Callable[[Params], tuple[Array, Params]]

    def __call__(self, u: Params) -> Params:
        return self.tangent(u)[1]
