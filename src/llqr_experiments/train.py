"""A run, from config to plots: a loop of named phases that can stop at any step and go on."""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.markup import escape

import llqr
from llqr._errors import unknown
from llqr._tree import leaf_names
from llqr._types import Array, Params
from llqr_experiments import build, data, insight, plots, records, tasks, translate
from llqr_experiments.checkpoint import BEST, Checkpoints, find, load_fields, steps
from llqr_experiments.clock import Clock
from llqr_experiments.console import Display, counts, shown
from llqr_experiments.errors import ConfigError, TrainingError
from llqr_experiments.evaluate import Histograms, evaluate
from llqr_experiments.material import Material
from llqr_experiments.preemption import Interrupted, Interrupts
from llqr_experiments.spec import Config
from llqr_experiments.step import Recipe, TrainState, advance, init
from llqr_experiments.tracking import Trackers


class Result(NamedTuple):
    """What a run ends with."""

    metrics: dict[str, float]
    task: tasks.Task
    params: Params
    statistics: Any


@dataclass(frozen=True)
class Run:
    """What stays the same during a run.

    Attributes:
      config: validated options.
      task: data, initial parameters, objectives.
      recipe: of a training step.
      horizon: how long it is.
      refit_steps: steps before which P is refitted.
      blocks: of the preconditioner; None without one.
      best: metric of the best checkpoint, and whether more of it is better.
    """

    config: Config
    task: tasks.Task
    recipe: Recipe
    horizon: build.Horizon
    refit_steps: frozenset[int]
    blocks: llqr.Description | None
    best: tuple[str, bool]

    @property
    def last(self) -> int:
        """The loop's last index, which only evaluates: the number of updates."""
        return self.horizon.total_steps - 1


