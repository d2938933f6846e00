"""Does it pay? LLQR against SGD, momentum, Adam, AdamW, Muon and SOAP, all tuned alike.

    uv run python benchmarks/study.py                        # everything, some hours
    uv run python benchmarks/study.py chars --only Muon      # one workload, some methods
    uv run python benchmarks/study.py --report               # tables and curves of what is there
    uv run python benchmarks/study.py --smoke                # seconds: does it run?

Protocol. Every method has the same schedule (5 % linear warm-up, linear decay to 0) and tunes one
number, its rate: on a seed that is not used again, by the training loss at the end, on a grid of
powers of 2 around its customary rate, extended until the best is at neither end. Then fresh seeds
run at the best. A gradient evaluation is one of a training batch, probes and curvature products
included. A difference of means counts where it is above two standard errors. Results are kept
after every run, in results/study_<workload>.json: a call goes on where the last one stopped,
except where a method's settings have changed.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import workloads
from methods import METHODS, Method
from reporting import RESULTS, environment
from rich.console import Console
from study_report import draw, table
from training import POINTS, costs, run
from workloads import Workload

TUNING_SEED = 1000
FACTOR = 2.0
LONGEST_GRID = 10
"""A method whose best rate is still at an end after so many is reported as it is."""


def best_rate(rates: dict[str, float]) -> str:
    """Return the rate with the lowest loss."""
    return min(rates, key=lambda rate: rates[rate])


def next_rate(rates: dict[str, float], first: float) -> float | None:
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


class Results:
    """The results of a workload, in a file that is written after every run."""

    def __init__(self, workload: Workload, steps: int, path: Path | None):
        self.steps, self.path, self.workload = steps, path, workload.name
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found.get("steps") == steps and "workload" in found:
                self.rows = {row["method"]: row for row in found["rows"]}

    def row(self, method: Method) -> dict[str, Any]:
        """Return a method's row; an empty one if there is none with its settings."""
        settings = json.loads(json.dumps(method.settings))
        row = self.rows.get(method.name)
        if row is None or row["settings"] != settings:
            row = {"method": method.name, "settings": settings, "rates": {}, "runs": {}}
            self.rows[method.name] = row
        return row

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is None:
            return
        RESULTS.mkdir(exist_ok=True)
        record = {
            "workload": self.workload,
            "steps": self.steps,
            "tuning seed": TUNING_SEED,
            "rows": self.ordered(),
        }
        self.path.write_text(json.dumps(record, indent=1) + "\n")

    def ordered(self) -> list[dict[str, Any]]:
        """Return the rows that have runs or rates, in the order of `METHODS`."""
        names = [m.name for m in METHODS]
        rows = [row for row in self.rows.values() if row["method"] in names and row["rates"]]
        return sorted(rows, key=lambda row: names.index(row["method"]))


def study(workload: Workload, method: Method, results: Results, seeds: int, steps: int) -> None:
    """Tune the rate, then run every seed; what is there already is not run again."""
    row, tx = results.row(method), method.optimizer()
    steps = method.steps(steps)
    grid = next_rate(row["rates"], method.rate)
    if grid is None and len(row["runs"]) >= seeds:
        return
    row |= {"cost": costs(workload, method, tx, steps), "environment": environment()}
    row["command"] = shlex.join(sys.argv)
    while (rate := next_rate(row["rates"], method.rate)) is not None:
        loss = run(workload, method, tx, rate, TUNING_SEED, steps, 1)[-1]["loss"]
        row["rates"][f"{rate:g}"] = loss if np.isfinite(loss) else float("inf")
        results.save()
    best = best_rate(row["rates"])
    if row.get("rate") != float(best):
        row |= {"rate": float(best), "runs": {}}
    for seed in map(str, range(seeds)):
        if seed not in row["runs"]:
            row["runs"][seed] = run(workload, method, tx, float(best), int(seed), steps)
            results.save()


def choose(asked: str) -> list[Method]:
    """Return the methods of a name, or with a part of their name, for each of `asked`, a|b|c."""
    names = {m.name for m in METHODS}
    return [
        m
        for m in METHODS
        if any(m.name == part if part in names else part in m.name for part in asked.split("|"))
    ]


def smoke(chosen: list[Method], console: Console) -> None:
    """Run each method for 20 steps; nothing is written."""
    workload, steps = workloads.load("digits"), 20
    results = Results(workload, steps, None)
    for method in chosen:
        tx, row = method.optimizer(), results.row(method)
        row |= {"cost": costs(workload, method, tx, steps), "rate": method.rate}
        row["rates"][f"{method.rate:g}"] = 0.0
        row["runs"]["0"] = run(workload, method, tx, method.rate, 0, steps, POINTS)
    console.print(table("digits", results.ordered()))


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description="LLQR against the optimizers that people use.")
    parser.add_argument("workloads", nargs="*", default=workloads.NAMES,
                        help=", ".join(workloads.NAMES))  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="a method's name or a part of it, or several "
                        "between |; the results of others are kept")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--smoke", action="store_true", help="20 steps, one seed, nothing written")
    given = parser.parse_args()
    if unknown := set(given.workloads) - set(workloads.NAMES):
        parser.error(f"unknown {sorted(unknown)}: choose from {', '.join(workloads.NAMES)}")
    console = Console(width=150)
    chosen = choose(given.only)
    if given.smoke:
        smoke(chosen, console)
        return
    for name in given.workloads:
        workload, path = workloads.load(name), RESULTS / f"study_{name}.json"
        results = Results(workload, workload.steps, path)
        for method in [] if given.report else chosen:
            study(workload, method, results, given.seeds, workload.steps)
            console.print(f"{name}, {method.name}: {results.rows[method.name]['rates']}")
        rows = [row for row in results.ordered() if row["runs"]]
        if rows:
            console.print(table(name, rows))
            draw(name, rows)


if __name__ == "__main__":
    main()
