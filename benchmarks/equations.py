"""Exact steps in a trust region on the suite's equations: error against steps and seconds.

    OPENBLAS_NUM_THREADS=1 uv run python -m benchmarks.equations [poisson burgers]

Float64, all points in every step, five seeds; each in this process, after its compilation. One
BLAS thread: eigendecompositions of a few hundred rows lose more to threads than they win.
"""

import sys
import time
from statistics import median
from typing import Any

import jax
import optax

import llqr
from benchmarks.suite import workloads

SEEDS, STEPS, SEEN = range(5), 100, (20, 50, 100)


def run(name: str, seed: int) -> tuple[float, dict[int, tuple[float, float]]]:
    """Return seconds of compilation, and step -> (error, seconds since then)."""
    workload = workloads.load(name)
    assert workload.test_loss is not None
    params = workload.parameters(jax.random.key(seed))
    bound = workload.objective.bind(workload.train)
    tx = llqr.exact(damping=llqr.Trust())

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params, objective=bound)
        return optax.apply_updates(params, updates), state

    started = time.perf_counter()
    compiled = step.lower(params, tx.init(params)).compile()
    compilation, state, found = time.perf_counter() - started, tx.init(params), {}
    started = time.perf_counter()
    for i in range(1, STEPS + 1):
        params, state = compiled(params, state)
        if i in SEEN:
            error = float(workload.test_loss(params, workload.test))
            found[i] = error, time.perf_counter() - started
    return compilation, found


def main() -> None:
    """Print a table."""
    jax.config.update("jax_enable_x64", True)
    heads = " | ".join(f"error after {i}" for i in SEEN)
    print(f"| equation | {heads} | seconds of {STEPS} steps | of compilation |")
    print("|---|" + "--:|" * (len(SEEN) + 2))
    for name in sys.argv[1:] or ["poisson", "burgers"]:
        trials = [run(name, seed) for seed in SEEDS]
        cells = []
        for i in SEEN:
            errors = sorted(found[i][0] for _, found in trials)
            cells.append(f"{median(errors):.1e} ({errors[0]:.1e} - {errors[-1]:.1e})")
        seconds = median(found[STEPS][1] for _, found in trials)
        cells += [f"{seconds:.1f}", f"{median(c for c, _ in trials):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