@dataclass
class Session:
    """What changes during a run; a checkpoint holds it.

    Attributes:
      state: what a training step changes.
      step: the next loop index.
      stream: training batches.
      refits: batches for refits.
      best: best value so far of the metric of the best checkpoint, and its step.
      reached: first steps of milestones, by name.
    """

    state: TrainState
    step: int
    stream: Any
    refits: Any
    best: dict[str, float] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Desk:
    """Where a run reports to.

    Attributes:
      display: the terminal.
      trackers: of metrics.
      clock: time by phase.
      checkpoints: of the run.
      interrupts: signals that ask the run to end.
      out_dir: the run's folder.
    """

    display: Display
    trackers: Trackers
    clock: Clock
    checkpoints: Checkpoints
    interrupts: Interrupts
    out_dir: Path

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values."""
        with self.clock.phase("logging"):
            self.trackers.log(step, values, self.clock.elapsed())


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
    with ExitStack() as stack:
        clock = stack.enter_context(Clock())
        interrupts = stack.enter_context(Interrupts())
        with clock.phase("setup"):
            job = prepare(config)
            facts = {"steps": job.last, "refits": len(job.refit_steps)}
            entered = records.enter(config, out_dir, command, **facts)
            display = Display(job.last, config.report_freq, quiet=quiet)
            checkpoints = _checkpoints(job, out_dir, display.say)
            session, meta = _begin(job, entered, out_dir, checkpoints, display)
            clock.add(meta.get("seconds", {}))
            trackers = records.open_trackers(
                config, job.task.name, out_dir, display.say, meta.get("trackers")
            )
            stack.callback(trackers.close)
            stack.callback(checkpoints.close)
        desk = Desk(display, trackers, clock, checkpoints, interrupts, out_dir)
        _announce(job, display)
        stack.enter_context(display)
        quality = {}
        if config.quality and session.step == 0:
            quality["before training"] = _quality(job, session.state, 0, desk)
        final = _loop(job, session, desk)
        if config.quality:
            quality["after training"] = _quality(job, session.state, job.last, desk)
            insight.draw(quality, _title(config), out_dir / "quality.png")
        checkpoints.wait()
    try:
        records.finish(out_dir, results=final, best=session.best, time=dict(clock.seconds))
        kind = job.task.material.kind
        plots.curves(out_dir / "metrics.jsonl", _title(config), out_dir / "curves.png", kind)
    except (OSError, ValueError) as error:
        display.say(f"[yellow]warning:[/] the closing files are not written: {error}")
    display.closing(_results(job, session, final), clock, records.shorten(out_dir))
    return Result(final, job.task, session.state.params, session.state.statistics)


def prepare(config: Config) -> Run:
    """Load the data and build everything that stays the same."""
    # Options are checked before the data is read: a schedule or a structure that does not
    # exist costs nothing to find.
    _check_sources(config)
    early = build.Horizon(1.0, config.total_epochs)
    build.optimizer(config, early)
    build.ascent(config, early)
    try:
        data.stride(config.batch_size * config.grad_acc_steps, config.batch_overlap_fraction)
    except ValueError as error:
        raise ConfigError(f"batch_overlap_fraction: {error}") from error
    task = tasks.build(config)
    length = task.material.streams.length(config)
    horizon = build.Horizon(length, config.total_epochs, config.max_steps)
    recipe = Recipe(
        build.optimizer(config, horizon),
        build.ascent(config, horizon),
        config.rng_seed,
        config.grad_acc_steps,
        config.normalize_conv_params,
        config.on_nonfinite == "skip",
        tasks.valid,
    )
    refits = build.refit_steps(config, horizon)
    blocks = llqr.describe(recipe.tx, task.params) if config.use_preconditioner else None
    return Run(config, task, recipe, horizon, refits, blocks, _best(config, task.material))


def _best(config: Config, made: Material) -> tuple[str, bool]:
    """Metric of the best checkpoint, and whether more of it is better."""
    name, maximize = made.best
    options = config.translation_eval
    if options.enabled and made.pairs is None:
        raise ConfigError(f"translation_eval.enabled=true: {made.name} is no translation.")
    if options.enabled and options.checkpoint_metric == "bleu":
        name, maximize = "valid bleu", options.maximize_checkpoint_metric
    if config.checkpoint_metric is not None:
        name = config.checkpoint_metric
        splits = [*made.evaluated, *(["train_eval"] if config.add_train_eval else [])]
        totals: dict[str, float] = dict.fromkeys(tasks.SUMS, 1.0)
        known = [metric for split in splits for metric in made.rates(split, totals)]
        if name not in known:
            hint = " (it needs add_train_eval=true)" if name.startswith("train_eval") else ""
            raise ConfigError(unknown("checkpoint_metric", name, known) + hint)
        maximize = "accuracy" in name
    wanted = config.maximize_checkpoint_metric
    return name, maximize if wanted is None else wanted


def _checkpoints(job: Run, out_dir: Path, say: Callable[[str], None]) -> Checkpoints:
    config, folder = job.config, out_dir / "checkpoints"
    if config.preempt_handling:
        folder = Path(os.environ["SCRATCH"]) / job.task.name / _job_id(config)
    return Checkpoints(folder, config.checkpoint_keep, say)


def _job_id(config: Config) -> str:
    return config.jobid or os.environ.get("SLURM_JOBID", "")


def _check_sources(config: Config) -> None:
    """Whether what a run needs besides data is there: before anything is read or written."""
    scratch = "SCRATCH" in os.environ
    if config.preempt_handling and not (scratch and _job_id(config)):
        missing = "give jobid, or set SLURM_JOBID" if scratch else "SCRATCH is not set"
        raise ConfigError(
            f"preempt_handling=true writes to $SCRATCH/<experiment>/<job id>: {missing}."
        )
    for run in (config.resume, config.init_from):
        if run is not None:
            find(Path(run))


def _begin(
    job: Run, entered: bool, out_dir: Path, checkpoints: Checkpoints, display: Display
) -> tuple[Session, dict[str, Any]]:
    """Return the session, new or restored, and the facts of the checkpoint it comes from."""
    config = job.config
    streams = job.task.material.streams
    state = init(job.recipe, job.task.params, job.task.statistics)
    session = Session(state, 0, streams.training(config), streams.refits(config))
    say, found, own, options = display.say, None, True, records.options(config)
    if entered or config.preempt_handling:
        found = checkpoints.restore(session.state)
        if found is not None:  # in $SCRATCH, the folder does not tell whose it is
            records.check_same(found.meta["options"], options, checkpoints.folder)
    if found is None and config.resume:
        found = Checkpoints(find(Path(config.resume)), 1, say).restore(session.state, own=False)
        own = False
        if found is None:
            raise ConfigError(f"resume={config.resume}: no checkpoint there can be read.")
    if found is None:
        if entered and "finished" in json.loads((out_dir / "meta.json").read_text()):
            raise ConfigError(
                f"{out_dir} already holds a finished run, without a checkpoint that can be read; "
                "give another folder (hydra.run.dir=...)."
            )
        if config.init_from:
            model = {"params": state.params, "statistics": state.statistics}
            found_model, step = load_fields(find(Path(config.init_from)), model, say)
            say(f"parameters of step {step} of {config.init_from}\n")
            session.state = state._replace(**found_model)
        return session, {}
    if found.step > job.last:
        raise ConfigError(
            f"the checkpoint is of step {found.step}, and this run ends at {job.last}."
        )
    meta, fresh = found.meta, session.state
    session.state, session.step = found.state, found.step
    session.best, session.reached = meta["best"], meta["reached"]
    if not job.recipe.skip:  # what an earlier run skipped is no reason to stop
        session.state = session.state._replace(health=fresh.health)
    where = "" if own else f" of {config.resume}"
    say(f"going on from the checkpoint of step {found.step}{where}\n")
    if all(meta["options"][name] == options[name] for name in STREAM):
        session.stream.set_state(meta["stream"])
        session.refits.set_state(meta["refits"])
    else:
        say("[yellow]warning:[/] the options of the data are others: the streams start anew\n")
    if not own:  # the record of another run stays where it is
        return session, {"seconds": meta["seconds"]}
    for name in (HISTOGRAMS, translate.FILE):
        _forget(out_dir / name, found.step)
    return session, meta


STREAM = (
    "dataset", "batch_size", "grad_acc_steps", "partial_batch", "batch_overlap_fraction",
    "precond_batch_size", "rng_seed",
)  # fmt: skip
"""Options that a position in the streams of data belongs to."""

HISTOGRAMS = "histograms.jsonl"


def _forget(path: Path, step: int) -> None:
    """Drop what comes again: evaluations from the checkpoint's step on, and those in the end."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        rows = [(x, json.loads(x)) for x in lines if x.endswith("\n")]
        kept = [x for x, row in rows if row["step"] < step and row.get("split") != "test"]
        path.write_text("".join(kept))


