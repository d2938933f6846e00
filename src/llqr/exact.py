"""Exact second-order steps inside an optax optimizer: a baseline, for small problems."""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from llqr import _replicas, lqr, metrics
from llqr._linalg import solve
from llqr._replicas import AxisName
from llqr.curvature.model import linearize
from llqr.curvature.route import Route
from llqr.errors import check_choice, check_range
from llqr.metrics import MetricLike, Reduction
from llqr.objective import BoundObjective
from llqr.tree import widen
from llqr.typing import Array, Float, Int, Number, Params

Solver: TypeAlias = Literal["cg", "riccati"]


class ExactState(NamedTuple):
    """State of `exact`."""

    steps: Int[Array, ""]  # conjugate-gradient steps of the last solve; 0 for riccati
    residual: Float[Array, ""]  # its relative residual
    base: Any  # state of the base optimizer


def exact(
    base: optax.GradientTransformation,
    *,
    metric: MetricLike = "ngd",
    damping: Number = 0.0,
    divergence_reduction: Reduction = "sum",
    solver: Solver = "cg",
    tolerance: float = 1e-8,
    max_steps: int | None = None,
    max_size: int = lqr.MAX_SIZE,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax optimizer: it sees (C + lambda I)^-1 g in place of the gradient g.

    Nothing is learned or approximated: every update solves for its own step. The cost is
    that of the solver, so this is a reference for small problems.

    Args:
      base: any optax optimizer; `optax.sgd(1.0)` takes the full step.
      metric: see `llqr.metrics`.
      damping: lambda >= 0; C is singular or indefinite for most networks, so use some.
      divergence_reduction: "sum" or "mean" over rows.
      solver: "cg", conjugate gradients on fused products, for any model; "riccati", the
        layerwise recursion, for an objective made from a staged model (`as_forward`).
      tolerance: of conjugate gradients, relative residual.
      max_steps: of conjugate gradients; None: ten times the number of parameters.
      max_size: of riccati, see `llqr.lqr.riccati`.
      axis_name: of replicas under `jax.pmap` or `jax.shard_map`, see `llqr.Route`; with cg.

    Returns:
      A transformation whose `update` requires `objective` (a `BoundObjective`) and `params`.

    Raises:
      ValueError: an unknown name or a value out of range; in `update`, a missing objective, or
        with riccati a model without stages or above `max_size`.
      NonConvexError: in `update`, J has no minimum. Inside `jit`, where nothing can be
        raised, the step is NaN instead: wrap it in `optax.apply_if_finite`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda w, x: x @ w, loss=lambda z, x: jnp.sum((z - 1.0) ** 2) / 2)
      >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> tx = llqr.exact(optax.sgd(1.0), metric="gauss_newton")
      >>> grads = jax.grad(objective)(w, x)
      >>> updates, _ = tx.update(grads, tx.init(w), w, objective=objective.bind(x))
      >>> [round(v, 4) for v in optax.apply_updates(w, updates).ravel().tolist()]
      [1.0, 0.3333]
    """
    resolved = metrics.resolve(metric)
    check_range("damping", damping, low=0)
    check_choice("divergence_reduction", divergence_reduction, ("sum", "mean"))
    check_choice("solver", solver, get_args(Solver))
    base = optax.with_extra_args_support(base)
    route = Route(axis_name=axis_name, layerwise=solver == "riccati")

    def init(params: Params) -> Any:
        return ExactState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), base.init(params))

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        objective: BoundObjective | None = None,
        **extra: Any,
    ) -> tuple[Params, Any]:
        if objective is None or params is None:
            raise ValueError("exact: update() needs params and objective=objective.bind(batch).")
        _replicas.check(axis_name)
        steps, residual = state.steps, state.residual
        if solver == "riccati":
            problem = _stage_by_stage(objective, params, resolved, damping, divergence_reduction)
            step = lqr.solve(problem, gradient=updates, max_size=max_size)
            step = jax.tree.map(jnp.negative, step)
        else:
            objective, wide = objective.widened(params)
            model = linearize(
                objective,
                wide,
                resolved,
                damping=damping,
                divergence_reduction=divergence_reduction,
                route=route,
            )
            step, info = solve(
                model.product,
                widen(updates),
                tolerance=tolerance,
                max_steps=max_steps,
                converge=False,
            )
            step = jax.tree.map(lambda s, u: s.astype(u.dtype), step, updates)
            steps, residual = info.steps, info.residual.astype(jnp.float32)
        updates, base_state = base.update(step, state.base, params, **extra)
        return updates, ExactState(steps, residual, base_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _stage_by_stage(
    objective: BoundObjective, params: Params, metric: Any, damping: Number, reduction: Reduction
) -> lqr.LQRProblem:
    forward = objective.objective.forward
    if not isinstance(forward, lqr.StagedForward) or forward.watch:
        raise ValueError(
            "exact: solver='riccati' needs the stages of the model: build the objective with "
            "forward=staged.as_forward(), staged being an llqr.lqr.StagedModel; or use "
            "solver='cg', which takes any model."
        )
    return lqr.linearize(
        forward.bound(objective.given),
        params,
        forward.inputs(objective.given),
        loss=objective.loss,
        metric=metric,
        damping=damping,
        divergence_reduction=reduction,
        mask=objective.mask(),
    )
