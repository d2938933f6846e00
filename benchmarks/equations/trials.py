"""How a method is tuned, run and timed, and where it is kept.

Rates are tuned by the error at the end, on a seed of their own: over the grid of the suite's tier
"quick", and then beyond its ends until the best rate is not at one. A method with a rate makes as
many steps as fit into the seconds of the problem, measured once, and its rate falls to 0 over them.
The seeds come one after another, and in each the methods take turns. Seconds are those of steps:
compilation is done before and told apart, and evaluations stop the clock.

What is kept of a problem is a file, with a line for each trial; what is there is not run again.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.suite import store
from benchmarks.suite.environment import environment, version
from benchmarks.suite.methods.method import Method
from benchmarks.suite.protocol import TIERS, TUNING_SEED, multiplier
from benchmarks.suite.training import Program, compiled
from benchmarks.suite.workloads.problem import Workload, rows

from .methods import ENTRIES, SHARE, Entry
from .problems import Problem

RESULTS = store.RESULTS.parent / "equations"
AXES = ("step", "gradients", "seconds")
COLUMNS = (*AXES, "error", "loss")
TIER = TIERS["quick"]
PACKAGES = ("scipy", "optimistix", "ssbroyden-optimistix")
BEYOND = 4
"""Rates beyond an end of the grid, at most."""
MARKS = frozenset(round(m * 10**e) for e in range(6) for m in (1, 1.5, 2, 3, 5, 7))
"""Steps after which the error is measured, beside the last one."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How a trial goes.

    Attributes:
      rate: the largest of the schedule.
      schedule: its steps.
      steps: after which it ends; None: never.
      seconds: after which it ends; None: never.
      alternative: number of the method's other options, None for the usual ones.
    """

    rate: float = 0.0
    schedule: int = 1
    steps: int | None = None
    seconds: float | None = None
    alternative: int | None = None


def course(program: Program, plan: Plan, seed: int, unit: float | None) -> dict[str, list[Any]]:
    """Train once.

    Args:
      program: compiled.
      plan: how.
      seed: of the parameters, and of the points where they are others in every step.
      unit: seconds of a gradient, in which work is told; None: it is counted.

    Returns:
      `COLUMNS`, a row for each evaluation; a run that has diverged ends with errors of None.
    """
    workload, engine = program.workload, program.engine
    stream = workload.batches(seed)
    carry = engine.start(workload.initial(seed), next(workload.batches(seed)), jax.random.key(seed))
    carry = jax.tree.map(lambda x: jax.numpy.copy(x) if isinstance(x, jax.Array) else x, carry)
    table, seconds, work, step = _Table(unit), 0.0, 0.0, 0
    table.add(0, 0.0, 0.0, _measured(program, carry))
    clock = time.perf_counter()
    while step != plan.steps:
        kind = engine.kind(step)
        rate = plan.rate * multiplier(min(step, plan.schedule), plan.schedule)
        carry = program.steps[kind](carry, next(stream), np.asarray(rate))
        work += float(engine.counted(carry)) if engine.counted else engine.work(kind)
        step += 1
        over = False
        if plan.seconds is not None:
            jax.block_until_ready(carry)
            over = seconds + time.perf_counter() - clock > plan.seconds
        if step in MARKS or step == plan.steps or over:
            jax.block_until_ready(carry)
            seconds += time.perf_counter() - clock
            if not table.add(step, work, seconds, _measured(program, carry)) or over:
                break
            clock = time.perf_counter()
    return table.columns


def _measured(program: Program, carry: Any) -> tuple[Any, Any]:
    """Return the loss and the error."""
    found = program.evaluate(carry)
    return found["train"], found["test"]


class _Table:
    """Columns that grow."""

    def __init__(self, unit: float | None):
        self.unit = unit
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def add(self, step: int, work: float, seconds: float, found: Any) -> bool:
        """Add a row, losses being (loss, error); return whether they are finite."""
        losses = [float(x) for x in found]
        finite = bool(np.isfinite(losses).all())
        loss, error = (float(f"{x:.5g}") if finite else None for x in losses)
        work = work if self.unit is None else seconds / self.unit
        values = (step, round(work, 1), round(seconds, 4), error, loss)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)
        return finite


def outside(
    entry: Entry, workload: Workload, limit: float, seed: int, unit: float
) -> tuple[float, dict[str, list[Any]]]:
    """Run a solver that has its own loop; return seconds of compilation, and columns."""
    assert entry.course is not None
    measured = jax.jit(workload.measured)
    compilation, seen = entry.course(workload, seed, limit)
    table, last = _Table(unit), seen[-1].step if seen else 0
    table.add(0, 0.0, 0.0, measured(workload.initial(seed), workload.fixed, workload.test))
    for at in seen:
        if at.step in MARKS or at.step == last:
            found = measured(at.params, workload.fixed, workload.test)
            table.add(at.step, 0.0, at.seconds, found)
    return compilation, table.columns


def final(columns: dict[str, list[Any]]) -> float:
    """Return the error at the end, infinite for a run that has diverged."""
    return math.inf if columns["error"][-1] is None else columns["error"][-1]


def gradient_seconds(workload: Workload, repeats: int = 30) -> float:
    """Return seconds of one loss and its gradient: the median."""
    both = jax.jit(jax.value_and_grad(workload.objective))
    params, batch = workload.initial(0), next(workload.batches(0))
    batch = jax.tree.map(jax.numpy.asarray, batch)
    found = []
    for _ in range(repeats + 1):
        clock = time.perf_counter()
        jax.block_until_ready(both(params, batch))
        found.append(time.perf_counter() - clock)
    return statistics.median(found[1:])


def pace(program: Program, warmup: int = 20, steps: int = 20, repeats: int = 3) -> float:
    """Return seconds of a step: the least mean of a few, once the first are over."""
    workload, engine = program.workload, program.engine
    stream = workload.batches(0)
    carry = engine.start(workload.initial(0), next(stream), jax.random.key(0))
    carry = jax.tree.map(lambda x: jax.numpy.copy(x) if isinstance(x, jax.Array) else x, carry)
    found, clock = [], 0.0
    for step in range(warmup + steps * repeats):
        if step >= warmup and (step - warmup) % steps == 0:
            jax.block_until_ready(carry)
            clock = time.perf_counter()
        carry = program.steps[engine.kind(step)](carry, next(stream), np.asarray(1e-5))
        if step >= warmup and (step - warmup) % steps == steps - 1:
            jax.block_until_ready(carry)
            found.append((time.perf_counter() - clock) / steps)
    return min(found)


def allowed(problem: Problem, entry: Entry) -> float:
    """Return the seconds of a trial."""
    return problem.seconds * (problem.patience if entry.patient else 1.0)


def _round_down(count: float) -> int:
    """Two digits."""
    digits = max(0, math.floor(math.log10(max(count, 1))) - 1)
    return max(1, int(count // 10**digits) * 10**digits)


def next_rate(customary: float, tried: dict[float, float]) -> float | None:
    """Return the rate to try next, rate -> error being those so far; None: it is tuned.

    >>> next_rate(0.1, {0.1: 3.0, 0.0316: 2.0, 0.316: 4.0, 0.01: 1.0, 1.0: 5.0})
    0.00316
    >>> next_rate(0.1, {0.1: 3.0, 0.0316: 2.0, 0.316: 4.0, 0.01: 2.5, 1.0: 5.0}) is None
    True
    """
    grid = TIER.grid(customary)
    if due := [rate for rate in grid if rate not in tried]:
        return due[0]
    best = min(tried, key=lambda rate: tried[rate])
    if best not in (min(tried), max(tried)) or len(tried) >= len(grid) + BEYOND:
        return None
    return TIER.following(tried)


# --- what is kept -------------------------------------------------------------------------------


class Record:
    """What is kept of a method on a problem.

    Attributes:
      kept: settings; steps that fit into the seconds; tuning: alternative, rate and error of each
        trial; environments; trials.
      dropped: trials of other settings, which are void.
    """

    def __init__(self, folder: Path, problem: Problem, workload: Workload, entry: Entry):
        self._place = folder, problem.name, "methods", entry.name
        options = {k: v for k, v in entry.method.options.items() if not callable(v)}
        settings = {
            "options": options,
            "seconds": allowed(problem, entry),
            "tuning": problem.tuning,
            "exact steps": problem.steps if entry.exact else None,
            "parameters": workload.size(),
            "rows": rows(next(workload.batches(0))),
        }
        settings = json.loads(json.dumps(settings, default=repr))
        self.kept: dict[str, Any] = {
            "settings": settings, "steps": None, "tuning": [], "environments": [], "trials": [],
        }  # fmt: skip
        found = store.read(folder, problem.name).get("methods", {}).get(entry.name, self.kept)
        self.dropped = 0 if found["settings"] == settings else len(found["trials"])
        if found["settings"] == settings:
            self.kept = found

    def trial(self, seed: int) -> dict[str, Any] | None:
        """Return the trial of a seed, None if it has not been run."""
        return next((t for t in self.kept["trials"] if t["seed"] == seed), None)

    def tuned(self) -> dict[str, Any] | None:
        """Return the best of what was tried, None if nothing was."""
        errors = [t for t in self.kept["tuning"] if t["error"] is not None]
        return min(errors, key=lambda t: t["error"], default=None)

    def tried(self, alternative: int | None = None) -> dict[float, float]:
        """Return rate -> error of what was tried; infinite where it diverged."""
        return {
            t["rate"]: math.inf if t["error"] is None else t["error"]
            for t in self.kept["tuning"]
            if t["alternative"] == alternative
        }

    def add(self, seed: int, found: dict[str, Any], where: dict[str, Any]) -> None:
        """Keep a trial."""
        known = self.kept["environments"]
        if where not in known:
            known.append(where)
        self.kept["trials"].append({"seed": seed, "environment": known.index(where), **found})
        self.save()

    def save(self) -> None:
        """Write it."""
        store.keep(*self._place, value=self.kept)


# --- a problem from its beginning to its end ----------------------------------------------------


class Bench:
    """One problem and its methods, in this process.

    Attributes:
      skipped: method -> why it was left out.
    """

    def __init__(
        self,
        problem: Problem,
        names: Iterable[str],
        folder: Path = RESULTS,
        say: Say = print,
        command: str = "",
    ):
        self.problem, self.workload, self.folder, self.say = problem, problem.make(), folder, say
        given = [ENTRIES[n] for n in names if problem.methods is None or n in problem.methods]
        self.entries = [entry for entry in given if entry.suits(self.workload)]
        self.records = {e.name: Record(folder, problem, self.workload, e) for e in self.entries}
        for name, record in self.records.items():
            if record.dropped:
                say(f"{problem.name}, {name}: settings have changed, {record.dropped} void")
        self.where, self.unit = environment(command=command), gradient_seconds(self.workload)
        self.where["versions"] |= {name: version(name) for name in PACKAGES}
        self.skipped: dict[str, str] = {}
        self._programs: dict[tuple[str, int | None], Program] = {}

    def run(self, seeds: Iterable[int]) -> None:
        """Tune what is not tuned, then run what is due, seed after seed, methods in turns."""
        seeds = list(seeds)
        with store.alone(self.folder, self.problem.name):
            self._keep_problem()
            progress = _Progress(self, seeds)
            for entry in self.entries:
                self._attempt(entry, lambda e: self._tune(e, progress))
            for seed in seeds:
                for entry in self.entries:
                    if self.records[entry.name].trial(seed) is None:
                        self._attempt(entry, lambda e: self._seed(e, seed, progress))  # noqa: B023

    def _attempt(self, entry: Entry, act: Callable[[Entry], None]) -> None:
        """Do it, but for a method that the library refuses."""
        if entry.name in self.skipped:
            return
        try:
            act(entry)
        except ValueError as error:
            self.skipped[entry.name] = str(error)
            self.say(f"{self.problem.name}, {entry.name}: left out: {error}")

    def _keep_problem(self) -> None:
        told = {
            "told": self.workload.told,
            "parameters": self.workload.size(),
            "rows": rows(next(self.workload.batches(0))),
            "fresh": not self.workload.full_batch,
            "seconds": self.problem.seconds,
            "gradient": self.unit,
        }
        store.keep(self.folder, self.problem.name, "problem", value=told)

    def _program(self, entry: Entry, alternative: int | None = None) -> Program:
        key = entry.name, alternative
        if key not in self._programs:
            method, workload = entry.method, self.workload
            if entry.after:
                method, schedule = self._hybrid(entry)
                workload = replace(workload, steps=schedule)
            self._programs[key] = compiled(workload, method, alternative)
        return self._programs[key]

    def _hybrid(self, entry: Entry) -> tuple[Method, int]:
        """A method that begins as another, and the steps of the other's schedule."""
        before = self.records.get(entry.after) or Record(
            self.folder, self.problem, self.workload, ENTRIES[entry.after]
        )
        if before.tuned() is None:
            raise ValueError(f"{entry.after} is not tuned: ask for it too")
        lbfgs, steps = ENTRIES["L-BFGS"], before.kept["steps"]
        kept = Record(self.folder, self.problem, self.workload, lbfgs).tuned()
        memory = lbfgs.method.chosen(kept["alternative"] if kept else None)
        options = {"switch": round(SHARE * steps), **memory}
        return replace(entry.method, options=options), steps

    def _plan(self, entry: Entry, rate: float, alternative: int | None, share: float) -> Plan:
        limit = share * allowed(self.problem, entry)
        if entry.exact:
            return Plan(steps=self.problem.steps, seconds=limit if entry.patient else None)
        if entry.after:
            before = Record(self.folder, self.problem, self.workload, ENTRIES[entry.after])
            tuned = before.tuned()
            assert tuned is not None
            return Plan(tuned["rate"], before.kept["steps"], seconds=limit)
        if entry.method.rate is None:
            return Plan(seconds=limit, alternative=alternative)
        record = self.records[entry.name]
        if record.kept["steps"] is None:
            record.kept["steps"] = _round_down(
                allowed(self.problem, entry) / pace(self._program(entry, alternative))
            )
        steps = max(1, round(share * record.kept["steps"]))
        return Plan(rate, steps, steps, alternative=alternative)

    def _course(
        self, entry: Entry, rate: float, alternative: int | None, seed: int, share: float = 1.0
    ) -> dict[str, Any]:
        """Train once, for a share of the seconds."""
        if entry.course is not None:
            limit = share * allowed(self.problem, entry)
            compilation, columns = outside(entry, self.workload, limit, seed, self.unit)
        else:
            program = self._program(entry, alternative)
            plan = self._plan(entry, rate, alternative, share)
            columns = course(program, plan, seed, self.unit if entry.timed else None)
            compilation = program.compilation
        found = {"compilation": round(compilation, 2), "gradient": float(f"{self.unit:.4g}")}
        return {"rate": rate, "alternative": alternative, **found, "columns": columns}

    def _due(self, entry: Entry) -> tuple[float, int | None] | None:
        """The rate and the alternative to try next, None if it is tuned."""
        record, rate = self.records[entry.name], entry.method.rate
        if rate is not None:
            found = next_rate(rate, record.tried())
            return None if found is None else (found, None)
        if not entry.alternatives:
            return None
        others = (None, *entry.alternatives)
        return next(((0.0, other) for other in others if not record.tried(other)), None)

    def _tune(self, entry: Entry, progress: "_Progress") -> None:
        record = self.records[entry.name]
        while (due := self._due(entry)) is not None:
            found = self._course(entry, *due, TUNING_SEED, self.problem.tuning)
            error = final(found["columns"])
            kept = None if math.isinf(error) else error
            record.kept["tuning"].append({"rate": due[0], "alternative": due[1], "error": kept})
            record.save()
            progress.done(entry, f"tuning, {_setting(*due)}", found)

    def _seed(self, entry: Entry, seed: int, progress: "_Progress") -> None:
        record = self.records[entry.name]
        best = record.tuned() or {"rate": 0.0, "alternative": None}
        found = self._course(entry, best["rate"], best["alternative"], seed)
        record.add(seed, found, self.where)
        progress.done(entry, f"seed {seed}", found)

    def due(self, seeds: list[int]) -> float:
        """Return about how many seconds are due, compilation left out."""
        total = 0.0
        for entry in self.entries:
            if entry.name not in self.skipped:
                record = self.records[entry.name]
                missing: float = sum(record.trial(seed) is None for seed in seeds)
                if self._due(entry) is not None:
                    most = TIER.rates + 1 if entry.method.rate else 1 + len(entry.alternatives)
                    missing += self.problem.tuning * max(1, most - len(record.kept["tuning"]))
                total += missing * allowed(self.problem, entry)
        return total


class _Progress:
    """Tells of each trial, and about when all will be over."""

    def __init__(self, bench: Bench, seeds: list[int]):
        self.bench, self.seeds, self.begun = bench, seeds, time.perf_counter()
        self.first = bench.due(seeds)

    def done(self, entry: Entry, what: str, found: dict[str, Any]) -> None:
        passed, left = time.perf_counter() - self.begun, self.bench.due(self.seeds)
        pace = passed / max(self.first - left, 1e-9)
        columns = found["columns"]
        self.bench.say(
            f"{self.bench.problem.name}, {entry.name}: {what}: error {final(columns):.2e} after "
            f"{columns['step'][-1]} steps, {columns['seconds'][-1]:.1f} s; "
            f"{passed / 60:.1f} min passed, about {max(left, 0) * max(pace, 0) / 60:.1f} left"
        )


def _setting(rate: float, alternative: int | None) -> str:
    return f"rate {rate:g}" if rate else f"alternative {alternative}"
