"""Whether the library is right and fast on the device that is here: one command, below ten minutes.

    uv run python benchmarks/accelerator.py            # figures: results/accelerator.json
    uv run python benchmarks/accelerator.py correctness
    uv run python benchmarks/accelerator.py --smoke    # in small, on any machine

  correctness  P of every structure, published and streaming, against the CPU in float64
  resnet-18    training on images like CIFAR's: plain, published, streaming; float32 and bfloat16
  gpt2-small   the same on windows of tokens

Data is synthetic, and stays on the device. A row of training says how long compiling took, the
median time of a step, what goes through in a second, what a refit costs in steps, and what the
compiler lays out in memory. The exit code is 1 where a structure is wrong.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reporting import MEBIBYTE, environment, show, spread, write
from rich.progress import track

import llqr
from llqr_experiments import models
from llqr_experiments.data.material import Material
from llqr_experiments.run.step import Recipe, init
from llqr_experiments.run.train import train_step
from llqr_experiments.task import tasks

PARTS = ("correctness", "resnet-18", "gpt2-small")
WITHIN = 1e-2
"""Largest error of P v, relative to its largest entry, in float32 after a refit."""

EVERY = 10
"""Steps between streaming refits."""


# --- correctness ------------------------------------------------------------------------------


def correctness(smoke: bool) -> list[dict[str, Any]]:
    """Return a row for each structure: the error of P v on this device."""
    names = ("diagonal", "e-kfac") if smoke else llqr.STRUCTURES
    cases = [(name, way) for name in names for way in ("published", "streaming")]
    rows = []
    for name, way in track(cases, "correctness", transient=True):
        try:
            found, expected = (learned(name, way, wide=wide) for wide in (False, True))
        except ValueError as error:
            if way == "published":
                raise
            if "stream" not in str(error).lower():
                raise
            continue  # it is no structure for that
        error = float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
        moved = float(np.max(np.abs(expected - 1)))
        good = error < WITHIN and moved > 1e-3
        rows.append({"structure": name, "refit": way, "error": error, "right": good})
    return rows


def learned(name: str, way: str, *, wide: bool) -> np.ndarray:
    """Return P times ones after some steps of a small network: here, or on the CPU in float64."""
    dtype = np.float64 if wide else np.float32
    device = jax.devices("cpu")[0] if wide else jax.devices()[0]
    random = np.random.default_rng(0)
    with (
        jax.enable_x64(wide),
        jax.default_device(device),
        jax.default_matmul_precision("highest"),
        same_draws(),
    ):
        # Square: where moments have rank to spare, rounding chooses a part of their basis.
        layer = lambda: {"kernel": random.normal(size=(8, 8)) / 3, "bias": np.zeros(8)}  # noqa: E731
        params = {"a": layer(), "b": layer()}
        batch = {name: random.normal(size=(256, 8)) for name in ("x", "y")}
        params, batch = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, batch))
        published = llqr.Refit(steps=10, learning_rate=0.2)
        tx = llqr.scale_by_llqr(
            structure=name,
            metric="gaussian",
            damping=0.1,
            divergence_reduction="mean" if way == "published" else None,
            refit=published if way == "published" else llqr.Streaming(every=1),
        )
        state = tx.init(params)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            grads = jax.grad(OBJECTIVE)(params, batch)
            return tx.update(grads, state, params, objective=OBJECTIVE.bind(batch))[1]

        for _ in range(1 if way == "published" else 3):
            state = step(params, state)
        ones = jax.tree.map(jnp.ones_like, params)
        product = llqr.precondition(tx, state, ones)
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(product)])


@contextmanager
def same_draws() -> Iterator[None]:
    """Draw random numbers in float32 whatever they are for: other precisions have other ones."""
    normal = jax.random.normal
    narrow = lambda key, shape=(), dtype=float: normal(key, shape, jnp.float32).astype(dtype)  # noqa: E731
    jax.random.normal = narrow
    try:
        yield
    finally:
        jax.random.normal = normal


def forward(params: Any, batch: Any) -> jax.Array:
    """Two layers."""
    hidden = jnp.tanh(batch["x"] @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"]


OBJECTIVE = llqr.Objective(forward, lambda z, batch: jnp.mean((z - batch["y"]) ** 2))


# --- training ---------------------------------------------------------------------------------


def material(name: str, smoke: bool) -> tuple[Material, int, str]:
    """Return what a model is made for, the size of its batches, and what goes through it."""
    nothing: Any = None  # no data is read
    if name == "resnet-18":
        side = 8 if smoke else 32
        inputs = lambda batch: batch["image"]  # noqa: E731
        made = Material("images", "images", nothing, {}, (), (side, side, 3), 10, inputs=inputs)
        return made, 4 if smoke else 128, "images"
    length, classes = (16, 64) if smoke else (1024, 50_257)
    inputs = lambda batch: batch["tokens"]  # noqa: E731
    made = Material("tokens", "text", nothing, {}, (), (length,), classes, inputs=inputs)
    return made, 2 if smoke else 8, "tokens"


def synthetic(made: Material, size: int, seed: int) -> dict[str, jax.Array]:
    """Return a batch on the device."""
    random = np.random.default_rng(seed)
    if made.kind == "images":
        image = random.normal(size=(size, *made.shape)).astype(np.float32)
        found = {"image": image, "label": random.integers(0, made.classes, size).astype(np.int32)}
    else:
        text = random.integers(0, made.classes, (size, made.shape[0] + 1)).astype(np.int32)
        found = {"tokens": text[:, :-1], "label": text[:, 1:]}
    return jax.device_put(found)


def optimizers(name: str) -> dict[str, optax.GradientTransformationExtraArgs]:
    """Return the optimizer of each way of training."""
    structure = "e-kfac" if name == "resnet-18" else "e-kfac-gpt"
    # Sides of matrices up to this length; those over a vocabulary are diagonal.
    options: dict[str, Any] = {"structure": structure, "metric": "ngd", "max_dim": 4096}
    refit = llqr.Refit(steps=5, learning_rate=0.01, every=None)
    plain = optax.with_extra_args_support(optax.sgd(0.01, momentum=0.9))
    chunks = llqr.Route(chunk_size=1) if name == "gpt2-small" else None
    return {
        "plain": plain,
        "published": llqr.llqr(
            optax.sgd(0.01, momentum=0.9), refit=refit, route=chunks, damping=0.1, **options
        ),
        "streaming": llqr.streaming(1e-3, **options),
    }


def training(name: str, smoke: bool) -> list[dict[str, Any]]:
    """Return a row for each way of training a model, in each precision."""
    rows = []
    ways = [
        (precision, way)
        for precision in (("float32",) if smoke else ("float32", "bf16"))
        for way in ("plain", "published", "streaming")
    ]
    base: dict[str, float] = {}
    for precision, way in track(ways, name, transient=True):
        row = trained(name, way, precision, smoke)
        base.setdefault(precision, row["step (ms)"])
        row["of a plain step"] = row["step (ms)"] / base[precision]
        rows.append(row)
    return rows


def trained(name: str, way: str, precision: str, smoke: bool) -> dict[str, Any]:
    """Return the row of one way of training."""
    made, size, what = material(name, smoke)
    small = models.MODELS[name].small if smoke else {}
    model = models.make(name, made.shape, made.classes, seed=0, options=small)
    task = tasks.assemble(name, made, model, precision=precision)
    tx = optimizers(name)[way]
    recipe = Recipe(tx, weight=tasks.valid)
    state, batch = init(recipe, task.params, task.statistics), synthetic(made, size, 0)
    wanted = [None] if way != "streaming" else [None, task.probing]
    begun = time.perf_counter()
    compiled: list[Any] = [
        train_step.lower(task.training, recipe, False, state, batch, probing).compile()
        for probing in wanted
    ]
    seconds = time.perf_counter() - begun
    times = []
    for step in range(3 if smoke else 30):
        due = way == "streaming" and step % EVERY == 0
        state, passed = timed(compiled[int(due)], state, batch)
        times.append((due, passed))
    plain = spread(passed for due, passed in times[2:] if not due) if times[2:] else [0.0] * 3
    row: dict[str, Any] = {
        "model": name, "precision": precision, "way": way, "compile (s)": seconds,
        "step (ms)": 1e3 * plain[0], f"{what} per second": size * unit(made) / plain[0],
        "refit (steps)": 0.0, "refit compile (s)": 0.0,
        "memory (MiB)": memory(compiled[0]) / MEBIBYTE,
    }  # fmt: skip
    if way == "streaming":
        probed = [passed for due, passed in times[1:] if due] or [times[0][1]]
        row["refit (steps)"] = min(probed) / plain[0] - 1
    if way == "published":
        half = {k: v[: max(size // 2, 1)] for k, v in batch.items()}
        objective = tasks.bound(task, half, state.statistics)
        refits = [timed_refit(tx, state.opt_state, state.params, objective) for _ in range(2)]
        row["refit (steps)"] = refits[1] / plain[0]
        row["refit compile (s)"] = refits[0] - refits[1]
    return row


def unit(made: Material) -> int:
    """Return what one example counts for."""
    return 1 if made.kind == "images" else made.shape[0]


def timed(step: Callable[..., Any], state: Any, batch: Any) -> tuple[Any, float]:
    """Return the state after a step, and its seconds."""
    begun = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    return state, time.perf_counter() - begun


def timed_refit(tx: Any, *given: Any) -> float:
    """Return the seconds of a refit."""
    begun = time.perf_counter()
    jax.block_until_ready(llqr.refresh(tx, *given))
    return time.perf_counter() - begun


def memory(compiled: Any) -> int:
    """Return the bytes that a compiled step holds at most, its state included."""
    told = compiled.memory_analysis()
    held = told.argument_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
    return held + told.temp_size_in_bytes


# --- all of it --------------------------------------------------------------------------------


def measured(parts: list[str], smoke: bool) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the rows of every part."""
    for name in parts:
        part = partial(correctness, smoke) if name == "correctness" else None
        yield name, part() if part else training(name, smoke)


def main() -> None:
    """Measure, print tables, write JSON with the name of the device."""
    parser = argparse.ArgumentParser(description="Right and fast on this device?")
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--smoke", action="store_true", help="in small; writes no JSON")
    given = parser.parse_args()
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"unknown parts {unknown}: choose {', '.join(PARTS)}")
    if given.smoke:
        jax.config.update("jax_disable_most_optimizations", True)
    begun, rows = time.perf_counter(), []
    for name, found in measured(given.parts, given.smoke):
        show(f"{name} on {jax.devices()[0].device_kind}", found)
        rows += [{"part": name, **row} for row in found]
    seconds = time.perf_counter() - begun
    print(f"{seconds:.0f} s in all")
    if not given.smoke:
        write("accelerator", environment(seconds=seconds), rows)
    wrong = [row for row in rows if not row.get("right", True)]
    if wrong:
        print(f"wrong: {', '.join(row['structure'] + ' ' + row['refit'] for row in wrong)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
