"""What changes during a run: begun, checked, saved; and where a run reports to."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import jax

from llqr.tree import leaf_names
from llqr.trust import IMPOSSIBLE, OUTCOMES
from llqr_experiments import processes
from llqr_experiments.config.options import Config
from llqr_experiments.errors import TrainingError
from llqr_experiments.files import write
from llqr_experiments.record import run_folder, translations
from llqr_experiments.record.clock import Clock
from llqr_experiments.record.console import Display
from llqr_experiments.record.trackers import Trackers
from llqr_experiments.run.checkpoint import BEST, Checkpoints
from llqr_experiments.run.job import Job, job_id
from llqr_experiments.run.origin import Origin
from llqr_experiments.run.preemption import Interrupted, Interrupts
from llqr_experiments.run.step import TrainState


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
      common: what any of the run's processes asks for.
    """

    display: Display
    trackers: Trackers
    clock: Clock
    checkpoints: Checkpoints
    interrupts: Interrupts
    out_dir: Path
    common: processes.Common = field(default_factory=processes.Common)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values."""
        with self.clock.phase("logging"):
            self.trackers.log(step, values, self.clock.elapsed())


def checkpoints_of(job: Job, out_dir: Path, say: Callable[[str], None]) -> Checkpoints:
    """Return where a run's checkpoints lie: in its folder, or in $SCRATCH."""
    config, folder = job.config, out_dir / "checkpoints"
    if config.preempt_handling:
        folder = Path(os.environ["SCRATCH"]) / job.task.name / job_id(config)
    return Checkpoints(folder, config.checkpoint_keep, say)


def begin(job: Job, origin: Origin, out_dir: Path, say: Callable[[str], None]) -> Session:
    """Return the session of a run that begins somewhere.

    Args:
      job: what stays the same.
      origin: where it begins.
      out_dir: the run's folder; what the run will record again is dropped there.
      say: prints a line for the user.
    """
    config, meta, streams = job.config, origin.meta, job.task.material.streams
    training, refits = streams.training(config, job.share), streams.refits(config)
    session = Session(origin.state, origin.step, training, refits)
    if not meta:
        return session
    session.best, session.reached = meta["best"], meta["reached"]
    if _of_data(meta["options"]) == _of_data(run_folder.options(config)):
        session.stream.set_state(meta["stream"])
        session.refits.set_state(meta["refits"])
    else:
        say("[yellow]warning:[/] the options of the data are others: the streams start anew\n")
    if origin.own and processes.first():
        for name in (HISTOGRAMS, translations.FILE):
            _forget(out_dir / name, origin.step)
    return session


STREAM = (
    "dataset", "batch_size", "grad_acc_steps", "partial_batch", "batch_overlap_fraction",
    "precond_batch_size", "rng_seed",
)  # fmt: skip
"""Options that a position in the streams of data belongs to."""

HISTOGRAMS = "histograms.jsonl"


def _of_data(options: dict[str, Any]) -> dict[str, Any]:
    known = run_folder.filled(options).items()
    return {name: value for name, value in known if name.partition(".")[0] in STREAM}


def _forget(path: Path, step: int) -> None:
    """Drop what comes again: evaluations from the checkpoint's step on, and those in the end.

    So is what cannot be read: a line that is cut off.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if line.endswith("\n") and row["step"] < step and row.get("split") != "test":
                kept.append(line)
    write(path, "".join(kept))


def checkpoint(job: Job, session: Session, desk: Desk) -> None:
    """Write a checkpoint if one is due; end the run if a signal asks for it."""
    step, every = session.step, job.config.checkpoint_freq
    signal, checkpoints = desk.common.any(desk.interrupts.requested or 0), desk.checkpoints
    due = step == job.last or (step > 0 and step % (every or 1) == 0)
    if every and (due or signal):
        check_health(job, session.state, desk)
        with desk.clock.phase("checkpoint"):
            checkpoints.save(step, session.state, _meta(job, session, desk))
    if not signal:
        return
    checkpoints.wait()
    saved = "Nothing is saved of it."
    if checkpoints.newest is not None:
        saved = (
            f"It is saved up to step {checkpoints.newest}; the same command for the folder "
            f"{desk.out_dir} goes on from there."
        )
    raise Interrupted(f"{Signals(signal).name} ended the run at step {step}. {saved}")


def keep_best(job: Job, session: Session, found: dict[str, float], desk: Desk) -> None:
    """Write a checkpoint if this evaluation is the best so far."""
    if job.goal.metric not in found:
        return
    value = found[job.goal.metric]
    if not job.goal.better(value, session.best.get("value")):
        return
    session.best = {"value": value, "step": float(session.step)}
    if job.config.checkpoint_freq:
        meta = _meta(job, session, desk)
        with desk.clock.phase("checkpoint"):
            desk.checkpoints.save(session.step, session.state, meta, kind=BEST)


def _meta(job: Job, session: Session, desk: Desk) -> dict[str, Any]:
    return {
        "options": run_folder.options(job.config),
        "best": session.best,
        "reached": session.reached,
        "stream": session.stream.get_state(),
        "refits": session.refits.get_state(),
        "seconds": {**desk.clock.seconds, "total": desk.clock.elapsed()},
        "trackers": desk.trackers.positions(),
    }


def check_health(job: Job, state: TrainState, desk: Desk) -> None:
    """Stop if a loss or gradient was not finite, before it is saved or believed."""
    health = jax.device_get(state.health)
    if job.config.exact_steps:
        _check_residuals(state)
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
        f"the {what} is not finite at step {int(health.bad_step)}; {where}. "
        f"{_caution(job.config)} or go on past such steps with on_nonfinite=skip."
    )


def _check_residuals(state: TrainState) -> None:
    """Stop if no step was taken yet, because no exact one can be made of such a loss."""
    known = state.opt_state.trust
    if known and int(known.refused) == int(state.step) and int(known.outcome) in IMPOSSIBLE:
        raise TrainingError(
            f"no exact step can be made: {OUTCOMES[int(known.outcome)]}. Numbers take "
            "divergence=gaussian, classes divergence=ngd."
        )


def _caution(config: Config) -> str:
    """What may be the cause: the rate, P, or the damping of exact steps."""
    if config.exact_steps:
        return "Raise exact_start," if config.exact_trust else "Lower learning_rate, raise damping,"
    if not config.use_preconditioner:
        return "Lower learning_rate,"
    if config.precond_streaming:
        return "Lower learning_rate, raise damping,"
    return "Lower learning_rate, refit more cautiously (damping, precond_lr, ema_decay),"
