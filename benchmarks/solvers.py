"""The inner solvers compared: how far a refit lowers its objective, and what that costs.

    uv run python benchmarks/solvers.py           # five problems
    uv run python benchmarks/solvers.py --quick   # the smallest one, as a smoke test

One refit of a diagonal P from the identity on each problem, with allow_grad_inversion=True,
so that what is compared is the solver and not the clamp behind it. The objective Phi is a
quadratic in a diagonal, so that conjugate gradients are exact in the end.

Counted are products with C (one tangent and one transpose sweep each) and evaluations along
a line (two tangent sweeps each, no transpose) of the solver; judging the result is left out.
Seconds are those of a second refit, with everything compiled.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from models import MODELS, cnn, cnn_shapes, cross_entropy, images, initial, mlp, mlp_shapes
from reporting import environment, show, write
from rich.progress import track

import llqr
from llqr.refit.objective import Phi

RATES = (1e-3, 1e-2, 1e-1)
PUBLISHED = ("momentum", 50, 1e-3)
FEW = ("cg", 8, None)
SETTINGS: list[tuple[str, int, float | None]] = [
    *(("momentum", 50, rate) for rate in RATES),
    *(("adam", steps, rate) for steps in (8, 50) for rate in RATES),
    *((solver, steps, None) for solver in ("cg", "cg_zoom_hz", "cg_back_pr+") for steps in (8, 50)),
]
"""Solver, inner steps, learning rate."""


@dataclass(frozen=True)
class Task:
    """A refit problem."""

    metric: str
    forward: Callable[[Any, Any], jax.Array]
    loss: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


def squared_error(outputs: jax.Array, batch: Any) -> jax.Array:
    """Half the mean square."""
    return 0.5 * jnp.mean((outputs - batch["t"]) ** 2)


def digits(key: jax.Array, size: int) -> Any:
    """64 pixels between 0 and 1, most of them dark, with random labels and targets."""
    keys = jax.random.split(key, 3)
    x = jnp.clip(jax.random.normal(keys[0], (size, 64)), 0, 2) / 2
    y = jax.random.randint(keys[1], (size,), 0, 10)
    return {"x": x, "y": y, "t": jax.random.normal(keys[2], (size, 10))}


def tasks() -> dict[str, Callable[[], Task]]:
    """The five problems, made when they are needed."""
    perceptron = initial(mlp_shapes(64, 100, 300, 10))
    key = jax.random.key(1)

    def transformer() -> Task:
        model = MODELS["transformer"]
        return Task("ngd", model.forward, model.loss, model.init(), model.data(key, 8))

    return {
        "logistic regression": lambda: Task(
            "ngd", mlp, cross_entropy, initial(mlp_shapes(64, 10)), digits(key, 128)
        ),
        "MLP": lambda: Task("ngd", mlp, cross_entropy, perceptron, digits(key, 64)),
        "MLP, regression": lambda: Task(
            "gauss_newton", mlp, squared_error, perceptron, digits(key, 64)
        ),
        "CNN": lambda: Task(
            "ngd",
            cnn,
            cross_entropy,
            initial(cnn_shapes(16, 16, 32, 64)),
            images(key, 16, (16, 16, 3)),
        ),
        "transformer": transformer,
    }


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Count what solvers ask of Phi; functions that are traced in here count, so trace anew."""
    counts: Counter[str] = Counter()
    names = ("value_and_gradient", "product", "along")
    originals = {name: getattr(Phi, name) for name in names}

    def counted(name: str) -> Any:
        def method(self: Any, *arguments: Any) -> Any:
            jax.debug.callback(lambda: counts.update([name]))
            return originals[name](self, *arguments)

        return method

    jax.clear_caches()
    for name in names:
        setattr(Phi, name, counted(name))
    try:
        yield counts
        jax.effects_barrier()
    finally:
        for name, original in originals.items():
            setattr(Phi, name, original)
        jax.clear_caches()


def refitter(
    task: Task, solver: str, steps: int, rate: float | None
) -> Callable[[], llqr.RefitInfo]:
    """Return a function that refits and waits for the record."""
    refit = llqr.Refit(
        solver=solver,
        steps=steps,
        learning_rate=RATES[0] if rate is None else rate,
        allow_grad_inversion=True,
    )
    tx = llqr.llqr(optax.sgd(0.1), structure="diagonal", metric=task.metric, refit=refit)
    objective = llqr.Objective(task.forward, task.loss).bind(task.batch)
    state = tx.init(task.params)

    def act() -> llqr.RefitInfo:
        found = llqr.find(llqr.refresh(tx, state, task.params, objective)).refit
        return jax.block_until_ready(found)

    return act


def measure(task: Task) -> list[dict[str, Any]]:
    """Refit with every setting: to count, to compile, and by the clock."""
    counts: dict[Any, Counter[str]] = {}
    for solver, steps, rate in SETTINGS:
        if (solver, steps) not in counts:  # no learning rate changes them
            with counting() as found:
                refitter(task, solver, steps, rate)()
            counts[solver, steps] = found
    rows = []
    for solver, steps, rate in SETTINGS:
        act, found = refitter(task, solver, steps, rate), counts[solver, steps]
        act()
        start = time.perf_counter()
        info = act()
        rows.append(
            {
                "solver": solver,
                "steps": steps,
                "learning rate": rate,
                "before": float(info.objective_before),
                "after": float(info.objective_after),
                "products with C": found["value_and_gradient"] + found["product"],
                "line evaluations": found["along"],
                "seconds": time.perf_counter() - start,
                "guarded": int(info.guarded),
            }
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a problem: cg after 8 steps beside momentum after 50."""
    out = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in rows if row["problem"] == problem]

        def after(solver: str, steps: int, rate: float | None = None, own: Any = own) -> float:
            return min(
                row["after"]
                for row in own
                if (row["solver"], row["steps"]) == (solver, steps)
                and rate in (None, row["learning rate"])
                and not math.isnan(row["after"])
            )

        few, published, best = after(*FEW), after(*PUBLISHED), after("momentum", 50)
        out.append(
            {
                "problem": problem,
                "before": own[0]["before"],
                "momentum(50), rate 1e-3": published,
                "momentum(50), best rate": best,
                "cg(8)": few,
                "cg(50)": after("cg", 50),
                "cg(8) lower": "yes" if few < min(published, best) else "NO",
            }
        )
    return out


def main() -> None:
    """Measure, print two tables, write JSON with the environment."""
    parser = argparse.ArgumentParser(description="The inner solvers compared.")
    parser.add_argument("--quick", action="store_true", help="the smallest problem")
    arguments = parser.parse_args()
    problems = tasks()
    if arguments.quick:
        problems = dict(list(problems.items())[:1])
    rows = [
        {"problem": name} | row
        for name, make in track(problems.items(), "refitting")
        for row in measure(make())
    ]
    where = environment(structure="diagonal", allow_grad_inversion=True)
    show("one refit of a diagonal P: objective before and after", rows)
    show("cg after 8 steps and momentum after 50", summary(rows))
    write("solvers_quick" if arguments.quick else "solvers", where, rows)


if __name__ == "__main__":
    main()
