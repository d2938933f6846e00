"""An optimizer at work on a workload, as the loop sees it.

A carry holds parameters and state. `step(carry, batch, rate)` is compiled once for each kind of
step; rates are those of the schedule. What is counted is gradient evaluations of a training batch:
a probe, a curvature product, the second pass of SAM and each call of a line search is one, or as
much of one as it sees of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import optax

from .workloads.problem import Batch, Workload

PLAIN = "plain"
REFIT = "refit"


@dataclass(frozen=True)
class Outside:
    """A refit that is no part of a step, on a batch of its own.

    Attributes:
      every: steps from one to the next, the first before step 0.
      batch: examples.
      work: gradient evaluations of such a batch.
      refit: (carry, batch) -> carry.
    """

    every: int
    batch: int
    work: float
    refit: Callable[[Any, Batch], Any]


@dataclass(frozen=True, eq=False)
class Engine:
    """How one method trains one workload.

    Attributes:
      start: (parameters, batch, key) -> carry.
      step: kind -> a function (carry, batch, rate) -> carry that can be compiled.
      parameters: carry -> parameters to evaluate.
      kind: step -> its kind.
      work: kind -> gradient evaluations of such a step.
      counted: carry -> those of its last step, where only the step itself knows.
      outside: refits between steps, if there are any.
    """

    start: Callable[[Any, Batch, Any], Any]
    step: Callable[[str], Callable[[Any, Batch, Any], Any]]
    parameters: Callable[[Any], Any]
    kind: Callable[[int], str] = lambda step: PLAIN
    work: Callable[[str], float] = lambda kind: 1.0
    counted: Callable[[Any], Any] | None = None
    outside: Outside | None = None


def optax_engine(
    workload: Workload,
    make: Callable[[Any], optax.GradientTransformation],
    *,
    keywords: Callable[[str, Any, Batch], dict[str, Any]] | None = None,
    evaluated: Callable[[Any, Any], Any] | None = None,
    counted: Callable[[Any], Any] | None = None,
    **others: Any,
) -> Engine:
    """Return the engine of an optax optimizer.

    Args:
      workload: what it trains.
      make: rate -> the optimizer; the rate, an array, is the scheduled one of a step.
      keywords: (kind, parameters, batch) -> what `update` takes besides.
      evaluated: (state, parameters) -> parameters to evaluate, if not those of the steps.
      counted: state -> gradient evaluations of its last step.
      others: of `Engine`.
    """

    def start(params: Any, batch: Batch, key: Any) -> Any:
        del batch, key
        return params, make(1.0).init(params)

    def step(kind: str, carry: Any, batch: Batch, rate: Any) -> Any:
        params, state = carry
        tx = optax.with_extra_args_support(make(rate))
        grads = jax.grad(workload.objective)(params, batch)
        more = keywords(kind, params, batch) if keywords else {}
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    return Engine(
        start=start,
        step=lambda kind: partial(step, kind),
        parameters=lambda carry: evaluated(carry[1], carry[0]) if evaluated else carry[0],
        counted=(lambda carry: counted(carry[1])) if counted else None,
        **others,
    )
