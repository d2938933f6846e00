r"""The inner problem: learn P by minimising the quadratic model of the step that it gives.

  symbol     meaning                                              shape
  P          structured inverse preconditioner, sigma included    params x params
  h          direction that P is learned on                       like params
  l          linear term of the objective                         like params
  C          curvature of the metric                              params x params
  d          EMA decay                                            []

    minimise over P's arrays   Phi(P) = l.u + 1/2 u.(C + lambda I) u,   u = P h

by a fixed number of steps of an inner solver (`solvers`). The published method (Layerwise
LQR, arXiv 2605.04230) has l = g and one fixed direction, h = -g or -g / |g|: Phi is then
the quadratic model of the step itself. A probe has l = -h, with h drawn afresh at every
inner step; from N(0, I), the minimiser over all matrices of the mean of Phi is
(C + lambda I)^-1, and over a structure its best approximation seen from every direction.

Then, in this order: EMA with the old arrays, projection, guards. A block keeps its old
arrays if the new ones are not finite or turn its share of h.Ph non-positive, and every
block does if Phi did not decrease.

The inner loop is one compiled step driven from Python on CPU, where XLA runs convolution
gradients inside a compiled loop 30 to 50 times slower than outside it, and a compiled loop
on other devices and inside a caller's trace. Both run the same step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from llqr import metrics, quadratic, solvers
from llqr._errors import check_choice, check_integer, check_range
from llqr._tree import Frozen, all_finite, cosine, is_traced, norm, normal_like, vdot
from llqr._types import Array, Bool, Float, Int, Number, Params, PyTree, Schedule
from llqr.metrics import Reduction
from llqr.objective import BoundObjective
from llqr.quadratic import QuadraticModel, Route
from llqr.solvers import SOLVERS, SolverLike
from llqr.structures import matrix as mx
from llqr.structures import plan as plans
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan

Probe: TypeAlias = Literal["gradient", "minibatch", "gaussian", "fisher"]

Blocks: TypeAlias = tuple[Arrays, ...]
"""The arrays of every block of a plan."""

WHOLE = Route()
SUBSET = 0.25
"""Share of the refit batch's rows in one minibatch probe."""
FISHER_FLOOR = 0.1
"""Share of the damping in the covariance of a fisher probe."""
EVALUATION_PROBES = 4
"""Random directions on which a refit is judged: the same before and after it."""

STATUS = ("none", "updated", "kept", "nonfinite", "inverted", "rejected")
"""What a refit did to a block, by the number in `RefitInfo.status`: not refitted yet; new arrays
installed; nothing changed; or old arrays kept by a guard: new ones were not finite, turned
the direction, or the objective did not decrease."""


