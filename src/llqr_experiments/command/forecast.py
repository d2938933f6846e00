"""What a run would do: its steps, refits, memory and cost, before anything is run."""

import math
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import llqr
from llqr.typing import PyTree
from llqr_experiments.command import memory
from llqr_experiments.config import advice, build
from llqr_experiments.config.options import Config
from llqr_experiments.record.console import counts
from llqr_experiments.run.job import Job, batches, exact_in_words, prepare, refits_in_words
from llqr_experiments.run.step import TrainState, init, shardings
from llqr_experiments.study import comparison
from llqr_experiments.task import tasks

INNER_STEP = 1.0
"""Cost of one inner step of a refit, in gradients on its batch: one tangent and one transpose
sweep. Measured: 0.8 to 1.2 (docs/performance.md)."""

PULL_BACK = 2 / 3
"""Cost of one probe of a streaming refit, in gradients: it shares the forward sweep."""


def show(config: Config) -> None:
    """Print what a run would do.

    Raises:
      ConfigError: an illegal option.
      DataError: the data cannot be used: a forecast needs their number and shape.
    """
    console = Console(highlight=False)
    if config.toy.name:
        console.print(f"toy {config.toy.name}: at most {config.toy.iterations:,} iterations")
        return
    if config.comparison.name == "potholes":
        runs, steps = config.comparison.runs, config.comparison.steps
        console.print(f"potholes: four methods, {runs} starts each, {steps:,} steps")
        return
    variants = {"": config}
    if config.comparison.name:
        variants = comparison.variants(config)
        console.print(f"{len(variants)} methods, {config.comparison.runs} runs each")
    for name, variant in variants.items():
        if name:
            console.print(f"\n[bold]{name}[/]")
        _show_run(variant, console)


def _show_run(config: Config, console: Console) -> None:
    with tasks.wide(config):
        _show(prepare(config, abstract=True), console)