@partial(jax.jit, static_argnames=("loss", "recipe", "active"), donate_argnames="state")
def train_step(
    loss: Callable[..., Any],
    recipe: Recipe,
    active: bool,
    state: TrainState,
    batch: dict[str, Array],
) -> tuple[TrainState, dict[str, Array]]:
    """One update; also sums over the batch (before the update), see `tasks.measure`.

    Args:
      loss: of the task, see `tasks.Task.training`.
      recipe: of the step.
      active: whether SAM perturbs it.
      state: before the step.
      batch: of the step.
    """
    return advance(loss, recipe, active, state, batch, tasks.SUMS, refresh=False)


def _loop(job: Run, session: Session, desk: Desk) -> dict[str, float]:
    """Steps up to the last index, which only evaluates; returns the final metrics."""
    config, ascent, clock = job.config, job.recipe.ascent, desk.clock
    final: dict[str, float] = {}
    first = session.step
    for step in range(first, job.last + 1):
        session.step = step
        if step != first or step == 0:
            _checkpoint(job, session, desk)
        if step == job.last or (step and step % config.test_eval_freq == 0):
            final = _evaluation(job, session, desk)
        final |= _translations(job, session, desk)
        if step == job.last:
            break
        with clock.phase("data"):
            batch = next(session.stream)
        if step in job.refit_steps:
            _refit(job, session, batch, desk)
        with clock.phase("training"):
            active = ascent is not None and step >= ascent.method.start
            session.state, sums = train_step(
                job.task.training, job.recipe, active, session.state, batch
            )
        if ascent and step == ascent.method.start:
            desk.display.say(f"step {step:>6}   {config.sam_mode} becomes active")
            desk.log(step, {"sam becomes active": float(step)})
        if (step + 1) % config.logging_freq == 0 or step == 0:
            with clock.phase("training"):  # waiting for the device is training
                jax.block_until_ready(sums)
            _report(job, step + 1, session.state, sums, desk)
    final |= _test_translations(job, session, desk)
    if ascent:
        desk.log(job.last, _sharpness(session.state))
        final |= _sharpness(session.state)
    return final


