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
LQR, arXiv 2605.04230): no cross-layer term is dropped. A product costs one tangent sweep
and one transpose sweep of the network.

A `Route` says how they are computed: from residuals that are kept, or again each time, or
chunk by chunk, or stage by stage. All routes give the same numbers.
"""

from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any, get_args

import jax
import jax.numpy as jnp

from llqr import _loops, _replicas, metrics
from llqr._replicas import AxisName
from llqr.curvature.chunked import chunked
from llqr.curvature.route import Route
from llqr.curvature.whole import Linearization, whole
from llqr.errors import check_choice, check_range
from llqr.metrics import Reduction
from llqr.objective import BoundObjective
from llqr.operators import (
    LinearOperator,
    ReplicatedCurvature,
    ReplicatedJacobian,
    SymmetricOperator,
)
from llqr.tree import check_inexact, norm, normal_like, vdot
from llqr.typing import Array, Float, Number, Params, PyTree

POWER_STEPS = 8
"""Power iterations behind divergence_reduction="unit"."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuadraticModel(SymmetricOperator):
    """J(u) = g.u + 1/2 u.(C / top + lambda I) u at one point, on one batch.

    Made by `linearize`. As an operator, it is C / top + lambda I. A pytree: it crosses
    `jax.jit`, so a loop over controls can compile its step once.

    Attributes:
      loss: the loss at the current parameters.
      gradient: g.
      outputs: of the forward function; with replicas, of each one's own part of the batch.
      cotangent: c, likewise.
      jacobian: J.
      curvature: C.
      damping: lambda.
      top_eigenvalue: top, by which C is divided: 1, or with divergence_reduction="unit" the
        largest eigenvalue of C.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda w, x: x @ w, loss=lambda z, x: jnp.sum((z - 1.0) ** 2) / 2)
      >>> model = llqr.linearize(
      ...     objective.bind(jnp.eye(2)), jnp.zeros(2), "gauss_newton", damping=1.0)
      >>> u = jnp.full(2, 0.5)  # the minimiser, -(C + lambda I)^-1 g
      >>> float(model.value(u)), model.product(u).tolist(), model.gradient.tolist()
      (-0.5, [1.0, 1.0], [-1.0, -1.0])

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """

    loss: Float[Array, ""]
    gradient: Params
    outputs: PyTree
    cotangent: PyTree
    jacobian: LinearOperator
    curvature: SymmetricOperator
    damping: Number
    top_eigenvalue: Number = 1.0

    @property
    def in_structure(self) -> PyTree:
        """Of the parameters."""
        return self.jacobian.in_structure

    def value(self, u: Params) -> Float[Array, ""]:
        """Return J(u), u like the parameters; its least value is at -(C / top + lambda I)^-1 g."""
        curved = self.bilinear(u, u)
        return vdot(self.gradient, u).astype(curved.dtype) + 0.5 * curved

    def product(self, u: Params) -> Params:
        """Return (C / top + lambda I) u."""
        return jax.tree.map(
            lambda c, x: (c / self.top_eigenvalue + self.damping * x).astype(c.dtype),
            self.curvature.product(u),
            u,
        )

    def bilinear(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.(C / top + lambda I) w, from tangent sweeps alone where C = J^T Q J.

        Args:
          u: a control, like the parameters.
          w: another; where it is the same object, one sweep is enough.
        """
        curved = self.curvature.bilinear(u, w) / self.top_eigenvalue
        return curved + (self.damping * vdot(u, w)).astype(curved.dtype)

    @property
    def compiles(self) -> bool:
        """Whether a product may be one compiled piece of a loop in Python."""
        return self.jacobian.compiles


def linearize(
    objective: BoundObjective,
    params: Params,
    metric: metrics.MetricLike = "ngd",
    *,
    damping: Number = 0.0,
    divergence_reduction: Reduction = "sum",
    route: Route | None = None,
) -> QuadraticModel:
    """Return the quadratic model of a bound objective at `params`.

    Args:
      objective: forward function, loss and batch.
      params: the current parameters; floating-point leaves only.
      metric: see `llqr.metrics`.
      damping: lambda >= 0, added to the curvature of every parameter.
      divergence_reduction: "sum" or "mean" over rows (no effect on newton and gauss_newton,
        which take the loss as it is), or "unit": C is divided by an estimate of its largest
        eigenvalue, so that damping is relative to it.
      route: how products are computed.

    Raises:
      TypeError: a parameter that is not floating-point.
      ValueError: unknown metric, a value out of range, a mask that does not fit the rows, or
        a route that the objective does not allow.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda params, x: x @ params, loss=lambda z, x: jnp.mean(z**2))
      >>> model = llqr.linearize(objective.bind(jnp.eye(2)), jnp.ones((2, 1)), "gauss_newton")
      >>> model.product(jnp.ones((2, 1))).tolist()
      [[1.0], [1.0]]

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """
    check_inexact(params)
    check_range("damping", damping, low=0)
    check_choice("divergence_reduction", divergence_reduction, get_args(Reduction))
    metric = metrics.resolve(metric)
    route = Route() if route is None else route
    rows = metrics.over_rows(divergence_reduction)
    params = _replicas.own(params, route.axis_name)
    if route.layerwise:
        forward = objective.objective.forward
        model = layerwise_model(forward, objective, params, metric, damping, rows, route)
    elif route.chunk_size is not None:
        model = _model(objective, chunked(objective, params, metric, rows, route), damping)
    else:
        model = _model(objective, whole(objective, params, metric, rows, route), damping)
    if route.axis_name:
        adds = rows == "sum" and not metrics.uses_loss(metric)
        model = _of_all(model, route.axis_name, adds=adds)
    return with_unit_top(model) if divergence_reduction == "unit" else model


def _model(
    objective: BoundObjective, linearization: Linearization, damping: Number
) -> QuadraticModel:
    """Add what the fused routes take from the outputs: loss, cotangent and gradient."""
    outputs, jacobian, curvature = linearization
    loss, cotangent = jax.value_and_grad(objective.loss)(outputs)
    gradient = jacobian.vjp(cotangent)
    return QuadraticModel(loss, gradient, outputs, cotangent, jacobian, curvature, damping)


def _of_all(model: QuadraticModel, axis_name: AxisName, *, adds: bool) -> QuadraticModel:
    """The model of the whole batch, from that of each replica's own part."""
    return replace(
        model,
        loss=_replicas.mean(model.loss, axis_name),
        gradient=_replicas.mean(model.gradient, axis_name),
        jacobian=ReplicatedJacobian(model.jacobian, axis_name),
        curvature=ReplicatedCurvature(model.curvature, axis_name, adds),
    )


