"""What is solved: workloads in float64 whose test loss is the relative error of the solution."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.suite.workloads import physics
from benchmarks.suite.workloads.problem import Workload

FEW = ("exact", "exact cg", "LLQR streaming", "SOAP", "AdamW")
"""Methods for points that are others in every step: the rest need a loss that stays the same."""


@dataclass(frozen=True)
class Problem:
    """A workload with its budget.

    Attributes:
      name: what it is asked for by.
      make: the workload.
      seconds: of a trial, by every method but the exact steps, which make `steps`.
      steps: exact steps.
      methods: names of those that suit it; None: all.
    """

    name: str
    make: Callable[[], Workload]
    seconds: float
    steps: int = 200
    methods: tuple[str, ...] | None = None


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("poisson", physics.poisson, 4.0),
        Problem("burgers", physics.burgers, 6.0),
    )
}
