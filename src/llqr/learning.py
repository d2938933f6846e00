r"""The inner problem: learn P by minimising the quadratic model of the step that it gives.

  symbol     meaning                                              shape
  P          structured inverse preconditioner, sigma included    params x params
  h          base direction, -g (or -g / |g|)                     like params
  J          the quadratic model, `llqr.quadratic`                []
  d          EMA decay                                            []

    minimise over P's arrays   Phi(P) = J(P h)

by a fixed number of steps of a first-order method (Layerwise LQR, arXiv 2605.04230). Then,
in this order: EMA with the old arrays, projection, guards. A block keeps its old arrays if
the new ones are not finite or turn its share of g.Pg non-positive, and every block does if
Phi did not decrease.

The inner loop is one compiled step driven from Python on CPU, where XLA runs convolution
gradients inside a compiled loop 30 to 50 times slower than outside it, and `lax.scan` on
other devices and inside a caller's trace. Both run the same step.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from llqr import quadratic
from llqr._errors import check_choice, check_range
from llqr._tree import all_finite, is_traced, vdot
from llqr._types import Array, Bool, Float, Int, Number, Params, PyTree, Schedule
from llqr.metrics import Reduction
from llqr.objective import BoundObjective
from llqr.quadratic import QuadraticModel
from llqr.structures import matrix as mx
from llqr.structures import plan as plans
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan

SolverName: TypeAlias = Literal["momentum", "sgd", "adam"]

Blocks: TypeAlias = tuple[Arrays, ...]
"""The arrays of every block of a plan."""


@dataclass(frozen=True, kw_only=True)
class Refit:
    """When and how the preconditioner is learned. Defaults are the papers'.

    Args:
      every: a refit is due when (count - start) is a multiple of this number of update
        calls; an int >= 1, or a schedule count -> int.
      start: no refit before this count.
      until: no refit at or after this count; None: never stops.
      steps: inner steps of one refit, a Python int.
      learning_rate: of the inner solver; a number > 0, or a schedule of the count.
      solver: "momentum", "sgd", "adam", or any optax transformation, whose updates are then
        added as they are (learning_rate and momentum do not enter).
      momentum: of the solver "momentum".
      clip_norm: largest L2 norm of the gradient of each stored array; None: no clipping.
      clip_value: largest absolute entry of that gradient; None: no clipping.
      warm_start: start from the current arrays; False: from the identity.
      ema_decay: d in [0, 1]; arrays become d old + (1 - d) new. A number or a schedule.
      normalize_gradient: use h = -g / |g|.
      allow_grad_inversion: allow P to turn the sign of gradients: entries of elementwise
        blocks are not clamped to >= 1e-8 and blocks with g.Pg <= 0 are not guarded.

    Raises:
      ValueError: a value outside its range.
    """

    every: Number | Schedule = 1000
    start: int = 0
    until: int | None = None
    steps: int = 50
    learning_rate: float | Schedule = 1e-3
    solver: SolverName | str | optax.GradientTransformation = "momentum"
    momentum: float = 0.9
    clip_norm: float | None = 5.0
    clip_value: float | None = None
    warm_start: bool = True
    ema_decay: float | Schedule = 0.0
    normalize_gradient: bool = False
    allow_grad_inversion: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, jax.Array) or int(self.steps) != self.steps or self.steps < 1:
            raise ValueError(f"Refit: steps must be a Python int >= 1, got {self.steps!r}.")
        if isinstance(self.solver, str):
            check_choice("solver", self.solver, get_args(SolverName))
        check_range("Refit: every", self.every, low=1)
        check_range("Refit: start", self.start, low=0)
        check_range("Refit: until", self.until, low=0)
        check_range("Refit: learning_rate", self.learning_rate, low=0, open_low=True)
        check_range("Refit: momentum", self.momentum, low=0, high=1)
        check_range("Refit: clip_norm", self.clip_norm, low=0, open_low=True)
        check_range("Refit: clip_value", self.clip_value, low=0, open_low=True)
        check_range("Refit: ema_decay", self.ema_decay, low=0, high=1)

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
    objective_before: Float[Array, ""]  # Phi at the start of the refit
    objective_after: Float[Array, ""]  # Phi of what the refit proposes to install
    nonfinite: Int[Array, ""]  # blocks that kept their old arrays: the new ones had NaN or inf
    inverted: Int[Array, ""]  # ... their share of g.Pg was not positive
    rejected: Int[Array, ""]  # ... Phi did not decrease

    @property
    def guarded(self) -> Int[Array, ""]:
        """Blocks that kept their old arrays in the last refit."""
        return self.nonfinite + self.inverted + self.rejected


def no_refit() -> RefitInfo:
    """Return the record before the first refit."""
    # An array of its own for each field: a state that repeats a buffer cannot be donated.
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    nan = lambda: jnp.full((), jnp.nan, jnp.float32)  # noqa: E731
    return RefitInfo(zero(), nan(), nan(), zero(), zero(), zero())


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
      metric: a resolved metric, or a tree of them flattened by `freeze`.
      reduction: over rows.
      scale: sigma at which blocks are initialised.
      refit: the refit's options.
    """

    plan: Plan
    metric: "Frozen"
    reduction: Reduction
    scale: float
    refit: Refit


