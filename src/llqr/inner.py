r"""The inner objective Phi: the quadratic model of the step that P gives, as a function of P.

  symbol     meaning                                              shape
  P          structured inverse preconditioner, sigma included    params x params
  h          direction that P is learned on                       like params
  l          linear term of the objective                         like params
  C          curvature of the metric                              params x params

    Phi(P) = l.u + 1/2 u.(C + lambda I) u,   u = P h

The published method (Layerwise LQR, arXiv 2605.04230) has l = g and one fixed direction,
h = -g or -g / |g|: Phi is then the quadratic model of the step itself. A probe has l = -h,
with h drawn afresh at every inner step; from N(0, I), the minimiser over all matrices of the
mean of Phi is (C + lambda I)^-1, and over a structure its best approximation seen from every
direction.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llqr import metrics, quadratic, solvers
from llqr._tree import is_traced, norm, normal_like, vdot
from llqr._types import Array, Float, Int, Params, PyTree
from llqr.objective import BoundObjective
from llqr.quadratic import QuadraticModel
from llqr.refits import Blocks, Hyper, Problem
from llqr.structures import plan as plans
from llqr.structures.plan import Plan

SUBSET = 0.25
"""Share of the refit batch's rows in one minibatch probe."""
FISHER_FLOOR = 0.1
"""Share of the damping in the covariance of a fisher probe."""


class Inner(NamedTuple):
    """What stays the same over the inner steps of one refit."""

    blocks: Blocks  # from which it starts
    hyper: Hyper
    key: Array
    model: QuadraticModel  # with fresh batches, on the first one
    source: tuple[Params, BoundObjective, Any]  # for fresh batches; and the base's state


class Phi:
    """The inner objective at one step, as a function of what is learned."""

    def __init__(self, problem: Problem, inner: Inner, step: Int[Array, ""]):
        self._plan, self._blocks = problem.plan, inner.blocks
        self._batched = problem.refit.batched
        self._model, objective = at_step(problem, inner, step)
        # Solvers that compare steps need the same directions at every one.
        fixed = problem.refit.solver in solvers.DETERMINISTIC
        key = jax.random.fold_in(inner.key, 1 if fixed else step + 1)
        self._direction, self._linear = directions(
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
        return each(self._model, self._batched, function, controls, linear)


def at_step(
    problem: Problem, inner: Inner, step: Int[Array, ""]
) -> tuple[QuadraticModel, BoundObjective]:
    """The model and the objective of one step: with fresh batches, those of its batch."""
    params, objective, _ = inner.source
    if not problem.refit.fresh_batches:
        return inner.model, objective
    objective = take(objective, step)
    model = linearize(problem, objective, params, inner.hyper)
    return replace(model, scale=inner.model.scale), objective


def each(
    model: QuadraticModel, batched: bool, function: Callable[..., Any], *arguments: Any
) -> Any:
    """function(model, *arguments), for each direction if there are several."""
    if not batched:
        return function(model, *arguments)
    if has_axis(model):  # one model for each example
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


def has_axis(model: QuadraticModel) -> bool:
    """Whether it is a stack of models, one for each example."""
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


def linearize(
    problem: Problem, objective: BoundObjective, params: Params, hyper: Hyper
) -> QuadraticModel:
    """Return the quadratic model of a batch, or a stack of those of its examples."""

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


def take(objective: BoundObjective, step: int | Int[Array, ""]) -> BoundObjective:
    """Return the objective on the batch of one step, of those that are stacked."""
    return jax.tree.map(lambda x: x[step], objective)


def directions(
    problem: Problem, model: QuadraticModel, objective: BoundObjective, inner: Inner,
    key: Array, probes: int,
) -> tuple[Params, Params]:  # fmt: skip
    """Return h and the linear term, with a leading axis if there are several."""
    refit = problem.refit
    if refit.probe == "gradient":
        toward = partial(base_direction, problem, inner)
        if refit.per_example:
            return jax.vmap(toward)(model.gradient), model.gradient
        return toward(model.gradient), model.gradient
    draw = partial(_draw, problem, model, objective)
    h = _over(model, draw, jax.random.split(key, probes))
    return h, jax.tree.map(jnp.negative, h)


def base_direction(problem: Problem, inner: Inner, gradient: Params) -> Params:
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
