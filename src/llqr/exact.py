"""Exact second-order steps inside an optax optimizer: with a damping, or in a trust region.

With a damping they are a reference: every update solves (C + lambda I) d = -g. In a trust region
(`llqr.trust`) they train: an equation, a small precise fit, an inverse problem.

Sources: Layerwise LQR (arXiv 2605.04230); see `llqr.trust` and `llqr.inverses` for theirs.
"""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from llqr import _replicas, inverses, lqr, metrics, trust
from llqr._linalg import solve
from llqr._replicas import AxisName
from llqr.curvature.model import QuadraticModel, linearize
from llqr.curvature.route import Route
from llqr.errors import check_choice, check_range
from llqr.inverses import Effort, Inverse, Solver
from llqr.metrics import MetricLike, Reduction
from llqr.objective import BoundObjective
from llqr.residuals import Residuals, curves, residuals
from llqr.tree import is_traced, replicate, shard_like, widen
from llqr.trust import OUTCOMES, REMEDIES, Trust, TrustState
from llqr.typing import Array, Float, Int, Number, Params


class ExactState(NamedTuple):
    """State of `exact`."""

    steps: Int[Array, ""]  # conjugate-gradient steps of the last solve; 0 for riccati
    residual: Float[Array, ""]  # its relative residual
    base: Any  # state of the base optimizer
    trust: Any = ()  # with damping=Trust() a TrustState


