"""Results on disk: a file for each workload, FOLDER/<workload>.json, replaced as a whole.

  section     what is in it
  targets     the losses to reach, see `targets`
  methods     name -> settings, environments, trials, one a line, see `Trials`
  release V   the same of LLQR's version V, on the test set, see `release`
  pace        milliseconds of a step, see `pace`
  diagnosis   see `diagnosis`

Tiers share it: what was run for one is a part of a finer one. A process that is killed at any
instant leaves a whole file behind, and the next call goes on. Several may write: each changes its
own part of what is on disk then, and leaves the others' as they are.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import release
from .methods.method import Method
from .workloads.problem import Workload

RESULTS = Path(__file__).parent.parent / "results" / "suite"
METHODS = "methods"
"""The section of trials."""


@dataclass(frozen=True)
class Setting:
    """What tells one trial of a method from another.

    Attributes:
      rate: the learning rate, 0 for a method that has none.
      seed: of parameters and batches.
      alternative: number of the other options, None for the usual ones.
    """

    rate: float
    seed: int
    alternative: int | None = None


def place(folder: Path, workload: str) -> Path:
    """Return the file of a workload."""
    return folder / f"{workload}.json"


def read(folder: Path, workload: str) -> dict[str, Any]:
    """Return what is kept of a workload, by section; nothing, if nothing is."""
    path = place(folder, workload)
    return json.loads(path.read_text()) if path.exists() else {}


def keep(folder: Path, workload: str, *part: str, value: Any) -> None:
    """Replace one part of what is kept of a workload.

    The file is the old one or the new one, never half of it.

    Args:
      folder: of the results.
      workload: its name.
      *part: the section, and what in it.
      value: plain data.
    """
    with _locked(folder / f".{workload}.write", fcntl.LOCK_EX):
        record = around = read(folder, workload)
        for name in part[:-1]:
            around = around.setdefault(name, {})
        around[part[-1]] = value
        path = place(folder, workload)
        new = path.with_suffix(f".{os.getpid()}.new")
        new.write_text(_text(record, _LINES) + "\n")
        os.replace(new, path)


@contextmanager
def alone(folder: Path, workload: str) -> Iterator[None]:
    """One process at a time runs a workload.

    Raises:
      RuntimeError: another one does.
    """
    with ExitStack() as stack:
        try:
            path = folder / f".{workload}.run"
            stack.enter_context(_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            told = f"another process runs {workload} in {folder}: wait for it."
            raise RuntimeError(told) from None
        yield


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield


_LINES = 4
"""Levels that are broken into lines: file, methods, one method, its trials."""


def _text(value: Any, lines: int) -> str:
    """JSON, its outer levels in lines: one more trial is one more line."""
    if lines and value and isinstance(value, dict):
        rows = (
            f"{json.dumps(str(name))}:{_text(inner, lines - 1)}" for name, inner in value.items()
        )
        return "{\n" + ",\n".join(rows) + "\n}"
    if lines and value and isinstance(value, list):
        return "[\n" + ",\n".join(_text(inner, lines - 1) for inner in value) + "\n]"
    return json.dumps(value, separators=(",", ":"))


def described(workload: Workload, method: Method) -> dict[str, Any]:
    """Return what decides a method's results on a workload; another value makes others void."""
    options = {k: v for k, v in method.options.items() if not callable(v)}
    return json.loads(
        json.dumps(
            {
                "options": options,
                "alternatives": method.alternatives,
                "customary rate": method.rate,
                "decays": method.decays,
                "steps": method.steps(workload),
                "budget": workload.steps,
                "batch": workload.batch,
                "measure": workload.measure,
            },
            default=repr,
        )
    )


def trials_of(folder: Path, workload: str) -> dict[str, Any]:
    """Return method -> what is kept of its trials: of ours on the test set, the last release's."""
    record = read(folder, workload)
    last = release.newest(list(record))
    return record.get(METHODS, {}) | (record[last] if last else {})


class Trials:
    """The trials of one method on one workload.

    Raises:
      RefusedError: they are those of a release whose code or settings have changed.

    Attributes:
      record: settings, environments, trials.
      dropped: trials of other settings that were kept: they are not used, and are gone once
        something is added.
    """

    def __init__(self, folder: Path, workload: Workload, method: Method):
        section = release.section(workload, method, METHODS)
        self._place = folder, workload.name, section, method.name
        settings = described(workload, method) | release.stamp(workload, method)
        self.dropped = 0
        self.record: dict[str, Any] = {"settings": settings, "environments": [], "trials": []}
        found = read(folder, workload.name).get(section, {}).get(method.name, self.record)
        if found["settings"] == settings:
            self.record = found
        elif section != METHODS:
            raise release.RefusedError(
                f"{workload.name}: {method.name} has trials of {section}, with other code or "
                "settings. A release runs once on the test set: the next version is another."
            )
        else:
            self.dropped = len(found["trials"])

    def get(self, setting: Setting) -> dict[str, Any] | None:
        """Return a trial, None if it has not been run."""
        for trial in self.record["trials"]:
            if Setting(trial["rate"], trial["seed"], trial["alternative"]) == setting:
                return trial
        return None

    def add(self, setting: Setting, found: dict[str, Any], environment: dict[str, Any]) -> None:
        """Keep a trial, on disk too."""
        known = self.record["environments"]
        if environment not in known:
            known.append(environment)
        trial = {**vars(setting), "environment": known.index(environment), **found}
        self.record["trials"].append(trial)
        keep(*self._place, value=self.record)
