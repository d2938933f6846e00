"""What LLQR costs on residual networks, as the runner trains them, in one process.

    uv run python benchmarks/vision.py
    uv run python benchmarks/vision.py refit --repeats 9
    uv run python benchmarks/vision.py --quick           # a smoke test

  refit     refit / training step and preconditioned / plain step of the small ResNet of
            experiment=small-resnet-fashion: batch 128, refits on 64 examples, 50 inner steps
  blocks    refit / plain step of ResNet-18, batch 32, dense sides in blocks of 512
  compile   seconds until the first step and the first refit of ResNet-18 are done, batch 32
  loop      the runner's plain step of ResNet-18 / that of a minimal loop with nnx.jit and
            nnx.Optimizer, batch 32

Data is random. Repeats alternate what is compared, and ratios are taken within a repeat.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from refit_cost import seconds
from reporting import ask, environment, show, spread, write

import llqr
from llqr_experiments import models
from llqr_experiments.data.material import Material
from llqr_experiments.run import step
from llqr_experiments.run.train import train_step
from llqr_experiments.task import tasks

SMALL = ("small ResNet, 28x28x1", (28, 28, 1), {"width": 8, "depth": 1})
FULL = ("ResNet-18, 32x32x3", (32, 32, 3), {})
MICRO = ("ResNet-18 of width 2, 8x8x3", (8, 8, 3), {"width": 2, "depth": 1})
RATE, MOMENTUM = 0.05, 0.9


def task_of(shape: tuple[int, ...], options: dict[str, Any]) -> tasks.Task:
    """The runner's task for a ResNet on images of a shape, without data."""
    nothing: Any = None
    material = Material(
        "random", "images", nothing, {}, ("test",), shape, 10, lambda batch: batch["image"]
    )
    return tasks.assemble(
        "resnet", material, models.make("resnet-18", shape, 10, seed=0, options=options)
    )


def batch_of(shape: tuple[int, ...], size: int, seed: int) -> dict[str, Any]:
    """Normal images with random labels."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(size, *shape)).astype(np.float32)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, 10, size))}


def runner(task: tasks.Task, tx: Any, batch: Any) -> Callable[[], Any]:
    """The runner's step; the state moves on, as in a run."""
    recipe = step.Recipe(optax.with_extra_args_support(tx))
    held = [step.init(recipe, task.params, task.statistics)]

    def act() -> Any:
        held[0], sums = train_step(task.training, recipe, False, held[0], batch)
        return sums

    return act


def minimal(shape: tuple[int, ...], options: dict[str, Any], batch: Any) -> Callable[[], Any]:
    """A loop as Flax's documentation writes it."""
    model = models.make("resnet-18", shape, 10, seed=0, options=options)
    optimizer = nnx.Optimizer(model, optax.sgd(RATE, MOMENTUM), wrt=nnx.Param)

    def loss(model: nnx.Module, batch: Any) -> jax.Array:
        picked = jnp.take_along_axis(model(batch["image"]), batch["label"][:, None], 1)  # type: ignore[operator]
        return -jnp.mean(picked)

    @nnx.jit
    def update(model: nnx.Module, optimizer: nnx.Optimizer, batch: Any) -> jax.Array:
        value, grads = nnx.value_and_grad(loss)(model, batch)
        optimizer.update(model, grads)
        return value

    return lambda: update(model, optimizer, batch)


def measure_refit(case: Any, repeats: int) -> list[dict[str, Any]]:
    """Refits and steps of the small ResNet."""
    name, shape, options = case
    task = task_of(shape, options)
    batch = batch_of(shape, 128, 1)
    bound = tasks.bound(task, batch_of(shape, 64, 2), task.statistics)
    base = optax.sgd(RATE, MOMENTUM)
    plain = runner(task, base, batch)
    jax.block_until_ready(plain())
    rows = []
    for structure in ("diagonal", "e-kfac"):
        tx = llqr.llqr(base, structure=structure)
        state = tx.init(task.params)
        refit = lambda tx=tx, state=state: llqr.refresh(tx, state, task.params, bound)  # noqa: E731
        preconditioned = runner(task, tx, batch)
        for act in (refit, preconditioned):
            jax.block_until_ready(act())
        found = []
        for _ in range(repeats):
            before, other, whole = seconds(plain, 5), seconds(preconditioned, 5), seconds(refit)
            one = (before + seconds(plain, 5)) / 2
            found.append((1e3 * one, whole / one, other / one))
        times, ratios, steps = (spread(column) for column in zip(*found, strict=True))
        rows.append(
            {"model": name, "structure": structure, "plain step (ms)": times,
             "refit / step": ratios, "preconditioned / plain step": steps}
        )  # fmt: skip
    return rows


