"""Runs what is due.

For each workload, in one process on one core: the baselines are tuned, the targets are fixed, LLQR
is tuned, and then every method runs seed after seed. In each of these stages the methods take
turns, A B C A B C, so that what else runs on the machine meets all of them alike.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from . import agenda, release, store, targets, workloads
from .environment import environment
from .methods import suited
from .methods.method import Method
from .protocol import Tier
from .store import Setting, Trials
from .training import Program, compiled, trial
from .workloads.problem import Workload

Say = Callable[[str], None]


def run(
    workload: Workload,
    methods: list[Method],
    tier: Tier,
    folder: Path,
    *,
    say: Say = print,
    command: str = "",
) -> None:
    """Run all that is due of a workload.

    Args:
      workload: as it is in the tier: see `in_tier`.
      methods: those that do not suit it are left out.
      tier: how much is run.
      folder: of the results; what is there already is not run again.
      say: told of each trial.
      command: as typed, for the results.

    Raises:
      RuntimeError: another process runs it in the folder; or targets cannot be fixed; or a method
        of ours does not run on the test set (`release.RefusedError`).
    """
    chosen = [release.as_run(method, workload) for method in suited(methods, workload)]
    with store.alone(folder, workload.name):
        trials = {method: Trials(folder, workload, method) for method in chosen}
        for method, of in trials.items():
            if of.dropped:
                say(f"{workload.name}, {method.name}: settings have changed, {of.dropped} void")
        bench = _Bench(workload, tier, trials, say, command)
        bench.in_turns(agenda.next_tuning, [m for m in chosen if not m.ours])
        if not targets.read(folder, workload.name):
            fixed = targets.fix(folder, workload, tier, trials)
            say(f"{workload.name}: targets {fixed['targets']}, from {fixed['method']}")
        bench.in_turns(agenda.next_tuning, [m for m in chosen if m.ours])
        bench.in_turns(agenda.next_run, chosen)


class _Bench:
    """Programs that have been compiled, and trials that are kept."""

    def __init__(
        self, workload: Workload, tier: Tier, trials: dict[Method, Trials], say: Say, command: str
    ):
        self.workload, self.tier, self.trials, self.say = workload, tier, trials, say
        self.environment = environment(command=command)
        self.programs: dict[tuple[Method, int | None], Program] = {}

    def in_turns(self, following: Callable[..., Setting | None], methods: Iterable[Method]) -> None:
        """Run one trial of each method after another, seed by seed, until none is due."""
        waiting = list(methods)
        while waiting:
            due = {method: self._due(following, method) for method in waiting}
            waiting = [method for method in waiting if due[method] is not None]
            first = min((setting.seed for setting in due.values() if setting), default=None)
            for method in waiting:
                setting = due[method]
                if setting is not None and setting.seed == first:
                    self._run(method, setting)

    def _due(self, following: Callable[..., Setting | None], method: Method) -> Setting | None:
        return following(self.tier, method, self.workload.measure, self.trials[method].get)

    def _run(self, method: Method, setting: Setting) -> None:
        key = method, setting.alternative
        if key not in self.programs:
            self.programs[key] = compiled(self.workload, *key)
        program, clock = self.programs[key], time.perf_counter()
        columns = trial(program, setting.rate, setting.seed, self.tier.points)
        found = {
            "columns": columns,
            "compilation": round(program.compilation, 2),
            "memory": program.memory,
        }
        self.trials[method].add(setting, found, self.environment)
        last = columns[self.workload.measure][-1]
        self.say(
            f"{self.workload.name}, {method.name}: rate {setting.rate:g}, seed {setting.seed}"
            f"{'' if setting.alternative is None else f', alternative {setting.alternative}'}: "
            f"{'diverged' if last is None else format(last, '.4g')}, "
            f"{time.perf_counter() - clock:.1f} s"
        )


def in_tier(workload: Workload, tier: Tier) -> Workload:
    """Return a workload as it is in a tier."""
    return workload if tier.shorter == 1 else workload.shortened(tier.shorter)


def run_here(name: str, methods: list[Method], tier: Tier, folder: Path, command: str) -> None:
    """Run a workload in this process."""
    if name in workloads.FLOAT64:
        import jax

        jax.config.update("jax_enable_x64", True)
    run(in_tier(workloads.load(name), tier), methods, tier, folder, command=command)


def run_all(
    names: list[str], methods: list[Method], tier: Tier, folder: Path, jobs: int, command: str
) -> list[str]:
    """Run workloads, each in a process of its own that keeps to one core.

    Returns:
      The names of those that failed; what they had done is kept.
    """
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    waiting, running, failed = list(names), {}, []
    chosen = ",".join(method.name for method in methods)
    while waiting or running:
        for core in cores:
            if core in running or not waiting:
                continue
            name = waiting.pop(0)
            arguments = ["run", name, "--tier", tier.name, "--methods", chosen,
                         "--out", str(folder), "--core", str(core), "--told", command]  # fmt: skip
            child = [sys.executable, "-m", "benchmarks.suite", *arguments]
            running[core] = name, subprocess.Popen(child, env={**os.environ, **THREADS})
        time.sleep(0.5)
        for core, (name, process) in list(running.items()):
            if process.poll() is not None:
                del running[core]
                failed += [name] if process.returncode else []
    return failed


THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""LAPACK's threads and XLA's are in each other's way."""


def typed() -> str:
    """Return the command line, as typed."""
    return shlex.join(["python", "-m", "benchmarks.suite", *sys.argv[1:]])
