"""What a report needs of the results: targets of each workload, runs of each method."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import agenda, pace, store, targets
from .methods.method import Method
from .protocol import TUNING_SEED, Tier
from .statistics import cost, geometric_mean, penalised
from .store import Setting

REFERENCE = "AdamW"
"""Costs are told by those of this method."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One method on one workload.

    Attributes:
      method: the method.
      setting: what was tuned, its seed apart.
      runs: seed -> trial, of the tuned setting.
      usual: seed -> trial, of the customary setting.
      rates: rate -> loss at the end on the tuning seed, infinite where it diverged.
      edge: whether the tuned rate is the smallest or the largest that was tried.
      pace: seconds of a gradient evaluation, with all that a step does besides, in the fastest of
        all trials: what else runs on a machine slows a trial down and never makes it faster. Where
        steps have been measured beside those of the reference, in one process, it is that ratio
        times the reference's.
      compilation: seconds, the least of all processes; likewise.
      environments: where it was measured.
    """

    method: Method
    setting: Setting
    runs: dict[int, dict[str, Any]]
    usual: dict[int, dict[str, Any]]
    rates: dict[float, float]
    edge: bool
    pace: float
    compilation: float
    environments: list[dict[str, Any]]

    def on_axis(self, value: float, axis: str) -> float:
        """Return steps or gradient evaluations on an axis: as they are, or in seconds."""
        seconds = self.pace * value
        return {"seconds": seconds, "all seconds": seconds + self.compilation}.get(axis, value)

    def last(self, column: str) -> list[float]:
        """Return what a column of the runs ends with."""
        return [trial["columns"][column][-1] for trial in self.runs.values()]

    def ended(self, column: str) -> list[float]:
        """Return what a loss of the runs ends with, at most what it began with.

        So a run that has diverged counts as none, whether or not its numbers are finite.
        """
        runs = [trial["columns"][column] for trial in self.runs.values()]
        return [values[0] if values[-1] is None else min(values[0], values[-1]) for values in runs]

    def accuracies(self) -> list[float]:
        """Return the accuracies at the end, of a run that has diverged that of its start.

        Of trials from before they were measured nothing is returned.
        """
        columns = [trial["columns"] for trial in self.runs.values()]
        found = [c["accuracy"] for c in columns if "accuracy" in c]
        return [values[0] if values[-1] is None else values[-1] for values in found]


@dataclass(frozen=True, eq=False)
class Result:
    """One workload.

    Attributes:
      name: of the workload.
      fixed: its targets, see `targets.fix`.
      entries: method's name -> what it did.
    """

    name: str
    fixed: dict[str, Any]
    entries: dict[str, Entry]

    @property
    def measure(self) -> str:
        """The loss that is looked at."""
        return self.fixed["measure"]

    def ends(self, name: str) -> dict[int, float]:
        """Return seed -> loss at the end of a method's runs."""
        runs = self.entries[name].runs
        return {seed: agenda.final(trial, self.measure) for seed, trial in runs.items()}

    def costs(self, name: str, target: str, axis: str) -> list[float]:
        """Return what a target has cost a method, seed by seed.

        Args:
          name: of the method.
          target: "easy", "medium" or "hard".
          axis: "step", "gradients", "seconds", or "all seconds" with compilation.
        """
        place, entry = self.fixed["targets"][target], self.entries[name]
        column = "step" if axis == "step" else "gradients"
        values = [cost(t["columns"], place, column, self.measure) for t in entry.runs.values()]
        return [entry.on_axis(value, axis) for value in values]

    def cost(self, name: str, target: str, axis: str) -> float:
        """Return the median of it, infinite if most runs fail."""
        return statistics.median_high(self.costs(name, target, axis))

    def counted(self, name: str, target: str, axis: str, reference: str) -> float:
        """Return the median cost, or the penalty where most runs fail.

        That is the penalty's factor times all that the method's runs have spent, or what the
        reference's have, if that is more: one that stops early has not been cheap.
        """
        column = "step" if axis == "step" else "gradients"
        spent = (
            entry.on_axis(statistics.median(entry.last(column)), axis)
            for entry in (self.entries[name], self.entries[reference])
        )
        return penalised(self.cost(name, target, axis), max(spent))


def read(folder: Path, name: str, methods: list[Method], tier: Tier) -> Result | None:
    """Read a workload's results: of the methods that have run on all seeds of the tier.

    Returns:
      The results, None if there are no targets or no such methods.
    """
    fixed = targets.read(folder, name)
    if fixed is None:
        return None
    kept, entries = store.trials_of(folder, name), {}
    for method in methods:
        if method.name in kept:
            entry = _entry(kept[method.name], method, tier, fixed["measure"])
            if len(entry.runs) == tier.seeds:
                entries[method.name] = entry
    return Result(name, fixed, _beside(entries, pace.read(folder, name))) if entries else None


