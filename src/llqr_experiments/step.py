"""One step of training: gradient, perturbed or not, and update."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

import llqr
from llqr._tree import normal_like
from llqr._types import Array, Params
from llqr_experiments import build


class TrainState(NamedTuple):
    """What a training step changes."""

    params: Params
    opt_state: Any
    sharpness: llqr.SharpnessState | None  # None without SAM


def init(
    tx: optax.GradientTransformation, ascent: build.Ascent | None, params: Params
) -> TrainState:
    """Return the state before the first step."""
    sharpness = ascent.method(_no_loss).init(params) if ascent else None
    return TrainState(params, tx.init(params), sharpness)


def _no_loss(params: Params) -> Array:
    raise AssertionError("only the state of the method is asked for")


def advance(
    loss: Callable[[Params, Any], tuple[Array, Any]],
    tx: optax.GradientTransformationExtraArgs,
    ascent: build.Ascent | None,
    active: bool,
    seed: int,
    state: TrainState,
    batch: Any,
    **options: Any,
) -> tuple[TrainState, Array, Any]:
    """Return the state after one step, and loss and auxiliary data of its last gradient.

    Args:
      loss: `(params, batch) -> (loss, aux)`.
      tx: the optimizer.
      ascent: how SAM perturbs; None without.
      active: whether this step is perturbed.
      seed: of random perturbations.
      state: before the step.
      batch: of the step.
      **options: of `tx.update`.
    """
    params, sharpness, apply = state.params, state.sharpness, True
    if ascent is None or sharpness is None:
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
    else:
        product = partial(llqr.precondition, tx, state.opt_state)
        (value, aux), grads, sharpness = ascent.method(loss, has_aux=True).step(
            params,
            sharpness,
            batch,
            precondition=product if ascent.uses_preconditioner else None,
            base=_base_vector(ascent, seed, state) if active else None,
            active=active,
        )
        apply = ascent.configured or not active
    updates, opt_state = tx.update(grads, state.opt_state, params, apply=apply, **options)
    params = optax.apply_updates(params, updates)
    return TrainState(params, opt_state, sharpness), value, aux


def _base_vector(ascent: build.Ascent, seed: int, state: TrainState) -> Params | None:
    """What the research switch perturbs along, in place of the gradient; None: the gradient."""
    if ascent.source == "main_optimizer_momentum":
        return build.momentum_of(state.opt_state)
    if ascent.source == "random_direction":
        assert state.sharpness is not None
        key = jax.random.fold_in(jax.random.key(seed), state.sharpness.count)
        return normal_like(state.params, key)
    return None
