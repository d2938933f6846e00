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

from llqr import metrics
from llqr._errors import check_choice, check_range
from llqr._tree import check_inexact, norm, normal_like, vdot
from llqr._types import Array, Float, Number, Params, PyTree
from llqr.chunked import Chunked, chunked
from llqr.curvature import Curvature, Linearization, Network, whole
from llqr.metrics import Reduction
from llqr.objective import BoundObjective
from llqr.route import Route

POWER_STEPS = 8
"""Power iterations behind divergence_reduction="unit"."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuadraticModel:
    """J(u) = g.u + 1/2 u.(C / scale + lambda I) u at one point, on one batch.

    Made by `linearize`. A pytree: it crosses `jax.jit`, so a loop over controls can compile
    its step once.

    Attributes:
      loss: the loss at the current parameters.
      gradient: g.
      outputs: of the forward function.
      cotangent: c.
      network: J.
      curvature: C.
      damping: lambda.
      scale: 1, or with divergence_reduction="unit" the largest eigenvalue of C.
    """

    loss: Float[Array, ""]
    gradient: Params
    outputs: PyTree
    cotangent: PyTree
    network: Network
    curvature: Curvature
    damping: Number
    scale: Number = 1.0

    def value(self, u: Params) -> Float[Array, ""]:
        """Return J(u)."""
        curved = self.inner(u, u)
        return vdot(self.gradient, u).astype(curved.dtype) + 0.5 * curved

    def value_and_gradient(self, u: Params) -> tuple[Float[Array, ""], Params]:
        """Return J(u) and dJ/du = g + (C + lambda I) u."""
        curved = self.product(u)
        value = vdot(self.gradient, u) + 0.5 * vdot(u, curved)
        return value, jax.tree.map(jnp.add, self.gradient, curved)

    def product(self, u: Params) -> Params:
        """Return (C + lambda I) u."""
        return jax.tree.map(
            lambda c, x: (c / self.scale + self.damping * x).astype(c.dtype), self.curve(u), u
        )

    def inner(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.(C + lambda I) w, from tangent sweeps alone where C = J^T Q J."""
        curved = self.curvature.inner(u, w) / self.scale
        return curved + (self.damping * vdot(u, w)).astype(curved.dtype)

    def curve(self, u: Params) -> Params:
        """Return C u, neither scaled nor damped."""
        return self.curvature.product(u)

    @property
    def loops_in_python(self) -> bool:
        """Whether its products, outside a trace, are loops over compiled chunks."""
        return isinstance(self.network, Chunked)

    def pull_back(self, w: PyTree) -> Params:
        """Return J^T w for a cotangent of the outputs."""
        return self.network.pull_back(w)


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
    """
    check_inexact(params)
    check_range("damping", damping, low=0)
    check_choice("divergence_reduction", divergence_reduction, get_args(Reduction))
    metric = metrics.resolve(metric)
    route = Route() if route is None else route
    rows = metrics.over_rows(divergence_reduction)
    if route.layerwise:
        forward = objective.objective.forward
        model = layerwise_model(forward, objective, params, metric, damping, rows, route)
    elif route.chunk_size is not None:
        size = route.chunk_size
        model = _model(objective, chunked(objective, params, metric, rows, size), damping)
    else:
        model = _model(objective, whole(objective, params, metric, rows, route), damping)
    if divergence_reduction == "unit":
        v = power_start(model)
        for _ in range(POWER_STEPS):
            v = power_step(model, v)
        model = with_unit_scale(model, v)
    return model


def _model(
    objective: BoundObjective, linearization: Linearization, damping: Number
) -> QuadraticModel:
    """Add what the fused routes take from the outputs: loss, cotangent and gradient."""
    outputs, network, curvature = linearization
    loss, cotangent = jax.value_and_grad(objective.loss)(outputs)
    gradient = network.pull_back(cotangent)
    return QuadraticModel(loss, gradient, outputs, cotangent, network, curvature, damping)


@singledispatch
def layerwise_model(
    forward: Any, objective: BoundObjective, params: Params, metric: PyTree,
    damping: Number, reduction: str, route: Route,
) -> QuadraticModel:  # fmt: skip
    """Return the model by the layerwise route; `llqr.lqr` knows how, for staged models."""
    raise ValueError(
        "the layerwise route needs the stages of the model: make the objective with "
        "forward=staged.as_forward(), staged being an llqr.lqr.StagedModel; or use the fused "
        f"route. Got the forward function {forward!r}."
    )


# --- the largest eigenvalue -------------------------------------------------------------------


def power_start(model: QuadraticModel) -> Params:
    """Return the first vector of the power iteration: a fixed normal draw."""
    return normal_like(model.gradient, jax.random.key(0))


def power_step(model: QuadraticModel, v: Params) -> Params:
    """Return C v / |v|: its length tends to the largest absolute eigenvalue of C."""
    return model.curve(_unit(v))


def with_unit_scale(model: QuadraticModel, v: Params) -> QuadraticModel:
    """Return the model with C divided by |v|, the estimate after power iterations."""
    length = norm(v)
    usable = jnp.isfinite(length) & (length > 0)  # C = 0 stays 0
    return replace(model, scale=jnp.where(usable, length, 1.0))


def _unit(v: Params) -> Params:
    length = norm(v)
    length = jnp.where(length > 0, length, 1.0)
    return jax.tree.map(lambda x: (x / length).astype(x.dtype), v)
