"""What a step takes beside one of the reference: all methods in one process, in turns.

What else runs on a machine, and which machine it is, then meets all of them alike. Seconds of
trials do not have that: they come from many days.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import jax
import numpy as np

from . import release, store, workloads
from .environment import environment
from .methods import suited
from .methods.method import Method
from .training import Program, compiled
from .workloads.problem import Workload

SECTION = "pace"
METHODS = "AdamW,SGD Nesterov,NadamW,schedule-free AdamW,Muon,SOAP,LLQR streaming,LLQR gradients"
"""Measured if none is named."""
STEP, COMPILATION = "milliseconds of a step", "seconds of compilation"
REPEATS, STEPS = 15, 10
"""Turns after the first, and steps in each."""


class Timed(NamedTuple):
    """Steps of one method.

    Attributes:
      program: compiled.
      kinds: kind of every step of a training.
      times: kind -> milliseconds of a step, turn after turn.
    """

    program: Program
    kinds: list[str]
    times: Mapping[str, list[float]]

    def mean(self, of: Any) -> float:
        """Return the mean over the steps of a training, each kind's times in one by `of`."""
        taken = {kind: of(times) for kind, times in self.times.items()}
        return mean(taken[kind] for kind in self.kinds)


def timed(workload: Workload, methods: list[Method], repeats: int = REPEATS) -> dict[str, Timed]:
    """Return method -> its steps, all methods and kinds of step having taken turns.

    Args:
      workload: what is trained, at a rate of 0.
      methods: without refits between their steps.
      repeats: turns, after one that is not counted.
    """
    rate = np.asarray(0.0, np.float64 if workload.float64 else np.float32)
    batch = next(workload.batches(0))
    found, carries = {}, {}
    for method in methods:
        program = compiled(workload, method)
        kinds = [program.engine.kind(i) for i in range(method.steps(workload))]
        found[method.name] = Timed(program, kinds, {kind: [] for kind in sorted(set(kinds))})
        for kind in found[method.name].times:
            made = program.engine.start(workload.initial(0), batch, jax.random.key(0))
            carries[method.name, kind] = jax.tree.map(jax.numpy.copy, made)
    for repeat in range(repeats + 1):
        for (name, kind), carry in carries.items():
            clock = time.perf_counter()
            for _ in range(STEPS):
                carry = found[name].program.steps[kind](carry, batch, rate)
            jax.block_until_ready(carry)
            carries[name, kind] = carry
            if repeat:
                found[name].times[kind].append((time.perf_counter() - clock) / STEPS * 1e3)
    return found


def write(names: list[str], methods: list[Method], folder: Path, command: str) -> None:
    """Measure workloads, in this process, and keep each one's milliseconds of a step."""
    for name in names:
        jax.config.update("jax_enable_x64", name in workloads.FLOAT64)
        workload = workloads.load(name)
        chosen = [
            release.as_run(m, workload) for m in suited(methods, workload) if m.rate is not None
        ]
        taken = timed(workload, chosen)
        steps = {who: found.mean(median) for who, found in taken.items()}
        first = {who: found.program.compilation for who, found in taken.items()}
        print(f"{name}: {', '.join(f'{who} {ms:.3g} ms' for who, ms in steps.items())}", flush=True)
        kept = {"environment": environment(command=command), STEP: steps, COMPILATION: first}
        store.keep(folder, name, SECTION, value=kept)


def read(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """Return what was measured, `STEP` and `COMPILATION`: method -> value, for some methods."""
    found = store.read(folder, name).get(SECTION, {})
    return {what: found.get(what, {}) for what in (STEP, COMPILATION)}
