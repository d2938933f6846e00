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
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llqr import metrics
from llqr._errors import check_choice, check_range
from llqr._tree import check_inexact, vdot
from llqr._types import Array, Float, Number, Params, PyTree
from llqr.metrics import Reduction
from llqr.objective import BoundObjective


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuadraticModel:
    """J(u) = g.u + 1/2 u.(J^T Q J + lambda I) u at one point, on one batch.

    Made by `linearize`. A pytree whose leaves are the residuals of the linearisation: it
    crosses `jax.jit`, so a loop over controls can compile its step once. A full Hessian
    has the same form with the parameters themselves as outputs: J the identity, Q the
    Hessian, c the gradient.

    Attributes:
      loss: the loss at the current parameters.
      gradient: g.
      cotangent: c.
      tangent: u -> J u.
      curvature: v -> Q v on output tangents.
      damping: lambda.
    """

    loss: Float[Array, ""]
    gradient: Params
    cotangent: PyTree
    tangent: Callable[[Params], PyTree]
    curvature: Callable[[PyTree], PyTree]
    damping: Number

    def value(self, u: Params) -> Float[Array, ""]:
        """Return J(u)."""
        v = self.tangent(u)
        return self._value(u, v, self.curvature(v))

    def value_and_gradient(self, u: Params) -> tuple[Float[Array, ""], Params]:
        """Return J(u) and dJ/du = g + (C + lambda I) u from one tangent and one transpose sweep."""
        v = self.tangent(u)
        q = self.curvature(v)
        gradient = self._pull_back(jax.tree.map(jnp.add, self.cotangent, q))
        return self._value(u, v, q), self._damped(gradient, u)

    def product(self, u: Params) -> Params:
        """Return (C + lambda I) u."""
        return self._damped(self._pull_back(self.curvature(self.tangent(u))), u)

    def _value(self, u: Params, v: PyTree, q: PyTree) -> Float[Array, ""]:
        return vdot(self.cotangent, v) + 0.5 * vdot(v, q) + 0.5 * self.damping * vdot(u, u)

    def _damped(self, curved: Params, u: Params) -> Params:
        return jax.tree.map(lambda d, x: (d + self.damping * x).astype(d.dtype), curved, u)

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
      ValueError: unknown metric, a value out of range, or a mask that does not fit the rows.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda params, x: x @ params, loss=lambda z, x: jnp.mean(z**2))
      >>> model = llqr.linearize(objective.bind(jnp.eye(2)), jnp.ones((2, 1)), "gauss_newton")
      >>> model.product(jnp.ones((2, 1))).tolist()
      [[1.0], [1.0]]
    """
    check_inexact(params)
    check_range("damping", damping, low=0)
    check_choice("divergence_reduction", divergence_reduction, ("sum", "mean"))
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
    return QuadraticModel(loss, gradient, cotangent, tangent, curvature, damping)


def _full_hessian(
    objective: BoundObjective, params: Params, metric: PyTree, damping: Number, reduction: Reduction
) -> QuadraticModel:
    """C = second derivative of the loss, or of a divergence, in the parameters."""
    if metrics.uses_loss(metric):
        (loss, gradient), hessian = jax.linearize(jax.value_and_grad(objective), params)
        hessian = _Second(hessian)
    else:
        loss, gradient = jax.value_and_grad(objective)(params)
        reference = jax.lax.stop_gradient(objective.outputs(params))

        def potential(p: Params) -> Float[Array, ""]:
            z = objective.outputs(p)
            return metrics.potential(metric, z, reference, objective.mask(), reduction)

        _, hessian = jax.linearize(jax.grad(potential), params)
    identity = jax.tree_util.Partial(_identity)
    return QuadraticModel(loss, gradient, gradient, identity, hessian, damping)


def _identity(u: Params) -> Params:
    return u


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Second:
    """The gradient's half of a linearised (loss, gradient): u -> Hessian u."""

    tangent: Callable[[Params], tuple[Array, Params]]

    def __call__(self, u: Params) -> Params:
        return self.tangent(u)[1]
