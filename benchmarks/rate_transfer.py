"""Does the best learning rate stay where it is when a network gets wider?

    uv run python -m benchmarks.rate_transfer            # figures: results/rate_transfer.json
    uv run python -m benchmarks.rate_transfer --quick    # seconds: does it run?

An MLP 196-w-w-10 on Fashion-MNIST at 14x14, w = 64, 128, 256; 400 steps of 128 with the schedule
of the suite (5 % warm-up, linear decay to 0). For each width and method, training losses at the
end, as means over seeds, on rates of powers of 2 that are extended until the best is not at an end.
The best rate between them is the vertex of the parabola through the best three, in log2 of the
rate.
"""

import argparse
import json
from dataclasses import replace
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.reporting import RESULTS, environment
from benchmarks.suite import workloads
from benchmarks.suite.methods import METHODS, Method
from benchmarks.suite.training import compiled, trial
from benchmarks.suite.workloads.networks import perceptron_parameters
from benchmarks.suite.workloads.problem import Workload, take

WIDTHS = (64, 128, 256)
FACTOR = 2.0
LONGEST_GRID = 10
"""A method whose best rate is still at an end after so many is reported as it is."""

COMPARED = {
    "AdamW": replace(
        METHODS["AdamW"], rate=2e-3, options={**METHODS["AdamW"].options, "weight_decay": 1e-2}
    ),
    "LLQR streaming e-kfac": METHODS["LLQR streaming"],
}
Losses = dict[str, float]


def best_rate(rates: Losses) -> str:
    """Return the rate with the lowest loss."""
    return min(rates, key=lambda rate: rates[rate])


def next_rate(rates: Losses, first: float) -> float | None:
    """Return the rate to try next, None if the best lies inside the grid."""
    if not rates:
        return first
    grid = sorted(map(float, rates))
    best = float(best_rate(rates))
    if len(grid) == LONGEST_GRID or grid[0] < best < grid[-1]:
        return None
    if not np.isfinite(rates[f"{best:g}"]):  # all have diverged
        return grid[0] / FACTOR
    return grid[-1] * FACTOR if best == grid[-1] else grid[0] / FACTOR


def vertex(losses: Losses) -> float:
    """Return the rate of the least loss by a parabola through the best rate and its neighbours.

    >>> round(vertex({"1": 2.0, "2": 1.0, "4": 1.0}), 3)
    2.828
    """
    rates = sorted(map(float, losses))
    i = rates.index(float(best_rate(losses)))
    if not 0 < i < len(rates) - 1:
        return rates[i]
    low, best, high = (losses[f"{r:g}"] for r in rates[i - 1 : i + 2])
    if not np.isfinite([low, high]).all():  # a neighbour has diverged
        return rates[i]
    return float(rates[i] * 2 ** (0.5 * (low - high) / (low - 2 * best + high)))


def perceptron(width: int) -> Workload:
    """Return an MLP 196-width-width-10 on Fashion-MNIST at 14x14."""
    workload = workloads.load("fashion-mlp")
    parameters = partial(perceptron_parameters, widths=(196, width, width, 10))
    fixed = take(workload.train, slice(5000))
    return replace(workload, name=f"mlp of {width}", parameters=parameters, fixed=fixed, steps=400)


def losses_of(workload: Workload, method: Method, seeds: int, most: int) -> Losses:
    """Return rate -> mean training loss at the end."""
    program, found = compiled(workload, method), {}
    while len(found) < most and (rate := next_rate(found, method.rate or 1.0)) is not None:
        ends = [trial(program, rate, seed, 1)["train"][-1] for seed in range(seeds)]
        found[f"{rate:g}"] = float("inf") if None in ends else float(np.mean(ends))
    return found


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description="The best learning rate against the width.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--only", default="", help="a method's name; the results of others are kept"
    )
    parser.add_argument("--quick", action="store_true", help="one width, 10 steps, nothing written")
    given = parser.parse_args()
    path, rows = RESULTS / "rate_transfer.json", {}
    if path.exists() and not given.quick:
        rows = json.loads(path.read_text())["rows"]
    for name in (given.only,) if given.only else COMPARED:
        method, rows[name] = COMPARED[name], {}
        for width in WIDTHS[:1] if given.quick else WIDTHS:
            workload = perceptron(width)
            if given.quick:
                workload = replace(workload, steps=10)
            found = losses_of(workload, method, given.seeds, 2 if given.quick else LONGEST_GRID)
            rows[name][str(width)] = {"losses": found, "best": vertex(found)}
            print(name, width, found, flush=True)
        if not given.quick:
            record = {"seeds": given.seeds, "environment": environment(), "rows": rows}
            path.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("method", *(f"w = {w}: rate, loss" for w in WIDTHS), "largest / smallest")
    for name, by_width in rows.items():
        best = [row["best"] for row in by_width.values()]
        cells = [f"{r['best']:.2g}, {min(r['losses'].values()):.4f}" for r in by_width.values()]
        table.add_row(name, *cells, f"{max(best) / min(best):.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
