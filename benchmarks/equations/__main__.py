"""The command: run, report, draw."""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

SEEDS = 5


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.equations", description="Equations, error against seconds."
    )
    parser.add_argument("action", choices=("run", "report", "draw"))
    parser.add_argument("--problems", nargs="+", default=[], help="all, if none is named")
    parser.add_argument("--methods", default="", help="names between commas; all, if none is named")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--jobs", type=int, default=1, help="problems at a time, one core each")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--into", type=Path, help="folder that the picture is drawn in")
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)  # of a child
    parser.add_argument("--told", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.core is not None:  # before jax counts them
        os.sched_setaffinity(0, {given.core})
    return given


def main() -> None:
    """Do what the command line asks for."""
    given = _arguments()
    import jax

    jax.config.update("jax_enable_x64", True)
    from . import methods, problems, trials

    names = given.problems or list(problems.PROBLEMS)
    chosen = [name.strip() for name in given.methods.split(",") if name.strip()]
    for asked, known in ((names, problems.PROBLEMS), (chosen, methods.ENTRIES)):
        if unknown := set(asked) - set(known):
            sys.exit(f"unknown {sorted(unknown)}: choose from {', '.join(known)}.")
    folder = given.out or trials.RESULTS
    if given.action != "run":
        from . import report

        results = report.read(folder, names, chosen or list(methods.ENTRIES))
        if given.action == "draw":
            report.draw(results, (given.into or folder) / report.PICTURE)
        else:
            report.write(results, folder)
    elif given.core is None and given.jobs > 1:
        _spread(names, given)
    else:
        command = given.told or shlex.join(["python", "-m", "benchmarks.equations", *sys.argv[1:]])
        for name in names:
            bench = trials.Bench(
                problems.PROBLEMS[name], chosen or list(methods.ENTRIES), folder,
                lambda text: print(text, flush=True), command,
            )  # fmt: skip
            bench.run(range(given.seeds))


def _spread(names: list[str], given: argparse.Namespace) -> None:
    """Run problems at the same time, each in a process of its own that keeps to one core."""
    told = shlex.join(["python", "-m", "benchmarks.equations", *sys.argv[1:]])
    cores, waiting = sorted(os.sched_getaffinity(0))[: given.jobs], list(names)
    running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    failed = []
    out = ["--out", str(given.out)] if given.out else []
    single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    while waiting or running:
        for core in cores:
            if core not in running and waiting:
                name = waiting.pop(0)
                child = [sys.executable, "-m", "benchmarks.equations", "run", "--problems", name,
                         "--methods", given.methods, "--seeds", str(given.seeds), "--core",
                         str(core), "--told", told, *out]  # fmt: skip
                running[core] = name, subprocess.Popen(child, env={**os.environ, **single})
        time.sleep(0.5)
        for core, (name, process) in list(running.items()):
            if process.poll() is not None:
                del running[core]
                failed += [name] if process.returncode else []
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what they had done is kept.")


if __name__ == "__main__":
    main()
