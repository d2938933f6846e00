"""What LLQR costs: refit / training step and preconditioned / plain step, in one process.

    uv run python benchmarks/refit_cost.py                    # all models and structures
    uv run python benchmarks/refit_cost.py mlp --repeats 9
    uv run python benchmarks/refit_cost.py --quick            # a smoke test

Each repeat times the plain step, the preconditioned step and a whole refit (50 inner
steps) one after the other, so that a drift of the machine's speed hits all three; ratios
are taken within a repeat and reported as median (smallest - largest). Compilation is the
first refit less the median one. Memory is XLA's temporary memory of the whole refit as one
compiled program, which on CPU is compiled for this figure only: there, a refit is driven
from Python.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from models import MODELS, Model
from reporting import MEBIBYTE, ask, environment, show, spread, write
from rich.progress import track

import llqr
from llqr_experiments.command.memory import compile_refit, temporary

PROBES: dict[str, Any] = {
    "structure": "kfac",
    "divergence_reduction": "unit",
    "refit": llqr.Refit(probe="fisher", probes=4, solver="adam"),
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    name: {s: {"structure": s} for s in ("diagonal", "kfac", "e-kfac", "sep-e-kfac")}
    for name in ("mlp", "cnn", "transformer")
}
SETTINGS["mlp"]["e-kfac, max_dim=512"] = {"structure": "e-kfac", "max_dim": 512}
SETTINGS["mlp"]["e-kfac, block_size=256"] = {"structure": "e-kfac", "block_size": 256}
SETTINGS["mlp"]["kfac, 4 fisher probes, adam"] = PROBES
"""Model -> label -> options of `llqr.llqr`."""


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


def measure(model: Model, label: str, options: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Time one setting on one model."""
    jax.clear_caches()  # no setting profits from what another has compiled
    objective, params = model.objective, model.init()
    base = optax.with_extra_args_support(optax.sgd(0.1))
    tx = llqr.llqr(base, **options)
    batch = model.data(jax.random.key(1), model.batch)
    bound = objective.bind(model.data(jax.random.key(2), model.refit_batch))
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
        rows.append(
            {"step": step, "refit": whole, "ratio": whole / step, "preconditioned": other / step}
        )
    found = {key: spread(row[key] for row in rows) for key in rows[0]}
    memory = temporary(compile_refit(tx, state, params, bound)) / MEBIBYTE
    return {
        "model": model.name,
        "structure": label,
        "plain step (ms)": [1e3 * x for x in found["step"]],
        "refit / step": found["ratio"],
        "preconditioned / plain step": found["preconditioned"],
        "compilation (s)": max(first - found["refit"][0], 0.0),
        "temporary memory (MiB)": memory,
    }


def main() -> None:
    """Measure, print a table, write JSON with the environment."""
    models, repeats, quick = ask(
        "What LLQR costs.", SETTINGS, repeats=5, quick="one repeat of one setting"
    )
    jobs = [(m, label) for m in models for label in SETTINGS[m]]
    if quick:
        jobs = [("mlp", "diagonal")]
    rows = [
        measure(MODELS[m], label, SETTINGS[m][label], repeats)
        for m, label in track(jobs, "measuring")
    ]
    where = environment(repeats=repeats)
    show(f"50-step refits, {where['device']}, {where['cores']} cores", rows)
    write("refit_cost_quick" if quick else "refit_cost", where, rows)


if __name__ == "__main__":
    main()
