"""What stays the same during a run: made from its options before anything is written."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import llqr
from llqr.inverses import HELD, Sizes, choose
from llqr_experiments import capacity, data, processes
from llqr_experiments.config import build
from llqr_experiments.config.options import Config
from llqr_experiments.config.row import become
from llqr_experiments.data import kinds
from llqr_experiments.data.kinds import KINDS
from llqr_experiments.data.material import Material
from llqr_experiments.errors import ConfigError
from llqr_experiments.layout import WHOLE, Layout, Share, arrange
from llqr_experiments.run.checkpoint import find
from llqr_experiments.run.goal import Goal, goal
from llqr_experiments.run.step import Recipe
from llqr_experiments.task import tasks


@dataclass(frozen=True)
class Job:
    """What stays the same during a run.

    Attributes:
      config: validated options.
      task: data, initial parameters, objectives.
      recipe: of a training step.
      horizon: how long it is.
      refit_steps: steps before which P is refitted.
      blocks: of the preconditioner; None without one.
      goal: what the best checkpoint is best in.
      layout: over devices; None: there is one.
    """

    config: Config
    task: tasks.Task
    recipe: Recipe
    horizon: build.Horizon
    refit_steps: frozenset[int]
    blocks: llqr.Description | None
    goal: Goal
    layout: Layout | None = None

    @property
    def share(self) -> Share:
        """Which rows of a batch this process fetches."""
        return self.layout.share if self.layout else WHOLE

    def join(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch over all devices, of which this process has fetched its share."""
        return self.layout.join(batch) if self.layout else batch

    def put(self, batch: dict[str, Any], axis: int = 0) -> dict[str, Any]:
        """Return a batch over all devices that every process has fetched as a whole."""
        return self.layout.put(batch, axis) if self.layout else batch

    def whole(self, tree: Any) -> Any:
        """Return arrays that every process can read."""
        return self.layout.whole(tree) if self.layout else tree

    def multiple(self, rows: int) -> int:
        """Return the next number of rows that divide over the devices."""
        return -(-rows // self.share.parts) * self.share.parts

    def seen(self, step: int) -> llqr.Objective | None:
        """Return the network that the optimizer sees in a step; None: only a gradient."""
        if self.config.exact_steps:
            return self.task.objective
        due = self.config.precond_streaming and step in self.refit_steps
        return self.task.probing if due else None

    @property
    def last(self) -> int:
        """The loop's last index, which only evaluates: the number of updates."""
        return self.horizon.total_steps - 1


def prepare(config: Config, *, abstract: bool = False) -> Job:
    """Load the data and build everything that stays the same.

    Args:
      config: validated options.
      abstract: whether the devices need not be there.

    Raises:
      ConfigError: an illegal option.
      DataError: the data cannot be used.
    """
    check(config)
    layout = arrange(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, abstract=abstract)
    _check_rows(config, layout)
    # The first process may have to download, for all of them.
    made = processes.one_by_one(lambda: kinds.make(config.dataset))
    horizon = _horizon(config, made)
    task = tasks.build(config, made)
    recipe = Recipe(
        build.optimizer(config, horizon),
        build.ascent(config, horizon),
        weight=tasks.valid,
        gradient=not (config.exact_steps and config.exact_trust),
        **become(config, "recipe"),
    )
    build.check_mask(config, task.params)
    size = sum(x.nbytes for x in jax.tree.leaves(task.params))
    for name in ("precond_probes", "precond_rank"):
        count = getattr(config, name) if config.use_preconditioner else None
        capacity.check(size * (count or 0), f"{name}={count}: as many times the parameters")
    if config.exact_steps and config.exact_trust:
        sizes, solver = exact_sizes(config, task)
        if solver in ("dual", "primal"):
            side = sizes.residuals if solver == "dual" else sizes.parameters
            entries = min(sizes.residuals * sizes.parameters, HELD) + 3 * side**2
            itemsize = 8 if config.precision == "float64" else 4
            what = f"exact_solver={solver}: matrices of {side:,} x {side:,}"
            capacity.check(itemsize * entries, what)
    refits = build.refit_steps(config, horizon)
    blocks = llqr.describe(recipe.tx, task.params) if config.use_preconditioner else None
    best = goal(config, task.material)
    return Job(config, task, recipe, horizon, refits, blocks, best, layout)


def _check_rows(config: Config, layout: Layout | None) -> None:
    """Raise ConfigError where a batch of one shape does not divide over the devices."""
    kind = kinds.of(config.dataset.name)
    if layout is None or kind is None or kind.decoded:
        return
    groups = config.sam_groups if config.sam_mode else 1
    if config.batch_size % (groups * layout.parts):
        told = f" in sam_groups={groups}" if groups > 1 else ""
        raise ConfigError(
            f"batch_size={config.batch_size}{told} does not divide over {layout.parts} devices "
            f"(mesh.data x mesh.fsdp): give a multiple of {groups * layout.parts}, or fewer "
            "devices by mesh.data."
        )


def check(config: Config) -> None:
    """Raise ConfigError for what is wrong whatever the data is, before any of it is read."""
    _check_sources(config)
    early = build.Horizon(build.EARLY, config.total_epochs)
    build.optimizer(config, early)
    build.ascent(config, early)
    try:
        data.stride(config.batch_size * config.grad_acc_steps, config.batch_overlap_fraction)
    except ValueError as error:
        raise ConfigError(f"batch_overlap_fraction: {error}") from error


def _horizon(config: Config, made: Material) -> build.Horizon:
    """How long a run on some data is: at least one step."""
    length = made.streams.length(config)
    horizon = build.Horizon(length, config.total_epochs, config.max_steps)
    if horizon.total_steps > build.MOST_STEPS:
        raise ConfigError(
            f"total_epochs={config.total_epochs:g} is {horizon.total_steps - 1:,} steps, and "
            f"schedules count up to {build.MOST_STEPS:,}: lower it, or set max_steps."
        )
    if horizon.total_steps > 1:
        build.check_schedules(config, horizon)
        _check_batches(config, made)
        return horizon
    raise ConfigError(
        f"total_epochs={config.total_epochs:g} is no step: an epoch of {made.name} has "
        f"{made.sizes['train']:,} examples, {length:.4g} batches (batch_size={config.batch_size}, "
        f"grad_acc_steps={config.grad_acc_steps}). One step takes total_epochs="
        f"{math.ceil(1e4 / length) / 1e4:g}, or a smaller batch."
    )


def _check_batches(config: Config, made: Material) -> None:
    """Whether batches can be held, before one is made."""
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in made.streams.shapes(config).values())
    examples = config.batch_size * config.grad_acc_steps
    sizes = {"batch_size": size * config.batch_size / examples, "grad_acc_steps": size}
    if not KINDS[made.kind].decoded:  # whose batches are as large as dataset.max_tokens
        for name in ("eval_batch_size", "precond_batch_size"):
            sizes[name] = size / examples * (getattr(config, name) or 0)
    if config.multibatch_training:
        sizes["precond_steps"] = sizes["precond_batch_size"] * config.precond_steps
    for name, needed in sizes.items():
        capacity.check(int(needed), f"{name}={getattr(config, name)}: a batch")


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


