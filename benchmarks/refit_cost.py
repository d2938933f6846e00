"""What LLQR costs: refit / training step and preconditioned / plain step, in one process.

    uv run python benchmarks/refit_cost.py            # both models
    uv run python benchmarks/refit_cost.py mlp --repeats 9

Each repeat times the plain step, the preconditioned step and a whole refit (50 inner
steps) one after the other, so that a drift of the machine's speed hits all three; ratios
are taken within a repeat and reported as median (smallest - largest).
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import llqr

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Model:
    """A model with the sizes of its training and refit batches."""

    name: str
    shapes: dict[str, Any]
    forward: Callable[[Any, Any], jax.Array]
    image: tuple[int, ...]
    batch: int
    refit_batch: int
    structures: tuple[str, ...]
    steps: int  # training steps timed together, for a steady clock


def mlp(params: Any, batch: Any) -> jax.Array:
    """784-100-300-10 with ReLU."""
    x = batch["x"]
    for name in ("hidden0", "hidden1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["logits"]["kernel"] + params["logits"]["bias"]


def cnn(params: Any, batch: Any) -> jax.Array:
    """A stem and three residual blocks with strided projections, 0.31 M parameters."""

    def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = jax.nn.relu(conv(batch["x"], params["stem"]["kernel"]))
    for name, stride in (("block0", 1), ("block1", 2), ("block2", 2)):
        block = params[name]
        y = jax.nn.relu(conv(x, block["conv0"]["kernel"], stride))
        x = jax.nn.relu(
            conv(y, block["conv1"]["kernel"]) + conv(x, block["skip"]["kernel"], stride)
        )
    return jnp.mean(x, (1, 2)) @ params["logits"]["kernel"] + params["logits"]["bias"]


def _dense(fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (fan_in, fan_out), "bias": (fan_out,)}


def _block(fan_in: int, fan_out: int) -> dict[str, Any]:
    return {
        "conv0": {"kernel": (3, 3, fan_in, fan_out)},
        "conv1": {"kernel": (3, 3, fan_out, fan_out)},
        "skip": {"kernel": (1, 1, fan_in, fan_out)},
    }


MODELS = {
    "mlp": Model(
        name="MLP 784-100-300-10",
        shapes={
            "hidden0": _dense(784, 100),
            "hidden1": _dense(100, 300),
            "logits": _dense(300, 10),
        },
        forward=mlp,
        image=(784,),
        batch=128,
        refit_batch=64,
        structures=("diagonal", "e-kfac"),
        steps=40,
    ),
    "cnn": Model(
        name="residual CNN, 32x32x3",
        shapes={
            "stem": {"kernel": (3, 3, 3, 32)},
            "block0": _block(32, 32),
            "block1": _block(32, 64),
            "block2": _block(64, 128),
            "logits": _dense(128, 10),
        },
        forward=cnn,
        image=(32, 32, 3),
        batch=32,
        refit_batch=32,
        structures=("diagonal", "e-kfac"),
        steps=4,
    ),
}


def loss(outputs: jax.Array, batch: Any) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]).mean()


def initial(shapes: Any) -> Any:
    """LeCun-normal kernels, zero biases."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    init = jax.nn.initializers.lecun_normal()
    return treedef.unflatten(
        [init(k, s) if len(s) > 1 else jnp.zeros(s) for k, s in zip(keys, leaves, strict=True)]
    )


def seconds(act: Callable[[], Any], times: int = 1) -> float:
    """Seconds of one `act`, from `times` of them."""
    start = time.perf_counter()
    for _ in range(times):
        out = act()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / times


def stepper(objective: llqr.Objective, tx: Any, params: Any, batch: Any) -> Callable[[], Any]:
    """A training step on fixed inputs, compiled."""

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(objective)(params, batch)
        updates, state = tx.update(grads, state, params, refresh=False)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    act = lambda: step(params, state, batch)  # noqa: E731
    jax.block_until_ready(act())
    return act


def measure(model: Model, structure: str, repeats: int) -> dict[str, Any]:
    """Time one structure on one model."""
    objective = llqr.Objective(model.forward, loss)
    params = initial(model.shapes)

    def data(size: int) -> Any:
        key = jax.random.key(1)
        x = jax.random.normal(key, (size, *model.image))
        return {"x": x, "y": jax.random.randint(key, (size,), 0, 10)}

    base = optax.with_extra_args_support(optax.sgd(0.1))
    tx = llqr.llqr(base, structure=structure)
    batch, bound = data(model.batch), objective.bind(data(model.refit_batch))
    plain = stepper(objective, base, params, batch)
    preconditioned = stepper(objective, tx, params, batch)
    state = tx.init(params)
    refit = lambda: llqr.refresh(tx, state, params, bound)  # noqa: E731
    first = seconds(refit)
    rows = []
    for _ in range(repeats):
        before = seconds(plain, model.steps)
        other = seconds(preconditioned, model.steps)
        whole = seconds(refit)
        step = (before + seconds(plain, model.steps)) / 2
        rows.append({"step": step, "refit": whole / step, "preconditioned": other / step})
    spread = {
        key: [f(row[key] for row in rows) for f in (statistics.median, min, max)] for key in rows[0]
    }
    return {
        "model": model.name,
        "structure": structure,
        "plain step (ms)": [1e3 * x for x in spread["step"]],
        "refit / step": spread["refit"],
        "preconditioned / plain step": spread["preconditioned"],
        "first refit, with compilation (s)": first,
    }


def main() -> None:
    """Measure, print a table, write JSON with the environment."""
    parser = argparse.ArgumentParser(description="What LLQR costs.")
    parser.add_argument("models", nargs="*", default=list(MODELS), help="mlp, cnn")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    jobs = [(MODELS[m], s) for m in arguments.models for s in MODELS[m].structures]
    rows = [measure(m, s, arguments.repeats) for m, s in track(jobs, "measuring")]
    environment = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "repeats": arguments.repeats,
    }
    table = Table(title=f"50-step refits, {environment['device']}, {environment['cores']} cores")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("model", "structure") else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    Console(width=140).print(table)
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / "refit_cost.json"
    out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")
    print(f"written to {out}")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        middle, low, high = value
        return f"{middle:.2f} ({low:.2f} - {high:.2f})"
    return value if isinstance(value, str) else f"{value:.1f}"


if __name__ == "__main__":
    main()
