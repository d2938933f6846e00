"""The training loop of the study: one compiled step for each kind, no host sync inside a segment.

Seconds are those of segments between two points where losses are recorded, without compilation
and without evaluation.
"""

import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from methods import PLAIN, Kind, Method
from workloads import Batch, Workload

import llqr

WARMUP_SHARE = 0.05
POINTS = 10
_CHUNK = 500  # examples evaluated at once


@partial(jax.jit, static_argnames=("workload", "tx", "kind"), donate_argnames=("params", "state"))
def train_step(
    workload: Workload, tx: Any, kind: Kind, params: Any, state: Any, batch: Batch, rate: Any
) -> tuple[Any, Any]:
    """One step; a refit inside it shares the forward pass with the gradient."""
    objective = workload.objective
    grads = jax.grad(objective)(params, batch)
    keywords: dict[str, Any] = dict(kind)
    if keywords["refresh"]:
        keywords["objective"] = objective.bind(batch)
    updates, state = tx.update(grads, state, params, **keywords)
    return jax.tree.map(lambda p, u: p + rate * u, params, updates), state


@partial(jax.jit, static_argnames=("workload", "tx"))
def _refit(workload: Workload, tx: Any, state: Any, params: Any, batch: Batch) -> Any:
    return llqr.refresh(tx, state, params, workload.objective.bind(batch))


def _refit_outside(workload: Workload, tx: Any, state: Any, params: Any, batch: Batch) -> Any:
    """One refit from outside; not compiled as a whole where it has convolutions (slow on CPU)."""
    if any(x.ndim > 2 for x in jax.tree.leaves(params)):
        return llqr.refresh(tx, state, params, workload.objective.bind(batch))
    return _refit(workload, tx, state, params, batch)


@partial(jax.jit, static_argnames="workload")
def _loss(workload: Workload, params: Any, batch: Batch) -> Any:
    return workload.objective(params, batch)


def evaluate(workload: Workload, params: Any, examples: Batch) -> float:
    """Mean loss over examples."""
    total, count = 0.0, len(examples["label"])
    for start in range(0, count, _CHUNK):
        part = {name: x[start : start + _CHUNK] for name, x in examples.items()}
        total += float(_loss(workload, params, part)) * len(part["label"])
    return total / count


def multiplier(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then linear decay to 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def start(workload: Workload, tx: Any, seed: int) -> tuple[Any, Any]:
    """Initial parameters and state, each array with a buffer of its own."""
    params = workload.initial(seed)
    return jax.tree.map(jnp.copy, (params, tx.init(params)))


def run(
    workload: Workload,
    method: Method,
    tx: Any,
    rate: float,
    seed: int,
    steps: int,
    points: int = POINTS,
) -> list[dict[str, Any]]:
    """Train once; return what was recorded at each point. A run that diverged ends early."""
    params, state = start(workload, tx, seed)
    outside, stream = method.outside, workload.batches(seed)
    refits = workload.batches(seed + 10_000, outside.batch if outside else None)
    recorded, seconds, work = [], 0.0, 0.0
    marks = [round(steps * (i + 1) / points) for i in range(points)]
    for begin, end in zip([0, *marks], marks, strict=False):
        clock = time.perf_counter()
        for step in range(begin, end):
            if outside and step % outside.every == 0:
                state = _refit_outside(workload, tx, state, params, next(refits))
                work += outside.products * outside.batch / workload.batch
            kind, now = method.kinds(step), np.float32(rate * multiplier(step, steps))
            params, state = train_step(workload, tx, kind, params, state, next(stream), now)
            work += method.work(kind)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - clock
        recorded.append(
            {
                "step": end,
                "loss": evaluate(workload, params, workload.fixed),
                "test": evaluate(workload, params, workload.test),
                "gradients": work,
                "seconds": seconds,
            }
        )
        if not np.isfinite(recorded[-1]["loss"]):
            break
    return recorded


def costs(workload: Workload, method: Method, tx: Any, steps: int) -> dict[str, float]:
    """Compile everything; time each kind of step against a step of SGD, alternating.

    Returns:
      "plain" and "step": median milliseconds of SGD's step and of the method's cheapest kind;
      "refit", of its dearest kind, and "outside", of a refit between steps, if there are any;
      "ratio": the mean over a run, refits included, by that of SGD.
    """
    batch, rate = next(workload.batches(0)), np.float32(0)
    plain = optax.with_extra_args_support(optax.sgd(1.0))
    kinds = [method.kinds(step) for step in range(steps)]
    found: dict[Any, list[float]] = {}
    runners: dict[tuple[str, Kind], Any] = {("sgd", PLAIN): start(workload, plain, 0)}
    runners |= {("method", kind): start(workload, tx, 0) for kind in sorted(set(kinds))}
    for repeat in range(6):
        for (who, kind), (params, state) in runners.items():
            chosen = plain if who == "sgd" else tx
            clock = time.perf_counter()
            for _ in range(5):
                params, state = train_step(workload, chosen, kind, params, state, batch, rate)
            jax.block_until_ready(params)
            runners[who, kind] = params, state
            if repeat:  # the first compiles
                found.setdefault((who, kind), []).append((time.perf_counter() - clock) * 200)
    middle = {key: statistics.median(values) for key, values in found.items()}
    times = sorted(value for (who, _), value in middle.items() if who == "method")
    mean = sum(middle["method", kind] for kind in kinds) / steps
    result = {"plain": middle["sgd", PLAIN], "step": times[0]}
    if len(times) > 1:
        result["refit"] = times[-1]
    if method.outside:
        params, state = start(workload, tx, 0)
        examples = next(workload.batches(0, method.outside.batch))
        for _ in range(2):  # the first compiles
            clock = time.perf_counter()
            jax.block_until_ready(_refit_outside(workload, tx, state, params, examples))
            result["outside"] = 1000 * (time.perf_counter() - clock)
        mean += result["outside"] / method.outside.every
    return {**result, "ratio": mean / result["plain"]}
