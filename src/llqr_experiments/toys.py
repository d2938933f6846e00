r"""Toy problems: functions of two or three variables, minimised by four methods side by side.

symbol   meaning                                        shape
theta    the variables                                  [d]
f, g, H  the function, its gradient and its Hessian     [], [d], [d, d]
lambda   damping of the exact methods                   []
u        a step                                         [d]
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import llqr
from llqr import lqr
from llqr._types import Array, Params
from llqr_experiments import build, records, toy_plots
from llqr_experiments.clock import Clock
from llqr_experiments.errors import ConfigError
from llqr_experiments.spec import Config
from llqr_experiments.toy_functions import FUNCTIONS, Toy
from llqr_experiments.tracking import Trackers

NEWTON, LQR, LEARNED, DESCENT = "Newton", "exact LQR", "LLQR", "descent"

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


def run(config: Config, out_dir: Path, command: str = "") -> dict[str, Course]:
    """Minimise `config.toy.name` by every method, and write everything into `out_dir`.

    Args:
      config: validated options; those of the optimizer and of refits are the learned
        method's.
      out_dir: the run's folder; made if missing.
      command: as typed, for meta.json.

    Returns:
      What each method did, by its name.

    Raises:
      ConfigError: an illegal option; nothing was written.
    """
    with ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        clock = stack.enter_context(Clock())
        toy, start = _prepare(config)
        tx = build.optimizer(config, build.Horizon(1.0, config.toy.iterations))
        console = Console(highlight=False)
        records.write_meta(config, out_dir, command, toy=config.toy.name, start=start.tolist())
        say = partial(console.print, soft_wrap=True)
        trackers = records.open_trackers(config, f"toy {config.toy.name}", out_dir, say)
        stack.callback(trackers.close)
        say(_headline(config, toy, start))
        courses = {}
        for name in _methods(config):
            with console.status(f"{name} ..."), clock.phase(name):
                courses[name] = _follow(name, config, toy, tx, jnp.asarray(start), clock)
            _log(trackers, name, courses[name], toy, config.logging_freq)
        gap = difference(courses[NEWTON], courses[LQR])
        trackers.log(0, {"largest difference of Newton and exact LQR": gap}, clock.elapsed())
    toy_plots.paths(toy, courses, _title(config), out_dir / "paths.png")
    say("")
    console.print(_table(courses, toy, clock, config.toy.tolerance))
    say(
        f"\nThe paths of {NEWTON} and {LQR} differ by at most {gap:.1e}.   "
        f"Compiling took {clock.seconds['compile']:.1f} s more.\n"
        f"[bold]in[/] {records.shorten(out_dir)}: "
        + ", ".join(path.name for path in sorted(out_dir.iterdir()))
    )
    return courses


def difference(first: Course, second: Course) -> float:
    """Return the largest distance in a variable between two courses; infinite if one is longer."""
    if len(first.thetas) != len(second.thetas):
        return math.inf
    return float(np.abs(np.array(first.thetas) - np.array(second.thetas)).max())


def _prepare(config: Config) -> tuple[Toy, np.ndarray]:
    assert config.toy.name is not None
    toy = FUNCTIONS[config.toy.name]
    start = np.array(config.toy.start or toy.start, float)
    if start.size != len(toy.minimum):
        raise ConfigError(
            f"toy.start={config.toy.start}: {config.toy.name} has {len(toy.minimum)} variables."
        )
    return toy, start


def _methods(config: Config) -> tuple[str, ...]:
    learned = (LEARNED,) if config.use_preconditioner else ()
    return (NEWTON, LQR, *learned, DESCENT)


def _follow(
    name: str,
    config: Config,
    toy: Toy,
    tx: optax.GradientTransformationExtraArgs,
    start: Array,
    clock: Clock,
) -> Course:
    """Run one method."""
    options = config.toy
    course = partial(
        follow,
        toy,
        start=start,
        iterations=options.iterations,
        tolerance=options.tolerance,
        now=clock.elapsed,
    )
    if name in (NEWTON, LQR):
        step = newton_step if name == NEWTON else lqr_step
        damped = Damped(toy, step, options.damping)
        found = course(advance=damped)
        found.raised = damped.raised
        return found
    if name == DESCENT:
        plain = optax.with_extra_args_support(optax.sgd(options.gradient_rate))
        return course(advance=Optax(toy, plain, start))
    learned = Optax(toy, tx, start)

    def advance(theta: Array, value: float) -> Array | None:
        following = learned(theta, value)
        learned.count()
        return following

    found = course(advance=advance)
    found.refits = (learned.refits, learned.guarded)
    return found


def _log(trackers: Trackers, name: str, course: Course, toy: Toy, every: int) -> None:
    """Log a course: its first `every` steps, where the exact methods end, then each `every`th."""
    for step, (theta, value) in enumerate(zip(course.thetas, course.values, strict=True)):
        if step < every or step % every == 0 or step == course.iterations:
            values = {f"{name} value": value, f"{name} distance": _distance(theta, toy)}
            trackers.log(step, values, course.seconds[step])


def _distance(theta: np.ndarray, toy: Toy) -> float:
    return float(np.linalg.norm(theta - np.array(toy.minimum)))


def _headline(config: Config, toy: Toy, start: np.ndarray) -> str:
    def point(values: Any) -> str:
        return "(" + ", ".join(f"{v:g}" for v in values) + ")"

    return (
        f"[bold]{config.toy.name}[/]   from {point(start)}, f = {float(toy(start)):.4g}   to the "
        f"minimum at {point(toy.minimum)}, f = {toy.value:g}   float64"
    )


def _title(config: Config) -> str:
    return f"{config.toy.name}: exact steps, learned LLQR and gradient descent"


def _table(courses: dict[str, Course], toy: Toy, clock: Clock, tolerance: float) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("\nmethod", no_wrap=True)
    for name in (f"within {tolerance:g}\nafter", "final\nvalue", "\ndistance",
                 "damping\nraised", "refits\nguarded", "\nseconds"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("\noutcome", no_wrap=True)
    for name, course in courses.items():
        done = course.outcome == "converged"
        iterations = f"{course.iterations}" if done else f"not in {course.iterations}"
        table.add_row(
            name,
            iterations,
            f"{course.values[-1]:.3g}",
            f"{_distance(course.thetas[-1], toy):.1e}",
            "-" if course.raised is None else f"{course.raised}",
            "-" if course.refits is None else f"{course.refits[1]}/{course.refits[0]}",
            f"{clock.seconds[name]:.2f}",
            course.outcome if done else f"[yellow]{course.outcome}[/]",
        )
    return table