def measure_blocks(case: Any, repeats: int) -> list[dict[str, Any]]:
    """Refits of e-kfac with long sides in blocks."""
    name, shape, options = case
    task, batch = task_of(shape, options), batch_of(shape, 32, 1)
    bound, base = tasks.bound(task, batch, task.statistics), optax.sgd(RATE, MOMENTUM)
    tx = llqr.llqr(base, structure="e-kfac", block_size=512)
    state, plain = tx.init(task.params), runner(task, base, batch)
    refit = lambda: llqr.refresh(tx, state, task.params, bound)  # noqa: E731
    jax.block_until_ready(plain())
    compiling = seconds(refit)
    found = []
    for _ in range(repeats):
        before, whole = seconds(plain, 3), seconds(refit)
        one = (before + seconds(plain, 3)) / 2
        found.append((1e3 * one, whole / one))
    times, ratios = (spread(column) for column in zip(*found, strict=True))
    return [{"model": name, "structure": "e-kfac", "block size": 512, "first refit (s)": compiling,
             "plain step (ms)": times, "refit / step": ratios}]  # fmt: skip


def measure_compile(case: Any, repeats: int) -> list[dict[str, Any]]:
    """Seconds until the first step and refit are done, with nothing compiled before."""
    del repeats
    name, shape, options = case
    jax.clear_caches()
    task = task_of(shape, options)
    batch = batch_of(shape, 32, 1)
    bound = tasks.bound(task, batch, task.statistics)
    tx = llqr.llqr(optax.sgd(RATE, MOMENTUM), structure="e-kfac")
    act = runner(task, tx, batch)
    jax.block_until_ready(task.params)
    started = time.perf_counter()
    jax.block_until_ready(act())
    stepped = time.perf_counter()
    state = tx.init(task.params)
    jax.block_until_ready(llqr.refresh(tx, state, task.params, bound))
    refitted = time.perf_counter()
    running = seconds(lambda: llqr.refresh(tx, state, task.params, bound)) + seconds(act)
    row = {
        "model": name,
        "structure": "e-kfac",
        "first step (s)": stepped - started,
        "first refit (s)": refitted - stepped,
        "both (s)": refitted - started,
        "of which running (s)": running,
        "compilation (s)": refitted - started - running,
    }
    return [row]


def measure_loop(case: Any, repeats: int) -> list[dict[str, Any]]:
    """The runner's step against a minimal loop."""
    name, shape, options = case
    batch = batch_of(shape, 32, 1)
    ours = runner(task_of(shape, options), optax.sgd(RATE, MOMENTUM), batch)
    theirs = minimal(shape, options, batch)
    for act in (ours, theirs):
        jax.block_until_ready(act())
    found = []
    for _ in range(repeats):
        before, other = seconds(theirs, 2), seconds(ours, 2)
        one = (before + seconds(theirs, 2)) / 2
        found.append((1e3 * one, other / one))
    times, ratios = (spread(column) for column in zip(*found, strict=True))
    return [{"model": name, "minimal loop (ms)": times, "runner / minimal loop": ratios}]


MEASURES = {
    "refit": (measure_refit, SMALL),
    "blocks": (measure_blocks, FULL),
    "compile": (measure_compile, FULL),
    "loop": (measure_loop, FULL),
}


def main() -> None:
    """Measure, print tables, write JSON with the environment."""
    names, repeats, quick = ask(
        "What LLQR costs on residual networks.",
        MEASURES,
        repeats=5,
        quick="one repeat on a tiny model",
    )
    where = environment(repeats=repeats)
    for name in names:
        measure, case = MEASURES[name]
        rows = measure(MICRO if quick else case, repeats)
        show(f"{name}: {where['device']}, {where['cores']} cores", rows)
        write(f"vision_{name}" + ("_quick" if quick else ""), where, rows)


if __name__ == "__main__":
    main()
