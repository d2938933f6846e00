"""Does the best learning rate stay where it is when a network gets wider?

    uv run python benchmarks/rate_transfer.py            # figures: results/rate_transfer.json
    uv run python benchmarks/rate_transfer.py --quick    # seconds: does it run?

An MLP 196-w-w-10 on Fashion-MNIST at 14x14, w = 64, 128, 256; 400 steps of 128 with the schedule
of the study (5 % warm-up, linear decay to 0). For each width and method, training losses at the
end, as means over seeds, on rates of powers of 2 that are extended until the best is not at an end.
The best rate between them is the vertex of the parabola through the best three, in log2 of the
rate.
"""

import argparse
import json
from dataclasses import replace

import numpy as np
import workloads
from methods import METHODS, Method
from reporting import RESULTS, environment
from rich.console import Console
from rich.table import Table
from study import best_rate, next_rate
from training import run
from workloads import Workload

WIDTHS = (64, 128, 256)
NAMES = ("AdamW", "LLQR streaming e-kfac")
Losses = dict[str, float]


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


def losses_of(workload: Workload, method: Method, seeds: int, most: int) -> Losses:
    """Return rate -> mean training loss at the end."""
    tx, found = method.optimizer(), {}
    while len(found) < most and (rate := next_rate(found, method.rate)) is not None:
        ends = [
            run(workload, method, tx, rate, seed, workload.steps, 1)[-1]["loss"]
            for seed in range(seeds)
        ]
        mean = float(np.mean(ends))
        found[f"{rate:g}"] = mean if np.isfinite(mean) else float("inf")
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
    for name in (given.only,) if given.only else NAMES:
        method = next(m for m in METHODS if m.name == name)
        rows[name] = {}
        for width in WIDTHS[:1] if given.quick else WIDTHS:
            workload = workloads.perceptron(width)
            if given.quick:
                workload = replace(workload, steps=10)
            found = losses_of(workload, method, given.seeds, 2 if given.quick else 10)
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
