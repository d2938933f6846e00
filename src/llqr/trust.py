r"""A trust region: the damping of an exact step, by how well the model predicts the loss.

  symbol       meaning                                                          shape
  r, R         residuals and their Jacobian (`llqr.residuals`)                  [m], [m, n]
  lambda, nu   damping, and how it grows                                        []
  d, b         step, and its geodesic correction                                [n]
  d0, mu       the step before, and how much of it goes on                      [n], []

    step       d = -R^T (R R^T + lambda)^-1 r
    momentum   d = mu d0 - R^T (R R^T + lambda)^-1 (r + mu R d0), at the first lambda that is tried
    geodesic   a = d2/dt2 r(theta + t d),  b = -1/2 R^T (R R^T + lambda)^-1 a;  d + b where
               |b| < 3/4 |d|
    radius     s d + s^2 b,  s = min(1, radius / |R d|)
    trust      rho = (f0 - f1) / (f0 - 1/2 |r + R d|^2);  taken where f1 < f0 and rho > 1e-4:
               lambda <- lambda max(1/5, 1 - (2 rho - 1)^3), nu <- 2;
               else lambda <- nu lambda, nu <- 2 nu, and again;  lambda between 50 roundings of the
               largest curvature and 1000 times as much as that
    noisy      h = -g1.d0 / -g0.d0, how steeply the loss of the next batch still falls at the end of
               a step; where h > 0, lambda changes as above, to the power of min(1, 4 h);
               else lambda <- lambda 2^min(1, -4 h)

No lambda needs another Jacobian.

Sources: Nielsen, Damping parameter in Marquardt's method (IMM-REP-1999-05), for lambda; Transtrum
and Sethna (arXiv 1201.5885) for the geodesic term; Guzman-Cordero et al. (arXiv 2505.12149) and
Goldshlager, Abrahamsen, Lin (arXiv 2401.10190, SPRING) for momentum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from llqr.curvature.model import QuadraticModel
from llqr.errors import check_integer, check_range
from llqr.inverses import SKETCH, SOLVERS, Effort, Inverse
from llqr.objective import BoundObjective
from llqr.residuals import Residuals, acceleration
from llqr.tree import accurate_dtype, all_finite, divide, norm, vdot
from llqr.typing import Array, Bool, Float, Int, Params

ACCEPTED = 1e-4
"""Least share of the predicted decrease that a step must give."""
GEODESIC = 0.75
"""Longest geodesic term, by the step."""
GROWTH = 2.0**10
"""Largest nu."""
SCALE = 1.5
"""Ratio above which curvature and loss are of different scale."""
FLOOR = 50
"""Least damping: as many roundings of the largest curvature."""
CEILING = 1e3
"""Largest damping, by the largest curvature: steps are then short ones along the gradient."""
GAIN = 4.0
"""How much of the slope that is left at the end of a step changes lambda fully, inverted."""

OUTCOMES = (
    "none", "taken", "no damping lowered the loss", "the loss is not convex in the outputs",
    "the loss couples rows of the outputs", "the loss is linear along some outputs",
    "the residuals or their Jacobian are not finite", "the gradient is 0",
    "examples are not apart in the model",
)  # fmt: skip
"""What became of a step, by the number that a state holds."""

IMPOSSIBLE = (3, 4, 5, 8)
"""Those that no other damping will mend."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """`damping=llqr.Trust()`: damping by how well the quadratic model predicts the loss.

    Args:
      start: first lambda, in units of the largest curvature there.
      tries: of lambda in one step, all with one Jacobian; then none is taken.
      geodesic: whether a step follows the curvature of the residuals along it (one more pass and
        a half: second derivatives along the step). A model with a `jax.custom_vjp` has none, and
        goes without, with a warning.
      noisy: whether every step sees other examples, which no parameters fit all: mini-batches of
        data. On its own examples, with fewer of them than parameters, a step always does well;
        so damping also follows how steeply the loss of the *next* ones still falls where a step
        ended. No further pass; the last step is kept in the state. Not for fresh points of an
        equation, which its solution fits all: there is no noise at the end.
      momentum: mu in [0, 1), how much of the last step goes on where the rows of this one say
        nothing about it (SPRING): for fresh points of an equation, 0.9. Keeps the last step too.
      radius: bound on |R d|, the length of a step in the metric; None: none.
      chunk: examples whose rows of R are held at once (rows, where examples meet); None: by
        their number, all if they fit in 2^28 numbers.
      sketch: rank of the matrix that preconditions cg, as many products in every step.

    Raises:
      ValueError: a value outside its range.

    Example:
      >>> Trust(start=1e-2).tries
      8
    """

    start: float = 1e-3
    tries: int = 8
    geodesic: bool = True
    noisy: bool = False
    momentum: float = 0.0
    radius: float | None = None
    chunk: int | None = None
    sketch: int = SKETCH

    def __post_init__(self) -> None:
        check_range("Trust: start", self.start, low=0, open_low=True)
        check_integer("Trust: tries", self.tries, low=1)
        check_range("Trust: momentum", self.momentum, low=0, high=1)
        check_range("Trust: radius", self.radius, low=0, open_low=True)
        check_integer("Trust: chunk", self.chunk, low=1)
        check_integer("Trust: sketch", self.sketch, low=1)
        if self.momentum == 1:
            raise ValueError("Trust: momentum must lie in [0, 1), got 1: steps would never end.")

    @property
    def remembers(self) -> bool:
        """Whether the last step is kept."""
        return self.noisy or self.momentum > 0


class TrustState(NamedTuple):
    """What a trust region remembers, and what its last step did."""

    damping: Float[Array, ""]  # lambda; 0 before the first step
    growth: Float[Array, ""]  # nu
    tries: Int[Array, ""]  # of the last step
    refused: Int[Array, ""]  # steps so far that were not taken: the parameters stayed
    ratio: Float[Array, ""]  # rho of the last step
    top: Float[Array, ""]  # largest curvature at the last step
    outcome: Int[Array, ""]  # of the last step: in `OUTCOMES`
    solver: Int[Array, ""]  # in `inverses.SOLVERS`; 0 before the first step
    residuals: Int[Array, ""]  # m
    rank: Int[Array, ""]  # of R at the last step; 0: not looked for
    room: Float[Array, ""]  # h: how steeply this loss still fell after the step before; with noisy
    slope: Float[Array, ""]  # -g.d of the last step, where it is remembered
    last: Any = ()  # the last step as it was taken, where it is remembered


@dataclass(frozen=True)
class TrustReport:
    """A trust region in words; `print` it. Made by `llqr.inspect`."""

    solver: str  # "" before the first step
    residuals: int
    parameters: int
    rank: int
    damping: float
    curvature: float  # the largest
    ratio: float
    tries: int
    refused: int
    outcome: str
    digits: float  # of the parameters' dtype: one rounding, relative
    unsolved: float = 0.0  # relative residual of conjugate gradients, the largest of the last step

    @property
    def advice(self) -> tuple[str, ...]:
        """What looks wrong, and what to try, in sentences; empty if nothing does."""
        return tuple(self._advice())

    def _advice(self) -> Iterator[str]:
        if not self.solver:
            yield "no step was made yet: update() takes params and objective=objective.bind(batch)."
            return
        least = FLOOR * self.digits * self.curvature
        ends = self.outcome == OUTCOMES[2] and self.damping >= CEILING / 2 * self.curvature
        if self.outcome != OUTCOMES[1] and not ends:
            yield f"the last step was not taken: {self.outcome}. {REMEDIES[self.outcome]}"
        if self.outcome == OUTCOMES[1] and self.ratio > SCALE:
            yield (
                f"the loss falls by {self.ratio:.1f} times what the model says: the metric is "
                "larger than the loss's own curvature. metric='gauss_newton' is of its scale; ngd "
                "wants divergence_reduction='mean' for a mean over rows, and gaussian a loss of "
                "half the squares."
            )
        if self.unsolved > 1e-2:
            yield (
                f"conjugate gradients ended at a relative residual of {self.unsolved:.0e}: a "
                "larger Trust(sketch=), or more max_steps."
            )
        if not (ends or self.damping <= 2 * least):
            return
        where = "no step lowers the loss, however short" if ends else "the damping is at its floor"
        if self.digits > 1e-10:
            yield (
                f"{where}: float32 has no more digits, and errors stop at about 1e-3. "
                "jax.config.update('jax_enable_x64', True), with parameters and data in float64."
            )
        else:
            yield (
                f"{where}: the loss is at a minimum up to rounding. What error is left lies "
                "between the rows, in their noise or in the model: more rows, other weights, a "
                "wider model."
            )

    def __str__(self) -> str:
        if not self.solver:
            return "exact steps: none yet"
        kind = {
            "dual": f"a factorisation of R R^T, {self.residuals} x {self.residuals}",
            "primal": f"a factorisation of R^T R, {self.parameters} x {self.parameters}",
            "cg": "conjugate gradients, preconditioned by a sketch",
            "riccati": "the layerwise recursion",
        }[self.solver]
        fewer = self.residuals < self.parameters
        lines = [
            ("solver", f"{self.solver}: {kind}"),
            (
                "rows of R",
                f"{self.residuals:,} residuals in {self.parameters:,} parameters"
                + (", which can meet all of them" if fewer else ""),
            ),
            (
                "rank",
                (f"{self.rank:,}" if self.rank else "unknown")
                + (" of the sketch" if self.solver == "cg" else ""),
            ),
            ("damping", f"{self.damping:.1e}, largest curvature {self.curvature:.1e}"),
            (
                "last step",
                f"{self.outcome}, {self.tries} tries, {self.ratio:.2f} of the prediction",
            ),
            ("not taken", f"{self.refused:,} steps"),
        ]
        return "\n".join(f"{name:<10} {words}" for name, words in lines)


REMEDIES = {
    OUTCOMES[0]: "",
    OUTCOMES[2]: (
        "Where rho is small again and again, the model is far from the loss: a larger "
        "Trust(start=), more tries, or scales of inputs and outputs near 1. At the end of a run it "
        "is rounding that is left."
    ),
    OUTCOMES[3]: (
        "The metrics ngd and gaussian are convex, of their own: metric='ngd' beside a mean over "
        "rows, metric='gaussian' beside half the mean of squares."
    ),
    OUTCOMES[4]: (
        "A sum or mean over rows has a root row by row; two outputs that the loss couples belong "
        "into one array, along its last axis. llqr.exact(metric='gauss_newton', damping=1e-3) "
        "takes any convex loss, by conjugate gradients."
    ),
    OUTCOMES[5]: (
        "A least-squares model has no curvature there at this point. "
        "llqr.exact(metric='gauss_newton', damping=1e-3) takes any convex loss, by conjugate "
        "gradients."
    ),
    OUTCOMES[6]: "Look for NaN in the batch, and for derivatives that are infinite (a root at 0).",
    OUTCOMES[7]: "The loss is at a minimum, or no row depends on the parameters (rank 0).",
    OUTCOMES[8]: (
        "Rows of R that are made example by example are not those of the whole model: it mixes "
        "examples, asks how many there are, returns them in another order, or draws random numbers "
        "for all of them from one key. Objective(..., batch_axes=lambda batch: None) takes the "
        "rows from the whole."
    ),
}
"""What to do about an outcome."""


def report(state: TrustState, unsolved: Array, parameters: int, dtype: Any) -> TrustReport:
    """Return what a state says, on the host.

    Args:
      state: of a trust region.
      unsolved: relative residual of conjugate gradients.
      parameters: n.
      dtype: of the parameters, the widest.
    """
    known = jax.device_get(state._replace(last=()))
    return TrustReport(
        solver=SOLVERS[int(known.solver)] if int(known.outcome) else "",
        residuals=int(known.residuals),
        parameters=parameters,
        rank=int(known.rank),
        damping=float(known.damping),
        curvature=float(known.top),
        ratio=float(known.ratio),
        tries=int(known.tries),
        refused=int(known.refused),
        outcome=OUTCOMES[int(known.outcome)],
        digits=float(jnp.finfo(dtype).eps),
        unsolved=float(unsolved),
    )


def start(options: Trust, params: Params) -> TrustState:
    """Return the state before the first step."""
    number = lambda: jnp.zeros((), accurate_dtype(params))  # noqa: E731
    count = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    last = jax.tree.map(jnp.zeros_like, params) if options.remembers else ()
    return TrustState(
        number(), number() + 2, count(), count(), number(), number(), count(), count(), count(),
        count(), number(), number(), last,
    )  # fmt: skip


class _Tried(NamedTuple):
    """Where the search for a damping is."""

    tries: Int[Array, ""]
    taken: Bool[Array, ""]
    last: Bool[Array, ""]  # there is no larger damping
    damping: Float[Array, ""]
    growth: Float[Array, ""]
    ratio: Float[Array, ""]
    step: Float[Array, " n"]
    steps: Int[Array, ""]  # of conjugate gradients
    unsolved: Float[Array, ""]  # their relative residual, the largest


def search(
    options: Trust, solver: str, inverse: Inverse, found: Residuals, model: QuadraticModel,
    objective: BoundObjective, params: Params, state: TrustState, bends: bool,
) -> tuple[Params, Effort, TrustState]:  # fmt: skip
    """Return the step that lowers the loss, zeros where none does.

    Args:
      options: of the trust region.
      solver: behind the inverse.
      inverse: of the curvature at `params`.
      found: the residuals there; where they or the inverse cannot be believed, no step is taken.
      model: of the loss there.
      objective: the loss.
      params: where.
      state: of the step before.
      bends: whether a step has a geodesic term.

    Returns:
      The step; what it cost in conjugate gradients; and what is remembered.
    """
    flat, unravel = ravel_pytree(params)
    why = refusal(found, inverse)
    r, top = jnp.where(why == 0, found.r, 0.0), inverse.top
    before = model.loss.astype(top.dtype)
    floor, ceiling = FLOOR * jnp.finfo(top.dtype).eps * top, CEILING * top
    first = jnp.where(state.damping > 0, state.damping, options.start * top)
    carried = jnp.zeros_like(flat)
    room = _room(model.gradient, state) if options.noisy else jnp.ones_like(top)
    first = first * jnp.exp2(jnp.clip(-GAIN * room, 0.0, 1.0))
    if options.momentum:
        carried = options.momentum * ravel_pytree(state.last)[0].astype(flat.dtype)
    pushed = inverse.map.along(carried) if options.momentum else jnp.zeros_like(r)

    def attempt(tried: _Tried) -> _Tried:
        lam = jnp.clip(tried.damping, floor, ceiling)
        keeps = (tried.tries == 0).astype(flat.dtype)  # a refused step was the momentum's, maybe
        solve = inverse.at(lam)
        d, effort = solve(r + keeps * pushed)
        d = keeps * carried - d
        rd, b = inverse.map.along(d), jnp.zeros_like(d)
        steps, unsolved = tried.steps + effort.steps, jnp.maximum(tried.unsolved, effort.residual)
        if bends:
            b, effort = solve(acceleration(objective, params, unravel(d), found))
            steps, unsolved = steps + effort.steps, jnp.maximum(unsolved, effort.residual)
            short = jnp.isfinite(norm(b)) & (norm(b) / 2 < GEODESIC * norm(d))
            b = jnp.where(short, -0.5 * b, 0.0)
        share = jnp.ones_like(top)
        if options.radius is not None:
            share = jnp.minimum(1.0, divide(jnp.asarray(options.radius, rd.dtype), norm(rd), 1.0))
        step, rd = share * d + share**2 * b, share * rd
        predicted = -(r @ rd + 0.5 * rd @ rd)
        after = objective(unravel(flat + step)).astype(top.dtype)
        own = divide(before - after, predicted)
        taken = (after < before) & (own > ACCEPTED) & all_finite(step)
        shrunk = lam * _change(own) ** jnp.clip(GAIN * room, 0.0, 1.0)
        return _Tried(
            tried.tries + 1,
            taken,
            lam >= ceiling,
            jnp.where(taken, shrunk, lam * tried.growth),
            jnp.where(taken, 2.0, jnp.minimum(2 * tried.growth, GROWTH)),
            own,
            jnp.where(taken, step, 0.0),
            steps,
            unsolved,
        )

    none, never = jnp.zeros((), jnp.int32), jnp.array(False)
    begin = _Tried(
        none, never, never, first, state.growth, state.ratio, jnp.zeros_like(flat), none,
        jnp.zeros_like(top),
    )  # fmt: skip
    moves = (top > 0) & jnp.any(r != 0)
    more = lambda t: moves & ~t.taken & ~t.last & (t.tries < options.tries)  # noqa: E731
    end = jax.lax.while_loop(more, attempt, begin)
    after = TrustState(
        damping=jnp.where(moves, jnp.clip(end.damping, floor, ceiling), state.damping),
        growth=end.growth,
        tries=end.tries,
        refused=state.refused + (~end.taken).astype(jnp.int32),
        ratio=end.ratio,
        top=top,
        outcome=jnp.where(end.taken, 1, jnp.where(why != 0, why, jnp.where(moves, 2, 7))),
        solver=jnp.array(SOLVERS.index(solver), jnp.int32),
        residuals=jnp.array(found.r.size, jnp.int32),
        rank=inverse.rank,
        room=room,
        slope=state.slope,
        last=state.last,
    )
    return unravel(end.step), Effort(end.steps, end.unsolved), after


def remembering(state: TrustState, model: QuadraticModel, updates: Params) -> TrustState:
    """Return a state with the step as it was taken: what base optimizers made of it.

    Args:
      state: after the search.
      model: of the loss where the step began.
      updates: the step.
    """
    slope = -vdot(model.gradient, jax.tree.map(_like, updates, model.gradient))
    return state._replace(last=updates, slope=slope.astype(state.slope.dtype))


def _like(x: Array, other: Array) -> Array:
    return x.astype(other.dtype)


def _change(ratio: Array) -> Array:
    return jnp.maximum(0.2, 1 - (2 * ratio - 1) ** 3)


def _room(gradient: Params, state: TrustState) -> Array:
    """h: how steeply the loss of this batch falls where the last step ended; 1 if there is none."""
    last = jax.tree.map(_like, state.last, gradient)
    left = divide(-vdot(gradient, last).astype(state.slope.dtype), state.slope, 1.0)
    left = jnp.where(jnp.isfinite(left), left, -1.0)
    return jnp.where(state.slope > 0, left, 1.0)


def refusal(found: Residuals, inverse: Inverse) -> Int[Array, ""]:
    """Return why a model cannot be believed, in `OUTCOMES`; 0 where it can.

    Args:
      found: the residuals.
      inverse: of the curvature.
    """
    reasons = [
        ~found.finite, ~found.convex, ~found.separable, found.rest, ~inverse.finite,
        ~inverse.agrees,
    ]  # fmt: skip
    numbers = [jnp.asarray(number, jnp.int32) for number in (6, 3, 4, 5, 6, 8)]
    return jnp.select(reasons, numbers, jnp.zeros((), jnp.int32))
