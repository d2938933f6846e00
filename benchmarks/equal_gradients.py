"""Streaming refits at the gradients of the others: fewer steps, since probes count too.

    uv run python -m benchmarks.equal_gradients run                 # all workloads of the suite
    uv run python -m benchmarks.equal_gradients run fashion-mlp characters
    uv run python -m benchmarks.equal_gradients report

In the suite all methods make the same number of steps. Here streaming stops, with its schedule,
where its gradient evaluations are those of the others, a probe being as much of one as it sees of
the batch. It is tuned as in the suite's tier "quick", as the others have been, and all are run on
ten fresh seeds in place of five. Trials are kept in benchmarks/results/equal_gradients.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

import llqr
from benchmarks.suite import methods, protocol, runner, store, summary, targets, workloads
from benchmarks.suite.methods.method import Method
from benchmarks.suite.statistics import margin
from benchmarks.suite.workloads.problem import Workload

FOLDER = Path(__file__).parent / "results" / "equal_gradients"
RIVALS = "SOAP,Muon,AdamW,SGD Nesterov"
OURS = "LLQR streaming at equal gradients"
TIER = replace(protocol.TIERS["quick"], name="quick, ten seeds", seeds=10, defaults=0)


def steps(workload: Workload) -> int:
    """Return how many steps streaming makes of as many gradients as the others' steps."""
    refit, spent = llqr.Streaming(), 0.0
    for step in range(workload.steps):
        spent += 1 + refit.probe_share * bool(refit.is_due(step))
        if spent > workload.steps:
            return step
    return workload.steps


def compared(workload: Workload | None = None) -> list[Method]:
    """Return streaming, with the steps that a workload gives it, and the others."""
    usual = methods.METHODS["LLQR streaming"]
    share = 1.0 if workload is None else steps(workload) / workload.steps
    return [replace(usual, name=OURS, share=share), *methods.choose(RIVALS)]


def run(name: str) -> None:
    """Run what is due of a workload, in this process; the suite's trials count."""
    jax.config.update("jax_enable_x64", name in workloads.FLOAT64)
    workload = workloads.load(name)
    suite, own = store.read(store.RESULTS, name), store.read(FOLDER, name)
    if targets.SECTION not in own:
        store.keep(FOLDER, name, targets.SECTION, value=suite[targets.SECTION])
    for method in methods.choose(RIVALS):
        if method.name not in own.get(store.METHODS, {}):
            kept = suite[store.METHODS][method.name]
            store.keep(FOLDER, name, store.METHODS, method.name, value=kept)
    runner.run(workload, compared(workload), TIER, FOLDER, command=runner.typed())


def report() -> None:
    """Print the losses at the end, and by how many standard errors streaming is below each."""
    table = Table(title="Loss at the end, mean ± standard deviation of ten seeds; standard errors")
    columns = "workload", *(method.name for method in compared())
    for column in columns:
        table.add_column(column, justify="left" if column == "workload" else "right")
    for name in workloads.MAKERS:
        result = summary.read(FOLDER, name, compared(), TIER)
        if result is None or OURS not in result.entries:
            continue
        cells = []
        for method in compared():
            if method.name not in result.entries:
                cells.append("")
                continue
            ends = result.ends(method.name)
            values = list(ends.values())
            text = f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.1g}"
            if method.name != OURS:
                text += f" ({margin(result.ends(OURS), ends):+.1f})"
            cells.append(text)
        table.add_row(name, *cells)
    if not table.rows:
        sys.exit(f"nothing in {FOLDER}: run first.")
    Console(width=180).print(table)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("workloads", nargs="*", help="of those to run; all, if none is named")
    given = parser.parse_args()
    if unknown := set(given.workloads) - set(workloads.MAKERS):
        parser.error(f"unknown {sorted(unknown)}: choose from {', '.join(workloads.MAKERS)}")
    if given.command == "report":
        report()
        return
    for name in given.workloads or workloads.MAKERS:
        run(name)


if __name__ == "__main__":
    main()
