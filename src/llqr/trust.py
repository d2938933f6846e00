r"""A trust region: the damping of an exact step, by how well the model predicts the loss.

  symbol       meaning                                                          shape
  r, R         residuals and their Jacobian (`llqr.residuals`)                  [m], [m, n]
  lambda, nu   damping, and how it grows                                        []
  d, b         step, and its geodesic correction                                [n]
  d0, mu       the step before, and how much of it goes on                      [n], []

    step       d = -R^T (R R^T + lambda)^-1 r
    momentum   d = mu d0 - R^T (R R^T + lambda)^-1 (r + mu R d0)
    geodesic   a = d2/dt2 r(theta + t d),  b = -1/2 R^T (R R^T + lambda)^-1 a;  d + b where
               |b| < 3/4 |d|
    radius     the step times min(1, radius / |R d|)
    trust      rho = (f0 - f1) / (f0 - 1/2 |r + R d|^2);  taken where f1 < f0:
               lambda <- lambda max(1/5, 1 - (2 rho - 1)^3), nu <- 2;
               else lambda <- nu lambda, nu <- 2 nu, and again
    fresh      of a step that was taken, rho is measured on the next batch, and
               lambda <- lambda max(1/5, 1 - (2 rho - 1)^3)^gain

One factorisation serves all lambdas that are tried.

Sources: Nielsen, Damping parameter in Marquardt's method (IMM-REP-1999-05), for lambda; Transtrum
and Sethna (arXiv 1201.5885) for the geodesic term; Guzman-Cordero et al. (arXiv 2505.12149) and
Goldshlager, Abrahamsen, Lin (arXiv 2401.10190, SPRING) for momentum.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from llqr.curvature.model import QuadraticModel
from llqr.errors import check_integer, check_range
from llqr.inverses import SKETCH, SOLVERS, Inverse
from llqr.objective import BoundObjective
from llqr.residuals import Residuals, acceleration
from llqr.tree import accurate_dtype, all_finite, divide, norm
from llqr.typing import Array, Bool, Float, Int, Params

ACCEPTED = 1e-4
"""Least share of the predicted decrease that a step must give."""
GEODESIC = 0.75
"""Longest geodesic term, by the step."""
FLOOR = 50
"""Least damping: as many roundings of the largest curvature."""
GAIN = 0.25
"""How much of the change of lambda a ratio on fresh points makes."""

OUTCOMES = (
    "none", "taken", "no damping lowered the loss", "the loss is not convex in the outputs",
    "the loss couples rows of the outputs", "the loss is linear along some outputs",
    "the residuals or their Jacobian are not finite", "the gradient is 0",
)  # fmt: skip
"""What became of a step, by the number that a state holds."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """`damping=llqr.Trust()`: damping by how well the quadratic model predicts the loss.

    Args:
      start: first lambda, in units of the largest curvature there.
      tries: of lambda in one step, all with one factorisation; then none is taken.
      geodesic: whether a step follows the curvature of the residuals along it (one more pass and
        a half: second derivatives along the step).
      fresh: whether every step sees other examples or points. How well a step did is then measured
        on those of the next step, at the price of one more loss: on its own, with fewer of them
        than parameters, a step always does well.
      momentum: mu in [0, 1), how much of the last step goes on where the examples of this one say
        nothing about it (SPRING). For fresh ones; the last step is then kept in the state.
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
    fresh: bool = False
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
        return self.fresh or self.momentum > 0


class TrustState(NamedTuple):
    """What a trust region remembers, and what its last step did."""

    damping: Float[Array, ""]  # lambda; 0 before the first step
    growth: Float[Array, ""]  # nu
    tries: Int[Array, ""]  # of the last step
    refused: Int[Array, ""]  # steps so far that were not taken: the parameters stayed
    ratio: Float[Array, ""]  # rho of the last step; with fresh, of the step before on this batch
    top: Float[Array, ""]  # largest curvature at the last step
    outcome: Int[Array, ""]  # of the last step: in `OUTCOMES`
    solver: Int[Array, ""]  # in `inverses.SOLVERS`; 0 before the first step
    residuals: Int[Array, ""]  # m
    rank: Int[Array, ""]  # of R at the last step
    predicted: Float[Array, ""]  # decrease of the loss by the last step
    last: Any = ()  # the last step as it was taken, where it is remembered


def start(options: Trust, params: Params) -> TrustState:
    """Return the state before the first step."""
    number = lambda: jnp.zeros((), accurate_dtype(params))  # noqa: E731
    count = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    last = jax.tree.map(jnp.zeros_like, params) if options.remembers else ()
    return TrustState(
        number(), number() + 2, count(), count(), number(), number(), count(), count(), count(),
        count(), number(), last,
    )  # fmt: skip


class _Tried(NamedTuple):
    """Where the search for a damping is."""

    tries: Int[Array, ""]
    taken: Bool[Array, ""]
    damping: Float[Array, ""]
    growth: Float[Array, ""]
    ratio: Float[Array, ""]
    predicted: Float[Array, ""]
    step: Float[Array, " n"]
    products: Int[Array, ""]  # steps of conjugate gradients


