"""Toy problems: functions of two or three variables, minimised by four methods side by side."""

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from llqr.typing import Array
from llqr_experiments.config import build
from llqr_experiments.config.options import Config
from llqr_experiments.errors import ConfigError
from llqr_experiments.files import names
from llqr_experiments.record import lock, run_folder
from llqr_experiments.record.clock import Clock
from llqr_experiments.record.trackers import Trackers
from llqr_experiments.study import toy_plots
from llqr_experiments.study.courses import Course, Damped, Optax, follow, lqr_step, newton_step
from llqr_experiments.study.toy_functions import FUNCTIONS, Toy

NEWTON, LQR, LEARNED, DESCENT = "Newton", "exact LQR", "LLQR", "descent"


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
        stack.enter_context(lock.hold(out_dir, command))
        if run_folder.look(config, out_dir):
            raise ConfigError(f"{out_dir} already holds this run: {lock.ELSEWHERE}.")
        toy, start = _prepare(config)
        horizon = build.Horizon(1.0, config.toy.iterations)
        tx = build.optimizer(config, horizon)
        build.check_schedules(config, horizon)
        console = Console(highlight=False)
        facts = {"toy": config.toy.name, "start": start.tolist()}
        run_folder.enter(config, out_dir, command, again=False, **facts)
        say = partial(console.print, soft_wrap=True)
        trackers = run_folder.open_trackers(config, f"toy {config.toy.name}", out_dir, say)
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
        run_folder.finish(out_dir, time=dict(clock.seconds))
        say("")
        console.print(_table(courses, toy, clock, config.toy.tolerance))
        say(
            f"\nThe paths of {NEWTON} and {LQR} differ by at most {gap:.1e}.   "
            f"Compiling took {clock.seconds['compile']:.1f} s more.\n"
            f"[bold]in[/] {run_folder.shorten(out_dir)}: " + ", ".join(names(out_dir))
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