def _checkpoint(job: Run, session: Session, desk: Desk) -> None:
    """Write a checkpoint if one is due; end the run if a signal asks for it."""
    step, every = session.step, job.config.checkpoint_freq
    signal, checkpoints = desk.interrupts.requested, desk.checkpoints
    due = step == job.last or (step > 0 and step % (every or 1) == 0)
    if every and (due or signal):
        _check_health(job, session.state, desk)
        with desk.clock.phase("checkpoint"):
            checkpoints.save(step, session.state, _meta(job, session, desk))
    if signal is None:
        return
    checkpoints.wait()
    saved = "Nothing is saved of it."
    if checkpoints.newest is not None:
        saved = (
            f"It is saved up to step {checkpoints.newest}; the same command for the folder "
            f"{desk.out_dir} goes on from there."
        )
    raise Interrupted(f"{signal.name} ended the run at step {step}. {saved}")


def _meta(job: Run, session: Session, desk: Desk) -> dict[str, Any]:
    return {
        "options": records.options(job.config),
        "best": session.best,
        "reached": session.reached,
        "stream": session.stream.get_state(),
        "refits": session.refits.get_state(),
        "seconds": {**desk.clock.seconds, "total": desk.clock.elapsed()},
        "trackers": desk.trackers.positions(),
    }


def _check_health(job: Run, state: TrainState, desk: Desk) -> None:
    """Stop if a loss or gradient was not finite, before it is saved or believed."""
    health = jax.device_get(state.health)
    if job.recipe.skip or health.bad_step < 0:
        return
    what, names = "training loss", leaf_names(state.params)
    if health.bad_leaf >= 0:
        kind = "gradient of" if health.bad_leaf < len(names) else "updated parameter"
        what = f"{kind} {names[health.bad_leaf % len(names)]}"
    desk.checkpoints.wait()
    where, last = "there is no checkpoint", desk.checkpoints.newest
    if last is not None:
        where = f"the last good checkpoint is of step {last}, in {desk.checkpoints.folder}"
    raise TrainingError(
        f"the {what} is not finite at step {int(health.bad_step)}; {where}. Lower "
        "learning_rate, refit more cautiously (damping, precond_lr, ema_decay), or go on past "
        "such steps with on_nonfinite=skip."
    )


def _evaluation(job: Run, session: Session, desk: Desk) -> dict[str, float]:
    """Evaluate, keep the best, and return the metrics."""
    config, step = job.config, session.step
    _check_health(job, session.state, desk)
    histograms = Histograms() if config.record_histograms else None
    with desk.clock.phase("evaluation"):
        made, size = job.task.material, config.eval_batch_size or config.batch_size
        splits = {name: name for name in made.evaluated}
        splits |= {"train_eval": "train"} if config.add_train_eval else {}
        model = session.state.params, session.state.statistics
        found = {}
        for name, split in splits.items():
            batches = made.streams.evaluation(split, size)
            totals = evaluate(job.task.objective, model, batches, histograms, name)
            found |= made.rates(name, totals)
    if histograms is not None:
        try:
            histograms.write(desk.out_dir / HISTOGRAMS, step)
        except (OSError, ValueError) as error:  # a full disk; losses that are not finite
            desk.display.say(f"[yellow]warning:[/] no histograms of step {step}: {error}")
    _reached(job, session, found)
    desk.display.evaluation(step, found)
    desk.log(step, found | session.reached)
    _keep_best(job, session, found, desk)
    return found | session.reached


def _reached(job: Run, session: Session, found: dict[str, float]) -> None:
    """Record the first evaluation at which an accuracy is reached."""
    made = job.task.material
    for share in made.milestones:
        name = f"{made.evaluated[0]} accuracy"
        if found[name] >= share:
            session.reached.setdefault(f"first step with {name} of {share:g} %", session.step)


