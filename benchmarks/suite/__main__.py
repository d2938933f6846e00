"""The command: run, report, draw, pace, diagnose."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a child is put on its core before jax is imported
    from .methods.method import Method
    from .protocol import Tier


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description="Optimizers side by side."
    )
    parser.add_argument("action", choices=("run", "report", "draw", "pace", "diagnose"))
    parser.add_argument("workloads", nargs="*", help="all of a set, if none is named")
    parser.add_argument("--set", default="development", help="of workloads: development or test")
    parser.add_argument("--tier", default="quick", help="smoke, quick or full")
    parser.add_argument("--methods", default="", help="names between commas; all, if none is named")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--into", type=Path, help="folder that pictures are drawn in")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)),
                        help="workloads at a time, one core each")  # fmt: skip
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)  # of a child
    parser.add_argument("--told", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.core is not None:  # before jax counts them
        os.sched_setaffinity(0, {given.core})
    return given


def main() -> None:
    """Do what the command line asks for."""
    given = _arguments()
    from . import protocol, release, store

    if given.tier not in protocol.TIERS:
        sys.exit(f"unknown tier {given.tier!r}: choose from {', '.join(protocol.TIERS)}.")
    tier = protocol.TIERS[given.tier]
    folder = given.out or (store.RESULTS if tier.shorter == 1 else Path("outputs") / tier.name)
    try:
        names, chosen = _named(given)
    except ValueError as error:
        sys.exit(str(error))
    try:
        _act(given, names, chosen, tier, folder)
    except release.RefusedError as error:
        sys.exit(str(error))


def _named(given: argparse.Namespace) -> "tuple[list[str], list[Method]]":
    """Return workloads and methods, on the test set those that may run there if none is named."""
    from . import methods, pace, release, workloads

    names = workloads.choose(given.set, given.workloads)
    chosen = methods.choose(given.methods or (pace.METHODS if given.action == "pace" else ""))
    runs = given.action in ("run", "pace")
    if runs and workloads.set_of(names[0]) == "test" and not given.methods:
        refused = {method: why for method in chosen if (why := release.refusal(method))}
        chosen = [method for method in chosen if method not in refused]
        print("left out on the test set:", *refused.values(), sep="\n- ")
    if missing := [m.name for m in chosen if not methods.is_installed(m)]:
        print(f"left out, not installed: {', '.join(missing)} (uv sync --extra peers)")
    return names, chosen


def _act(
    given: argparse.Namespace,
    names: list[str],
    chosen: "list[Method]",
    tier: "Tier",
    folder: Path,
) -> None:
    from . import runner, workloads

    if given.action == "run" and given.core is not None:
        runner.run_here(names[0], chosen, tier, folder, given.told)
    elif given.action == "run":
        failed = runner.run_all(names, chosen, tier, folder, given.jobs, runner.typed())
        if failed:
            sys.exit(f"failed: {', '.join(failed)}; what they had done is kept.")
    elif given.action == "report":
        from . import report

        report.write(names, chosen, tier, folder, workloads.set_of(names[0]))
    elif given.action == "draw":
        from . import report

        report.draw(names, chosen, tier, folder, given.into or folder / "images")
    elif given.action == "pace":
        from . import pace

        pace.write(names, chosen, folder, runner.typed())
    else:
        from . import diagnosis

        diagnosis.write(names, folder)


if __name__ == "__main__":
    main()