@dataclass(frozen=True, kw_only=True)
class Refit:
    """When and how the preconditioner is learned. Defaults are the papers'.

    Args:
      every: a refit is due when (count - start) is a multiple of this number of update
        calls; an int >= 1, or a schedule count -> int.
      start: no refit before this count.
      until: no refit at or after this count; None: never stops.
      steps: inner steps of one refit, a Python int; the most, with a tolerance.
      tolerance: stop when an inner step changes the objective by less than this share of it;
        0: never.
      learning_rate: of the inner solver; a number > 0, or a schedule of the count.
      anneal: let the learning rate fall linearly to zero over the refit, which averages out
        the noise of random directions.
      solver: a name of `llqr.solvers.SOLVERS`, or any optax transformation that needs nothing
        but gradients and parameters: it sees the clipped gradient, and its updates are added
        as they are (learning_rate and momentum do not enter).
      momentum: of the solver "momentum".
      clip_norm: largest L2 norm of the gradient of each stored array; None: no clipping.
      clip_value: largest absolute entry of that gradient; None: no clipping.
      warm_start: start from the current arrays; False: from the identity, and the guard then
        asks whether the objective fell below the identity's. Structures with a memory always
        start from it.
      ema_decay: d in [0, 1]; arrays become d old + (1 - d) new. A number or a schedule.
        Memories are left out.
      normalize_gradient: use h = -g / |g|.
      allow_grad_inversion: allow P to turn the sign of gradients: entries of elementwise
        blocks are not clamped to >= 1e-8 and blocks with h.Ph <= 0 are not guarded.
      probe: directions h. "gradient": the refit batch's own, the published method;
        "minibatch": the gradient of a quarter of its rows; "gaussian": N(0, I); "fisher": the
        gradient for labels drawn from the model, with covariance C (and a tenth of the damping
        on top, so that directions in which the batch has no curvature stay where they are).
      probes: how many directions at once; 1 with "gradient".
      fresh_batches: a batch of its own for every inner step: the objective's batch then has
        one more axis in front, of length `steps`.
      per_example: the mean of one problem for each example, with that example's gradient
        and curvature, in place of one problem for the batch. It holds several copies of the
        parameters for each example.
      seed: of probes and of the fresh vectors of structures with a memory; the number of the
        refit and the inner step are folded into it.

    Raises:
      ValueError: a value outside its range, or options that exclude each other.
      TypeError: a value of a wrong type.
    """

    every: int | Schedule = 1000
    start: int = 0
    until: int | None = None
    steps: int = 50
    tolerance: float = 0.0
    learning_rate: float | Schedule = 1e-3
    anneal: bool = False
    solver: SolverLike = "momentum"
    momentum: float = 0.9
    clip_norm: float | None = 5.0
    clip_value: float | None = None
    warm_start: bool = True
    ema_decay: float | Schedule = 0.0
    normalize_gradient: bool = False
    allow_grad_inversion: bool = False
    probe: Probe = "gradient"
    probes: int = 1
    fresh_batches: bool = False
    per_example: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("Refit: steps", self.steps, low=1)
        check_integer("Refit: probes", self.probes, low=1)
        check_integer("Refit: start", self.start, low=0)
        check_integer("Refit: until", self.until, low=0)
        check_integer("Refit: seed", self.seed, low=0)
        if not isinstance(self.solver, optax.GradientTransformation):
            check_choice("solver", self.solver, SOLVERS)
        check_choice("probe", self.probe, get_args(Probe))
        for name in ("every", "learning_rate", "ema_decay", "clip_norm", "momentum", "tolerance"):
            if isinstance(getattr(self, name), jax.Array):
                raise TypeError(
                    f"Refit: {name} must be a Python number, or a schedule where it may change "
                    "(options are static), not an array."
                )
        if not callable(self.every):
            check_integer("Refit: every", self.every, low=1)
        check_range("Refit: learning_rate", self.learning_rate, low=0, open_low=True)
        check_range("Refit: tolerance", self.tolerance, low=0)
        check_range("Refit: momentum", self.momentum, low=0, high=1)
        check_range("Refit: clip_norm", self.clip_norm, low=0, open_low=True)
        check_range("Refit: clip_value", self.clip_value, low=0, open_low=True)
        check_range("Refit: ema_decay", self.ema_decay, low=0, high=1)
        why = None
        if self.probe == "gradient" and self.probes != 1:
            why = f"probe='gradient' is one fixed direction: probes must be 1, not {self.probes}"
        elif self.per_example and self.probe != "gradient":
            why = f"per_example learns on each example's gradient, not on probe={self.probe!r}"
        elif self.normalize_gradient and self.probe != "gradient":
            why = f"normalize_gradient has no effect with probe={self.probe!r}"
        elif self.tolerance and (self.fresh_batches or self._random):
            why = "fresh batches and probes change the objective at every step: tolerance must be 0"
        elif self.anneal and self.solver in solvers.DETERMINISTIC:
            why = f"solver={self.solver!r} finds its own lengths: anneal has no effect"
        elif self.fresh_batches and self.solver in solvers.DETERMINISTIC:
            why = f"solver={self.solver!r} needs one objective for all steps: no fresh_batches"
        elif self.until is not None and self.until < self.start:
            why = f"until={self.until} lies before start={self.start}"
        if why:
            raise ValueError(f"Refit: {why}.")

    @property
    def _random(self) -> bool:
        return self.probe != "gradient" and self.solver not in solvers.DETERMINISTIC

    @property
    def batched(self) -> bool:
        """Whether there are several directions at once, on a leading axis."""
        return self.per_example or self.probe != "gradient"

    def is_due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Return whether a refit is due before update call number `count`, counted from 0."""
        every = self.every
        if callable(every):  # a schedule gives floats
            every = jnp.maximum(jnp.round(every(count)), 1).astype(count.dtype)
        offset = count - self.start
        due = (offset >= 0) & (offset % every == 0)
        return due if self.until is None else due & (count < self.until)


class RefitInfo(NamedTuple):
    """What the last refit did; zeros and NaN before the first."""

    refits: Int[Array, ""]  # how many so far
    steps: Int[Array, ""]  # inner steps of the last one
    objective_before: Float[Array, ""]  # Phi at the start of the refit
    objective_after: Float[Array, ""]  # Phi of what the refit proposes to install
    cosine: Float[Array, ""]  # of P h and h, for what was installed
    status: Int[Array, " blocks"]  # what was done to each block: index into `STATUS`
    cosines: Float[Array, " blocks"]  # of P h and h in each block; 0 where h or P h is zero

    def count(self, *words: str) -> Int[Array, ""]:
        """Return how many blocks have one of these words of `STATUS`."""
        found = [jnp.sum(self.status == STATUS.index(w), dtype=jnp.int32) for w in words]
        return sum(found, start=jnp.zeros((), jnp.int32))

    @property
    def guarded(self) -> Int[Array, ""]:
        """Blocks that kept their old arrays in the last refit because of a guard."""
        return self.count("nonfinite", "inverted", "rejected")


def no_refit(blocks: int) -> RefitInfo:
    """Return the record before the first refit, for a number of blocks."""
    # An array of its own for each field: a state that repeats a buffer cannot be donated.
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    nan = lambda *shape: jnp.full(shape, jnp.nan, jnp.float32)  # noqa: E731
    status = jnp.zeros((blocks,), jnp.int32)
    return RefitInfo(zero(), zero(), nan(), nan(), nan(), status, nan(blocks))


class Hyper(NamedTuple):
    """The numbers of one refit that may change between refits without a recompilation."""

    learning_rate: Number
    ema_decay: Number
    damping: Number


def hyper_at(refit: Refit, count: Int[Array, ""], damping: Number) -> Hyper:
    """Return the numbers of a refit at `count`."""

    def at(value: Any) -> Any:
        return value(count) if callable(value) else value

    return Hyper(at(refit.learning_rate), at(refit.ema_decay), damping)


@dataclass(frozen=True)
class Problem:
    """What stays the same over all refits of a run: static and hashable.

    Args:
      plan: the blocks.
      metric: a resolved metric, or a tree of them, flattened by `freeze`.
      reduction: over rows.
      scale: sigma at which blocks are initialised.
      refit: the refit's options.
      route: how curvature products are computed.
      base: optimizer whose update P multiplies; None: P multiplies the gradient.
    """

    plan: Plan
    metric: Frozen
    reduction: Reduction
    scale: float
    refit: Refit
    route: Route = WHOLE
    base: optax.GradientTransformation | None = None

    @property
    def solver(self) -> solvers.Solver:
        """The inner solver."""
        refit = self.refit
        return solvers.make(
            refit.solver,
            momentum=refit.momentum,
            clip_norm=refit.clip_norm,
            clip_value=refit.clip_value,
        )

    @property
    def has_memory(self) -> bool:
        """Whether a block has a memory."""
        return any(block.structure.has_memory for block in self.plan)

    @property
    def compiled(self) -> bool:
        """Whether a refit must be one compiled function on every device.

        The pieces of the reference route cannot cross `jit`, and a line search has a loop
        of its own, which chunks that are looped over in Python cannot be inside of.
        """
        searches = self.refit.solver in solvers.LINE_SEARCHES
        return self.route.layerwise or (searches and self.route.chunk_size is not None)

    def check(self) -> None:
        """Raise ValueError if the options exclude each other."""
        curved = [b.structure.name for b in self.plan if not b.structure.linear]
        if self.refit.solver == "cg" and curved:
            raise ValueError(
                "solver='cg' needs structures that are linear in their arrays (scalar, "
                f"diagonal, dense), but there is {curved[0]!r}; 'cg_zoom_hz' takes any."
            )


def check_options(refit: Refit, metric: PyTree, reduction: Reduction, route: Route) -> None:
    """Raise ValueError if options of a refit exclude each other."""
    why = None
    if refit.probe == "fisher" and not metrics.can_sample(metric):
        why = (
            "probe='fisher' needs a metric from which labels can be drawn: ngd, reverse_kl, "
            "renyi or gaussian"
        )
    elif refit.per_example and route.chunk_size is not None:
        why = "per_example splits the batch already: chunk_size must be None"
    elif refit.per_example and reduction == "unit":
        why = (
            "per_example has one curvature for each example: divergence_reduction='unit' needs "
            "that of the batch"
        )
    if why:
        raise ValueError(f"{why}.")


class _Inner(NamedTuple):
    """What stays the same over the inner steps of one refit."""

    blocks: Blocks  # from which it starts
    hyper: Hyper
    key: Array
    model: QuadraticModel  # with fresh batches, on the first one
    source: tuple[Params, BoundObjective, Any]  # for fresh batches; and the base's state


class _Carry(NamedTuple):
    """What an inner step changes."""

    learned: Blocks
    solver: Any
    step: Int[Array, ""]
    first: Float[Array, ""]  # Phi at the start of the refit
    value: Float[Array, ""]  # Phi at the start of the last step
    done: Bool[Array, ""]


def learn(
    problem: Problem,
    blocks: Blocks,
    info: RefitInfo,
    params: Params,
    objective: BoundObjective,
    hyper: Hyper,
    base_state: Any = (),
) -> tuple[Blocks, RefitInfo]:
    """Run one refit.

    Args:
      problem: static description.
      blocks: the current arrays.
      info: the record so far.
      params: the current parameters.
      objective: the curvature objective on the refit batch.
      hyper: learning rate, decay, damping.
      base_state: state of `problem.base`.

    Returns:
      The arrays to install and the new record. Never anything that is not finite, unless
      the old arrays were not.
    """
    if problem.refit.fresh_batches:
        _check_stacked(objective, problem.refit.steps)
    if is_traced(params) or _platform(params) != "cpu" or problem.compiled:
        return _learn_compiled(problem, blocks, info, params, objective, hyper, base_state)
    # Chunks are looped over in Python too: their step is not one compiled function.
    driver = _Eager(compile_step=problem.route.chunk_size is None)
    return _learn(problem, blocks, info, params, objective, hyper, base_state, driver)


@partial(jax.jit, static_argnames="problem")
def _learn_compiled(
    problem: Problem, blocks: Blocks, info: RefitInfo, params: Params,
    objective: BoundObjective, hyper: Hyper, base_state: Any,
) -> tuple[Blocks, RefitInfo]:  # fmt: skip
    return _learn(problem, blocks, info, params, objective, hyper, base_state, _Compiled())


@dataclass(frozen=True)
class _Eager:
    """Drive compiled pieces from Python."""

    compile_step: bool

    def run(self, function: Any, *arguments: Any) -> Any:
        return _jitted(function, *arguments) if self.compile_step else function(*arguments)

    def loop(self, function: Any, problem: Problem, carry: Any, inner: Any, steps: int) -> Any:
        for _ in range(steps):
            carry = self.run(function, problem, carry, inner)
            # The one place where the host waits for the device, and only when asked to.
            if problem.refit.tolerance and isinstance(carry, _Carry) and bool(carry.done):
                break
        return carry


@dataclass(frozen=True)
class _Compiled:
    """Everything is inside one trace already."""

    def run(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    def loop(self, function: Any, problem: Problem, carry: Any, inner: Any, steps: int) -> Any:
        if problem.refit.tolerance and isinstance(carry, _Carry):
            return jax.lax.while_loop(
                lambda carry: (carry.step < steps) & ~carry.done,
                lambda carry: function(problem, carry, inner),
                carry,
            )
        return jax.lax.scan(
            lambda carry, _: (function(problem, carry, inner), None), carry, length=steps
        )[0]


@partial(jax.jit, static_argnames=("function", "problem"))
def _jitted(function: Any, problem: Problem, *arguments: Any) -> Any:
    return function(problem, *arguments)


def _learn(
    problem: Problem,
    blocks: Blocks,
    info: RefitInfo,
    params: Params,
    objective: BoundObjective,
    hyper: Hyper,
    base_state: Any,
    driver: _Eager | _Compiled,
) -> tuple[Blocks, RefitInfo]:
    inner = driver.run(_prepare, problem, blocks, info, params, objective, hyper, base_state)
    if problem.reduction == "unit":
        v = quadratic.power_start(inner.model)
        v = driver.loop(_power, problem, v, inner, quadratic.POWER_STEPS)
        inner = inner._replace(model=quadratic.with_unit_scale(inner.model, v))
    carry = driver.run(_start, problem, inner)
    carry = driver.loop(_step, problem, carry, inner, problem.refit.steps)
    return driver.run(_finish, problem, blocks, info, carry, inner)


# --- the pieces of a refit ------------------------------------------------------------------------


def _prepare(
    problem: Problem, blocks: Blocks, info: RefitInfo, params: Params,
    objective: BoundObjective, hyper: Hyper, base_state: Any,
) -> _Inner:  # fmt: skip
    """Linearise once and choose the start."""
    # Curvature in float32 at least: in bfloat16, P h rounds away what a refit changes.
    params = jax.tree.map(lambda p: p.astype(plans.at_least_float32(p.dtype)), params)
    first = _take(objective, 0) if problem.refit.fresh_batches else objective
    model = _linearize(problem, first, params, hyper)
    key = jax.random.fold_in(jax.random.key(problem.refit.seed), info.refits)
    start = blocks
    if not problem.refit.warm_start:
        cold = plans.identity(problem.plan, problem.scale)
        start = tuple(
            old if block.structure.has_memory else new
            for block, old, new in zip(problem.plan, blocks, cold, strict=True)
        )
    return _Inner(start, hyper, key, model, (params, objective, base_state))


def _power(problem: Problem, v: Params, inner: _Inner) -> Params:
    del problem
    return quadratic.power_step(inner.model, v)


def _start(problem: Problem, inner: _Inner) -> _Carry:
    """The carry before the first step."""
    key = jax.random.fold_in(inner.key, 0)
    learned = plans.start(problem.plan, inner.blocks, key)
    # A bfloat16 loss could not tell the start of a refit from its end.
    zero = jnp.zeros((), plans.at_least_float32(jnp.result_type(inner.model.loss)))
    found = None
    if problem.solver.needs_first_gradient:
        found = _Phi(problem, inner, jnp.zeros((), jnp.int32)).gradient(learned)
    state = problem.solver.init(learned, found)
    done = jnp.array(False)
    return _Carry(learned, state, jnp.zeros((), jnp.int32), zero, zero, done)


def _step(problem: Problem, carry: _Carry, inner: _Inner) -> _Carry:
    """One inner step."""
    phi = _Phi(problem, inner, carry.step)
    rate = inner.hyper.learning_rate
    if problem.refit.anneal:
        rate = rate * (1 - carry.step.astype(carry.value.dtype) / problem.refit.steps)
    learned, state, value = problem.solver.step(phi, carry.learned, carry.solver, rate)
    value = value.astype(carry.value.dtype)
    done = carry.done
    if problem.refit.tolerance:
        small = jnp.abs(value - carry.value) <= problem.refit.tolerance * jnp.abs(carry.value)
        done = (carry.step > 0) & small
    first = jnp.where(carry.step == 0, value, carry.first)
    return _Carry(learned, state, carry.step + 1, first, value, done)


class _Phi:
    """The inner objective at one step, as a function of what is learned."""

    def __init__(self, problem: Problem, inner: _Inner, step: Int[Array, ""]):
        self._plan, self._blocks = problem.plan, inner.blocks
        self._batched = problem.refit.batched
        self._model, objective = _at(problem, inner, step)
        # Solvers that compare steps need the same directions at every one.
        fixed = problem.refit.solver in solvers.DETERMINISTIC
        key = jax.random.fold_in(inner.key, 1 if fixed else step + 1)
        self._direction, self._linear = _directions(
            problem, self._model, objective, inner, key, problem.refit.probes
        )

    def gradient(self, learned: Blocks) -> tuple[Float[Array, ""], Blocks]:
        """Return Phi and its gradient: one product with C."""
        controls, pull_back = self._vjp(learned)
        value, cotangent = self._each(_value_and_gradient, controls, self._linear)
        return _mean(value, self._batched), _pull(pull_back, _share(cotangent, self._batched))

    def _vjp(self, learned: Blocks) -> tuple[Params, Any]:
        return _vjp(self._plan, self._batched, self._blocks, learned, self._direction)

    def product(self, direction: Blocks) -> Blocks:
        """Return the Hessian of Phi times a direction, where P is linear in what is learned."""
        controls, pull_back = self._vjp(direction)
        curved = self._each(lambda model, u, _: model.product(u), controls, self._linear)
        return _pull(pull_back, _share(curved, self._batched))

    def along(
        self, learned: Blocks, direction: Blocks, t: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """Return Phi, its slope and u'.(C + lambda) u' along a line: tangent sweeps alone."""

        def controls(t: Array) -> Params:
            moved = jax.tree.map(lambda b, d: b + t * d, learned, direction)
            return _controls(self._plan, self._batched, self._blocks, moved, self._direction)

        u, slope = jax.jvp(controls, (t,), (jnp.ones_like(t),))

        def one(model: QuadraticModel, pair: Any, linear: Params) -> tuple[Array, Array, Array]:
            u, du = pair
            value = vdot(linear, u) + 0.5 * model.inner(u, u)
            return value, vdot(linear, du) + model.inner(u, du), model.inner(du, du)

        found = self._each(one, (u, slope), self._linear)
        return tuple(_mean(x, self._batched) for x in found)  # type: ignore[return-value]

    def _each(self, function: Callable[..., Any], controls: Any, linear: Params) -> Any:
        return _each(self._model, self._batched, function, controls, linear)


def _at(
    problem: Problem, inner: _Inner, step: Int[Array, ""]
) -> tuple[QuadraticModel, BoundObjective]:
    """The model and the objective of one step: with fresh batches, those of its batch."""
    params, objective, _ = inner.source
    if not problem.refit.fresh_batches:
        return inner.model, objective
    objective = _take(objective, step)
    model = _linearize(problem, objective, params, inner.hyper)
    return replace(model, scale=inner.model.scale), objective


def _each(
    model: QuadraticModel, batched: bool, function: Callable[..., Any], *arguments: Any
) -> Any:
    """function(model, *arguments), for each direction if there are several."""
    if not batched:
        return function(model, *arguments)
    if _has_axis(model):  # one model for each example
        return jax.vmap(function)(model, *arguments)
    return _over(model, partial(function, model), *arguments)


def _value_and_gradient(
    model: QuadraticModel, u: Params, linear: Params
) -> tuple[Float[Array, ""], Params]:
    curved = model.product(u)
    return vdot(linear, u) + 0.5 * vdot(u, curved), jax.tree.map(jnp.add, linear, curved)


def _over(model: QuadraticModel, function: Callable[..., Any], *stacked: Any) -> Any:
    """Map over the leading axis; in Python where the model's chunks are looped over in Python."""
    if not model.loops_in_python or is_traced((model.gradient, stacked)):
        return jax.vmap(function)(*stacked)
    count = jax.tree.leaves(stacked)[0].shape[0]
    found = [function(*jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(count)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def _has_axis(model: QuadraticModel) -> bool:
    return jnp.ndim(model.loss) == 1


def _mean(x: Array, batched: bool) -> Array:
    return jnp.mean(x) if batched else x


def _share(cotangent: Params, batched: bool) -> Params:
    """The part of each direction in the gradient of the mean."""
    if not batched:
        return cotangent
    return jax.tree.map(lambda c: (c / c.shape[0]).astype(c.dtype), cotangent)


def _controls(
    plan: Plan, batched: bool, blocks: Blocks, learned: Blocks, direction: Params
) -> Params:
    arrays = plans.install(plan, blocks, learned)
    multiply = partial(plans.multiply, plan, arrays)
    return jax.vmap(multiply)(direction) if batched else multiply(direction)


@partial(jax.jit, static_argnames=("plan", "batched"))
def _vjp(
    plan: Plan, batched: bool, blocks: Blocks, learned: Blocks, direction: Params
) -> tuple[Params, Any]:
    """Return u = P h, and its pull-back to what is learned, for `_pull`."""
    return jax.vjp(lambda x: _controls(plan, batched, blocks, x, direction), learned)


@jax.jit
def _pull(pull_back: Any, cotangent: Params) -> Blocks:
    return pull_back(cotangent)[0]


def _linearize(
    problem: Problem, objective: BoundObjective, params: Params, hyper: Hyper
) -> QuadraticModel:
    def one(objective: BoundObjective) -> QuadraticModel:
        return quadratic.linearize(
            objective,
            params,
            problem.metric.tree,
            damping=hyper.damping,
            divergence_reduction=metrics.over_rows(problem.reduction),
            route=problem.route,
        )

    if not problem.refit.per_example:
        return one(objective)
    chunks = objective.split(1)
    return jax.vmap(lambda i: one(chunks[i]))(jnp.arange(len(chunks)))


def _check_stacked(objective: BoundObjective, steps: int) -> None:
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(objective.batch)}
    if lengths != {(steps,)}:
        raise ValueError(
            f"fresh_batches needs one batch for each of the {steps} inner steps, stacked on a "
            f"first axis of every leaf of the batch; found first axes {sorted(lengths)}."
        )


def _take(objective: BoundObjective, step: int | Int[Array, ""]) -> BoundObjective:
    return jax.tree.map(lambda x: x[step], objective)


def _directions(
    problem: Problem, model: QuadraticModel, objective: BoundObjective, inner: _Inner,
    key: Array, probes: int,
) -> tuple[Params, Params]:  # fmt: skip
    """Return h and the linear term, with a leading axis if there are several."""
    refit = problem.refit
    if refit.probe == "gradient":
        toward = partial(_base_direction, problem, inner)
        if refit.per_example:
            return jax.vmap(toward)(model.gradient), model.gradient
        return toward(model.gradient), model.gradient
    draw = partial(_draw, problem, model, objective)
    h = _over(model, draw, jax.random.split(key, probes))
    return h, jax.tree.map(jnp.negative, h)


def _base_direction(problem: Problem, inner: _Inner, gradient: Params) -> Params:
    """-g, or the update that the base optimizer would make of g: both descend."""
    if problem.base is None:
        direction = jax.tree.map(jnp.negative, gradient)
    else:
        params, _, base_state = inner.source
        base = optax.with_extra_args_support(problem.base)
        direction, _ = base.update(gradient, base_state, params)
        direction = jax.tree.map(lambda h, g: h.astype(g.dtype), direction, gradient)
    if problem.refit.normalize_gradient:
        length = jnp.maximum(norm(direction), 1e-9)
        direction = jax.tree.map(lambda h: h / length.astype(h.dtype), direction)
    return direction


def _draw(problem: Problem, model: QuadraticModel, objective: BoundObjective, key: Array) -> Params:
    """One random direction."""
    probe = problem.refit.probe
    if probe == "gaussian":
        return normal_like(model.gradient, key)
    if probe == "minibatch":
        rows = jax.random.bernoulli(key, SUBSET, (_rows(model.cotangent),))

        def subset(c: Array) -> Array:
            if not c.ndim:  # no rows
                return -c
            kept = rows[: c.shape[0]].reshape(-1, *[1] * (c.ndim - 1))
            return jnp.where(kept, -c / SUBSET, 0.0).astype(c.dtype)

        return model.pull_back(jax.tree.map(subset, model.cotangent))
    reduction = metrics.over_rows(problem.reduction)
    mask, (key, isotropic) = objective.mask(), jax.random.split(key)
    cotangent = metrics.sample(problem.metric.tree, key, model.outputs, mask, reduction)
    h = model.pull_back(cotangent)
    scale, floor = jnp.sqrt(model.scale), jnp.sqrt(FISHER_FLOOR * model.damping)
    noise = normal_like(model.gradient, isotropic)
    return jax.tree.map(lambda x, n: (x / scale + floor * n).astype(x.dtype), h, noise)


def _rows(cotangent: PyTree) -> int:
    return max(c.shape[0] if c.ndim else 1 for c in jax.tree.leaves(cotangent))


def _finish(
    problem: Problem, old: Blocks, info: RefitInfo, carry: _Carry, inner: _Inner
) -> tuple[Blocks, RefitInfo]:
    """EMA, projection, guards, and the record."""
    refit, plan = problem.refit, problem.plan
    new = plans.install(plan, inner.blocks, carry.learned)
    # A number 0 costs nothing; a schedule or an injected value is data.
    if not (isinstance(refit.ema_decay, float | int) and refit.ema_decay == 0):
        new = _average(plan, old, new, inner.hyper.ema_decay)
    finite = [all_finite(arrays) for arrays in new]  # the clamp would hide -inf
    new = tuple(
        mx.project(block.structure, arrays, allow_inversion=refit.allow_grad_inversion)
        for block, arrays in zip(plan, new, strict=True)
    )
    last = jnp.maximum(carry.step - 1, 0) if refit.fresh_batches else jnp.zeros((), jnp.int32)
    judge = _Judge(problem, inner, last)
    upright = [jnp.array(True)] * len(plan)
    if not refit.allow_grad_inversion:
        upright = judge.upright(new)
    keep = [f & u for f, u in zip(finite, upright, strict=True)]
    proposed = _choose(keep, new, old)
    # The first step has evaluated the start already, where that is what is installed.
    known = refit.probe == "gradient" and not (refit.fresh_batches or problem.has_memory)
    before = carry.first if known else judge.objective(inner.blocks)
    after = judge.objective(proposed)
    decreased = after < before  # False for NaN too
    installed = _choose([decreased] * len(plan), proposed, old)
    status = [
        _status(f, u, decreased, _same(a, b))
        for f, u, a, b in zip(finite, upright, new, old, strict=True)
    ]
    whole, cosines = judge.cosines(installed)
    record = RefitInfo(
        refits=info.refits + 1,
        steps=carry.step,
        objective_before=before.astype(jnp.float32),
        objective_after=after.astype(jnp.float32),
        cosine=whole.astype(jnp.float32),
        status=jnp.stack(status).astype(jnp.int32) if plan else info.status,
        cosines=jnp.stack(cosines).astype(jnp.float32) if plan else info.cosines,
    )
    return installed, record


class _Judge:
    """What decides about new arrays: the objective, and how P h lies to h."""

    def __init__(self, problem: Problem, inner: _Inner, step: Int[Array, ""]):
        self._plan, self._batched = problem.plan, problem.refit.batched
        self._model, objective = _at(problem, inner, step)
        key = jax.random.fold_in(inner.key, 2**31 - 1)
        self._direction, self._linear = _directions(
            problem, self._model, objective, inner, key, EVALUATION_PROBES
        )
        gradient = self._model.gradient
        if _has_axis(self._model):
            gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradient)
        self._h = _base_direction(problem, inner, gradient)

    def objective(self, blocks: Blocks) -> Float[Array, ""]:
        """Return Phi."""

        def one(model: QuadraticModel, h: Params, linear: Params) -> Array:
            u = plans.multiply(self._plan, blocks, h)
            return vdot(linear, u) + 0.5 * model.inner(u, u)

        return jnp.mean(_each(self._model, self._batched, one, self._direction, self._linear))

    def upright(self, blocks: Blocks) -> list[Bool[Array, ""]]:
        """Per block: whether its share of h.Ph is positive, or its h is zero."""
        return [
            (vdot(h, ph) > 0) | jnp.all(jnp.stack([jnp.all(x == 0) for x in h]))
            for h, ph in self._pairs(blocks)
        ]

    def cosines(self, blocks: Blocks) -> tuple[Float[Array, ""], list[Float[Array, ""]]]:
        """Return the cosine of P h and h, as a whole and in each block."""
        pairs = self._pairs(blocks)
        whole = [[x for pair in pairs for x in pair[side]] for side in (0, 1)]
        return cosine(*whole), [cosine(h, ph) for h, ph in pairs]

    def _pairs(self, blocks: Blocks) -> list[tuple[list[Array], list[Array]]]:
        """(h, P h) of each block."""
        leaves, scaled = (
            jax.tree.leaves(tree) for tree in (self._h, plans.multiply(self._plan, blocks, self._h))
        )
        return [
            ([leaves[i] for i in block.leaves], [scaled[i] for i in block.leaves])
            for block in self._plan
        ]


