"""What the weights by signal (`llqr.Streaming(signal_decay=...)`) do on workloads of the suite.

    uv run python -m benchmarks.streaming_signal poisson recurrent-digits mnist1d digits

Each variant trains as in the suite, at five rates on a seed of its own, and then at its best one
on seeds that are the same for all. A row for each variant: the loss at the end of every seed,
and the gradient evaluations to a tenth, a hundredth and a thousandth of the first loss.
Figures are written to benchmarks/results/streaming_signal_*.json.
"""

import argparse
import os
from dataclasses import replace
from typing import Any

import numpy as np

import llqr

SEEDS = (0, 1, 2)
RATIO = 2.0
SHARES = (1e-1, 1e-2, 1e-3)
VARIANTS = {
    "streaming, no signal": ("LLQR streaming", {"refit": llqr.Streaming(signal_decay=None)}),
    "streaming": ("LLQR streaming", {}),
    "SOAP": ("SOAP", {}),
}


def _cost(columns: dict[str, list[Any]], measure: str, share: float) -> float:
    losses = np.array([np.inf if x is None else x for x in columns[measure]])
    reached = np.flatnonzero(losses <= share * losses[0])
    return float(columns["gradients"][reached[0]]) if len(reached) else float("inf")


def _end(columns: dict[str, list[Any]], measure: str) -> float:
    last = columns[measure][-1]
    return float("inf") if last is None else float(last)


def measured(name: str) -> None:
    """Tune and train every variant on one workload, and write what came out."""
    from benchmarks import reporting
    from benchmarks.suite import methods, protocol, training, workloads

    workload = workloads.load(name)
    known = {method.name: method for method in methods.choose("")}
    rows = []
    for label, (which, options) in VARIANTS.items():
        method = known[which]
        method = replace(method, options=method.options | options)
        program = training.compiled(workload, method)

        def run(rate: float, seed: int, program: Any = program) -> dict[str, list[Any]]:
            return training.trial(program, rate, seed, points=40)

        assert method.rate is not None
        ends = {}
        exponents = [-2, -1, 0, 1, 2]
        while True:
            for i in exponents:
                if i not in ends:
                    found = run(method.rate * RATIO**i, protocol.TUNING_SEED)
                    ends[i] = _end(found, workload.measure)
            best = min(ends, key=lambda i: ends[i])
            if min(ends) < best < max(ends):
                break  # not at the end of the grid
            exponents = [best - 1, best + 1]
        rate = method.rate * RATIO**best
        curves = [run(rate, seed) for seed in SEEDS]
        row = {
            "variant": label,
            "rate": rate,
            "tuning": {f"{method.rate * RATIO**i:.3g}": x for i, x in sorted(ends.items())},
            "ends": [_end(c, workload.measure) for c in curves],
            "costs": {
                str(s): [_cost(c, workload.measure, s) for c in curves] for s in SHARES
            },
        }  # fmt: skip
        rows.append(row)
        costs = [f"{np.median(x):.0f}" for x in row["costs"].values()]
        told = " ".join(f"{x:.3g}" for x in row["ends"])
        print(
            f"{name:17} {label:21} rate {rate:.3g}  end {told}  costs {' '.join(costs)}", flush=True
        )
    reporting.write(f"streaming_signal_{name}", reporting.environment(), rows)


def main() -> None:
    """Measure the named workloads, one after the other."""
    parser = argparse.ArgumentParser(description="Signal weights of streaming refits.")
    parser.add_argument("workloads", nargs="+")
    given = parser.parse_args()
    from benchmarks.suite import workloads

    double = {name in workloads.FLOAT64 for name in given.workloads}
    if len(double) > 1:
        parser.error("float64 workloads (poisson, burgers) need a call of their own.")
    os.environ["JAX_ENABLE_X64"] = str(int(double.pop()))
    import jax

    jax.config.update("jax_enable_x64", os.environ["JAX_ENABLE_X64"] == "1")
    for name in given.workloads:
        measured(name)


if __name__ == "__main__":
    main()
