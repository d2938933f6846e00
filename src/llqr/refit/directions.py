r"""Directions h on which P is learned, and the linear term l that belongs to each.

  probe       h                                                       l
  gradient    -g, -g / |g|, or the update that the base makes of g    g
  minibatch   minus the gradient of a quarter of the rows             -h
  gaussian    N(0, I)                                                 -h
  fisher      the gradient for labels drawn from the model, whose     -h
              covariance is C / top, and a tenth of the damping

The published method (Layerwise LQR, arXiv 2605.04230) has one fixed direction; the others, the
probes, are drawn afresh at every inner step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llqr import _loops, _replicas, metrics
from llqr._replicas import AxisName
from llqr.curvature.model import QuadraticModel
from llqr.metrics import Reduction
from llqr.objective import BoundObjective
from llqr.refit.learner import Seen
from llqr.refit.setup import Inputs, Setup
from llqr.structures import trees
from llqr.tree import norm, normal_like
from llqr.typing import Array, Int, Params, PRNGKeyArray, PyTree

SUBSET = 0.25
"""Share of the refit batch's rows in one minibatch probe."""
FISHER_FLOOR = 0.1
"""Share of the damping in the covariance of a fisher probe."""


class Directions(NamedTuple):
    """h and l, as the matrices of each block; with a leading axis if there are several."""

    h: Seen
    linear: Seen


def directions(
    setup: Setup, inputs: Inputs, model: QuadraticModel, objective: BoundObjective,
    key: PRNGKeyArray, probes: int,
) -> Directions:  # fmt: skip
    """Return the directions of one step.

    Args:
      setup: of the refit.
      inputs: of the refit.
      model: the quadratic model of the step's batch, or a stack of those of its examples.
      objective: on that batch.
      key: of random directions.
      probes: how many of them, >= 1; not used where the direction is the gradient's.

    Returns:
      h and l, with a leading axis of directions where `setup.refit.batched`.
    """
    refit = setup.refit
    if refit.probe == "gradient":
        toward = partial(base_direction, setup, inputs)
        return Directions(*(jax.vmap(toward) if refit.per_example else toward)(model.gradient))

    def draw(key: PRNGKeyArray) -> Seen:
        return trees.gather(setup.plan, _draw(setup, model, objective, key))

    h = over(model, draw, jax.random.split(key, probes))
    return Directions(h, jax.tree.map(jnp.negative, h))


def base_direction(setup: Setup, inputs: Inputs, gradient: Params) -> tuple[Seen, Seen]:
    """Return -g, or the update that the base optimizer would make of g: both descend; and g.

    Args:
      setup: of the refit.
      inputs: of the refit, with the base optimizer's state.
      gradient: g, like the parameters.

    Returns:
      Both as the matrices of each block.
    """
    g = trees.gather(setup.plan, gradient)
    if setup.base is None:
        direction = [-x for x in g]
    else:
        base = optax.with_extra_args_support(setup.base)
        update: Params = base.update(gradient, inputs.base_state, inputs.params)[0]
        direction = trees.gather(setup.plan, update)
    if setup.refit.normalize_gradient:
        length = jnp.maximum(norm(direction), 1e-9)
        direction = [h / length.astype(h.dtype) for h in direction]
    return direction, g


def each(
    model: QuadraticModel, batched: bool, function: Callable[..., Any], *arguments: Any
) -> Any:
    """Return function(model, *arguments), for each direction if there are several.

    Args:
      model: one quadratic model, or a stack of one for each direction.
      batched: whether the arguments have a leading axis of directions; so has the result then.
      function: of a single model and direction.
      *arguments: trees of arrays.
    """
    if not batched:
        return function(model, *arguments)
    if has_axis(model):  # one model for each example
        return jax.vmap(function)(model, *arguments)
    return over(model, partial(function, model), *arguments)


def over(model: QuadraticModel, function: Callable[..., Any], *stacked: Any) -> Any:
    """Map over the leading axis; in Python where the model's own products loop there.

    Args:
      model: whose products `function` takes.
      function: of one slice of each tree.
      *stacked: trees of arrays with one leading axis in common.
    """
    python = not model.compiles and _loops.in_python(model.gradient, stacked)
    return _loops.mapped(function, *stacked, python=python)


def has_axis(model: QuadraticModel) -> bool:
    """Whether it is a stack of models, one for each example."""
    return jnp.ndim(model.loss) == 1


def take(objective: BoundObjective, step: int | Int[Array, ""]) -> BoundObjective:
    """Return the objective on the batch of one step, of those that are stacked.

    Args:
      objective: its batch with one more axis in front.
      step: position on that axis.
    """
    return jax.tree.map(lambda x: x[step], objective)


def _draw(
    setup: Setup, model: QuadraticModel, objective: BoundObjective, key: PRNGKeyArray
) -> Params:
    """One random direction."""
    probe = setup.refit.probe
    if probe == "gaussian":
        return normal_like(model.gradient, key)
    if probe == "minibatch":
        own = _replicas.own_key(key, setup.route.axis_name)
        return model.jacobian.vjp(_subset(model.cotangent, own))
    key, isotropic = jax.random.split(key)
    h = fisher_probe(
        setup.metric.tree, setup.reduction, model, objective, key, setup.route.axis_name
    )
    return floored(model, h, isotropic)


def fisher_probe(
    metric: PyTree, reduction: Reduction, model: QuadraticModel, objective: BoundObjective,
    key: PRNGKeyArray, axis_name: AxisName = None,
) -> Params:  # fmt: skip
    """Return the gradient for labels drawn from the model, with covariance C: one pull-back.

    Args:
      metric: resolved, one from which labels can be drawn.
      reduction: over rows.
      model: at the current parameters.
      objective: on its batch.
      key: of the labels.
      axis_name: of replicas, each with its own part of the batch.
    """
    rows, mask = metrics.over_rows(reduction), objective.mask()
    drawn = metrics.sample(metric, key, model.outputs, mask, rows, axis_name)
    return model.jacobian.vjp(drawn)


def floored(model: QuadraticModel, h: Params, key: PRNGKeyArray) -> Params:
    """Return h in units of the largest eigenvalue, with a tenth of the damping on top.

    Args:
      model: whose eigenvalue and damping are meant.
      h: a Fisher probe.
      key: of the normal numbers that keep directions without curvature where they are.
    """
    top, floor = jnp.sqrt(model.top_eigenvalue), jnp.sqrt(FISHER_FLOOR * model.damping)
    noise = normal_like(h, key)
    return jax.tree.map(lambda x, n: (x / top + floor * n).astype(x.dtype), h, noise)


def _subset(cotangent: PyTree, key: PRNGKeyArray) -> PyTree:
    """Minus the loss's gradient in the outputs, of a random part of the rows."""
    count = max(c.shape[0] if c.ndim else 1 for c in jax.tree.leaves(cotangent))
    rows = jax.random.bernoulli(key, SUBSET, (count,))

    def one(c: Array) -> Array:
        if not c.ndim:  # no rows
            return -c
        kept = rows[: c.shape[0]].reshape(-1, *[1] * (c.ndim - 1))
        return jnp.where(kept, -c / SUBSET, 0.0).astype(c.dtype)

    return jax.tree.map(one, cotangent)
