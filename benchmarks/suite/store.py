"""Results on disk: a file for each workload and method, replaced as a whole after every trial.

    FOLDER/<workload>/<method>.json     settings, environments, trials
    FOLDER/<workload>/targets.json      the losses to reach, see `targets`

A process that is killed at any instant leaves whole files behind, and the next call goes on.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .methods.method import Method
from .workloads.problem import Workload

RESULTS = Path(__file__).parent.parent / "results" / "suite"


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


def write(path: Path, record: Any) -> None:
    """Write JSON so that the file is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n")
    os.replace(new, path)


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


class Trials:
    """The trials of one method on one workload.

    Attributes:
      path: of the file.
      record: its content.
      dropped: trials of other settings that the file held: they are not used, and are gone once
        something is added.
    """

    def __init__(self, folder: Path, workload: Workload, method: Method):
        self.path = folder / workload.name / f"{slug(method.name)}.json"
        self.dropped, settings = 0, described(workload, method)
        self.record: dict[str, Any] = {
            "workload": workload.name,
            "method": method.name,
            "settings": settings,
            "environments": [],
            "trials": [],
        }
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["settings"] == settings:
                self.record = found
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
        write(self.path, self.record)


def slug(name: str) -> str:
    """Return a name for a file.

    >>> slug("LLQR streaming")
    'llqr-streaming'
    """
    return name.lower().replace(" ", "-")
