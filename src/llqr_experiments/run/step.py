"""One step of training: gradient, perturbed or not, check, and update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import llqr
from llqr.tree import norm, normal_like
from llqr.typing import Array, Int, Params
from llqr_experiments.config import build
from llqr_experiments.layout import Layout
from llqr_experiments.task.tasks import KEY, STATISTICS, Carry


class Health(NamedTuple):
    """Losses, gradients and parameters that were not finite."""

    bad_step: Int[Array, ""]  # the first step with one; -1: none
    # the first leaf whose gradient it was; -1: the loss; from the number of leaves on: the first
    # leaf whose new value it was
    bad_leaf: Int[Array, ""]
    bad_steps: Int[Array, ""]  # how many there were


class TrainState(NamedTuple):
    """What a training step changes."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    statistics: Any  # running statistics of the model; empty without batch norm
    sharpness: llqr.SharpnessState | None  # None without SAM
    health: Health


@dataclass(frozen=True)
class Recipe:
    """What stays the same from step to step.

    Attributes:
      tx: the optimizer.
      ascent: how SAM perturbs; None without.
      seed: of dropout and random perturbations.
      microbatches: parts of the batch whose gradients are averaged.
      normalize: whether tensors of rank 4 and more are scaled to L2 norm sqrt(size) first.
      skip: whether a step with a loss or gradient that is not finite changes nothing.
      gradient: whether the optimizer asks for one.
      weight: `(batch) -> number`, how much a micro-batch counts.
    """

    tx: optax.GradientTransformationExtraArgs
    ascent: build.Ascent | None = None
    seed: int = 0
    microbatches: int = 1
    normalize: bool = False
    skip: bool = False
    gradient: bool = True
    weight: Callable[[Any], Array] | None = None


def init(recipe: Recipe, params: Params, statistics: Any = ()) -> TrainState:
    """Return the state before the first step; its arrays are its own."""
    ascent = recipe.ascent
    sharpness = ascent.method(_no_loss).init(params) if ascent else None
    count = lambda value: jnp.asarray(value, jnp.int32)  # noqa: E731
    health = Health(count(-1), count(-1), count(0))
    state = TrainState(count(0), params, recipe.tx.init(params), statistics, sharpness, health)
    return jax.tree.map(jnp.array, state)  # steps donate their state


def begin(recipe: Recipe, params: Params, statistics: Any, layout: Layout | None) -> TrainState:
    """Return the state before the first step, on the devices of a run.

    Args:
      recipe: of the steps.
      params: on one device or on the host, the same in all processes.
      statistics: as the parameters.
      layout: over devices; None: one.
    """
    if layout is None:
        return init(recipe, params, statistics)
    start, model = partial(init, recipe), layout.place((params, statistics), layout.everywhere)
    onto = shardings(recipe, layout, jax.eval_shape(start, *model))
    return jax.jit(start, out_shardings=onto)(*model)


def shardings(recipe: Recipe, layout: Layout, state: TrainState) -> TrainState:
    """Return where every array of a state lies: what belongs to a parameter, like the parameter.

    Args:
      recipe: of the steps.
      layout: over devices.
      state: its arrays, or their shapes.
    """
    params = jax.tree.map(lambda x: layout.parameter(x.shape), state.params)
    known = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state.params, params
    )
    alike = lambda x: jax.tree.structure(x) == jax.tree.structure(params)  # noqa: E731

    def rest(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: params if alike(x) else layout.everywhere, tree, is_leaf=alike
        )

    opt_state = llqr.state_shardings(recipe.tx, known)
    return TrainState(
        rest(state.step),
        params,
        opt_state,
        jax.tree.map(lambda _: layout.everywhere, state.statistics),
        rest(state.sharpness),
        rest(state.health),
    )


def _no_loss(params: Params) -> Array:
    raise AssertionError("only the state of the method is asked for")


def advance(
    loss: Callable[[Params, Any, Carry], tuple[Array, Carry]],
    recipe: Recipe,
    active: bool,
    state: TrainState,
    batch: Any,
    sums: Sequence[str] = (),
    seen: llqr.Objective | None = None,
    **options: Any,
) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after one step, and the sums over its batch at the last gradient.

    The model's statistics are those that the last gradient leaves: with SAM, at the perturbed
    point.

    Args:
      loss: `(params, batch, carry) -> (loss, carry)`.
      recipe: how.
      active: whether SAM perturbs this step.
      state: before the step.
      batch: of the step.
      sums: names of the sums over rows that `loss` adds to in its carry.
      seen: the network that the optimizer sees in this step: for a streaming refit, or for an
        exact step; None: there is neither.
      **options: of `tx.update`.
    """
    params = state.params
    if seen is not None:
        options |= {"refresh": True, "objective": _bound(recipe, seen, state, batch)}
    (value, carry), grads, sharpness = _gradient(loss, recipe, active, state, batch, sums)
    apply = recipe.ascent is None or recipe.ascent.configured or not active
    updates, opt_state = recipe.tx.update(grads, state.opt_state, params, apply=apply, **options)
    if recipe.normalize:
        params = jax.tree.map(_normalized, params)
    params = optax.apply_updates(params, updates)
    finite, health = _examined(state, value, grads, params)
    new = TrainState(state.step + 1, params, opt_state, carry.statistics, sharpness, health)
    if recipe.skip:
        kept = state._replace(step=new.step, health=health)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
    return new, carry.sums


def _bound(
    recipe: Recipe, seen: llqr.Objective, state: TrainState, batch: Any
) -> llqr.BoundObjective:
    """The network as this step's gradient sees it, on the first of its micro-batches."""
    part = jax.tree.map(lambda x: x[:: recipe.microbatches], batch)
    return seen.bind({**part, STATISTICS: state.statistics, KEY: _key(recipe, state)})


