"""What stays the same during a run: made from its options before anything is written."""

import os
from dataclasses import dataclass
from pathlib import Path

import llqr
from llqr._errors import unknown
from llqr_experiments import data
from llqr_experiments.config import build
from llqr_experiments.config.option import become
from llqr_experiments.config.options import Config
from llqr_experiments.errors import ConfigError
from llqr_experiments.run.checkpoint import find
from llqr_experiments.run.step import Recipe
from llqr_experiments.task import tasks
from llqr_experiments.task.material import Material


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


def prepare(config: Config) -> Run:
    """Load the data and build everything that stays the same.

    Raises:
      ConfigError: an illegal option.
      DataError: the data cannot be used.
    """
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
        weight=tasks.valid,
        **become(config, "recipe"),
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


def _check_sources(config: Config) -> None:
    """Whether what a run needs besides data is there: before anything is read or written."""
    scratch = "SCRATCH" in os.environ
    if config.preempt_handling and not (scratch and job_id(config)):
        missing = "give jobid, or set SLURM_JOBID" if scratch else "SCRATCH is not set"
        raise ConfigError(
            f"preempt_handling=true writes to $SCRATCH/<experiment>/<job id>: {missing}."
        )
    for run in (config.resume, config.init_from):
        if run is not None:
            find(Path(run))


def job_id(config: Config) -> str:
    """Return what names a preemptible job; empty if nothing does."""
    return config.jobid or os.environ.get("SLURM_JOBID", "")


def batches(job: Run) -> str:
    """Return in words what a training batch holds."""
    config, parts = job.config, job.config.grad_acc_steps
    if job.task.material.pairs is not None:
        return f"at most {config.dataset.max_tokens:,} words"
    examples = f"{config.batch_size * parts} examples"
    return f"{examples} in {parts} micro-batches" if parts > 1 else examples


def title(config: Config) -> str:
    """Return what pictures of a run are called."""
    name = f"{config.dataset.name}, {config.architecture.name}: {config.main_optimizer}"
    name += f" {config.learning_rate:g}"
    name += f" + LLQR {config.block_structure}" if config.use_preconditioner else ""
    return name + (f" + {config.sam_mode}" if config.sam_mode else "")
