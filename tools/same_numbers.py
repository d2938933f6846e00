"""Are the numbers the same as before a change? Bit for bit, for every preset in small.

    uv run python tools/same_numbers.py /tmp/before                         # in the old checkout
    uv run python tools/same_numbers.py /tmp/after --against /tmp/before    # in the new one

Runs quick-local-test and toy-rosenbrock at their own size, every preset with smoke=true, and
quick-local-test killed on its way and resumed; with --against, the other checkout's killed run
is resumed by this code too. Compares every number of every metrics.jsonl (toys: every file of
numbers), times left out.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KILL_AT = 1000
"""Step of quick-local-test at which the run that is resumed is killed."""


def command(out: Path, *overrides: str) -> list[str]:
    """Return the command line of one run."""
    return [sys.executable, "run.py", f"hydra.run.dir={out}", "logging.aim=false", *overrides]


def run(out: Path, *overrides: str) -> str:
    """Run to the end; return what it printed where it failed."""
    done = subprocess.run(command(out, *overrides), cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout[-2000:] + done.stderr[-2000:]


def interrupt(out: Path) -> None:
    """Start the quick run and kill it when it has passed KILL_AT."""
    quick = command(out, "experiment=quick-local-test", "checkpoint_freq=300")
    process = subprocess.Popen(quick, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        rows = numbers(out).get("metrics.jsonl") or []
        if rows and rows[-1]["step"] >= KILL_AT:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.02)


def resume(killed: Path, out: Path) -> str:
    """Go on with a copy of a killed run."""
    shutil.copytree(killed, out, dirs_exist_ok=True)
    return run(out, "experiment=quick-local-test", "checkpoint_freq=300")


def numbers(out: Path) -> dict[str, Any]:
    """Return what a run has recorded, by file, without times."""
    found: dict[str, Any] = {}
    for path in sorted(out.glob("*.jsonl")):
        rows = []
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(timeless(json.loads(line)))
            except json.JSONDecodeError:  # of a run that is being written
                break
        found[path.name] = rows
    meta = out / "meta.json"
    if meta.exists():
        found["results"] = timeless(json.loads(meta.read_text()).get("results"))
    return found


def timeless(value: Any) -> Any:
    """Leave out everything that is a time."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "second" not in k and k != "time"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def everything(folder: Path) -> dict[str, tuple[str, ...]]:
    """Name -> overrides of each run."""
    presets = sorted(p.stem for p in (ROOT / "configs" / "experiment").glob("[!_]*.yaml"))
    runs: dict[str, tuple[str, ...]] = {
        "quick-local-test at its own size": ("experiment=quick-local-test",),
        "toy-rosenbrock at its own size": ("experiment=toy-rosenbrock",),
    }
    return runs | {f"{p} in small": (f"experiment={p}", "smoke=true") for p in presets}


def main() -> int:
    """Run everything, and compare."""
    parser = argparse.ArgumentParser(description="Are the numbers the same as before a change?")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, help="folder of the other checkout's runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    given = parser.parse_args()
    folder = given.folder.resolve()
    chosen = {name: o for name, o in everything(folder).items() if given.only in name}
    failures = {}
    with ThreadPoolExecutor(given.workers) as pool:
        jobs = {name: pool.submit(run, folder / name, *o) for name, o in chosen.items()}
        for name, job in jobs.items():
            failures[name] = job.result()
            print(f"{name}: {'failed' if failures[name] else 'ran'}", flush=True)
    resumed = {}
    if not given.only:
        interrupt(folder / "killed")
        resumed["resumed"] = folder / "killed"
        if given.against:
            resumed["resumed from the other checkpoint"] = given.against / "killed"
    for name, killed in resumed.items():
        failures[name] = resume(killed, folder / name)
    for name, text in failures.items():
        if text:
            print(f"--- {name} failed\n{text}")
    differ = []
    for name in failures if given.against else ():
        theirs = given.against / ("resumed" if name.startswith("resumed") else name)
        if not numbers(folder / name) or numbers(folder / name) != numbers(theirs):
            differ.append(name)
    if given.against:
        print(f"{len(failures) - len(differ)} of {len(failures)} runs are equal bit for bit")
        print("\n".join(f"differs: {name}" for name in differ))
    return 1 if differ or any(failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
