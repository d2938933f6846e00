r"""The inner problem: learn P by minimising Phi (`inner`), the quadratic model of its step.

A refit is a fixed number of steps of an inner solver (`solvers`) from the current arrays. Then,
in this order: EMA with the old arrays, projection, guards. A block keeps its old arrays if the
new ones are not finite or turn its share of h.Ph non-positive, and every block does if Phi did
not decrease.

The inner loop is one compiled step driven from Python on CPU, where XLA runs convolution
gradients inside a compiled loop 30 to 50 times slower than outside it, and a compiled loop
on other devices and inside a caller's trace. Both run the same step.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llqr import quadratic
from llqr._tree import all_finite, cosine, is_traced, vdot
from llqr._types import Array, Bool, Float, Int, Number, Params
from llqr.inner import (
    Inner,
    Phi,
    at_step,
    base_direction,
    directions,
    each,
    has_axis,
    linearize,
    take,
)
from llqr.objective import BoundObjective
from llqr.quadratic import QuadraticModel
from llqr.refits import STATUS, Blocks, Hyper, Problem, RefitInfo
from llqr.structures import matrix as mx
from llqr.structures import plan as plans
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan

EVALUATION_PROBES = 4
"""Random directions on which a refit is judged: the same before and after it."""


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


def _check_stacked(objective: BoundObjective, steps: int) -> None:
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(objective.batch)}
    if lengths != {(steps,)}:
        raise ValueError(
            f"fresh_batches needs one batch for each of the {steps} inner steps, stacked on a "
            f"first axis of every leaf of the batch; found first axes {sorted(lengths)}."
        )


def _platform(params: Params) -> str:
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array):
            return next(iter(leaf.devices())).platform
    return jax.default_backend()


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


def _prepare(
    problem: Problem, blocks: Blocks, info: RefitInfo, params: Params,
    objective: BoundObjective, hyper: Hyper, base_state: Any,
) -> Inner:  # fmt: skip
    """Linearise once and choose the start."""
    # Curvature in float32 at least: in bfloat16, P h rounds away what a refit changes.
    params = jax.tree.map(lambda p: p.astype(plans.at_least_float32(p.dtype)), params)
    first = take(objective, 0) if problem.refit.fresh_batches else objective
    model = linearize(problem, first, params, hyper)
    key = jax.random.fold_in(jax.random.key(problem.refit.seed), info.refits)
    start = blocks
    if not problem.refit.warm_start:
        cold = plans.identity(problem.plan, problem.scale)
        start = tuple(
            old if block.structure.has_memory else new
            for block, old, new in zip(problem.plan, blocks, cold, strict=True)
        )
    return Inner(start, hyper, key, model, (params, objective, base_state))


def _power(problem: Problem, v: Params, inner: Inner) -> Params:
    del problem
    return quadratic.power_step(inner.model, v)


def _start(problem: Problem, inner: Inner) -> _Carry:
    """The carry before the first step."""
    key = jax.random.fold_in(inner.key, 0)
    learned = plans.start(problem.plan, inner.blocks, key)
    # A bfloat16 loss could not tell the start of a refit from its end.
    zero = jnp.zeros((), plans.at_least_float32(jnp.result_type(inner.model.loss)))
    found = None
    if problem.solver.needs_first_gradient:
        found = Phi(problem, inner, jnp.zeros((), jnp.int32)).gradient(learned)
    state = problem.solver.init(learned, found)
    done = jnp.array(False)
    return _Carry(learned, state, jnp.zeros((), jnp.int32), zero, zero, done)


def _step(problem: Problem, carry: _Carry, inner: Inner) -> _Carry:
    """One inner step."""
    phi = Phi(problem, inner, carry.step)
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


def _finish(
    problem: Problem, old: Blocks, info: RefitInfo, carry: _Carry, inner: Inner
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

    def __init__(self, problem: Problem, inner: Inner, step: Int[Array, ""]):
        self._plan, self._batched = problem.plan, problem.refit.batched
        self._model, objective = at_step(problem, inner, step)
        key = jax.random.fold_in(inner.key, 2**31 - 1)
        self._direction, self._linear = directions(
            problem, self._model, objective, inner, key, EVALUATION_PROBES
        )
        gradient = self._model.gradient
        if has_axis(self._model):
            gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradient)
        self._h = base_direction(problem, inner, gradient)

    def objective(self, blocks: Blocks) -> Float[Array, ""]:
        """Return Phi."""

        def one(model: QuadraticModel, h: Params, linear: Params) -> Array:
            u = plans.multiply(self._plan, blocks, h)
            return vdot(linear, u) + 0.5 * model.inner(u, u)

        return jnp.mean(each(self._model, self._batched, one, self._direction, self._linear))

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
