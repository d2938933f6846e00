"""What is solved: workloads in float64 whose test loss is the relative error of the solution.

Two are the suite's. The others are equations of the runner (`llqr_experiments.data.problems`) with
a plain network: a row asks for a sum of terms, `operator` has their coefficients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.suite.workloads import networks, physics
from benchmarks.suite.workloads.problem import Batch, Workload, rows, squared_error
from llqr_experiments.data import equations, problems

FRESH = ("exact", "exact cg", "LLQR streaming", "SOAP", "AdamW")
"""Methods for points that are others in every step: the rest need a loss that stays the same."""

MANY = (*FRESH, "L-BFGS", "AdamW then L-BFGS", "SSBroyden")
"""Methods for many rows: least squares of other libraries make only a few steps there."""


@dataclass(frozen=True)
class Problem:
    """A workload with its budget.

    Attributes:
      name: what it is asked for by.
      make: the workload.
      seconds: of a trial: what `steps` exact steps take on one core, or more.
      steps: exact steps at most; with a factorisation all of them are made.
      tuning: share of the seconds in which rates are tuned.
      patience: seconds of least squares whose steps are slow, by `seconds`.
      methods: names of those that suit it; None: all.
    """

    name: str
    make: Callable[[], Workload]
    seconds: float
    steps: int = 100
    tuning: float = 0.25
    patience: float = 1.0
    methods: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Fresh(Workload):
    """A workload whose points are others in every step; `train` has some of them.

    Attributes:
      source: of its rows.
    """

    source: equations.FreshRows | None = None

    @property
    def full_batch(self) -> bool:
        """Never."""
        return False

    def batches(self, seed: int, size: int | None = None) -> Iterator[Batch]:
        """Batches without end, each of points of its own."""
        assert self.source is not None
        rng, index = np.random.default_rng(seed), np.arange(size or len(self.source))
        while True:
            yield self.source.draw(index, rng)


def _forward(params: Any, batch: Batch, *, terms: Any) -> Any:
    """Return the sum of terms that each row asks for."""
    value, first, second = networks.jets(params, batch["x"])
    found = [value[:, None], first, second]
    if terms is not None:
        found.append(terms(value[:, None], first[:, None], second[:, None]))
    return jnp.sum(batch["operator"] * jnp.concatenate(found, -1), -1)


def of_rows(
    name: str, equation: equations.Equation, train: equations.Rows, hidden: tuple[int, ...]
) -> Workload:
    """Return the workload of an equation of the runner, the rows being those of training."""
    widths = (len(equation.box), *hidden, 1)
    test, given = equations.solution_rows(equation), train.gather(np.arange(len(train)))
    more: dict[str, Any] = {"source": train} if isinstance(train, equations.FreshRows) else {}
    return (Fresh if more else Workload)(
        name,
        partial(networks.perceptron_parameters, widths=widths),
        partial(_forward, terms=equation.terms),
        squared_error,
        train=given,
        fixed=given,
        test=test.gather(np.arange(len(test))),
        batch=rows(given),
        steps=1000,
        metric="gaussian",
        measure="test",
        test_loss=physics.solution_error,
        float64=True,
        told=f"{equation.told}, tanh {'-'.join(map(str, widths))}, float64",
        **more,
    )


def _grid(name: str, equation: equations.Equation, sides: Any, along: Any, hidden: Any) -> Workload:
    return of_rows(name, equation, equations.grid(equation, sides, along), hidden)


def _poisson_5d() -> Workload:
    """10,065 parameters, as in Dangel et al. (arXiv 2405.15603)."""
    train = equations.fresh(problems.POISSON_5D, 512, 128)
    return of_rows("poisson-5d", problems.POISSON_5D, train, (64, 64, 48, 48))


def _suite(name: str, make: Callable[[], Workload], seconds: float, steps: int) -> Problem:
    return Problem(name, make, seconds, steps, tuning=1.0, patience=2.0)


def _wave() -> Workload:
    return _grid("wave", problems.WAVE, (20, 20), (52,) * 4, (32,) * 3)


def _helmholtz() -> Workload:
    return _grid("helmholtz", problems.HELMHOLTZ, (28, 28), (28,) * 4, (24, 24))


def _poisson_runner() -> Workload:
    """As `experiment=pinn-poisson`."""
    return _grid("poisson-runner", problems.POISSON, (32, 32), (32,) * 4, (32, 32))


def _burgers_dense() -> Workload:
    """The suite's with four times the points in each direction."""
    return _grid("burgers-dense", problems.BURGERS, (96, 64), (192, 64, 64), (24, 24))


PROBLEMS = {
    problem.name: problem
    for problem in (
        _suite("poisson", physics.poisson, 3.5, 200),
        _suite("burgers", physics.burgers, 4.0, 100),
        Problem("wave", _wave, 10.0, 200),
        Problem("helmholtz", _helmholtz, 8.0),
        Problem("poisson-runner", _poisson_runner, 12.0, 100),
        Problem("burgers-dense", _burgers_dense, 15.0, 100, methods=MANY),
        Problem("poisson-5d", _poisson_5d, 25.0, 60, methods=FRESH),
    )
}
"""To add one, add it here."""
