"""Does it pay? LLQR against SGD, momentum, Adam, AdamW and Muon from the same seeds.

    uv run python benchmarks/study.py                    # both data sets, about an hour
    uv run python benchmarks/study.py digits --seeds 2   # one of them, fewer seeds
    uv run python benchmarks/study.py --smoke            # seconds: does it run?

Every method gets the same number of learning rates (`RATES` steps of its own grid), tuned on
one seed that is not used again, by the training loss at the end; then every seed runs at the
best. Recorded at ten points of each run: training loss (10,000 fixed examples), test accuracy,
gradient evaluations in units of training batches (a refit's product with C counts as one
gradient of its batch) and seconds (without compilation). JSON with the environment,
a table, and plots for the documentation.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from reporting import RESULTS, environment
from rich.console import Console
from rich.progress import track
from rich.table import Table

import llqr
from llqr.curvature import POWER_STEPS
from llqr_experiments import data

HERE = Path(__file__).parent
PICTURES = HERE.parent / "docs" / "images"
HIDDEN = (100, 300)
BATCH, STEPS, POINTS, EXAMPLES = 128, 1000, 10, 10_000
TUNING_SEED = 1000


@dataclass(frozen=True)
class Method:
    """One optimizer: a base with learning rate 1, LLQR around it or not, and rates to try."""

    name: str
    base: Callable[[], optax.GradientTransformation]
    rates: tuple[float, ...]
    llqr: dict[str, Any] | None = None
    refit_batch: int = 64
    refit: dict[str, Any] = field(default_factory=dict)

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Return the transformation; its updates are multiplied by the learning rate later."""
        base = optax.with_extra_args_support(self.base())
        if self.llqr is None:
            return base
        return llqr.llqr(base, refit=llqr.Refit(**self.refit), **self.llqr)


def momentum() -> optax.GradientTransformation:
    """SGD with momentum 0.9."""
    return optax.sgd(1.0, momentum=0.9)


SGD = partial(optax.sgd, 1.0)
ADAM = partial(optax.adam, 1.0)
GRID_SGD = (0.03, 0.1, 0.3, 1.0)
GRID_MOMENTUM = (0.02, 0.05, 0.1, 0.2)
GRID_ADAM = (3e-4, 1e-3, 3e-3, 1e-2)
GRID_MUON = (2.5e-3, 5e-3, 1e-2, 2e-2)

PUBLISHED = {"every": 100}
PROBE = {
    "every": 100,
    "steps": 50,
    "probe": "fisher",
    "probes": 2,
    "solver": "relative",
    "learning_rate": 0.1,
    "anneal": True,
    "clip_norm": None,
}
UNIT = {
    "divergence_reduction": "unit",
    "damping": 1e-3,
    "graft": "global",
    "identity_scaling": 100.0,
}
"""PROBE and UNIT are `method=probe` of the runner, with a refit every 100 steps."""


def published(name: str, structure: str, decay: float) -> Method:
    """LLQR with the papers' defaults, a refit every 100 steps."""
    refit = {**PUBLISHED, "ema_decay": decay}
    return Method(name, SGD, GRID_SGD, {"structure": structure}, 64, refit)


def probe(name: str, structure: str, base: Any, rates: Any, **changes: Any) -> Method:
    """LLQR with probe refits."""
    return Method(name, base, rates, {"structure": structure, **UNIT, **changes}, 256, PROBE)


METHODS = (
    Method("SGD", SGD, GRID_SGD),
    Method("momentum", momentum, GRID_MOMENTUM),
    Method("Adam", ADAM, GRID_ADAM),
    Method("AdamW", partial(optax.adamw, 1.0, weight_decay=1e-2), GRID_ADAM),
    Method("Muon", partial(optax.contrib.muon, 1.0), GRID_MUON),
    published("LLQR diagonal", "diagonal", 0.0),
    published("LLQR diagonal, EMA 0.95", "diagonal", 0.95),
    published("LLQR e-kfac", "e-kfac", 0.0),
    published("LLQR e-kfac, EMA 0.95", "e-kfac", 0.95),
    probe("LLQR probe diagonal, momentum", "diagonal", momentum, GRID_MOMENTUM),
    probe("LLQR probe kfac, momentum", "kfac", momentum, GRID_MOMENTUM),
    probe("LLQR probe e-kfac, momentum", "e-kfac", momentum, GRID_MOMENTUM),
    probe("LLQR probe kfac, on Adam's update", "kfac", ADAM, GRID_ADAM, precondition="update"),
)


