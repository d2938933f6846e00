"""A method: how its engine is made, and what of it is tuned."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.suite.engine import Engine
from benchmarks.suite.workloads.problem import Workload


@dataclass(frozen=True, eq=False)
class Method:
    """An optimizer with a declared search space.

    Attributes:
      name: how it is called in tables and asked for.
      build: (workload, **options) -> its engine.
      rate: the customary learning rate, in the middle of the grid; None: it has none. A method
        that finds its rate by itself has another number here.
      options: of `build`, where nothing else is tuned.
      alternatives: other values of one of them, tried in the tier "full".
      second_order: whether it uses curvature.
      ours: whether it is LLQR; targets are fixed without it.
      released: for ours, the options that a release has by default, as it is run on the test set;
        None: it is not run there. See `benchmarks.suite.release`.
      decays: whether the rate falls to 0 after the warm-up.
      warms: whether there is a warm-up.
      share: of the workload's steps that it makes, where a step costs many gradients.
      applies: whether a workload suits it.
      package: what must be installed.
    """

    name: str
    build: Callable[..., Engine]
    rate: float | None
    options: dict[str, Any] = field(default_factory=dict)
    alternatives: tuple[dict[str, Any], ...] = ()
    second_order: bool = False
    ours: bool = False
    released: dict[str, Any] | None = None
    decays: bool = True
    warms: bool = True
    share: float = 1.0
    applies: Callable[[Workload], bool] = lambda workload: True
    package: str = ""

    def steps(self, workload: Workload) -> int:
        """Return how many steps it makes."""
        return max(1, round(self.share * workload.steps))

    def engine(self, workload: Workload, alternative: int | None = None) -> Engine:
        """Return its engine, with one of its alternatives."""
        return self.build(workload, **self.chosen(alternative))

    def chosen(self, alternative: int | None) -> dict[str, Any]:
        """Return its options, with one of its alternatives."""
        return self.options | ({} if alternative is None else self.alternatives[alternative])
