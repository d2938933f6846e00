"""What streaming refits cost: all steps of a training, refits included, against the plain ones.

    uv run python -m benchmarks.streaming_cost               # figures: results/streaming_cost.json
    uv run python -m benchmarks.streaming_cost characters --repeats 20

One process; ten steps of each kind in turn, so that what else runs on the machine meets all of
them. The mean over a training has ten refits at its start and one at every tenth step after.
Ratios are of medians, and of the smallest values, which other jobs disturb least; those of floating
point operations are what XLA counts in the compiled steps, and leave LAPACK out.

SOAP's QR factorisations are LAPACK's. On a CPU its threads and XLA's are in each other's way, so
that one of a side of 192 can take 60 times as long as it does alone: OPENBLAS_NUM_THREADS=1, which
is set here, keeps them apart (`--blas-threads` for another number). Streaming refits call nothing
of LAPACK's.
"""

import argparse
import os
import statistics
from typing import Any

NAMES = ("characters", "fashion-resnet", "fashion-mlp")
PLAIN = "SGD Nesterov"
METHODS = ("AdamW", "SOAP", "Muon", "LLQR streaming")


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each method: milliseconds of its steps, and ratios to those of SGD."""
    # Late: the environment of its threads comes first.
    from benchmarks.suite import methods, workloads
    from benchmarks.suite.pace import timed

    found = timed(workloads.load(name), [methods.METHODS[m] for m in (PLAIN, *METHODS)], repeats)

    def flops(who: str, kind: str) -> float:
        return found[who].program.steps[kind].cost_analysis()["flops"]

    usual = found[PLAIN]
    plain = flops(PLAIN, usual.kinds[-1])
    rows = []
    for who in METHODS:
        own, median = found[who], statistics.median
        middle = {kind: median(times) for kind, times in own.times.items()}
        rows.append(
            {
                "workload": name,
                "method": who,
                "plain, ms": usual.mean(median),
                "step, ms": min(middle.values()),
                "refit step, ms": max(middle.values()),
                "all / SGD, medians": own.mean(median) / usual.mean(median),
                "all / SGD, smallest": own.mean(min) / usual.mean(min),
                "flops of a step / SGD": min(flops(who, kind) for kind in middle) / plain,
            }
        )
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="The cost of streaming refits.")
    parser.add_argument("workloads", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--blas-threads", type=int, default=1)
    given = parser.parse_args()
    if unknown := set(given.workloads) - set(NAMES):
        parser.error(f"unknown {sorted(unknown)}: choose from {', '.join(NAMES)}")
    os.environ["OPENBLAS_NUM_THREADS"] = str(given.blas_threads)
    from benchmarks.reporting import environment, show, write

    rows = [row for name in given.workloads for row in measure(name, given.repeats)]
    show("streaming refits: all steps of a training", rows)
    if given.blas_threads == 1 and tuple(given.workloads) == NAMES:
        load = os.getloadavg()[0]
        write("streaming_cost", environment(repeats=given.repeats, load=load), rows)


if __name__ == "__main__":
    main()
