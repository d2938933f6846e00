"""Compile an engine, run a trial.

Seconds are those of steps and refits alone: compilation is done before and timed for itself, and
evaluations stop the clock. No step waits for the last one between two evaluations, except where
only the step knows what it has cost.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from . import release
from .engine import Engine
from .methods.method import Method
from .protocol import multiplier
from .workloads.problem import Workload

MEASURED = ("train", "test", "accuracy")
"""Columns of what is evaluated, in order; see `Workload.measured`."""

REFIT_SEEDS = 10_000
"""Added to a trial's seed for the batches of refits from outside."""


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled engine.

    Attributes:
      workload: what it trains.
      method: whose engine it is.
      engine: the engine.
      steps: kind -> compiled step.
      refit: a refit from outside, if there are any.
      evaluate: carry -> what `Workload.measured` returns.
      compilation: seconds that steps and refit took to compile.
      memory: peak bytes of the largest step, by XLA's own account.
    """

    workload: Workload
    method: Method
    engine: Engine
    steps: dict[str, Callable[[Any, Any, Any], Any]]
    refit: Callable[[Any, Any], Any] | None
    evaluate: Callable[[Any], dict[str, Any]]
    compilation: float
    memory: int


def compiled(workload: Workload, method: Method, alternative: int | None = None) -> Program:
    """Compile a method for a workload.

    Raises:
      RefusedError: a method of ours that does not run on the test set.
    """
    release.check(workload, method, alternative)
    engine = method.engine(workload, alternative)
    batch = next(workload.batches(0))
    carry = engine.start(workload.initial(0), batch, jax.random.key(0))
    rate = np.asarray(0.0, np.float64 if workload.float64 else np.float32)
    kinds = sorted({engine.kind(step) for step in range(method.steps(workload))})
    clock, steps, memory = time.perf_counter(), {}, 0
    for kind in kinds:
        done = jax.jit(engine.step(kind), donate_argnums=0).lower(carry, batch, rate).compile()
        steps[kind], memory = done, max(memory, _peak(done))
    refit = None
    if engine.outside is not None:
        refit = engine.outside.refit
        # Compiled as a whole, a refit with convolutions is slow on a CPU.
        if all(x.ndim <= 2 for x in jax.tree.leaves(engine.parameters(carry))):
            examples = next(workload.batches(0, engine.outside.batch))
            done = jax.jit(refit).lower(carry, examples).compile()
            refit, memory = done, max(memory, _peak(done))
        else:
            jax.block_until_ready(refit(carry, next(workload.batches(0, engine.outside.batch))))
    compilation = time.perf_counter() - clock
    measured = jax.jit(workload.measured)

    def evaluate(carry: Any) -> dict[str, Any]:
        return measured(engine.parameters(carry), workload.fixed, workload.test)

    evaluate(carry)
    return Program(workload, method, engine, steps, refit, evaluate, compilation, memory)


def _peak(done: Any) -> int:
    """Bytes of arguments, results and temporary arrays, what is donated counted once."""
    found = done.memory_analysis()
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )


def trial(program: Program, rate: float, seed: int, points: int) -> dict[str, Any]:
    """Train once.

    Args:
      program: compiled for a workload and a method.
      rate: the largest of the schedule.
      seed: of the parameters and of the order of the examples.
      points: evaluations, besides that of the start.

    Returns:
      Columns "step", "gradients", "seconds", "train", "test" and, where there are classes,
      "accuracy", a row for each evaluation; a run that has diverged ends with a row whose losses
      are None.
    """
    workload, engine, total = (
        program.workload,
        program.engine,
        program.method.steps(program.workload),
    )
    stream, outside = workload.batches(seed), engine.outside
    refits = workload.batches(seed + REFIT_SEEDS, outside.batch if outside else None)
    carry = engine.start(workload.initial(seed), next(workload.batches(seed)), jax.random.key(seed))
    carry = jax.tree.map(_own, carry)
    dtype = np.float64 if workload.float64 else np.float32
    marks = {round(total * (i + 1) / points) for i in range(points)}
    columns: dict[str, list[Any]] = {}

    def record(step: int) -> bool:
        measured = program.evaluate(carry)
        found = {name: float(measured[name]) for name in MEASURED if name in measured}
        finite = bool(np.isfinite(list(found.values())).all())
        row = {"step": step, "gradients": round(work, 2), "seconds": round(seconds, 4)}
        row |= {name: float(f"{x:.6g}") if finite else None for name, x in found.items()}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
        return finite

    seconds, work = 0.0, 0.0
    record(0)
    clock = time.perf_counter()
    for step in range(total):
        if outside is not None and program.refit is not None and step % outside.every == 0:
            carry = program.refit(carry, next(refits))
            work += outside.work * outside.batch / workload.batch
        kind = engine.kind(step)
        now = multiplier(step, total, decays=program.method.decays, warms=program.method.warms)
        carry = program.steps[kind](carry, next(stream), np.asarray(rate * now, dtype))
        work += float(engine.counted(carry)) if engine.counted else engine.work(kind)
        spent = engine.counted is not None and work >= workload.steps
        if step + 1 in marks or spent:
            jax.block_until_ready(carry)
            seconds += time.perf_counter() - clock
            if not record(step + 1) or spent:
                break
            clock = time.perf_counter()
    return columns


def _own(x: Any) -> Any:
    return jax.numpy.copy(x) if isinstance(x, jax.Array) else x