def _beside(entries: dict[str, Entry], measured: dict[str, dict[str, float]]) -> dict[str, Entry]:
    """Return the entries, those measured in one process with what they took there.

    Args:
      entries: method -> its entry, with the pace of its trials.
      measured: what steps and compilation take, for some methods: see `pace.read`.
    """
    steps, compilation = measured[pace.STEP], measured[pace.COMPILATION]

    def per_step(entry: Entry) -> float:
        return statistics.median(entry.last("gradients")) / statistics.median(entry.last("step"))

    known = entries.keys() & steps.keys()
    if REFERENCE not in known:
        return entries
    usual = entries[REFERENCE]
    unit = usual.pace * per_step(usual) / steps[REFERENCE]  # seconds of trials, of measured ones
    first = usual.compilation / compilation[REFERENCE]
    found = {
        n: replace(
            entries[n],
            pace=unit * steps[n] / per_step(entries[n]),
            compilation=first * compilation[n],
        )
        for n in known
    }
    return {name: found.get(name, entry) for name, entry in entries.items()}


def _entry(record: dict[str, Any], method: Method, tier: Tier, measure: str) -> Entry:
    trials = {Setting(t["rate"], t["seed"], t["alternative"]): t for t in record["trials"]}
    get = trials.get
    chosen = agenda.best(tier, method, measure, get)
    runs = {s.seed: t for s in agenda.compared(tier, method, measure, get) if (t := get(s))}
    usual = {s.seed: t for s in agenda.untuned(tier, method) if (t := get(s))}
    tried = {
        rate: agenda.final(trial, measure)
        for rate in sorted(agenda.rates(tier, method, measure, get))
        if (trial := get(Setting(rate, TUNING_SEED)))
    }
    edge = agenda.at_the_edge(tried, chosen)
    pace, compilation = _pace([t for s, t in trials.items() if s.alternative == chosen.alternative])
    return Entry(
        method, chosen, runs, usual, tried, edge, pace, compilation, record["environments"]
    )


def _pace(trials: list[dict[str, Any]]) -> tuple[float, float]:
    """Return seconds of a gradient evaluation, and of compilation: the least of all trials."""
    ends = [(t["columns"]["seconds"][-1], t["columns"]["gradients"][-1]) for t in trials]
    pace = min(seconds / gradients for seconds, gradients in ends if gradients)
    return pace, min(trial["compilation"] for trial in trials)


def tasks(results: list[Result], axis: str) -> dict[str, list[float]]:
    """Return method -> cost of every workload and target, NaN where it was not run."""
    names = list(dict.fromkeys(name for result in results for name in result.entries))
    return {
        name: [
            result.cost(name, target, axis) if name in result.entries else math.nan
            for result in results
            for target in result.fixed["targets"]
        ]
        for name in names
    }


def ratios(results: list[Result], axis: str, reference: str) -> Mapping[str, tuple[float, int]]:
    """Return method -> geometric mean of its costs by those of a reference, and how many tasks.

    Tasks are those that both were run on; one that was not reached counts as the penalty.
    """
    found: dict[str, list[float]] = {}
    for result in results:
        if reference not in result.entries:
            continue
        for target in result.fixed["targets"]:
            base = result.counted(reference, target, axis, reference)
            for name in result.entries:
                value = result.counted(name, target, axis, reference)
                found.setdefault(name, []).append(value / base)
    return {name: (geometric_mean(values), len(values)) for name, values in found.items()}


def generalisation(results: list[Result], reference: str) -> dict[str, dict[str, list[float]]]:
    """Return method -> figures at the end by those of a reference, a number for each workload.

    "train" and "test" are ratios of losses, geometric means over seeds. "accuracy" is a share on
    the test examples, a mean over seeds, and "gained" what it is above the reference's.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if reference not in result.entries:
            continue
        usual = result.entries[reference]
        for name, entry in result.entries.items():
            row = found.setdefault(name, {n: [] for n in ("train", "test", "accuracy", "gained")})
            for column in ("train", "test"):
                mine, theirs = (geometric_mean(e.ended(column)) for e in (entry, usual))
                row[column].append(mine / theirs)
            if entry.accuracies() and usual.accuracies():
                mine, theirs = (statistics.mean(e.accuracies()) for e in (entry, usual))
                row["accuracy"].append(mine)
                row["gained"].append(mine - theirs)
    return found