def search(
    options: Trust, solver: str, inverse: Inverse, usable: Bool[Array, ""], found: Residuals,
    model: QuadraticModel, objective: BoundObjective, params: Params, state: TrustState,
) -> tuple[Params, Int[Array, ""], TrustState]:  # fmt: skip
    """Return the step that lowers the loss, zeros where none does.

    Args:
      options: of the trust region.
      solver: behind the inverse.
      inverse: of the curvature at `params`.
      usable: whether the model can be believed; else no step is taken.
      found: the residuals there.
      model: of the loss there.
      objective: the loss.
      params: where.
      state: of the step before.

    Returns:
      The step; conjugate-gradient steps that it took; and what is remembered.
    """
    flat, unravel = ravel_pytree(params)
    r, top = jnp.where(usable, found.r, 0.0), inverse.top
    floor = FLOOR * jnp.finfo(top.dtype).eps * top
    first = jnp.where(state.damping > 0, state.damping, options.start * top)
    ratio, carried = state.ratio, jnp.zeros_like(flat)
    if options.fresh:
        first, ratio = _on_fresh_points(objective, params, model.loss, first, state)
    if options.momentum:
        carried = options.momentum * ravel_pytree(state.last)[0].astype(flat.dtype)
    pushed = inverse.map.along(carried) if options.momentum else jnp.zeros_like(r)

    def attempt(tried: _Tried) -> _Tried:
        lam = jnp.maximum(tried.damping, floor)
        d, products = inverse.solve(lam, r + pushed)
        step = d = carried - d
        rd = inverse.map.along(d)
        predicted = -(r @ rd + 0.5 * rd @ rd)
        if options.geodesic:
            a = acceleration(objective, params, unravel(d), found)
            b, more = inverse.solve(lam, a)
            b, products = -0.5 * b, products + more
            short = jnp.isfinite(norm(b)) & (norm(b) < GEODESIC * norm(d))
            step = d + jnp.where(short, b, 0.0)
        if options.radius is not None:
            share = jnp.minimum(1.0, divide(jnp.asarray(options.radius, rd.dtype), norm(rd), 1.0))
            predicted = -(share * (r @ rd) + 0.5 * share**2 * (rd @ rd))
            step = share * step
        after = objective(unravel(flat + step))
        own = divide(model.loss - after, predicted)
        taken = (after < model.loss) & (own > ACCEPTED)
        shrunk = lam if options.fresh else lam * _change(own)
        return _Tried(
            tried.tries + 1,
            taken,
            jnp.where(taken, shrunk, lam * tried.growth),
            jnp.where(taken, 2.0, 2 * tried.growth),
            tried.ratio if options.fresh else own,
            jnp.where(taken, predicted, 0.0),
            jnp.where(taken, step, 0.0),
            tried.products + products,
        )

    none, never = jnp.zeros((), jnp.int32), jnp.array(False)
    begin = _Tried(
        none, never, first, state.growth, ratio, jnp.zeros_like(top), jnp.zeros_like(flat), none
    )
    moves = usable & (top > 0) & jnp.any(r != 0)
    more = lambda t: moves & ~t.taken & (t.tries < options.tries)  # noqa: E731
    end = jax.lax.while_loop(more, attempt, begin)
    step = unravel(end.step)
    after = TrustState(
        damping=jnp.where(moves, jnp.maximum(end.damping, floor), state.damping),
        growth=end.growth,
        tries=end.tries,
        refused=state.refused + (~end.taken).astype(jnp.int32),
        ratio=end.ratio,
        top=top,
        outcome=_outcome(end.taken, found, usable, moves),
        solver=jnp.array(SOLVERS.index(solver), jnp.int32),
        residuals=jnp.array(found.r.size, jnp.int32),
        rank=inverse.rank,
        predicted=end.predicted,
        last=state.last,
    )
    return step, end.products, after


def _change(ratio: Array) -> Array:
    return jnp.maximum(0.2, 1 - (2 * ratio - 1) ** 3)


def _on_fresh_points(
    objective: BoundObjective, params: Params, loss: Array, damping: Array, state: TrustState
) -> tuple[Array, Array]:
    """Damping and ratio, by what the last step did to the loss of this batch."""
    before = jax.tree.map(lambda p, d: p - d.astype(p.dtype), params, state.last)
    ratio = divide(objective(before) - loss, state.predicted)
    known = (state.predicted > 0) & jnp.isfinite(ratio)
    change = _change(jnp.clip(ratio, -1.0, 1.0)) ** GAIN
    return jnp.where(known, damping * change, damping), jnp.where(known, ratio, state.ratio)


def _outcome(taken: Array, found: Residuals, usable: Array, moves: Array) -> Array:
    """In `OUTCOMES`."""
    reasons = [
        taken, ~all_finite(found.r), ~found.convex, ~found.separable, found.rest, ~usable, ~moves,
    ]  # fmt: skip
    numbers = [jnp.asarray(x, jnp.int32) for x in (1, 6, 3, 4, 5, 6, 7)]
    return jnp.select(reasons, numbers, jnp.asarray(2, jnp.int32))