def _key(recipe: Recipe, state: TrainState) -> Array:
    """Of dropout in this step."""
    return jax.random.fold_in(jax.random.key(recipe.seed), state.step)


def _gradient(
    loss: Callable[..., Any],
    recipe: Recipe,
    active: bool,
    state: TrainState,
    batch: Any,
    sums: Sequence[str],
) -> tuple[tuple[Array, Carry], Params, llqr.SharpnessState | None]:
    """Loss and carry, gradient, and the new state of SAM: of micro-batches, perturbed or not."""
    ascent, params, gradient = recipe.ascent, state.params, jax.value_and_grad
    carry = Carry(
        state.statistics,
        _key(recipe, state),
        {name: jnp.zeros(()) for name in sums},
    )
    if not recipe.gradient:
        return loss(params, batch, carry), jax.tree.map(jnp.zeros_like, params), None
    if recipe.microbatches > 1:
        gradient = llqr.microbatched(
            recipe.microbatches, in_axes=AXES, weight=recipe.weight, thread=_hand_on
        )
    if ascent is None or state.sharpness is None:
        return *gradient(loss, has_aux=True)(params, batch, carry), None
    grouped = ascent.method.groups > 1
    weight = recipe.weight if grouped else None
    oracle = ascent.method(loss, has_aux=True, value_and_grad=gradient, in_axes=AXES, weight=weight)
    product = partial(llqr.precondition, recipe.tx, state.opt_state)
    (value, carry), grads, sharpness = oracle.step(
        params,
        state.sharpness,
        batch,
        carry,
        precondition=product if ascent.uses_preconditioner else None,
        base=_base_vector(ascent, recipe.seed, state) if active else None,
        active=active,
    )
    return (value, _over_groups(carry) if grouped else carry), grads, sharpness


AXES = (0, None)
"""Where the examples are in batch and carry."""


def _hand_on(args: tuple[Any, Carry], carry: Carry) -> tuple[Any, Carry]:
    """What a micro-batch leaves is what the next one starts from."""
    return args[0], carry


def _over_groups(carry: Carry) -> Carry:
    """Means of statistics, and totals of sums, over groups that each started from the same."""
    mean = lambda x: jnp.mean(x, 0).astype(x.dtype)  # noqa: E731
    total = lambda x: jnp.sum(x, 0)  # noqa: E731
    return carry._replace(
        statistics=jax.tree.map(mean, carry.statistics), sums=jax.tree.map(total, carry.sums)
    )


def _examined(
    state: TrainState, value: Array, grads: Params, params: Params
) -> tuple[Array, Health]:
    """Whether loss, gradient and new parameters are finite, and the record of what was not."""
    leaves = [*jax.tree.leaves(grads), *jax.tree.leaves(params)]
    flags = jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])
    finite, old = jnp.all(flags) & jnp.isfinite(value), state.health
    first = ~finite & (old.bad_step < 0)
    # A leaf says more than the loss: it is named where there is one.
    leaf = jnp.where(jnp.all(flags), -1, jnp.argmin(flags).astype(jnp.int32))
    return finite, Health(
        jnp.where(first, state.step, old.bad_step),
        jnp.where(first, leaf, old.bad_leaf),
        old.bad_steps + ~finite,
    )


def _normalized(x: Array) -> Array:
    """A tensor of rank 4 or more at L2 norm sqrt(size)."""
    if x.ndim < 4:
        return x
    return (x * (x.size**0.5 / jnp.maximum(norm(x), 1e-8))).astype(x.dtype)


def _base_vector(ascent: build.Ascent, seed: int, state: TrainState) -> Params | None:
    """What the research switch perturbs along, in place of the gradient; None: the gradient."""
    if ascent.source == "main_optimizer_momentum":
        return build.momentum_of(state.opt_state)
    if ascent.source == "random_direction":
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        return normal_like(state.params, key)
    return None
