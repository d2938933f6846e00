"""By what it is solved: the suite's methods, exact steps, and solvers of other libraries.

Solvers that are driven from outside are engines of the suite: those of optimistix by `solver.step`,
compiled once and called in a loop, without its test for convergence. SciPy's has a loop of its own,
whose callback notes the time and the parameters.
"""

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import llqr
from benchmarks.suite.engine import PLAIN, Engine, optax_engine
from benchmarks.suite.methods import METHODS as SUITE
from benchmarks.suite.methods.method import Method
from benchmarks.suite.workloads.problem import Batch, Workload, rows

FIRST = "first"
MOST_LM = 1000
"""Parameters for optimistix' least squares: with 1,185 a step takes 17 seconds."""
SHARE = 0.3
"""Of AdamW's steps, before L-BFGS."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A method as it is run here.

    Attributes:
      method: how its engine is made. One with a rate is tuned, and makes as many steps as fit into
        the seconds of the problem; one without goes on until they are over.
      exact: whether it makes the exact steps of the problem instead; if `patient`, as many as fit
        into its seconds.
      timed: whether its work is told in seconds of a gradient, because a step is more than that.
      patient: whether it has the problem's `patience`.
      alternatives: of the method, by number, that are tried beside its usual options.
      after: the method whose tuned rate and steps it begins with.
      course: (workload, seed, seconds) -> (seconds of compilation, its iterates), for a solver
        that has its own loop.
      most: parameters that it can hold a square matrix of.
    """

    method: Method
    exact: bool = False
    timed: bool = False
    patient: bool = False
    alternatives: tuple[int, ...] = ()
    after: str = ""
    course: "Callable[[Workload, int, float], tuple[float, list[Iterate]]] | None" = None
    most: float = math.inf

    @property
    def name(self) -> str:
        """What it is asked for by."""
        return self.method.name

    def suits(self, workload: Workload) -> bool:
        """Whether it is installed and can do it."""
        package = self.method.package
        here = not package or importlib.util.find_spec(package) is not None
        return here and self.method.applies(workload) and workload.size() <= self.most


@dataclass(frozen=True)
class Iterate:
    """What a solver with its own loop has told.

    Attributes:
      step: number of the step.
      seconds: since its start.
      params: parameters.
    """

    step: int
    seconds: float
    params: Any = field(repr=False)


# --- ours ---------------------------------------------------------------------------------------


def _exact(workload: Workload, solver: str) -> Engine:
    """Exact steps in a trust region; the gradient that the engine takes is not used.

    With momentum where points are others in every step.
    """
    momentum = 0.0 if workload.full_batch else 0.9
    if solver == "factor":
        solver = "dual" if rows(next(workload.batches(0))) <= workload.size() else "primal"
    tx: Any = llqr.exact(damping=llqr.Trust(momentum=momentum), solver=solver)  # type: ignore[arg-type]

    def keywords(kind: str, params: Any, batch: Batch) -> dict[str, Any]:
        return {"objective": workload.objective.bind(batch)}

    return optax_engine(workload, lambda rate: tx, keywords=keywords)


# --- quasi-Newton -------------------------------------------------------------------------------


def _hybrid(workload: Workload, switch: int, memory_size: int) -> Engine:
    """AdamW for a while, then L-BFGS."""
    one = SUITE["AdamW"].engine(workload)
    other = SUITE["L-BFGS"].build(workload, memory_size=memory_size)
    assert other.counted is not None
    counted = other.counted

    def start(params: Any, batch: Batch, key: Any) -> Any:
        first, second = (engine.start(params, batch, key) for engine in (one, other))
        return params, first[1], second[1]

    def step(kind: str) -> Callable[[Any, Batch, Any], Any]:
        def act(carry: Any, batch: Batch, rate: Any) -> Any:
            params, first, second = carry
            if kind == FIRST:
                params, first = one.step(PLAIN)((params, first), batch, rate)
            else:
                params, second = other.step(PLAIN)((params, second), batch, rate)
            return params, first, second

        return act

    def work(carry: Any) -> Any:
        begun = carry[2][0].count > 0
        return jnp.where(begun, counted((carry[0], carry[2])), 1)

    return Engine(
        start=start,
        step=step,
        parameters=lambda carry: carry[0],
        kind=lambda i: FIRST if i < switch else PLAIN,
        counted=work,
    )


def _residuals(workload: Workload) -> Callable[[Any], Any]:
    """Return r of the parameters, whose half square sum is the loss."""
    batch = workload.train
    return lambda p: (workload.forward(p, batch) - batch["label"]) / rows(batch) ** 0.5