# --- the problem --------------------------------------------------------------------------------


def initial(seed: int, widths: list[int]) -> list[dict[str, Any]]:
    """LeCun-normal kernels, zero biases."""
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (m, n)) / m**0.5, "bias": jnp.zeros(n)}
        for k, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def forward(params: list[dict[str, Any]], batch: dict[str, Any]) -> Any:
    """Logits of the multilayer perceptron."""
    x = batch["image"].reshape(batch["image"].shape[0], -1)
    for i, layer in enumerate(params):
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def loss(logits: Any, batch: dict[str, Any]) -> Any:
    """Mean cross-entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))


OBJECTIVE = llqr.Objective(forward, loss)


@partial(jax.jit, static_argnames="tx", donate_argnums=(1, 2))
def train_step(tx: Any, params: Any, state: Any, batch: Any, rate: Any) -> tuple[Any, Any]:
    """One step."""
    grads = jax.grad(OBJECTIVE)(params, batch)
    updates, state = tx.update(grads, state, params, refresh=False)
    params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    return params, state


@partial(jax.jit, static_argnames="tx")
def refit(tx: Any, state: Any, params: Any, batch: Any) -> Any:
    """One refit."""
    return llqr.refresh(tx, state, params, OBJECTIVE.bind(batch))


@jax.jit
def evaluate(params: Any, train: Any, test: Any) -> tuple[Any, Any]:
    """Training loss and test accuracy."""
    correct = jnp.argmax(forward(params, test), -1) == test["label"]
    return OBJECTIVE(params, train), jnp.mean(correct)


class Data:
    """The arrays of a data set, and batches in a seeded order."""

    def __init__(self, name: str):
        loaded = data.load(name, None, download=False)
        sources = [data.Source.of(loaded, split) for split in ("train", "test")]
        self.train, self.test = (s.gather(np.arange(len(s))) for s in sources)
        self.classes = loaded.num_classes

    def pick(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the training set."""
        return {k: v[index] for k, v in self.train.items()}

    def batches(self, seed: int, size: int) -> Any:
        """Shuffled batches without end; a part of an epoch that fills no batch is left out."""
        rng = np.random.default_rng(seed)
        count = len(self.train["label"])
        while True:
            order = rng.permutation(count)
            for start in range(0, count - size + 1, size):
                yield self.pick(order[start : start + size])