def _translations(job: Run, session: Session, desk: Desk) -> dict[str, float]:
    """Translate the valid set, or a sample of it, where that is due; return the metrics."""
    options, step, last = job.config.translation_eval, session.step, session.step == job.last
    if not options.enabled or not (step or last):
        return {}
    every = job.config.test_eval_freq if options.freq is None else options.freq
    full = last and options.full_eval_at_end
    full = full or bool(options.full_eval_freq and step % options.full_eval_freq == 0)
    if not full and not (every and step % every == 0):
        return {}
    _check_health(job, session.state, desk)
    name, most = ("bleu", None) if full else ("bleu_sampled", options.max_examples)
    found = _translate(job, session.state.params, "valid", most, step, desk)
    values = translate.record("valid", name, found)
    _keep_best(job, session, values, desk)
    if full and job.best[0] == "valid bleu":
        values["best valid bleu"] = session.best["value"]
        values["best valid bleu step"] = session.best["step"]
    desk.log(step, values)
    return values


def _test_translations(job: Run, session: Session, desk: Desk) -> dict[str, float]:
    """Translate the test set with the best parameters, which is done once, in the end."""
    if not job.config.translation_eval.enabled:
        return {}
    params, step = _best_params(job, session, desk)
    values = translate.record("test", "bleu", _translate(job, params, "test", None, step, desk))
    desk.log(job.last, values)
    return values


def _best_params(job: Run, session: Session, desk: Desk) -> tuple[Params, int]:
    """Return the parameters of the best evaluation, and its step; the last if there is none."""
    params, step = session.state.params, session.step
    best, say = int(session.best.get("step", step)), desk.display.say
    if best == step or not job.config.checkpoint_freq:
        return params, step
    desk.checkpoints.wait()
    folders = [desk.checkpoints.folder]
    if job.config.resume:  # the best may be of the run that this one goes on from
        folders.append(find(Path(job.config.resume)))
    for folder in folders:
        if best in steps(folder, BEST):
            try:
                found, step = load_fields(folder, {"params": params}, say, kind=BEST)
            except ConfigError:  # damaged, which was said
                continue
            return found["params"], step
    say(
        f"[yellow]warning:[/] the best checkpoint, of step {best}, cannot be read: the test set "
        "is translated with the last parameters."
    )
    return params, step


def _translate(
    job: Run, params: Params, split: str, most: int | None, step: int, desk: Desk
) -> translate.Translated:
    """Translate, and show and write what came out."""
    config, task, say = job.config, job.task, desk.display.say
    options = config.translation_eval
    assert task.decoder is not None
    assert task.material.pairs is not None
    follow = partial(desk.display.follow, what=f"translating {split}", every=options.progress_freq)
    with desk.clock.phase("translation"):
        found = translate.translate(
            task.decoder,
            params,
            task.material.pairs,
            split,
            options,
            batch_size=config.eval_batch_size or 128,
            most=most,
            follow=follow,
        )
    say(
        f"step {step:>6}   {split} BLEU [bold]{found.bleu.score:.2f}[/] on {found.examples:,} "
        f"sentences   {found.bleu.signature}"
    )
    for sample in found.samples if options.print_samples else ():
        say(f"{'':>14}source      {escape(sample.source)}")
        say(f"{'':>14}translation {escape(sample.hypothesis)}")
        say(f"{'':>14}reference   {escape(sample.reference)}")
    try:
        translate.write(desk.out_dir / translate.FILE, step, split, found)
    except OSError as error:
        say(f"[yellow]warning:[/] the translations of step {step} are not written: {error}")
    return found


def _keep_best(job: Run, session: Session, found: dict[str, float], desk: Desk) -> None:
    """Write a checkpoint if this evaluation is the best so far."""
    name, sign = job.best[0], 1 if job.best[1] else -1
    if name not in found:
        return
    value = found[name]
    better = not session.best or sign * value > sign * session.best["value"]
    if not math.isfinite(value) or not better:
        return
    session.best = {"value": value, "step": float(session.step)}
    if job.config.checkpoint_freq:
        meta = _meta(job, session, desk)
        with desk.clock.phase("checkpoint"):
            desk.checkpoints.save(session.step, session.state, meta, kind=BEST)