@dataclass(frozen=True)
class Frozen:
    """A pytree of hashable leaves, made hashable."""

    leaves: tuple[Any, ...]
    treedef: Any

    @property
    def tree(self) -> PyTree:
        """The pytree again."""
        return jax.tree.unflatten(self.treedef, self.leaves)


def freeze(tree: PyTree) -> Frozen:
    """Make a tree of metrics a static value; None stays a leaf."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: x is None)
    return Frozen(tuple(leaves), treedef)


class _Inner(NamedTuple):
    """What stays the same over the inner steps of one refit."""

    model: QuadraticModel
    direction: Params  # h
    hyper: Hyper


class _Carry(NamedTuple):
    """What an inner step changes."""

    blocks: Blocks
    solver: Any


def learn(
    problem: Problem,
    blocks: Blocks,
    info: RefitInfo,
    params: Params,
    objective: BoundObjective,
    hyper: Hyper,
) -> tuple[Blocks, RefitInfo]:
    """Run one refit.

    Args:
      problem: static description.
      blocks: the current arrays.
      info: the record so far.
      params: the current parameters.
      objective: the curvature objective on the refit batch.
      hyper: learning rate, decay, damping.

    Returns:
      The arrays to install and the new record. Never anything that is not finite, unless
      the old arrays were not.
    """
    if is_traced(params) or _platform(params) != "cpu":
        return _learn_scan(problem, blocks, info, params, objective, hyper)
    inner, carry = _prepare(problem, blocks, params, objective, hyper)
    carry, before = _step(problem, carry, inner)
    for _ in range(problem.refit.steps - 1):
        carry, _ = _step(problem, carry, inner)
    return _finish(problem, blocks, carry.blocks, before, info, inner)


@partial(jax.jit, static_argnames="problem")
def _learn_scan(
    problem: Problem,
    blocks: Blocks,
    info: RefitInfo,
    params: Params,
    objective: BoundObjective,
    hyper: Hyper,
) -> tuple[Blocks, RefitInfo]:
    inner, carry = _prepare(problem, blocks, params, objective, hyper)
    carry, values = jax.lax.scan(
        lambda carry, _: _step(problem, carry, inner), carry, length=problem.refit.steps
    )
    return _finish(problem, blocks, carry.blocks, values[0], info, inner)


@partial(jax.jit, static_argnames="problem")
def _prepare(
    problem: Problem, blocks: Blocks, params: Params, objective: BoundObjective, hyper: Hyper
) -> tuple[_Inner, _Carry]:
    """Linearise once; choose the base direction and the start."""
    # Curvature in float32 at least: in bfloat16, P h rounds away what a refit changes.
    params = jax.tree.map(lambda p: p.astype(plans.at_least_float32(p.dtype)), params)
    model = quadratic.linearize(
        objective,
        params,
        problem.metric.tree,
        damping=hyper.damping,
        divergence_reduction=problem.reduction,
    )
    direction = jax.tree.map(jnp.negative, model.gradient)
    if problem.refit.normalize_gradient:
        length = jnp.maximum(jnp.sqrt(vdot(direction, direction)), 1e-9)
        direction = jax.tree.map(lambda h: h / length.astype(h.dtype), direction)
    warm = problem.refit.warm_start
    start = blocks if warm else plans.identity(problem.plan, problem.scale)
    return _Inner(model, direction, hyper), _Carry(start, _solver(problem.refit).init(start))


@partial(jax.jit, static_argnames="problem")
def _step(problem: Problem, carry: _Carry, inner: _Inner) -> tuple[_Carry, Float[Array, ""]]:
    """One inner step; also returns Phi where the step started."""
    control, pull_back = jax.vjp(
        lambda blocks: plans.multiply(problem.plan, blocks, inner.direction), carry.blocks
    )
    value, cotangent = inner.model.value_and_gradient(control)
    gradient = pull_back(cotangent)[0]
    updates, solver = _solver(problem.refit).update(gradient, carry.solver, carry.blocks)
    if isinstance(problem.refit.solver, str):
        updates = jax.tree.map(lambda u: -inner.hyper.learning_rate * u, updates)
    blocks = jax.tree.map(lambda b, u: (b + u).astype(b.dtype), carry.blocks, updates)
    return _Carry(blocks, solver), value


@partial(jax.jit, static_argnames="problem")
def _finish(
    problem: Problem,
    old: Blocks,
    new: Blocks,
    before: Float[Array, ""],
    info: RefitInfo,
    inner: _Inner,
) -> tuple[Blocks, RefitInfo]:
    """EMA, projection, guards."""
    refit, plan = problem.refit, problem.plan
    # A number 0 costs nothing; a schedule or an injected value is data.
    if not (isinstance(refit.ema_decay, float | int) and refit.ema_decay == 0):
        decay = inner.hyper.ema_decay
        new = jax.tree.map(lambda o, n: (decay * o + (1 - decay) * n).astype(o.dtype), old, new)
    finite = [all_finite(arrays) for arrays in new]  # the clamp would hide -inf
    new = tuple(
        mx.project(block.structure, arrays, allow_inversion=refit.allow_grad_inversion)
        for block, arrays in zip(plan, new, strict=True)
    )
    upright = [jnp.array(True)] * len(plan)
    if not refit.allow_grad_inversion:
        upright = _upright(problem, new, inner.model.gradient)
    keep = [f & u for f, u in zip(finite, upright, strict=True)]
    proposed = _choose(keep, new, old)
    after = inner.model.value(plans.multiply(plan, proposed, inner.direction))
    decreased = after < before  # False for NaN too
    installed = _choose([decreased] * len(plan), proposed, old)

    def count(flags: list[Array]) -> Int[Array, ""]:
        return sum((f.astype(jnp.int32) for f in flags), start=jnp.zeros((), jnp.int32))

    nonfinite = count([~f for f in finite])
    inverted = count([f & ~u for f, u in zip(finite, upright, strict=True)])
    record = RefitInfo(
        refits=info.refits + 1,
        objective_before=before.astype(jnp.float32),
        objective_after=after.astype(jnp.float32),
        nonfinite=nonfinite,
        inverted=inverted,
        rejected=jnp.where(decreased, 0, len(plan) - nonfinite - inverted).astype(jnp.int32),
    )
    return installed, record


def _upright(problem: Problem, blocks: Blocks, gradient: Params) -> list[Array]:
    """Per block: whether its share of g.Pg is positive (or its gradient is zero)."""
    scaled = jax.tree.leaves(plans.multiply(problem.plan, blocks, gradient))
    leaves = jax.tree.leaves(gradient)
    flags = []
    for block in problem.plan:
        share = vdot([leaves[i] for i in block.leaves], [scaled[i] for i in block.leaves])
        idle = jnp.all(jnp.stack([jnp.all(leaves[i] == 0) for i in block.leaves]))
        flags.append((share > 0) | idle)
    return flags


def _choose(flags: list[Array], new: Blocks, old: Blocks) -> Blocks:
    return tuple(
        jax.tree.map(lambda n, o, flag=flag: jnp.where(flag, n, o), ns, os)
        for flag, ns, os in zip(flags, new, old, strict=True)
    )


def _solver(refit: Refit) -> optax.GradientTransformation:
    """The inner chain: per-array clipping, elementwise clipping, solver (without its rate)."""
    if not isinstance(refit.solver, str):
        solver = refit.solver
    elif refit.solver == "momentum":
        solver = optax.trace(refit.momentum)
    elif refit.solver == "adam":
        solver = optax.scale_by_adam()
    else:
        solver = optax.identity()
    steps = [solver]
    if refit.clip_value is not None:
        steps.insert(0, optax.clip(refit.clip_value))
    if refit.clip_norm is not None:
        steps.insert(0, _clip_each(refit.clip_norm))
    return optax.chain(*steps)


def _clip_each(limit: float) -> optax.GradientTransformation:
    """Scale every array to an L2 norm of at most `limit`."""

    def clip(x: Array) -> Array:
        norm = jnp.sqrt(jnp.sum(x * x))
        return x * jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(x.dtype).tiny))

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))


def _platform(params: Params) -> str:
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array):
            return next(iter(leaf.devices())).platform
    return jax.default_backend()