def run(method: Method, tx: Any, source: Data, rate: float, seed: int, steps: int) -> list[dict]:
    """Train once; return what was recorded at each point."""
    size = source.train["image"][0].size
    params = initial(seed, [size, *HIDDEN, source.classes])
    state = tx.init(params)
    stream = source.batches(seed, BATCH)
    refits = source.batches(seed + 10_000, min(method.refit_batch, len(source.train["label"])))
    shown = source.pick(np.arange(min(EXAMPLES, len(source.train["label"]))))
    every = method.refit.get("every")
    points, seconds, work = [], 0.0, 0.0
    for step in range(steps):
        begin = time.perf_counter()
        if every and step % every == 0:
            # Compiled as a whole: there is no convolution in it.
            state = refit(tx, state, params, next(refits))
            work += refit_work(method)
        params, state = train_step(tx, params, state, next(stream), rate)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - begin
        work += 1
        if (step + 1) % (steps // POINTS) == 0:
            value, accuracy = jax.device_get(evaluate(params, shown, source.test))
            points.append(
                {
                    "step": step + 1,
                    "loss": float(value),
                    "accuracy": 100 * float(accuracy),
                    "gradients": work,
                    "seconds": seconds,
                }
            )
    return points


def refit_work(method: Method) -> float:
    """Gradient evaluations of a refit, in training batches."""
    options = llqr.Refit(**method.refit)
    power = POWER_STEPS if (method.llqr or {}).get("divergence_reduction") == "unit" else 0
    products = 1 + power + options.steps * options.probes * (2 if options.probe == "fisher" else 1)
    return products * method.refit_batch / BATCH


# --- the study ----------------------------------------------------------------------------------


def study(method: Method, source: Data, seeds: int, steps: int) -> dict[str, Any]:
    """Tune the rate on one seed, then run every seed."""
    tx = method.optimizer()
    every = max(method.refit.get("every", 1), 1)
    run(method, tx, source, 0.0, TUNING_SEED, POINTS * max(1, min(every, POINTS) // POINTS))
    tuned = {}
    for rate in method.rates:
        final = run(method, tx, source, rate, TUNING_SEED, steps)[-1]["loss"]
        tuned[rate] = final if np.isfinite(final) else float("inf")
    best = min(tuned, key=lambda rate: tuned[rate])
    runs = [run(method, tx, source, best, seed, steps) for seed in range(seeds)]
    return {
        "method": method.name,
        "rates": {f"{rate:g}": value for rate, value in tuned.items()},
        "rate": best,
        "runs": runs,
    }


def summary(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over the seeds at the end."""
    last = [points[-1] for points in row["runs"]]
    found = {}
    for key in ("loss", "accuracy", "gradients", "seconds"):
        values = [point[key] for point in last]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found[key] = (statistics.mean(values), spread)
    return found


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """The table that a person reads; sorted by training loss."""
    out = Table(title=f"{name}: after {rows[0]['runs'][0][-1]['step']} steps")
    for column in ("method", "rate", "training loss", "test accuracy, %", "gradients", "seconds"):
        out.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted(rows, key=lambda row: summary(row)["loss"][0]):
        s = summary(row)
        out.add_row(
            row["method"],
            f"{row['rate']:g}",
            "{:.3g} ± {:.2g}".format(*s["loss"]),
            "{:.2f} ± {:.2f}".format(*s["accuracy"]),
            f"{s['gradients'][0]:,.0f}",
            f"{s['seconds'][0]:.1f}",
        )
    return out


def draw(name: str, rows: list[dict[str, Any]]) -> None:
    """Training loss against steps, gradient evaluations and seconds."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(f"{name}: mean over {len(rows[0]['runs'])} seeds, tuned learning rates")
    axes = figure.subplots(1, 3, sharey=True)
    for row in rows:
        ours = "probe" in row["method"]
        style = {"lw": 2.2 if ours else 1.2, "ls": "-" if ours else "--", "label": row["method"]}
        if not row["method"].startswith("LLQR"):
            style["ls"] = ":"
        losses = np.mean([[p["loss"] for p in points] for points in row["runs"]], axis=0)
        for axis, key in zip(axes, ("step", "gradients", "seconds"), strict=True):
            places = np.mean([[p[key] for p in points] for points in row["runs"]], axis=0)
            axis.plot(places, losses, **style)
    for axis, label in zip(
        axes, ("steps", "gradient evaluations (batches of 128)", "seconds"), strict=True
    ):
        axis.set(xlabel=label, yscale="log", xscale="linear" if label == "steps" else "log")
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="training loss")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=4,
                  loc="outside lower center", fontsize=8)  # fmt: skip
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"study-{name}.png", dpi=120)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description="LLQR against first-order methods and Muon.")
    parser.add_argument("data", nargs="*", default=["digits", "fashion_mnist"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="methods whose name contains this; the others' "
                        "results are kept")  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="20 steps, one seed, nothing written")
    arguments = parser.parse_args()
    names = ["digits"] if arguments.smoke else arguments.data
    seeds, steps = (1, 20) if arguments.smoke else (arguments.seeds, arguments.steps)
    chosen = [m for m in METHODS if arguments.only in m.name]
    console = Console(width=140)
    for name in names:
        source, out = Data(name), RESULTS / f"study_{name}.json"
        found: dict[str, Any] = {}
        if arguments.only and out.exists() and not arguments.smoke:
            found = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
        for method in track(chosen, f"{name}", console=console):
            found[method.name] = study(method, source, seeds, steps)
            console.print(f"{method.name}: {summary(found[method.name])['loss'][0]:.4g}")
            rows = [found[m.name] for m in METHODS if m.name in found]
            if not arguments.smoke:
                RESULTS.mkdir(exist_ok=True)
                record = {"environment": environment(), "steps": steps, "rows": rows}
                out.write_text(json.dumps(record, indent=1) + "\n")
        console.print(table(name, rows))
        if not arguments.smoke:
            draw(name, rows)


if __name__ == "__main__":
    main()
