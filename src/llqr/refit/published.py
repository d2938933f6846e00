r"""Published refits, for which training stops: P minimises Phi, the quadratic model of its step.

The network is linearised once; then come a fixed number of steps of an inner solver (`solvers`)
from the current arrays, and the decision what to install (`guards`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llqr import _loops, metrics
from llqr.curvature import model as quadratic
from llqr.curvature.chunked import check_uncoupled
from llqr.curvature.model import QuadraticModel
from llqr.errors import check_range
from llqr.graft import Step
from llqr.objective import BoundObjective
from llqr.refit import solvers
from llqr.refit.directions import base_direction, directions, has_axis, take
from llqr.refit.guards import judge
from llqr.refit.learner import Asked, Blocks, Defaults, Held, Setting
from llqr.refit.objective import Phi
from llqr.refit.options import DETERMINISTIC, Refit, check_options
from llqr.refit.record import RefitInfo
from llqr.refit.remedies import PUBLISHED
from llqr.refit.setup import Inputs, Setup, numbers_at
from llqr.structures import matrix as mx
from llqr.structures import trees
from llqr.structures.plan import Plan, merge
from llqr.structures.preconditioner import Preconditioner
from llqr.tree import accurate_dtype, all_finite, widen
from llqr.typing import Array, Bool, Float, Int, Number, Params, PRNGKeyArray, PyTree

EVALUATION_PROBES = 4
"""Random directions on which a refit is judged: the same before and after it."""


@dataclass(frozen=True)
class Published:
    """The published way: refits that minimise Phi (`objective`). A `Learner`.

    It remembers nothing besides P, and its step is P times the vector.

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """

    options: Refit
    setting: Setting

    name = "llqr.Refit"
    defaults = Defaults(damping=0.0, reduction="sum", graft="none")
    remedies = PUBLISHED
    remembers = ""
    has_momentum = False
    needs_objective = True

    def __post_init__(self) -> None:
        setting = self.setting
        check_options(self.options, setting.metric.tree, setting.reduction, setting.route)

    @staticmethod
    def takes(options: Any) -> bool:
        """Whether these are its options."""
        return isinstance(options, Refit)

    def check_damping(self, damping: Number) -> None:
        """Raise ValueError if lambda is negative."""
        check_range("damping", damping, low=0)

    def check_base(self, base: optax.GradientTransformation, params: Params) -> None:
        """Any optimizer can come after P g."""
        del base, params

    def _setup(self, plan: Plan) -> Setup:
        s = self.setting
        return Setup(plan, s.metric, s.reduction, s.sigma, self.options, s.route, s.base)

    def init(self, plan: Plan, params: Params) -> tuple[()]:
        """Return nothing, of blocks that the solver can learn."""
        del params
        self._setup(plan).check()
        return ()

    @staticmethod
    def owns(kept: Any) -> bool:
        """Whether nothing is remembered."""
        return kept == ()

    def open(self, plan: Plan, kept: tuple[()], like: PyTree) -> tuple[()]:
        """Return nothing."""
        del plan, like
        return kept

    def close(self, plan: Plan, memory: tuple[()], like: PyTree) -> tuple[()]:
        """Return nothing."""
        del plan, like
        return memory

    def observe(self, plan: Plan, held: Held, gradient: Params, count: Int[Array, ""]) -> Held:
        """Return what is held: a refit has a gradient of its own."""
        del plan, count
        return held._replace(info=held.info.after(all_finite(gradient)))

    def refit(self, plan: Plan, held: Held, asked: Asked) -> Held:
        """Return what is held after one refit: the arrays to install, and the record."""
        numbers = numbers_at(self.options, asked.count, asked.damping)
        inputs = Inputs(
            held.arrays, held.info, asked.params, asked.objective, numbers, asked.base_state
        )
        arrays, info = learn(self._setup(plan), inputs)
        return held._replace(arrays=arrays, info=info)

    def step(
        self, plan: Plan, held: Held, vector: Params, count: Int[Array, ""], apply: bool
    ) -> tuple[Held, Step]:
        """Return what is held, and P v."""
        del count
        if not apply:
            return held, Step(vector, vector, vector)
        p = Preconditioner.on(plan, held.arrays, vector, self.setting.sigma)
        found = p.product(vector)
        return held, Step(found, found, vector)

    def reexpress(self, plan: Plan, held: Held, arrays: Blocks) -> Held:
        """Return what is held with other arrays of P."""
        del plan
        return held._replace(arrays=arrays)

    def trees(self, kept: tuple[()]) -> dict[str, PyTree]:
        """Return none."""
        del kept
        return {}

    def with_trees(self, kept: tuple[()], trees: dict[str, PyTree]) -> tuple[()]:
        """Return nothing."""
        del trees
        return kept


class Linearized(NamedTuple):
    """What stays the same over the inner steps of one refit: a pytree."""

    start: Blocks  # arrays from which it starts
    key: PRNGKeyArray
    model: QuadraticModel  # with fresh batches, on the first one
    inputs: Inputs


class _Carry(NamedTuple):
    """What an inner step changes."""

    learned: Blocks
    solver: Any
    step: Int[Array, ""]
    first: Float[Array, ""]  # Phi at the start of the refit
    value: Float[Array, ""]  # Phi at the start of the last step
    done: Bool[Array, ""]


def learn(setup: Setup, inputs: Inputs) -> tuple[Blocks, RefitInfo]:
    """Run one refit.

    Args:
      setup: what stays the same.
      inputs: what it starts from.

    Returns:
      The arrays to install and the new record. Never anything that is not finite, unless
      the old arrays were not.

    Raises:
      ValueError: fresh batches that are not stacked, one for each inner step.

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """
    if setup.refit.fresh_batches:
        _check_stacked(inputs.objective, setup.refit.steps)
    plan = setup.plan
    setup = replace(setup, plan=merge(plan))
    inputs = inputs._replace(blocks=trees.merged(plan, inputs.blocks))
    whole = setup.compiled_whole or not _loops.in_python(inputs.params)
    blocks, info = (_learn_whole if whole else _learn)(setup, inputs)
    return trees.separated(plan, blocks), info


def _check_stacked(objective: BoundObjective, steps: int) -> None:
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(objective.batch)}
    if lengths != {(steps,)}:
        raise ValueError(
            f"fresh_batches needs one batch for each of the {steps} inner steps, stacked on a "
            f"first axis of every leaf of the batch; found first axes {sorted(lengths)}."
        )


@partial(jax.jit, static_argnames="setup")
def _learn_whole(setup: Setup, inputs: Inputs) -> tuple[Blocks, RefitInfo]:
    return _learn(setup, inputs)


def _learn(setup: Setup, inputs: Inputs) -> tuple[Blocks, RefitInfo]:
    python = _loops.in_python(inputs.params)
    # Chunks are looped over in Python too: their step is not one compiled function.
    piecewise = python and setup.route.chunk_size is None
    run, piece = (_loops.compiled if piecewise else _loops.direct), setup.piece()
    fixed = run(_linearized, piece, inputs)
    if setup.reduction == "unit":
        fixed = fixed._replace(model=quadratic.with_unit_top(fixed.model))
    carry = run(_start, piece, fixed)
    carry = _loops.repeat(
        lambda carry: run(_step, piece, carry, fixed),
        carry,
        setup.refit.steps,
        python=python,
        done=(lambda carry: carry.done) if setup.refit.tolerance else None,
    )
    return run(_finish, piece, inputs, carry, fixed)


def _linearized(setup: Setup, inputs: Inputs) -> Linearized:
    """Linearise once and choose the start."""
    # Curvature in float32 at least: in bfloat16, P h rounds away what a refit changes.
    if setup.route.layerwise:  # stages are cut by the objective's own type
        inputs = inputs._replace(params=widen(inputs.params))
    else:
        objective, params = inputs.objective.widened(inputs.params)
        inputs = inputs._replace(params=params, objective=objective)
    objective = inputs.objective
    first = take(objective, 0) if setup.refit.fresh_batches else objective
    model = _linearize(setup, inputs, first)
    key = jax.random.fold_in(jax.random.key(setup.refit.seed), inputs.info.refits)
    start = inputs.blocks
    if not setup.refit.warm_start:
        cold = trees.identity(setup.plan, setup.sigma)
        start = tuple(
            old if block.structure.has_memory else new
            for block, old, new in zip(setup.plan, inputs.blocks, cold, strict=True)
        )
    return Linearized(start, key, model, inputs)


def _linearize(setup: Setup, inputs: Inputs, objective: BoundObjective) -> QuadraticModel:
    """Return the quadratic model of a batch, or a stack of those of its examples."""

    def one(objective: BoundObjective) -> QuadraticModel:
        return quadratic.linearize(
            objective,
            inputs.params,
            setup.metric.tree,
            damping=inputs.numbers.damping,
            divergence_reduction=metrics.over_rows(setup.reduction),
            route=setup.route,
        )

    if not setup.refit.per_example:
        return one(objective)
    chunks = objective.split(1)
    check_uncoupled(objective, inputs.params, chunks)
    return jax.vmap(lambda i: one(chunks[i]))(jnp.arange(len(chunks)))


def _at_step(
    setup: Setup, fixed: Linearized, step: Int[Array, ""]
) -> tuple[QuadraticModel, BoundObjective]:
    """The model and the objective of one step: with fresh batches, those of its batch."""
    objective = fixed.inputs.objective
    if not setup.refit.fresh_batches:
        return fixed.model, objective
    objective = take(objective, step)
    model = _linearize(setup, fixed.inputs, objective)
    return replace(model, top_eigenvalue=fixed.model.top_eigenvalue), objective


def phi_at(setup: Setup, fixed: Linearized, step: Int[Array, ""]) -> Phi:
    """Return the objective of one inner step.

    Args:
      setup: what stays the same over a run.
      fixed: what stays the same over the refit.
      step: number of the inner step, from 0.
    """
    model, objective = _at_step(setup, fixed, step)
    # Solvers that compare steps need the same directions at every one.
    same = setup.refit.solver in DETERMINISTIC
    key = jax.random.fold_in(fixed.key, 1 if same else step + 1)
    found = directions(setup, fixed.inputs, model, objective, key, setup.refit.probes)
    return Phi(setup.plan, fixed.start, model, found, setup.refit.batched)


def _solver(setup: Setup) -> solvers.Solver:
    refit = setup.refit
    clamps = not refit.allow_grad_inversion and any(mx.clamps(b.structure) for b in setup.plan)
    return solvers.make(
        refit.solver,
        setup.plan,
        momentum=refit.momentum,
        clip_norm=refit.clip_norm,
        clip_value=refit.clip_value,
        clamp=partial(_clamp, setup.plan) if clamps else None,
    )


def _clamp(plan: Plan, learned: Blocks) -> Blocks:
    return tuple(mx.clamp(b.structure, arrays) for b, arrays in zip(plan, learned, strict=True))


def _start(setup: Setup, fixed: Linearized) -> _Carry:
    """The carry before the first step."""
    key = jax.random.fold_in(fixed.key, 0)
    learned = trees.start(setup.plan, fixed.start, key)
    # A bfloat16 loss could not tell the start of a refit from its end.
    zero = jnp.zeros((), accurate_dtype(fixed.model.loss))
    solver, found = _solver(setup), None
    if solver.needs_first_gradient:
        found = phi_at(setup, fixed, jnp.zeros((), jnp.int32)).value_and_gradient(learned)
    state = solver.init(learned, found)
    done = jnp.array(False)
    return _Carry(learned, state, jnp.zeros((), jnp.int32), zero, zero, done)


def _step(setup: Setup, carry: _Carry, fixed: Linearized) -> _Carry:
    """One inner step."""
    phi, numbers = phi_at(setup, fixed, carry.step), fixed.inputs.numbers
    rate = numbers.learning_rate
    if setup.refit.anneal:
        rate = rate * (1 - carry.step.astype(carry.value.dtype) / numbers.steps)
    learned, state, value = _solver(setup).step(phi, carry.learned, carry.solver, rate)
    value = value.astype(carry.value.dtype)
    done = carry.done
    if setup.refit.tolerance:
        small = jnp.abs(value - carry.value) <= setup.refit.tolerance * jnp.abs(carry.value)
        done = (carry.step > 0) & small
    first = jnp.where(carry.step == 0, value, carry.first)
    return _Carry(learned, state, carry.step + 1, first, value, done)


def _finish(
    setup: Setup, inputs: Inputs, carry: _Carry, fixed: Linearized
) -> tuple[Blocks, RefitInfo]:
    """Decide what to install, and record it."""
    refit, plan, info = setup.refit, setup.plan, inputs.info
    last = jnp.maximum(carry.step - 1, 0) if refit.fresh_batches else jnp.zeros((), jnp.int32)
    model, objective = _at_step(setup, fixed, last)
    key = jax.random.fold_in(fixed.key, 2**31 - 1)
    found = directions(setup, fixed.inputs, model, objective, key, EVALUATION_PROBES)
    descent = found.h
    if refit.batched:
        gradient = model.gradient
        if has_axis(model):
            gradient = jax.tree.map(lambda g: jnp.mean(g, axis=0), gradient)
        descent, _ = base_direction(setup, fixed.inputs, gradient)
    # The first step has evaluated the start already, where that is what is installed.
    known = refit.probe == "gradient" and not (refit.fresh_batches or setup.has_memory)
    verdict = judge(
        setup,
        Phi(plan, fixed.start, model, found, refit.batched),
        descent,
        inputs.blocks,
        trees.install(plan, fixed.start, carry.learned),
        inputs.numbers.ema_decay,
        carry.first if known else None,
    )
    record = RefitInfo(
        refits=info.refits + 1,
        steps=carry.step,
        objective_before=verdict.before.astype(jnp.float32),
        objective_after=verdict.after.astype(jnp.float32),
        cosine=verdict.cosine.astype(jnp.float32),
        status=verdict.status.astype(jnp.int32),
        cosines=verdict.cosines.astype(jnp.float32),
        dropped=info.dropped,
    )
    return verdict.installed, record
