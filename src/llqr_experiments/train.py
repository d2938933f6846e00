"""A run, from config to plots: a loop of named phases."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import llqr
from llqr._types import Array, Params
from llqr_experiments import build, data, insight, plots, records, tasks
from llqr_experiments import step as step_of
from llqr_experiments.clock import Clock
from llqr_experiments.console import Display
from llqr_experiments.errors import TrainingError
from llqr_experiments.evaluate import evaluate
from llqr_experiments.spec import Config
from llqr_experiments.step import TrainState, advance
from llqr_experiments.tracking import Trackers


class Result(NamedTuple):
    """What a run ends with."""

    metrics: dict[str, float]
    task: tasks.Task
    train: data.Source
    params: Params


@dataclass(frozen=True)
class Run:
    """What stays the same during a run.

    Attributes:
      config: validated options.
      task: data, initial parameters, objective.
      tx: the optimizer.
      ascent: how SAM perturbs; None without.
      horizon: how long it is.
      refit_steps: steps before which P is refitted.
      blocks: of the preconditioner; None without one.
      train: normalised training split.
      test: normalised test split.
    """

    config: Config
    task: tasks.Task
    tx: optax.GradientTransformationExtraArgs
    ascent: build.Ascent | None
    horizon: build.Horizon
    refit_steps: frozenset[int]
    blocks: llqr.Description | None
    train: data.Source
    test: data.Source

    @property
    def total_steps(self) -> int:
        """Loop indices, see `build.Horizon`."""
        return self.horizon.total_steps


def run(config: Config, out_dir: Path, command: str = "", *, quiet: bool = False) -> Result:
    """Train, evaluate, and write everything into `out_dir`.

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
      TrainingError: the loss is no longer finite.
    """
    with ExitStack() as stack:
        clock = stack.enter_context(Clock())
        with clock.phase("setup"):
            job = _prepare(config)
            steps, refits = job.total_steps - 1, len(job.refit_steps)
            records.write_meta(config, out_dir, command, steps=steps, refits=refits)
            display = Display(job.total_steps - 1, config.report_freq, quiet=quiet)
            trackers = records.open_trackers(config, job.task.name, out_dir, display.say)
            stack.callback(trackers.close)
        _announce(job, display)
        stack.enter_context(display)
        quality = {}
        if config.quality:
            quality["before training"] = _quality(job, job.task.params, 0, display, trackers, clock)
        final, params = _loop(job, display, trackers, clock)
        if config.quality:
            last = job.total_steps - 1
            quality["after training"] = _quality(job, params, last, display, trackers, clock)
            insight.draw(quality, _title(config), out_dir / "quality.png")
    plots.curves(out_dir / "metrics.jsonl", _title(config), out_dir / "curves.png")
    results = {
        "test accuracy": f"{final['test accuracy']:.2f} %",
        "test loss": f"{final['test loss']:.4f}",
    }
    if job.ascent:
        results["gradients"] = (
            f"{final['sam gradient evaluations']:,.0f} in {job.total_steps - 1:,} steps, "
            f"{final['sam active steps']:,.0f} of them perturbed"
        )
    display.closing(results, clock.seconds, clock.elapsed(), records.shorten(out_dir))
    return Result(final, job.task, job.train, params)


def _prepare(config: Config) -> Run:
    # Options are checked before the data is read: a schedule or a structure that does not
    # exist costs nothing to find.
    early = build.Horizon(1.0, config.total_epochs)
    build.optimizer(config, early)
    build.ascent(config, early)
    task = tasks.build(config)
    train, test = (data.Source.of(task.dataset, split) for split in ("train", "test"))
    horizon = build.Horizon(data.epoch_length(train, config.batch_size), config.total_epochs)
    tx = build.optimizer(config, horizon)
    refits = build.refit_steps(config, horizon)
    blocks = llqr.describe(tx, task.params) if config.use_preconditioner else None
    ascent = build.ascent(config, horizon)
    return Run(config, task, tx, ascent, horizon, refits, blocks, train, test)


@partial(
    jax.jit,
    static_argnames=("objective", "tx", "ascent", "active", "seed"),
    donate_argnames="state",
)
def train_step(
    objective: llqr.Objective,
    tx: optax.GradientTransformationExtraArgs,
    ascent: build.Ascent | None,
    active: bool,
    seed: int,
    state: TrainState,
    batch: dict[str, Array],
) -> tuple[TrainState, dict[str, Array]]:
    """One update; also sums over the batch (before the update), see `tasks.measure`.

    Args:
      objective: model and loss.
      tx: the optimizer.
      ascent: how SAM perturbs; None without.
      active: whether this step is perturbed.
      seed: of random perturbations.
      state: before the step.
      batch: of the step.
    """

    def loss(params: Params, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        outputs = objective.forward(params, batch)
        return objective.loss(outputs, batch), tasks.measure(outputs, batch)

    state, _, sums = advance(loss, tx, ascent, active, seed, state, batch, refresh=False)
    if ascent and ascent.method.groups > 1:
        sums = jax.tree.map(lambda x: x.sum(0), sums)
    return state, sums


def _loop(
    job: Run, display: Display, trackers: Trackers, clock: Clock
) -> tuple[dict[str, float], Params]:
    """Steps 0 .. total - 1; the last index only evaluates. Also returns the parameters."""
    config, last = job.config, job.total_steps - 1
    stream = data.train_stream(job.train, batch_size=config.batch_size, seed=config.rng_seed)
    refits = data.refit_stream(
        job.train, batch_size=config.precond_batch_size, seed=config.rng_seed, num_threads=0
    )
    ascent = job.ascent
    state = step_of.init(job.tx, ascent, job.task.params)
    state = jax.tree.map(jax.numpy.array, state)  # steps donate their state: own the buffers
    log = partial(_log, trackers, clock)
    final: dict[str, float] = {}
    for step in range(job.total_steps):
        if step == last or (step and step % config.test_eval_freq == 0):
            with clock.phase("evaluation"):
                final = _evaluate(job, state.params)
            display.evaluation(step, final["test loss"], final["test accuracy"])
            log(step, final)
        if step == last:
            break
        batch = next(stream)
        if step in job.refit_steps:
            state = _refit(job, state, refits, batch, step, display, log, clock)
        with clock.phase("training"):
            active = ascent is not None and step >= ascent.method.start
            state, sums = train_step(
                job.task.objective, job.tx, ascent, active, config.rng_seed, state, batch
            )
            if ascent and step == ascent.method.start:
                display.say(f"step {step:>6}   {config.sam_mode} becomes active")
                log(step, {"sam becomes active": float(step)})
            if (step + 1) % config.logging_freq == 0 or step == 0:
                _report(step + 1, _means(sums) | _sharpness(state), display, log)
    if ascent:
        log(last, _sharpness(state))
        final |= _sharpness(state)
    return final, state.params


def _sharpness(state: TrainState) -> dict[str, float]:
    """What is logged of SAM."""
    return {} if state.sharpness is None else insight.sharpness_record(state.sharpness.info)


def _refit(
    job: Run,
    state: TrainState,
    batches: Iterator[dict[str, Any]],
    training: dict[str, Any],
    step: int,
    display: Display,
    log: Callable[[int, dict[str, float]], None],
    clock: Clock,
) -> TrainState:
    """Relearn P before the update of `step`, and say what it did."""
    before = clock.seconds["refit"]
    jax.block_until_ready(state)  # earlier training steps are not the refit's time
    with clock.phase("refit"):
        batch = seen = next(batches)
        if job.config.multibatch_training:  # one for every inner step, on an axis of their own
            more = [next(batches) for _ in range(job.config.precond_steps - 1)]
            seen = jax.tree.map(lambda *leaves: np.stack(leaves), batch, *more)
        objective = job.task.objective.bind(seen)
        opt_state = llqr.refresh(job.tx, state.opt_state, state.params, objective)
        jax.block_until_ready(opt_state)
    seconds = clock.seconds["refit"] - before
    with clock.phase("insight"):
        skew = job.config.measure_asymmetry
        report = llqr.inspect(job.tx, opt_state, state.params, asymmetry=skew)
        cosine = insight.gradient_cosine(job.task.objective, state.params, batch, training)
        record = insight.refit_record(report, float(cosine))
    display.refit(step, report, seconds)
    log(step, record)
    return state._replace(opt_state=opt_state)


def _quality(
    job: Run, params: Params, step: int, display: Display, trackers: Trackers, clock: Clock
) -> llqr.Quality:
    """Compare the steps of `config.quality` with the exact one, on the first refit batch."""
    config = job.config
    batch = next(
        data.refit_stream(
            job.train, batch_size=config.precond_batch_size, seed=config.rng_seed, num_threads=0
        )
    )
    with clock.phase("quality"):
        found = insight.measure(config, job.task.objective.bind(batch), params)
    display.say(f"\nstep {step:>6}   steps compared with the exact one\n{found}\n")
    _log(trackers, clock, step, insight.metrics(found))
    return found


def _evaluate(job: Run, params: Params) -> dict[str, float]:
    size = job.config.eval_batch_size or job.config.batch_size
    found = evaluate(job.task.objective, params, job.test, size)
    return {f"test {name}": value for name, value in found.items()}


def _means(sums: dict[str, Array]) -> dict[str, float]:
    host = jax.device_get(sums)
    rows = float(host["rows"])
    return {
        "train loss": float(host["loss"]) / rows,
        "train accuracy": 100.0 * float(host["correct"]) / rows,
    }


def _report(
    step: int,
    values: dict[str, float],
    display: Display,
    log: Callable[[int, dict[str, float]], None],
) -> None:
    log(step, values)
    display.progress(step, values["train loss"], values["train accuracy"])
    if not math.isfinite(values["train loss"]):
        raise TrainingError(
            f"the training loss is {values['train loss']} at step {step}. Lower learning_rate, or "
            "refit more cautiously (damping, precond_lr, ema_decay)."
        )


def _log(trackers: Trackers, clock: Clock, step: int, values: dict[str, float]) -> None:
    trackers.log(step, values, clock.elapsed())


def _announce(job: Run, display: Display) -> None:
    """Say what is about to happen."""
    config, size = job.config, sum(x.size for x in jax.tree.leaves(job.task.params))
    display.say(
        f"[bold]{job.task.name}[/]   {size:,} parameters   {len(job.train):,} training and "
        f"{len(job.test):,} test examples   {job.total_steps - 1:,} steps of {config.batch_size}   "
        f"{jax.devices()[0].platform.upper()}"
    )
    if job.ascent:
        display.say(_describe_ascent(config, job.ascent))
    for text in build.warnings(config, job.horizon):
        display.say(f"[yellow]warning:[/] {text}\n")
    if config.use_preconditioner:
        display.say(
            f"LLQR on {config.main_optimizer}: {config.block_structure}, {config.divergence}, "
            f"refits: {len(job.refit_steps)}, of {config.precond_steps} inner steps on "
            f"{config.precond_batch_size} examples\n{job.blocks}\n"
        )
    else:
        display.say(f"{config.main_optimizer} without a preconditioner\n")


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


def _title(config: Config) -> str:
    name = f"{config.dataset.name}, {config.architecture.name}: {config.main_optimizer}"
    name += f" {config.learning_rate:g}"
    name += f" + LLQR {config.block_structure}" if config.use_preconditioner else ""
    return name + (f" + {config.sam_mode}" if config.sam_mode else "")
