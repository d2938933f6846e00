r"""Exact second-order steps inside an optax optimizer: with a damping, or in a trust region.

With a damping they are a reference. In a trust region they train: an equation, a small precise fit.

  symbol       meaning                                                          shape
  r, R         residuals and their Jacobian (`llqr.residuals`)                  [m], [m, n]
  w, U         eigenvalues and eigenvectors of R R^T (dual) or R^T R (primal)
  lambda       damping, adapted                                                 []
  d, b         step, and its geodesic correction                                [n]

    dual       d = -R^T U (w + lambda)^-1 U^T r        m x m
    primal     d = -U (w + lambda)^-1 U^T R^T r        n x n: the same step
    geodesic   a = d2/dt2 r(theta + t d),  b = -1/2 R^T (R R^T + lambda)^-1 a;  d + b where
               |b| < 3/4 |d|
    trust      rho = (f0 - f1) / (f0 - 1/2 |r + R d|^2);  taken where f1 < f0:
               lambda <- lambda max(1/5, 1 - (2 rho - 1)^3), nu <- 2;
               else lambda <- nu lambda, nu <- 2 nu, and again

One eigendecomposition serves all lambdas that are tried.

Sources: Layerwise LQR (arXiv 2605.04230) for the step; Nielsen, Damping parameter in Marquardt's
method (IMM-REP-1999-05), for lambda; Transtrum and Sethna (arXiv 1201.5885) for the geodesic term.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from llqr import _replicas, lqr, metrics
from llqr._linalg import solve
from llqr._replicas import AxisName
from llqr.curvature.model import QuadraticModel, linearize
from llqr.curvature.route import Route
from llqr.errors import check_choice, check_integer, check_range
from llqr.metrics import MetricLike, Reduction
from llqr.objective import BoundObjective
from llqr.residuals import Residuals, acceleration, jacobian, residuals
from llqr.tree import accurate_dtype, all_finite, divide, is_traced, norm, widen
from llqr.typing import Array, Bool, Float, Int, Number, Params

Solver: TypeAlias = Literal["auto", "cg", "riccati", "dual", "primal"]

ACCEPTED = 1e-4
"""Least share of the predicted decrease that a step must give."""
GEODESIC = 0.75
"""Longest geodesic term, by the step."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """`damping=llqr.Trust()`: damping by how well the quadratic model predicts the loss.

    Args:
      start: first lambda, in units of the largest curvature there.
      tries: of lambda in one step, all with one factorisation; then none is taken.
      geodesic: whether a step follows the curvature of the residuals along it (one more pass and
        a half: second derivatives along the step).

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> Trust(start=1e-2).tries
      8
    """

    start: float = 1e-3
    tries: int = 8
    geodesic: bool = True

    def __post_init__(self) -> None:
        check_range("Trust: start", self.start, low=0, open_low=True)
        check_integer("Trust: tries", self.tries, low=1)


class TrustState(NamedTuple):
    """What a trust region remembers, and what its last step did."""

    damping: Float[Array, ""]  # lambda; 0 before the first step
    growth: Float[Array, ""]  # nu
    tries: Int[Array, ""]  # of the last step
    refused: Int[Array, ""]  # steps so far that were not taken: the parameters stayed
    ratio: Float[Array, ""]  # rho of the last step
    top: Float[Array, ""]  # largest curvature at the last step


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
    divergence_reduction: Reduction = "sum",
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
      base: any optax optimizer behind the step; None: `optax.sgd(1.0)`, the whole step.
      metric: see `llqr.metrics`. None: "ngd", and "gauss_newton" in a trust region, which compares
        the model with the loss.
      damping: lambda >= 0; C is singular or indefinite for most networks, so use some. Or a
        `Trust`, which adapts it; the step is then that of the objective, and the gradient that
        reaches `update` is not used.
      divergence_reduction: "sum" or "mean" over rows.
      solver: with a number as damping "cg", conjugate gradients on fused products, for any model
        ("auto" too); or "riccati", the layerwise recursion, for an objective made from a staged
        model (`as_forward`). In a trust region "dual", a matrix of residuals x residuals, or
        "primal", of parameters x parameters: the same step; "auto" takes the smaller.
      tolerance: of conjugate gradients, relative residual.
      max_steps: of conjugate gradients; None: ten times the number of parameters.
      max_size: of riccati, see `llqr.lqr.riccati`.
      axis_name: of replicas under `jax.pmap` or `jax.shard_map`, see `llqr.Route`; with cg.

    Returns:
      A transformation whose `update` requires `objective` (a `BoundObjective`) and `params`.

    Raises:
      ValueError: an unknown name or a value out of range; in `update`, a missing objective, or
        with riccati a model without stages or above `max_size`; in a trust region, a loss that is
        not convex in the outputs, or couples rows (inside `jit`: no step is taken, and counted).
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
    check_choice("divergence_reduction", divergence_reduction, ("sum", "mean"))
    check_choice("solver", solver, get_args(Solver))
    _check_solver(trusts, solver, resolved, axis_name)
    base = optax.with_extra_args_support(optax.sgd(1.0) if base is None else base)
    route = Route(axis_name=axis_name, layerwise=solver == "riccati")

    def init(params: Params) -> Any:
        number = lambda: jnp.zeros((), accurate_dtype(params))  # noqa: E731
        count = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
        trust = TrustState(number(), number() + 2, count(), count(), number(), number())
        kept = trust if trusts else ()
        return ExactState(count(), jnp.zeros((), jnp.float32), base.init(params), kept)

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
        steps, residual, trust = state.steps, state.residual, state.trust
        if isinstance(damping, Trust):
            objective, wide = objective.widened(params)
            model = linearize(objective, wide, resolved, divergence_reduction=divergence_reduction)
            step, trust = _trusted(damping, solver, model, objective, wide, trust)
            step = jax.tree.map(lambda s, u: s.astype(u.dtype), step, updates)
        elif solver == "riccati":
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
        return updates, ExactState(steps, residual, base_state, trust)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_solver(trusts: bool, solver: str, metric: Any, axis_name: AxisName) -> None:
    """Raise ValueError if a solver, a metric or replicas do not go with the damping."""
    why = None
    if trusts and solver in ("cg", "riccati"):
        why = f"a trust region needs a factorisation: solver='dual', 'primal', not {solver!r}"
    elif not trusts and solver in ("dual", "primal"):
        why = f"solver={solver!r} goes with damping=llqr.Trust()"
    elif trusts and metrics.is_full(metric):
        why = "a trust region needs a positive metric: gauss_newton, ngd, gaussian, not newton"
    elif trusts and axis_name:
        why = "a trust region works on whole batches: axis_name must be None"
    if why:
        raise ValueError(f"exact: {why}.")


class _Factors(NamedTuple):
    """R R^T or R^T R = U diag(w) U^T, and how they act."""

    w: Float[Array, " k"]
    solve: Callable[[Array, Array], Array]  # lambda, v [m] -> R^T (R R^T + lambda)^-1 v, [n]
    along: Callable[[Array], Array]  # d [n] -> R d, [m]


def _factors(solver: str, jacobian: Float[Array, "m n"]) -> _Factors:
    m, n = jacobian.shape
    dual = solver == "dual" or (solver == "auto" and m <= n)
    matrix = jacobian @ jacobian.T if dual else jacobian.T @ jacobian
    w, u = jnp.linalg.eigh(matrix)
    w = jnp.maximum(w, 0.0)

    def solve(damping: Array, v: Array) -> Array:
        if dual:
            return jacobian.T @ (u @ ((u.T @ v) / (w + damping)))
        return u @ ((u.T @ (jacobian.T @ v)) / (w + damping))

    return _Factors(w, solve, lambda d: jacobian @ d)


class _Tried(NamedTuple):
    """Where the search for a damping is."""

    tries: Int[Array, ""]
    taken: Bool[Array, ""]
    damping: Float[Array, ""]
    growth: Float[Array, ""]
    ratio: Float[Array, ""]
    step: Float[Array, " n"]


def _trusted(
    options: Trust, solver: str, model: QuadraticModel, objective: BoundObjective,
    params: Params, state: TrustState,
) -> tuple[Params, TrustState]:  # fmt: skip
    """Return minus the step that lowers the loss, zeros where none does, and what is remembered."""
    curvature: Any = model.curvature
    found = residuals(model.outputs, model.cotangent, curvature.output_hessian)
    flat, unravel = ravel_pytree(params)
    matrix = jacobian(objective, params, found)
    _check_residuals(found, matrix)
    usable = found.convex & found.separable & ~found.rest & all_finite((found.r, matrix))
    # A factorisation of what is not finite might never end.
    factors = _factors(solver, jnp.where(usable, matrix, 0.0))
    r = jnp.where(usable, found.r, 0.0)
    top = jnp.max(factors.w)
    floor = 50 * jnp.finfo(top.dtype).eps * top
    first = jnp.where(state.damping > 0, state.damping, options.start * top)

    def attempt(tried: _Tried) -> _Tried:
        lam = jnp.maximum(tried.damping, floor)
        d = -factors.solve(lam, r)
        rd = factors.along(d)
        predicted = -(r @ rd + 0.5 * rd @ rd)
        step = d
        if options.geodesic:
            a = acceleration(objective, params, unravel(d), found)
            b = -0.5 * factors.solve(lam, a)
            short = jnp.isfinite(norm(b)) & (norm(b) < GEODESIC * norm(d))
            step = d + jnp.where(short, b, 0.0)
        after = objective(unravel(flat + step))
        ratio = divide(model.loss - after, predicted)
        taken = (after < model.loss) & (ratio > ACCEPTED)
        shrink = jnp.maximum(0.2, 1 - (2 * ratio - 1) ** 3)
        return _Tried(
            tried.tries + 1, taken, jnp.where(taken, lam * shrink, lam * tried.growth),
            jnp.where(taken, 2.0, 2 * tried.growth), ratio, jnp.where(taken, step, 0.0),
        )  # fmt: skip

    start = _Tried(
        jnp.zeros((), jnp.int32), jnp.array(False), first, state.growth, state.ratio,
        jnp.zeros_like(flat),
    )  # fmt: skip
    more = lambda t: usable & ~t.taken & (t.tries < options.tries)  # noqa: E731
    end = jax.lax.while_loop(more, attempt, start)
    after = TrustState(
        jnp.where(usable, jnp.maximum(end.damping, floor), state.damping), end.growth, end.tries,
        state.refused + (~end.taken).astype(jnp.int32), end.ratio, top,
    )  # fmt: skip
    return jax.tree.map(jnp.negative, unravel(end.step)), after


def _check_residuals(found: Residuals, matrix: Array) -> None:
    """Raise ValueError in words where that can be, outside `jit`."""
    if is_traced((found.r, matrix)):
        return
    why = None
    if not all_finite((found.r, matrix)):
        why = "the residuals or their Jacobian are not finite"
    elif not found.convex:
        why = "the loss is not convex in the outputs; metric='ngd' or 'gaussian' is, of its own"
    elif not found.separable:
        why = "the loss couples rows of the outputs; a sum or mean over rows has a root row by row"
    elif found.rest:
        why = "the loss is linear along some outputs, where a least-squares model has no curvature"
    if why:
        raise ValueError(f"exact: {why}. solver='cg' with a number as damping takes any loss.")


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
