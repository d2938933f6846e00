"""What a refit of ResNet-18 holds in memory, by route.

    uv run python benchmarks/refit_memory.py           # ResNet-18, refit batch 128
    uv run python benchmarks/refit_memory.py --quick   # a small CNN, as a smoke test

The whole refit (50 inner steps, diagonal structure) is traced and compiled, not run; the
figure is XLA's temporary memory of the compiled program (`temp_size_in_bytes`): the largest
sum of buffers alive at once, without arguments and results. Outside a trace on CPU, a refit
is driven from Python, and these figures do not describe it.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import jax
import optax
from models import MODELS, Model, count
from reporting import MEBIBYTE, environment, show, write
from rich.progress import track

import llqr
from llqr_experiments.command.memory import compile_refit, temporary

ROUTES = {
    "default": {},
    "curvature_recomputed": {"memory": "curvature_recomputed"},
    "recomputed": {"memory": "recomputed"},
    "recomputed, dots_no_batch_dims": {
        "memory": "recomputed",
        "checkpoint_policy": "dots_no_batch_dims",
    },
    "chunk_size=64": {"chunk_size": 64},
    "chunk_size=32": {"chunk_size": 32},
    "chunk_size=16": {"chunk_size": 16},
}
JOBS = [("ngd", name) for name in ROUTES] + [
    ("newton", name) for name in ("default", "curvature_recomputed", "chunk_size=32")
]


def measure(model: Model, metric: str, route: str, steps: int) -> dict[str, Any]:
    """Compile one refit."""
    tx = llqr.llqr(
        optax.sgd(0.1),
        metric=metric,
        route=llqr.Route(**ROUTES[route]),
        refit=llqr.Refit(steps=steps),
    )
    params = jax.eval_shape(model.init)
    state = jax.eval_shape(tx.init, params)
    bound = model.objective.bind(
        jax.eval_shape(lambda key: model.data(key, model.refit_batch), jax.random.key(1))
    )
    start = time.perf_counter()
    memory = temporary(compile_refit(tx, state, params, bound)) / MEBIBYTE
    return {
        "metric": metric,
        "route": route,
        "temporary memory (MiB)": memory,
        "compilation (s)": time.perf_counter() - start,
    }


def main() -> None:
    """Compile all routes, print a table, write JSON with the environment."""
    parser = argparse.ArgumentParser(description="What a refit holds in memory.")
    parser.add_argument("--steps", type=int, default=50, help="inner steps of the refit")
    parser.add_argument("--quick", action="store_true", help="a small CNN: a smoke test")
    arguments = parser.parse_args()
    model = replace(MODELS["cnn"], refit_batch=128) if arguments.quick else MODELS["resnet18"]
    rows = [
        measure(model, metric, route, arguments.steps) for metric, route in track(JOBS, "compiling")
    ]
    for row in rows:
        default = next(r for r in rows if r["metric"] == row["metric"])
        key = "temporary memory (MiB)"
        row["of the default"] = row[key] / default[key]
    parameters = count(jax.eval_shape(model.init))
    where = environment(
        model=model.name,
        parameters=parameters,
        refit_batch=model.refit_batch,
        steps=arguments.steps,
    )
    show(f"{model.name}, {parameters / 1e6:.2f} M, refit batch {model.refit_batch}", rows)
    write("refit_memory_quick" if arguments.quick else "refit_memory", where, rows)


if __name__ == "__main__":
    main()