def batches(job: Job) -> str:
    """Return in words what a training batch holds."""
    return KINDS[job.task.material.kind].batch(job.config)


def refits_in_words(job: Job) -> str:
    """Return in words how many refits a run makes, and of what."""
    config, count = job.config, len(job.refit_steps)
    if config.precond_streaming:
        many = "a probe" if config.precond_probes == 1 else f"{config.precond_probes} probes"
        return f"streaming refits: {count}, of {many} on the training batch"
    return (
        f"refits: {count}, of {config.precond_steps} inner steps on "
        f"{config.precond_batch_size} examples"
    )


def exact_sizes(config: Config, task: tasks.Task) -> tuple[Sizes, str]:
    """Return residuals and parameters of an exact step, and the solver of a trust region."""
    batch = task.material.streams.shapes(config)
    outputs = jax.eval_shape(
        lambda params, batch: tasks.bound(task, batch, task.statistics).outputs(params),
        task.params,
        batch,
    )
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))  # noqa: E731
    sizes = Sizes(count(outputs), count(task.params))
    return sizes, choose(config.exact_solver, sizes)


def exact_in_words(job: Job) -> str:
    """Return how a run makes exact steps."""
    config = job.config
    if not config.exact_trust:
        solver = "cg" if config.exact_solver == "auto" else config.exact_solver
        return (
            f"exact steps by {solver}, {config.divergence}: damping {config.damping:g}, in front "
            f"of {config.main_optimizer}"
        )
    sizes, solver = exact_sizes(config, job.task)
    geodesic = "with" if config.exact_geodesic else "without"
    return (
        f"exact steps by {solver}, {config.divergence}: {sizes.residuals:,} residuals in "
        f"{sizes.parameters:,} parameters, a trust region, {geodesic} a geodesic term"
    )


def title(config: Config) -> str:
    """Return what pictures of a run are called."""
    name = f"{config.dataset.name}, {config.architecture.name}: "
    if config.exact_steps and config.exact_trust:
        return f"{name}exact steps"
    name += f"exact steps, {config.main_optimizer}" * config.exact_steps or config.main_optimizer
    name += f" {config.learning_rate:g}"
    way = "streaming " if config.precond_streaming else ""
    name += f" + LLQR {way}{config.block_structure}" if config.use_preconditioner else ""
    return name + (f" + {config.sam_mode}" if config.sam_mode else "")
