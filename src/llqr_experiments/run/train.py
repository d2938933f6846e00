"""A run, from config to plots: a loop of named phases that can stop at any step and go on."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

import llqr
from llqr.typing import Array, Params
from llqr_experiments import processes
from llqr_experiments.config import advice, build
from llqr_experiments.config.options import Config
from llqr_experiments.layout import Layout
from llqr_experiments.record import insight, lock, plots, run_folder
from llqr_experiments.record.clock import Clock
from llqr_experiments.record.console import Display, counts, shown
from llqr_experiments.record.trackers import Trackers
from llqr_experiments.run import phases
from llqr_experiments.run.job import (
    Job,
    batches,
    exact_in_words,
    prepare,
    refits_in_words,
    title,
)
from llqr_experiments.run.origin import origin
from llqr_experiments.run.preemption import Interrupts
from llqr_experiments.run.session import Desk, Session, begin, checkpoint, checkpoints_of
from llqr_experiments.run.step import Recipe, TrainState, advance, shardings
from llqr_experiments.task import tasks


class Result(NamedTuple):
    """What a run ends with."""

    metrics: dict[str, float]
    task: tasks.Task
    params: Params
    statistics: Any


def run(config: Config, out_dir: Path, command: str = "", *, quiet: bool = False) -> Result:
    """Train, evaluate, and write everything into `out_dir`, or go on where it has a checkpoint.

    Args:
      config: validated options.
      out_dir: the run's folder; made if missing.
      command: as typed, for meta.json.
      quiet: print nothing.

    Returns:
      The final metrics, and what was trained.

    Raises:
      ConfigError: an illegal option; nothing was written.
      DataError: the data cannot be used.
      TrainingError: a loss or gradient is not finite.
      Interrupted: a signal came, and everything is saved.
    """
    with processes.ending(), _alone(out_dir, command):
        return _run(config, out_dir, command, quiet or not processes.first())


@contextmanager
def _alone(folder: Path, command: str) -> Iterator[None]:
    """Hold a folder for the processes of this run."""
    with ExitStack() as stack:
        processes.decide(lambda: stack.enter_context(lock.hold(folder, command)))
        yield


def _run(config: Config, out_dir: Path, command: str, quiet: bool) -> Result:
    with ExitStack() as stack:
        stack.enter_context(tasks.wide(config))
        clock = stack.enter_context(Clock())
        interrupts = stack.enter_context(Interrupts())
        with clock.phase("setup"):
            # Nothing is written into the folder before all is known to be there and to fit.
            again = processes.decide(lambda: run_folder.look(config, out_dir))
            job = prepare(config)
            display = Display(job.last, config.report_freq, quiet=quiet)
            checkpoints = checkpoints_of(job, out_dir, display.say)
            if config.preempt_handling:  # another folder's run may have the same job's
                stack.enter_context(_alone(checkpoints.folder, command))
            start = origin(job, again, out_dir, checkpoints, display.say)
            facts = {"steps": job.last, "refits": len(job.refit_steps)}
            if job.layout is not None:
                facts |= {"mesh": dict(job.layout.mesh.shape), "processes": processes.count()}
            processes.decide(
                lambda: run_folder.enter(config, out_dir, command, again=again, **facts)
            )
            session = begin(job, start, out_dir, display.say)
            clock.add(start.seconds)
            trackers = Trackers(display.say)
            if processes.first():
                trackers = run_folder.open_trackers(
                    config, job.task.name, out_dir, display.say, start.trackers
                )
            stack.callback(session.stream.close)
            stack.callback(session.refits.close)
            stack.callback(trackers.close)
            stack.callback(checkpoints.close)
        desk = Desk(display, trackers, clock, checkpoints, interrupts, out_dir)
        _announce(job, display)
        stack.enter_context(display)
        quality = {}
        if config.quality and session.step == 0:
            quality["before training"] = phases.quality(job, session.state, 0, desk)
        final = _loop(job, session, desk)
        if config.quality:
            quality["after training"] = phases.quality(job, session.state, job.last, desk)
            if processes.first():
                insight.draw(quality, title(config), out_dir / "quality.png")
        phases.solution(job, session.state, desk)
        checkpoints.wait()
    result = Result(final, job.task, session.state.params, session.state.statistics)
    if not processes.first():
        return result
    try:
        run_folder.finish(out_dir, results=final, best=session.best, time=dict(clock.seconds))
        kind = job.task.material.kind
        plots.curves(out_dir / "metrics.jsonl", title(config), out_dir / "curves.png", kind)
    except (OSError, ValueError) as error:
        display.say(f"[yellow]warning:[/] the closing files are not written: {error}")
    display.closing(_results(job, session, final), clock, run_folder.shorten(out_dir))
    return result


@partial(
    jax.jit,
    static_argnames=("loss", "recipe", "active", "seen", "layout"),
    donate_argnames="state",
)
def train_step(
    loss: Callable[..., Any],
    recipe: Recipe,
    active: bool,
    state: TrainState,
    batch: dict[str, Array],
    seen: llqr.Objective | None = None,
    layout: Layout | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One update; also sums over the batch (before the update), see `tasks.measure`.

    Args:
      loss: of the task, see `tasks.Task.training`.
      recipe: of the step.
      active: whether SAM perturbs it.
      state: before the step.
      batch: of the step.
      seen: the task's network, in a step with a streaming refit and in an exact one.
      layout: over devices; None: one.
    """
    state, sums = advance(
        loss, recipe, active, state, batch, tasks.sums_of(batch), seen, refresh=False
    )
    if layout is not None:
        state = jax.lax.with_sharding_constraint(state, shardings(recipe, layout, state))
    return state, sums


