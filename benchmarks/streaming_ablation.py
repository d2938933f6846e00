"""What parts of streaming refits do, on workloads of the suite and against its targets.

    uv run python -m benchmarks.streaming_ablation run poisson mnist1d
    uv run python -m benchmarks.streaming_ablation report

`run` tunes and trains each variant as the suite does in its tier "quick", and keeps the trials in
benchmarks/results/ablation. `report` prints the geometric mean of the costs of all targets by those
of AdamW, for the variants and for what the suite has, over the workloads that all of them have.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import jax

import llqr
from benchmarks.suite import methods, protocol, runner, store, summary, tables, targets, workloads
from benchmarks.suite.methods.method import Method

FOLDER = Path(__file__).parent / "results" / "ablation"
KEPT = "AdamW,Muon,SOAP,LLQR streaming"
VARIANTS = {
    "LLQR not weighed": llqr.Streaming(probe_share=1.0, signal_decay=None),
    "LLQR momentum 0.95": llqr.Streaming(probe_share=1.0, momentum=0.95),
    "LLQR every 10": llqr.Streaming(probe_share=1.0),
    "LLQR every 15": llqr.Streaming(probe_share=1.0, every=15),
    "LLQR every 20": llqr.Streaming(probe_share=1.0, every=20),
    "LLQR every 30": llqr.Streaming(probe_share=1.0, every=30),
    "LLQR every 15, a quarter": llqr.Streaming(every=15),
    "LLQR every 10, an eighth": llqr.Streaming(probe_share=0.125),
}


def _variants() -> list[Method]:
    usual = methods.METHODS["LLQR streaming"]
    return [
        replace(usual, name=name, options=usual.options | {"refit": refit})
        for name, refit in VARIANTS.items()
    ]


def run(name: str) -> None:
    """Run all variants on a workload, in this process."""
    jax.config.update("jax_enable_x64", name in workloads.FLOAT64)
    fixed = store.read(store.RESULTS, name)[targets.SECTION]
    store.keep(FOLDER, name, targets.SECTION, value=fixed)
    runner.run(
        workloads.load(name), _variants(), protocol.TIERS["quick"], FOLDER, command=runner.typed()
    )


def report() -> None:
    """Print the table, and a row for each workload."""
    tier, results = protocol.TIERS["quick"], []
    for name in workloads.MAKERS:
        ours = summary.read(FOLDER, name, _variants(), tier)
        kept = summary.read(store.RESULTS, name, methods.choose(KEPT), tier)
        if ours and kept and len(ours.entries) == len(VARIANTS):
            results.append(replace(kept, entries=kept.entries | ours.entries))
    if not results:
        sys.exit(f"nothing in {FOLDER}: run first.")
    print(tables.means(results))
    for result in results:
        found = summary.ratios([result], "gradients", tables.REFERENCE)
        print(result.name, {name: round(value, 2) for name, (value, _) in found.items()})


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("workloads", nargs="*", help="of those to run")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
    for name in arguments.workloads:
        run(name)


if __name__ == "__main__":
    main()