def _stepped(workload: Workload, make: Callable[[], Any], squares: bool = False) -> Engine:
    """A solver of optimistix, by its steps."""
    import equinox as eqx  # with optimistix, which not everyone has

    solver, batch, none = make(), workload.train, frozenset()
    options = {"jac": "bwd" if rows(batch) < workload.size() else "fwd"} if squares else {}
    _, unravel = ravel_pytree(workload.initial(0))

    def of(flat: Any, args: Any) -> tuple[Any, None]:
        params = unravel(flat)
        return (_residuals(workload) if squares else loss)(params), None

    def loss(params: Any) -> Any:
        return workload.objective(params, batch)

    def begin(params: Any) -> tuple[Any, Any, Any]:
        flat = ravel_pytree(params)[0]
        shape = jax.eval_shape(lambda y: of(y, None)[0], flat)
        state = solver.init(of, flat, None, options, shape, None, none)
        return flat, *eqx.partition(state, eqx.is_array)

    static = begin(workload.initial(0))[2]

    def step(carry: Any, batch: Batch, rate: Any) -> Any:
        del batch, rate
        state = eqx.combine(carry[1], static)
        flat, state, _ = solver.step(of, carry[0], None, options, state, none)
        return flat, eqx.partition(state, eqx.is_array)[0]

    return Engine(
        start=lambda params, batch, key: begin(params)[:2],
        step=lambda kind: step,
        parameters=lambda carry: unravel(carry[0]),
    )


def _optimistix(workload: Workload, solver: str) -> Engine:
    import optimistix

    squares = solver == "LevenbergMarquardt"
    return _stepped(workload, lambda: getattr(optimistix, solver)(rtol=0.0, atol=0.0), squares)


def _broyden(workload: Workload) -> Engine:
    package = importlib.import_module("ssbroyden_optimistix")
    return _stepped(workload, lambda: package.SSBroyden(rtol=0.0, atol=0.0))


# --- SciPy --------------------------------------------------------------------------------------


def _trf(workload: Workload, seed: int, seconds: float) -> tuple[float, list[Iterate]]:
    """SciPy's least squares; its Jacobian has the gradient of each row, as ours."""
    import scipy.optimize

    least_squares: Any = scipy.optimize.least_squares
    flat, unravel = ravel_pytree(workload.initial(seed))
    batch, found = workload.train, _residuals(workload)

    def row(x: Any, one: Batch) -> Any:
        single = {name: value[None] for name, value in one.items()}
        return workload.forward(unravel(x), single)[0] / rows(batch) ** 0.5

    many = jax.vmap(jax.grad(row), (None, 0))
    clock = time.perf_counter()
    r = jax.jit(lambda x: found(unravel(x))).lower(flat).compile()
    jacobian = jax.jit(lambda x: many(x, jax.tree.map(jnp.asarray, batch))).lower(flat).compile()
    compilation = time.perf_counter() - clock
    seen: list[Iterate] = []

    def told(intermediate_result: Any) -> None:
        passed = time.perf_counter() - clock
        seen.append(Iterate(len(seen) + 1, passed, unravel(intermediate_result.x.copy())))
        if passed > seconds:
            raise StopIteration

    clock = time.perf_counter()
    least_squares(
        lambda x: np.asarray(r(x)), np.asarray(flat), jac=lambda x: np.asarray(jacobian(x)),
        method="trf", ftol=1e-15, xtol=1e-15, gtol=1e-15, callback=told,
    )  # fmt: skip
    return compilation, seen


def _none(workload: Workload, **_: Any) -> Engine:
    raise AssertionError("it has its own loop")


def _full(workload: Workload) -> bool:
    return workload.full_batch


def _own(name: str, build: Callable[..., Engine], package: str = "", **options: Any) -> Method:
    return Method(name, build, None, options, applies=_full, package=package)


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(Method("exact", _exact, None, {"solver": "factor"}), exact=True, timed=True,
              most=20_000),
        Entry(Method("exact cg", _exact, None, {"solver": "cg"}), exact=True, timed=True,
              patient=True),
        Entry(SUITE["LLQR streaming"]),
        Entry(SUITE["SOAP"]),
        Entry(SUITE["Muon"]),
        Entry(SUITE["AdamW"]),
        Entry(SUITE["L-BFGS"], alternatives=(2,)),
        Entry(_own("AdamW then L-BFGS", _hybrid), after="AdamW"),
        Entry(_own("optimistix BFGS", _optimistix, "optimistix", solver="BFGS"), most=5000),
        Entry(_own("SSBroyden", _broyden, "ssbroyden_optimistix"), most=5000),
        Entry(_own("optimistix LM", _optimistix, "optimistix", solver="LevenbergMarquardt"),
              timed=True, patient=True, most=MOST_LM),
        Entry(_own("SciPy trf", _none, "scipy"), timed=True, patient=True, course=_trf,
              most=5000),
    )
}  # fmt: skip
"""In the order of tables. L-BFGS is tried with a memory of 10 and, its third alternative, of 50."""
