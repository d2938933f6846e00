"""What goes around any method: averages of its iterates, and a look-ahead from them.

Each takes a `build` of `Method` and returns one with options of its own beside the old ones, so
that they nest: `averaged(ema_nesterov(build))`. A carry begins with the parameters that the
gradient is taken at; of those that a method evaluates, `Engine.parameters` knows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.suite.engine import Engine
from benchmarks.suite.workloads.problem import Batch, Workload

Build = Callable[..., Engine]


def averaged(build: Build) -> Build:
    """Average the end: from the last `share` of the steps on, their plain mean is evaluated.

    Tail averaging of stochastic gradient descent, Jain et al., arXiv 1610.03774, with the decaying
    rate kept. The mean is of the parameters that the method itself would have evaluated. The method
    makes as many steps as the workload has (`Method.share` is 1).
    """

    def made(workload: Workload, *, share: float = 0.2, **options: Any) -> Engine:
        inner = build(workload, **options)
        before = workload.steps - max(1, round(share * workload.steps))

        def start(params: Any, batch: Batch, key: Any) -> Any:
            carry = inner.start(params, batch, key)
            mean = jax.tree.map(jnp.copy, inner.parameters(carry))
            return carry[0], carry[1:], mean, jnp.zeros(())  # a count, as precise as parameters

        def step(kind: str, carry: Any, batch: Batch, rate: Any) -> Any:
            params, rest, mean, count = carry
            after, count = inner.step(kind)((params, *rest), batch, rate), count + 1
            weight = 1 / jnp.maximum(count - before, 1)
            mean = _towards(mean, inner.parameters(after), weight)
            return after[0], after[1:], mean, count

        return _around(inner, start, step, lambda carry: carry[2])

    return made


def ema_nesterov(build: Build) -> Build:
    """Take the gradient ahead of the iterates, away from their exponential moving average.

    Nesterov's look-ahead, y = z + a (z - z before), with an average e in the place of the iterate
    before. For the method's own step u from y, in the words of its last link,

      z <- z + u(y),   e <- decay e + (1 - decay) z,   y <- z + ahead (z - e),

    and z is evaluated; decay = 0 is the method itself. At a constant speed v the look-ahead is
    `ahead` decay / (1 - decay) steps: nine with the usual options.

    Named after EMA-Nesterov, arXiv 2605.25395, of which we have no text: this form, that the method
    steps from y and that z is evaluated are assumptions.
    """

    def made(
        workload: Workload, *, decay: float = 0.9, ahead: float = 1.0, **options: Any
    ) -> Engine:
        inner = build(workload, **options)

        def start(params: Any, batch: Batch, key: Any) -> Any:
            carry = inner.start(params, batch, key)
            z, e = (jax.tree.map(jnp.copy, carry[0]) for _ in range(2))
            return carry[0], carry[1:], z, e

        def step(kind: str, carry: Any, batch: Batch, rate: Any) -> Any:
            y, rest, z, e = carry
            after = inner.step(kind)((y, *rest), batch, rate)
            z = jax.tree.map(lambda z, new, old: z + (new - old), z, after[0], y)
            e = _towards(e, z, 1 - decay)
            return _towards(z, e, -ahead), after[1:], z, e

        return _around(inner, start, step, lambda carry: carry[2])

    return made


def _towards(x: Any, y: Any, share: Any) -> Any:
    """Return x + share (y - x), y itself for a share of 1."""
    return jax.tree.map(lambda a, b: b - jnp.asarray(1 - share, a.dtype) * (b - a), x, y)


def _around(inner: Engine, start: Any, step: Any, parameters: Any) -> Engine:
    """The engine with a carry of (parameters, rest of its own carry, ...)."""
    counted, outside = inner.counted, inner.outside
    if outside is not None:
        raise ValueError("a method with refits from outside cannot be wrapped.")
    return replace(
        inner,
        start=start,
        step=lambda kind: lambda *arguments: step(kind, *arguments),
        parameters=parameters,
        counted=None if counted is None else lambda carry: counted((carry[0], *carry[1])),
    )