def exact(
    base: optax.GradientTransformation | None = None,
    *,
    metric: MetricLike | None = None,
    damping: Number | Trust = 0.0,
    divergence_reduction: Reduction | None = None,
    solver: Solver = "auto",
    tolerance: float = 1e-8,
    max_steps: int | None = None,
    max_size: int = lqr.MAX_SIZE,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax optimizer: it sees (C + lambda I)^-1 g in place of the gradient g.

    Nothing is learned or approximated: every update solves for its own step. With a number as
    damping the cost is that of the solver, and this is a reference for small problems. With
    `damping=llqr.Trust()` it trains them to the end, without a learning rate: the whole step is
    taken where it lowers the loss on its batch, and none where it would not.

    Args:
      base: any optax optimizer behind the step; None: `optax.sgd(1.0)`, the whole step. With a
        momentum of its own, or Adam's scaling, steps are no longer those that were tried.
      metric: see `llqr.metrics`. None: "ngd", and "gauss_newton" in a trust region, which compares
        the model with the loss.
      damping: lambda >= 0; C is singular or indefinite for most networks, so use some. Or a
        `Trust`, which adapts it; the step is then that of the objective, and the gradient that
        reaches `update` is not used.
      divergence_reduction: "sum" or "mean" over rows, for metrics that are divergences. None:
        "sum", and "mean" in a trust region, where the metric must be of the loss's scale: ngd
        beside a mean of log-likelihoods, gaussian beside half a mean of squares.
      solver: "cg", conjugate gradients on products, for any model; "riccati", the layerwise
        recursion, for an objective made from a staged model (`as_forward`). In a trust region also
        "dual", a matrix of residuals x residuals, and "primal", of parameters x parameters, and cg
        is preconditioned by a sketch. All give the same step. "auto" is cg with a number as
        damping; in a trust region the smaller of the two matrices, up to a side of 8,192, and cg
        beyond. `llqr.inspect` says which.
      tolerance: of conjugate gradients, relative residual.
      max_steps: of conjugate gradients; None: ten times the number of parameters, in a trust region
        100 at each damping.
      max_size: of riccati, see `llqr.lqr.riccati`.
      axis_name: of replicas under `jax.pmap` or `jax.shard_map`, see `llqr.Route`; with cg.

    Returns:
      A transformation whose `update` requires `objective` (a `BoundObjective`) and `params`.

    Raises:
      ValueError: an unknown name or a value out of range; in `update`, a missing objective, or
        with riccati a model without stages or above `max_size`; in a trust region, an empty batch,
        a loss that is not convex in the outputs, couples rows, is linear or not finite, or examples
        that are not apart where they should be (inside `jit`: no step is taken, and counted).
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

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230; Transtrum
      and Sethna, arXiv 1201.5885.
    """
    trusts = isinstance(damping, Trust)
    resolved = metrics.resolve(metric or ("gauss_newton" if trusts else "ngd"))
    if not trusts:
        check_range("damping", damping, low=0)
    reduction: Reduction = divergence_reduction or ("mean" if trusts else "sum")
    check_choice("divergence_reduction", reduction, ("sum", "mean"))
    check_choice("solver", solver, inverses.SOLVERS)
    _check_solver(trusts, solver, resolved, axis_name)
    base = optax.with_extra_args_support(optax.sgd(1.0) if base is None else base)
    route = Route(axis_name=axis_name, layerwise=solver == "riccati")
    ways = inverses.Ways(solver, tolerance=tolerance, max_steps=max_steps, max_size=max_size)

    def init(params: Params) -> Any:
        kept = trust.start(damping, params) if isinstance(damping, Trust) else ()
        number = jnp.zeros((), jnp.float32)
        return ExactState(jnp.zeros((), jnp.int32), number, base.init(params), kept)

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
        steps, residual, kept, model = state.steps, state.residual, state.trust, None
        if isinstance(damping, Trust):
            model, step, effort, kept = _trusted(
                damping, ways, resolved, reduction, objective, params, kept
            )
            steps, residual = effort.steps, effort.residual.astype(jnp.float32)
            step = jax.tree.map(lambda s, p: shard_like(-s, p).astype(p.dtype), step, params)
        elif solver == "riccati":
            problem = _stage_by_stage(objective, params, resolved, damping, reduction)
            step = lqr.solve(problem, gradient=updates, max_size=max_size)
            step = jax.tree.map(jnp.negative, step)
        else:
            objective, wide = objective.widened(params)
            model = linearize(
                objective,
                wide,
                resolved,
                damping=damping,
                divergence_reduction=reduction,
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
        if isinstance(damping, Trust) and damping.remembers:
            assert model is not None
            kept = trust.remembering(kept, model, updates)
        return updates, ExactState(steps, residual, base_state, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_solver(trusts: bool, solver: str, metric: Any, axis_name: AxisName) -> None:
    """Raise ValueError if a solver, a metric or replicas do not go with the damping."""
    why = None
    if not trusts and solver in ("dual", "primal"):
        why = f"solver={solver!r} goes with damping=llqr.Trust()"
    elif trusts and metrics.is_full(metric):
        why = "a trust region needs a positive metric: gauss_newton, ngd, gaussian, not newton"
    elif trusts and axis_name:
        why = (
            "a trust region needs the whole batch in one program, since its damping and its matrix "
            "are those of all rows: axis_name must be None. Use jax.jit with a batch that is "
            "sharded over the devices in place of jax.pmap or jax.shard_map"
        )
    if why:
        raise ValueError(f"exact: {why}.")


def _trusted(
    options: Trust, ways: inverses.Ways, metric: Any, reduction: Reduction,
    objective: BoundObjective, params: Params, state: TrustState,
) -> tuple[QuadraticModel, Params, Effort, TrustState]:  # fmt: skip
    """The model of the loss, the step in its trust region, what it cost, what is remembered."""
    coarse = max(float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(params))
    objective, params = objective.widened(jax.tree.map(replicate, params))
    model = linearize(objective, params, metric, divergence_reduction=reduction)
    curvature: Any = model.curvature
    flat, _ = ravel_pytree(params)
    found = residuals(model.outputs, model.cotangent, curvature.output_hessian, flat.dtype)
    if not found.r.size:
        raise ValueError("exact: the outputs have no rows: the batch is empty.")
    regulator = partial(_stage_by_stage, objective, params, metric, 0.0, reduction)
    ways = replace(ways, chunk=options.chunk, sketch=options.sketch, coarse=coarse)
    name, inverse = inverses.damped(ways, found, model, objective, params, regulator, state.damping)
    _check_residuals(found, inverse)
    bends = options.geodesic and curves(objective, params)
    if options.geodesic and not bends:
        warnings.warn(
            "llqr: exact steps go without their geodesic term: the model has a jax.custom_vjp, and "
            "with it no second derivative along a step. Trust(geodesic=False) says that this is "
            "meant; a jax.custom_jvp in its place has one.",
            UserWarning,
            stacklevel=4,
        )
    step, effort, state = trust.search(
        options, name, inverse, found, model, objective, params, state, bends
    )
    return model, step, effort, state


def _check_residuals(found: Residuals, inverse: Inverse) -> None:
    """Raise ValueError in words where that can be, outside `jit`."""
    why = trust.refusal(found, inverse)
    if not is_traced(why) and why:
        words = OUTCOMES[int(why)]
        raise ValueError(f"exact: {words}. {REMEDIES[words]}")


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