def _show(job: Job, console: Console) -> None:
    config = job.config
    state = jax.eval_shape(
        lambda model: init(job.recipe, *model), (job.task.params, job.task.statistics)
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(job, state):
        table.add_row(name, value)
    if job.refit_steps and config.plan_memory and not config.precond_streaming:
        with console.status("asking the compiler what a refit holds in memory"):
            table.add_row("refit memory", _refit_memory(job, state))
    console.print(table)
    for text in advice.warnings(config, job.horizon, job.task.material.sizes["train"]):
        console.print(f"[yellow]warning:[/] {text}", soft_wrap=True)
    if job.blocks is not None:
        console.print(f"\n{job.blocks}", soft_wrap=True)


def _rows(job: Job, state: TrainState) -> Iterable[tuple[str, str]]:
    config, ascent = job.config, job.recipe.ascent
    size = sum(x.size for x in jax.tree.leaves(job.task.params))
    yield "model", f"{config.architecture.name}, {size:,} parameters, {config.precision}"
    yield (
        "data",
        f"{config.dataset.name}: {counts(job.task.material.sizes)} examples",
    )
    yield (
        "steps",
        f"{job.last:,} of {batches(job)} ({job.last / job.horizon.steps_per_epoch:.3g} epochs)",
    )
    if config.exact_steps:
        yield "steps by", exact_in_words(job)
    yield (
        "optimizer",
        f"{config.main_optimizer}, learning rate {config.learning_rate:g}"
        + (f" ({config.lr_scheduler['name']})"),
    )
    evaluations = 1 + max(job.last - 1, 0) // config.test_eval_freq
    yield "evaluations", f"{evaluations:,}"
    if config.checkpoint_freq:
        writes = 1 + max(job.last - 1, 0) // config.checkpoint_freq
        yield (
            "checkpoints",
            (
                f"{writes:,} of {_amount(state)}; the newest {config.checkpoint_keep} and the "
                "best are kept"
            ),
        )
    yield (
        "memory",
        ", ".join(f"{name} {_amount(tree)}" for name, tree in _parts(state)),
    )
    if job.layout is not None:
        axes = " x ".join(f"{name} {size}" for name, size in job.layout.mesh.shape.items())
        yield "devices", f"{job.layout.mesh.size}: {axes}"
        onto = shardings(job.recipe, job.layout, state)
        pairs = zip(_parts(state), _parts(onto), strict=True)
        held = (f"{name} {_bytes(_held(tree, where))}" for (name, tree), (_, where) in pairs)
        yield "per device", ", ".join(held)
    gradients = job.last * 1.0
    if ascent is not None:
        perturbed = max(job.last - ascent.method.start, 0)
        gradients += perturbed * (ascent.method.passes - 1)
        yield (
            "SAM",
            (
                f"{config.sam_mode} from step {ascent.method.start:,}: {perturbed:,} perturbed "
                f"steps, {gradients:,.0f} gradients in all"
            ),
        )
    if job.blocks is None:
        return
    due = sorted(job.refit_steps)
    shown = ", ".join(f"{step:,}" for step in due[:4]) + (", ..." if len(due) > 4 else "")
    yield (
        "refits",
        (f"{len(due):,}, before steps {shown}; " + refits_in_words(job).partition(" of ")[2]),
    )
    yield "overhead", _overhead(job, gradients)


def _refit_batch(job: Job) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a refit batch."""
    with closing(job.task.material.streams.refits(job.config)) as refits:
        return jax.eval_shape(lambda x: x, next(refits))


def _refit_memory(job: Job, state: TrainState) -> str:
    config, like = job.config, (_refit_batch(job), state.statistics)
    if config.multibatch_training:  # as many of them as inner steps, on a first axis
        many = (config.precond_steps,)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(many + x.shape, x.dtype), like)
    objective, tx = tasks.bound(job.task, *like), job.recipe.tx
    size = memory.temporary(memory.compile_refit(tx, state.opt_state, state.params, objective))
    told = f"{_bytes(size)} on top while one runs, compiled as a whole for {jax.default_backend()}"
    route = build.route(config)
    if route.chunk_size is None and not route.layerwise and config.batch_solve_precond:
        told += (
            "; less in chunks: llqr_batch_update_mode=chunked_lqr_segment "
            "llqr_batch_update_chunk_size=N"
        )
    return told


def _overhead(job: Job, gradients: float) -> str:
    """What P costs, in gradients of the training batch: an estimate."""
    config = job.config
    if config.precond_streaming:
        return _streaming_overhead(job, gradients)
    probes = config.precond_probes if config.precond_probe != "gradient" else 1
    training = _gradient_flops(job, job.task.material.streams.shapes(config))
    if not training:
        return "not known: the compiler counts no operations here"
    share = _gradient_flops(job, _refit_batch(job)) / training
    refits = len(job.refit_steps) * config.precond_steps * probes * share * INNER_STEP
    product = 2.0 * sum(row.cost for row in job.blocks.rows)  # type: ignore[union-attr]
    steps = job.last * product / training
    return (
        f"refits about {refits:,.0f} gradients of a training batch, "
        f"{100 * refits / gradients:.1f} % of the run; products with P about "
        f"{100 * steps / gradients:.1f} % (estimates from operations, not times)"
    )


def _streaming_overhead(job: Job, gradients: float) -> str:
    """The same for streaming refits: a probe is a pull-back, two of a gradient's three sweeps."""
    training = _gradient_flops(job, job.task.material.streams.shapes(job.config))
    probes = (
        len(job.refit_steps) * job.config.precond_probes * PULL_BACK / job.config.grad_acc_steps
    )
    told = f"probes about {probes:,.0f} gradients, {100 * probes / gradients:.1f} % of the run"
    if not training:
        return told
    product = 2.0 * sum(row.cost for row in job.blocks.rows)  # type: ignore[union-attr]
    moments = 2.0 * sum(
        row.parameters * sum(n for n in row.view if n <= job.config.precond_max_dim)
        for row in job.blocks.rows  # type: ignore[union-attr]
        if len(row.view) == 2
    )
    share = 100 * job.last * (product + moments) / training / gradients
    return f"{told}; moments and products with P about {share:.1f} % (estimates, not times)"


def _gradient_flops(job: Job, shapes: dict[str, jax.ShapeDtypeStruct]) -> float:
    """Floating-point operations of one gradient on a batch, as XLA counts them."""
    objective = tasks.bound(job.task, shapes, job.task.statistics)
    lowered = jax.jit(lambda p, o: jax.grad(o)(p)).lower(job.task.params, objective)
    found: Any = lowered.cost_analysis()
    return float((found or {}).get("flops", 0.0))


def _parts(state: TrainState) -> Iterable[tuple[str, Any]]:
    yield "parameters", state.params
    try:
        preconditioner = llqr.find(state.opt_state)
    except ValueError:
        yield "optimizer", state.opt_state
    else:
        yield "optimizer", getattr(state.opt_state, "base", ())
        yield "P", preconditioner
    if state.sharpness is not None:
        yield "SAM", state.sharpness


def _amount(tree: PyTree) -> str:
    return _bytes(memory.size(tree))


def _held(tree: PyTree, onto: PyTree) -> int:
    """Bytes of a tree on each device."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(onto), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)


def _bytes(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size >= 2**power / 100:
            return f"{size / 2**power:,.2f} {unit}"
    return f"{size:,} B"