def _average(plan: Plan, old: Blocks, new: Blocks, decay: Number) -> Blocks:
    """Return d old + (1 - d) new on what is learned; memories and constants stay new."""
    averaged = []
    for block, o, n in zip(plan, old, new, strict=True):
        mixed = {
            slot: (decay * o[slot] + (1 - decay) * n[slot]).astype(o[slot].dtype)
            for slot in block.structure.learned
        }
        averaged.append(n | mixed)
    return tuple(averaged)


def _same(a: Arrays, b: Arrays) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(a[slot] == b[slot]) for slot in a]))


def _status(finite: Array, upright: Array, decreased: Array, same: Array) -> Int[Array, ""]:
    code = {word: i for i, word in enumerate(STATUS)}
    choice = jnp.where(decreased, code["updated"], code["rejected"])
    choice = jnp.where(upright, choice, code["inverted"])
    choice = jnp.where(finite, choice, code["nonfinite"])
    return jnp.where(same, code["kept"], choice)


def _choose(flags: list[Array], new: Blocks, old: Blocks) -> Blocks:
    return tuple(
        jax.tree.map(lambda n, o, flag=flag: jnp.where(flag, n, o), ns, os)
        for flag, ns, os in zip(flags, new, old, strict=True)
    )


def _platform(params: Params) -> str:
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array):
            return next(iter(leaf.devices())).platform
    return jax.default_backend()
