r"""What a method does on a toy function: exact steps, damped as needed, or an optimizer as it is.

symbol   meaning                                        shape
theta    the variables                                  [d]
f, g, H  the function, its gradient and its Hessian     [], [d], [d, d]
lambda   damping of the exact methods                   []
u        a step                                         [d]
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llqr
from llqr import lqr
from llqr.typing import Array, Params
from llqr_experiments.study.toy_functions import Toy

LEAST_DAMPING, MOST_DAMPING = 1e-12, 1e20
"""Where the damping stays: below, it is zero to rounding; above, the step is."""

FACTOR = 4.0
"""By which the damping grows where a step fails, and shrinks where it succeeds."""

LOST = 1e8
"""A variable larger than this has diverged."""


@dataclass
class Course:
    """What one method did.

    Attributes:
      thetas: the points, from the start on; one more than iterations.
      values: f at each.
      seconds: when each was reached, on the run's clock.
      outcome: converged, stalled, diverged or still falling.
      raised: how often the damping was increased; None for undamped methods.
      refits: how many there were, and in how many of them a guard kept an old block; None
        without a preconditioner.
    """

    thetas: list[np.ndarray] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    outcome: str = ""
    raised: int | None = None
    refits: tuple[int, int] | None = None

    @property
    def iterations(self) -> int:
        """Steps taken."""
        return len(self.thetas) - 1


@partial(jax.jit, static_argnames="toy")
def value_at(toy: Toy, theta: Array) -> Array:
    """Return f."""
    return toy(theta)


@partial(jax.jit, static_argnames="toy")
def newton_step(toy: Toy, theta: Array, damping: Array) -> Array:
    """Return -(H + lambda I)^-1 g by the fused route; NaN where the matrix is not positive."""
    model = llqr.linearize(toy.objective(), toy.params(theta), "newton", damping=damping)
    product = jax.vmap(lambda u: toy.theta(model.product(toy.params(u))))
    factor = jax.scipy.linalg.cho_factor(product(jnp.eye(theta.size)), lower=True)
    return -jax.scipy.linalg.cho_solve(factor, toy.theta(model.gradient))


@partial(jax.jit, static_argnames="toy")
def lqr_step(toy: Toy, theta: Array, damping: Array) -> Array:
    """Return the same step by the Riccati recursion over the stages; NaN likewise.

    Outside `jit` the recursion raises `llqr.lqr.NonConvexError` there; inside, the Cholesky
    factor of the stage that has no minimum is NaN, and with it the step.
    """
    problem = lqr.linearize(
        toy.staged, toy.params(theta), toy.inputs, loss=jnp.sum, metric="newton", damping=damping
    )
    return toy.theta(lqr.solve(problem))


class Damped:
    """An exact method made globally convergent (Levenberg-Marquardt).

    Newton's step is a minimum only where H + lambda I is positive, and even there f can rise.
    lambda grows by a factor until the step exists and f decreases, and shrinks after success.

    Args:
      toy: the function.
      step: (toy, theta, lambda) -> u, NaN where there is none.
      damping: the first lambda.
    """

    def __init__(self, toy: Toy, step: Callable[..., Array], damping: float):
        self._toy, self._step = toy, step
        self.damping, self.raised = max(damping, LEAST_DAMPING), 0

    def __call__(self, theta: Array, value: float) -> Array | None:
        """Return the next point; None if no damping gives a decrease."""
        while self.damping <= MOST_DAMPING:
            trial = theta + self._step(self._toy, theta, self.damping)
            if float(value_at(self._toy, trial)) < value:  # False for NaN
                self.damping = max(self.damping / FACTOR, LEAST_DAMPING)
                return trial
            self.damping *= FACTOR
            self.raised += 1
        return None


@partial(jax.jit, static_argnames=("toy", "tx"))
def _optax_step(
    toy: Toy, tx: optax.GradientTransformationExtraArgs, params: Params, state: Any
) -> tuple[Params, Any]:
    objective = toy.objective()
    grads = jax.grad(objective)(params)
    updates, state = tx.update(grads, state, params, objective=objective)
    return optax.apply_updates(params, updates), state


class Optax:
    """An optax optimizer, LLQR or not, taken as it is: nothing checks that f decreases."""

    def __init__(self, toy: Toy, tx: optax.GradientTransformationExtraArgs, theta: Array):
        self._toy, self._tx = toy, tx
        self._state: Any = tx.init(toy.params(theta))
        self.refits = self.guarded = 0

    def __call__(self, theta: Array, value: float) -> Array | None:
        """Return the next point."""
        params, self._state = _optax_step(self._toy, self._tx, self._toy.params(theta), self._state)
        return self._toy.theta(params)

    def count(self) -> None:
        """Count the refit of the last step, if it had one."""
        info = llqr.find(self._state).refit
        if int(info.refits) > self.refits:
            self.refits = int(info.refits)
            self.guarded += int(info.guarded) > 0


def follow(
    toy: Toy,
    advance: Callable[[Array, float], Array | None],
    start: Array,
    *,
    iterations: int,
    tolerance: float,
    now: Callable[[], float] = time.perf_counter,
) -> Course:
    """Iterate until f is within `tolerance` of its minimum, or nothing is left to try.

    Args:
      toy: the function.
      advance: (theta, f) -> next theta, or None if the method cannot go on.
      start: the first theta.
      iterations: most steps.
      tolerance: of f above the minimum.
      now: seconds.
    """
    course, theta = Course(), start
    for step in range(iterations + 1):
        value = float(value_at(toy, theta))
        course.thetas.append(np.asarray(theta))
        course.values.append(value)
        course.seconds.append(now())
        if not math.isfinite(value) or np.abs(course.thetas[-1]).max() > LOST:
            course.outcome = "diverged"
            return course
        if value - toy.value <= tolerance:
            course.outcome = "converged"
            return course
        if step == iterations:
            break
        following = advance(theta, value)
        if following is None:
            course.outcome = "stalled"
            return course
        theta = following
    course.outcome = "stalled" if _stalled(toy, course.values) else "still falling"
    return course


def _stalled(toy: Toy, values: list[float]) -> bool:
    """Whether the last tenth of a course lowered the best f by less than 1 % of what is left."""
    early = min(values[: max(1, len(values) * 9 // 10)])
    return early - min(values) < 0.01 * (early - toy.value)