@singledispatch
def layerwise_model(
    forward: Any, objective: BoundObjective, params: Params, metric: PyTree,
    damping: Number, reduction: str, route: Route,
) -> QuadraticModel:  # fmt: skip
    """Return the model by the layerwise route; `llqr.lqr` knows how, for staged models.

    Args:
      forward: of the objective; its type chooses the implementation.
      objective: forward function, loss and batch.
      params: the current parameters.
      metric: a resolved metric, see `llqr.metrics`.
      damping: lambda >= 0.
      reduction: "sum" or "mean" over rows.
      route: a layerwise one.

    Raises:
      ValueError: a forward function without stages, or one that watches some of them.
    """
    raise ValueError(
        "the layerwise route needs the stages of the model: make the objective with "
        "forward=staged.as_forward(), staged being an llqr.lqr.StagedModel; or use the fused "
        f"route. Got the forward function {forward!r}."
    )


def with_unit_top(model: QuadraticModel) -> QuadraticModel:
    """Return the model with C divided by an estimate of its largest absolute eigenvalue.

    POWER_STEPS power iterations v <- C v / |v| from a fixed normal draw; |v| is the estimate.
    C = 0 stays 0.
    """
    python = _loops.in_python(model.gradient)
    run = _loops.compiled if python and model.compiles else _loops.direct
    step = lambda v: run(power_step, None, model.curvature, v)  # noqa: E731
    start = normal_like(model.gradient, jax.random.key(0))
    length = norm(_loops.repeat(step, start, POWER_STEPS, python=python))
    usable = jnp.isfinite(length) & (length > 0)
    return replace(model, top_eigenvalue=jnp.where(usable, length, 1.0))


def power_step(_: None, curvature: SymmetricOperator, v: Params) -> Params:
    """Return C v / |v|: its length tends to the largest absolute eigenvalue of C.

    Args:
      curvature: C.
      v: not zero; the last power step.
    """
    length = norm(v)
    length = jnp.where(length > 0, length, 1.0)
    return curvature.product(jax.tree.map(lambda x: (x / length).astype(x.dtype), v))