def _loop(job: Job, session: Session, desk: Desk) -> dict[str, float]:
    """Steps up to the last index, which only evaluates; returns the final metrics."""
    config, ascent, clock = job.config, job.recipe.ascent, desk.clock
    final: dict[str, float] = {}
    first = session.step
    for step in range(first, job.last + 1):
        session.step = step
        if step != first or step == 0:
            checkpoint(job, session, desk)
        if step == job.last or (step and step % config.test_eval_freq == 0):
            final = phases.evaluation(job, session, desk)
        final |= phases.translations(job, session, desk)
        if step == job.last:
            break
        with clock.phase("data"):
            batch = job.join(next(session.stream))
        if step in job.refit_steps and not config.precond_streaming:
            phases.refit(job, session, batch, desk)
        with clock.phase("training"):
            active = ascent is not None and step >= ascent.method.start
            session.state, sums = train_step(
                job.task.training, job.recipe, active, session.state, batch,
                job.seen(step), job.layout,
            )  # fmt: skip
        if ascent and step == ascent.method.start:
            desk.display.say(f"step {step:>6}   {config.sam_mode} becomes active")
            desk.log(step, {"sam becomes active": float(step)})
        if (step + 1) % config.logging_freq == 0 or step == 0:
            with clock.phase("training"):  # waiting for the device is training
                jax.block_until_ready(sums)
            phases.report(job, step + 1, session.state, sums, desk)
    final |= phases.closing_translations(job, session, desk)
    if ascent:
        desk.log(job.last, phases.sharpness(session.state))
        final |= phases.sharpness(session.state)
    return final


def _announce(job: Job, display: Display) -> None:
    """Say what is about to happen."""
    config, size = job.config, sum(x.size for x in jax.tree.leaves(job.task.params))
    display.say(
        f"[bold]{job.task.name}[/]   {size:,} parameters   examples: "
        f"{counts(job.task.material.sizes)}   {job.last:,} steps of {batches(job)}   "
        f"{jax.devices()[0].platform.upper()}"
    )
    if job.layout is not None:
        display.say(_describe_layout(job.layout))
    if job.recipe.ascent:
        display.say(_describe_ascent(config, job.recipe.ascent))
    for text in advice.warnings(config, job.horizon, job.task.material.sizes["train"]):
        display.say(f"[yellow]warning:[/] {text}\n")
    if config.use_preconditioner:
        display.say(
            f"LLQR on {config.main_optimizer}: {config.block_structure}, {config.divergence}, "
            f"{refits_in_words(job)}\n{job.blocks}\n"
        )
    elif config.exact_steps:
        display.say(f"{exact_in_words(job)}\n")
    else:
        display.say(f"{config.main_optimizer} without a preconditioner\n")


def _describe_layout(layout: Layout) -> str:
    axes = ", ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
    return f"{layout.mesh.size} devices of {processes.count()} process(es): {axes}"


def _describe_ascent(config: Config, ascent: build.Ascent) -> str:
    rho = config.perturbation_rho_scheduler["name"]
    rho = f"{config.perturbation_rho:g}" if rho == "constant" else f"by {rho}"
    own = config.sam_mode in ("asam", "fisher_sam")
    along = "" if own else f" along {config.perturb_mode} in {config.norm_mode}"
    update = "with" if ascent.configured and config.use_preconditioner else "without"
    passes = ascent.method.passes
    return (
        f"{config.sam_mode}: radius {rho}{along}, update {update} P, {passes} "
        f"gradient{'s' if passes > 1 else ''} a step from step {ascent.method.start} on"
    )


def _results(job: Job, session: Session, final: dict[str, float]) -> dict[str, str]:
    """Rows of the closing table."""
    splits = [name for name in job.task.material.sizes if name != "train"] + ["train_eval"]
    found = {
        name: shown(name, value)
        for name, value in final.items()
        if name.startswith(tuple(splits)) and "_bleu_" not in name
    }
    found |= {name: f"{step:,.0f}" for name, step in session.reached.items()}
    if session.best:
        best = shown(job.goal.metric, session.best["value"])
        found["best"] = f"{job.goal.metric} {best} at step {session.best['step']:,.0f}"
    if job.recipe.ascent:
        found["gradients"] = (
            f"{final['sam gradient evaluations']:,.0f} in {job.last:,} steps, "
            f"{final['sam active steps']:,.0f} of them perturbed"
        )
    if skipped := int(session.state.health.bad_steps):
        found["skipped"] = f"{skipped} steps whose loss or gradient was not finite"
    return found
