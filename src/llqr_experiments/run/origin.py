"""Where a run begins: at a checkpoint of its own, or of another run, or with parameters, or anew.

The first of these sources that there is counts; each is one function below.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llqr_experiments import processes
from llqr_experiments.errors import ConfigError
from llqr_experiments.record import run_folder
from llqr_experiments.record.lock import ELSEWHERE
from llqr_experiments.run.checkpoint import Checkpoint, Checkpoints, find, load_fields
from llqr_experiments.run.job import Job
from llqr_experiments.run.step import TrainState, begin

Say = Callable[[str], None]
"""Prints a line for the user."""


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    Attributes:
      state: before its first step.
      step: the index of that.
      meta: facts of the checkpoint it is from; empty without one.
      own: whether that is the run's own checkpoint, so that its record goes on as well.
      name: of what it is from, for the user; empty if it begins anew.
    """

    state: TrainState
    step: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    own: bool = True
    name: str = ""

    @property
    def seconds(self) -> dict[str, float]:
        """Time by phase before the checkpoint."""
        return self.meta.get("seconds", {})

    @property
    def trackers(self) -> dict[str, Any] | None:
        """Where the run's trackers go on; None: they start."""
        return self.meta.get("trackers") if self.own else None


def origin(job: Job, entered: bool, out_dir: Path, checkpoints: Checkpoints, say: Say) -> Origin:
    """Return where a run begins.

    Args:
      job: what stays the same.
      entered: whether the run's folder holds this run.
      out_dir: the run's folder.
      checkpoints: of the run.
      say: prints a line for the user.

    Raises:
      ConfigError: there is nothing to go on with, or it is not this run's.
    """
    config, found = job.config, None
    new = begin(job.recipe, job.task.params, job.task.statistics, job.layout)
    if entered or config.preempt_handling:
        found = interrupted(job, new, checkpoints)
    if found is None and config.resume:
        found = resumed(job, new, say)
    if found is None and entered:
        processes.decide(lambda: _refuse_finished(out_dir))
    if found is None and config.init_from:
        found = initialised(job, new, say)
    if found is None:
        return Origin(new)
    say(f"{found.name}\n")
    return found


def interrupted(job: Job, new: TrainState, checkpoints: Checkpoints) -> Origin | None:
    """Return the newest of the run's own checkpoints; None: there is none."""
    found = checkpoints.restore(new)
    if found is None:
        return None
    # In $SCRATCH, the folder does not tell whose it is.
    run_folder.check_same(found.meta["options"], run_folder.options(job.config), checkpoints.folder)
    return _restored(job, new, found, own=True)


def resumed(job: Job, new: TrainState, say: Say) -> Origin:
    """Return the newest checkpoint of the run that `resume` names; its record stays where it is."""
    folder = find(Path(str(job.config.resume)))
    found = Checkpoints(folder, 1, say).restore(new, own=False)
    if found is None:
        raise ConfigError(f"resume={job.config.resume}: no checkpoint there can be read.")
    return _restored(job, new, found, own=False)


def initialised(job: Job, new: TrainState, say: Say) -> Origin:
    """Return the first step, with the parameters of the run that `init_from` names."""
    folder = find(Path(str(job.config.init_from)))
    model, step = load_fields(folder, {"params": new.params, "statistics": new.statistics}, say)
    name = f"parameters of step {step} of {job.config.init_from}"
    return Origin(new._replace(**model), name=name)


def _restored(job: Job, new: TrainState, found: Checkpoint, *, own: bool) -> Origin:
    if found.step > job.last:
        raise ConfigError(
            f"the checkpoint is of step {found.step}, and this run ends at {job.last}."
        )
    state = found.state
    if not job.recipe.skip:  # what an earlier run skipped is no reason to stop
        state = state._replace(health=new.health)
    where = "" if own else f" of {job.config.resume}"
    name = f"going on from the checkpoint of step {found.step}{where}"
    return Origin(state, found.step, found.meta, own, name)


def _refuse_finished(out_dir: Path) -> None:
    if run_folder.finished(out_dir):
        raise ConfigError(
            f"{out_dir} already holds a finished run, without a checkpoint that can be read: "
            f"{ELSEWHERE}."
        )