def _refit(job: Run, session: Session, training: dict[str, Any], desk: Desk) -> None:
    """Relearn P before the update of this step, and say what it did."""
    config, clock, state = job.config, desk.clock, session.state
    with clock.phase("training"):
        jax.block_until_ready(state)  # earlier steps are not the refit's time
    before = clock.seconds["refit"]
    with clock.phase("refit"):
        batch = seen = next(session.refits)
        statistics = state.statistics
        if config.multibatch_training:  # one for every inner step, on an axis of their own
            more = [next(session.refits) for _ in range(config.precond_steps - 1)]
            seen = jax.tree.map(lambda *leaves: np.stack(leaves), batch, *more)
            statistics = jax.tree.map(lambda x: np.stack([x] * config.precond_steps), statistics)
        objective = tasks.bound(job.task, seen, statistics)
        opt_state = llqr.refresh(job.recipe.tx, state.opt_state, state.params, objective)
        jax.block_until_ready(opt_state)
    seconds = clock.seconds["refit"] - before
    with clock.phase("insight"):
        skew = config.measure_asymmetry
        report = llqr.inspect(job.recipe.tx, opt_state, state.params, asymmetry=skew)
        ours, theirs = (_bound(job, given, state) for given in (batch, training))
        cosine = insight.gradient_cosine(ours, theirs, state.params)
        record = insight.refit_record(report, float(cosine))
    desk.display.refit(session.step, report, seconds)
    desk.log(session.step, record)
    session.state = state._replace(opt_state=opt_state)


def _bound(job: Run, batch: dict[str, Any], state: TrainState) -> llqr.BoundObjective:
    """The objective in inference mode, as refits see it."""
    return tasks.bound(job.task, batch, state.statistics)


def _quality(job: Run, state: TrainState, step: int, desk: Desk) -> llqr.Quality:
    """Compare the steps of `config.quality` with the exact one, on the first refit batch."""
    config, batch = job.config, next(job.task.material.streams.refits(job.config))
    with desk.clock.phase("quality"):
        found = insight.measure(config, _bound(job, batch, state), state.params)
    desk.display.say(f"\nstep {step:>6}   steps compared with the exact one\n{found}\n")
    desk.log(step, insight.metrics(found))
    return found


def _report(job: Run, step: int, state: TrainState, sums: dict[str, Array], desk: Desk) -> None:
    totals = {name: float(total) for name, total in jax.device_get(sums).items()}
    rates = job.task.material.rates("train", totals)
    values = rates | _sharpness(state)
    if job.recipe.skip:
        values["skipped steps"] = float(state.health.bad_steps)
    desk.log(step, values)
    with desk.clock.phase("logging"):
        desk.display.progress(step, rates)
    _check_health(job, state, desk)


def _sharpness(state: TrainState) -> dict[str, float]:
    """What is logged of SAM."""
    return {} if state.sharpness is None else insight.sharpness_record(state.sharpness.info)


def _results(job: Run, session: Session, final: dict[str, float]) -> dict[str, str]:
    """Rows of the closing table."""
    splits = [name for name in job.task.material.sizes if name != "train"] + ["train_eval"]
    found = {
        name: shown(name, value)
        for name, value in final.items()
        if name.startswith(tuple(splits)) and "_bleu_" not in name
    }
    found |= {name: f"{step:,.0f}" for name, step in session.reached.items()}
    if session.best:
        best = shown(job.best[0], session.best["value"])
        found["best"] = f"{job.best[0]} {best} at step {session.best['step']:,.0f}"
    if job.recipe.ascent:
        found["gradients"] = (
            f"{final['sam gradient evaluations']:,.0f} in {job.last:,} steps, "
            f"{final['sam active steps']:,.0f} of them perturbed"
        )
    if skipped := int(session.state.health.bad_steps):
        found["skipped"] = f"{skipped} steps whose loss or gradient was not finite"
    return found


def _announce(job: Run, display: Display) -> None:
    """Say what is about to happen."""
    config, size = job.config, sum(x.size for x in jax.tree.leaves(job.task.params))
    batch = f"{config.batch_size}" + (
        f" x {config.grad_acc_steps}" if config.grad_acc_steps > 1 else ""
    )
    display.say(
        f"[bold]{job.task.name}[/]   {size:,} parameters   examples: "
        f"{counts(job.task.material.sizes)}   {job.last:,} steps of {batch}   "
        f"{jax.devices()[0].platform.upper()}"
    )
    if job.recipe.ascent:
        display.say(_describe_ascent(config, job.recipe.ascent))
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
