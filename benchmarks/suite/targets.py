"""The losses to reach: fixed from the tuned baselines before LLQR has run on a workload.

With L the loss at the start and B the least loss that a baseline ends with on the tuning seed, a
target is L (B / L)^share, for the shares of `protocol.TARGETS`. They are written once, and no call
changes them: to fix them anew, the file of the workload has to go.
"""

import math
from pathlib import Path
from typing import Any

from . import agenda, store
from .methods.method import Method
from .protocol import TARGETS, Tier
from .store import Trials
from .workloads.problem import Workload

SECTION = "targets"


def between(start: float, best: float) -> dict[str, float]:
    """Return the targets between two losses.

    >>> between(1.0, 0.01)
    {'easy': 0.1, 'medium': 0.0251, 'hard': 0.0126}
    """
    return {name: float(f"{start * (best / start) ** s:.3g}") for name, s in TARGETS.items()}


def read(folder: Path, workload: str) -> dict[str, Any] | None:
    """Return what was fixed for a workload, None if nothing was."""
    return store.read(folder, workload).get(SECTION)


def fix(
    folder: Path, workload: Workload, tier: Tier, trials: dict[Method, Trials]
) -> dict[str, Any]:
    """Fix the targets of a workload, if they are not there.

    Args:
      folder: of the results.
      workload: the workload.
      tier: which rates have been tried.
      trials: of all methods that are run.

    Raises:
      RuntimeError: LLQR has trials already, no baseline has come to an end, or one at zero.
    """
    if found := read(folder, workload.name):
        return found
    if any(t.record["trials"] for m, t in trials.items() if m.ours):
        raise RuntimeError(
            f"{workload.name}: LLQR has run, and there are no targets. They are fixed from the "
            f"baselines before: remove {store.place(folder, workload.name)} and run all anew."
        )
    ends = {}
    for method, of in trials.items():
        if not method.ours:
            setting = agenda.best(tier, method, workload.measure, of.get)
            ends[method.name] = agenda.final(of.get(setting), workload.measure), setting.rate, of
    name = min(ends, key=lambda n: ends[n][0], default=None)
    if name is None or math.isinf(ends[name][0]):
        raise RuntimeError(
            f"{workload.name}: no baseline has come to an end, so that there is nothing to fix "
            f"targets from: ask for baselines too, not for {', '.join(m.name for m in trials)}."
        )
    loss, rate, of = ends[name]
    if loss <= 0:
        raise RuntimeError(
            f"{workload.name}: {name} ends with a loss of {loss}, and no target lies before it: "
            "give the workload fewer steps, or more to learn."
        )
    start = of.record["trials"][0]["columns"][workload.measure][0]
    record = {
        "measure": workload.measure,
        "start": start,
        "best": loss,
        "method": name,
        "rate": rate,
        "tier": tier.name,
        "baselines": {n: end[0] if math.isfinite(end[0]) else None for n, end in ends.items()},
        "targets": between(start, loss),
    }
    store.keep(folder, workload.name, SECTION, value=record)
    return record
