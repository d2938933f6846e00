"""Equinox: an objective over `eqx.filter(model, eqx.is_inexact_array)`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx

from llqr.objective import Objective
from llqr.structures import Rule, Structure


def objective(
    model: Any, call: Callable[[Any, Any], Any], loss: Callable[[Any, Any], Any],
    mask: Callable[[Any], Any] | None = None,
) -> Objective:  # fmt: skip
    """Return the objective `loss(call(model, batch), batch)`.

    Its parameters are `eqx.filter(model, eqx.is_inexact_array)`; the rest of `model` is
    frozen here, so build it from `eqx.nn.inference_mode(model)` and once for a training.

    Args:
      model: an Equinox module.
      call: (model, batch) -> outputs, e.g. `lambda model, batch: jax.vmap(model)(batch["x"])`.
      loss: (outputs, batch) -> scalar.
      mask: (batch) -> which rows count; None: all.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp
      >>> model = eqx.nn.Linear(2, 1, use_bias=False, key=jax.random.key(0))
      >>> mean_square = objective(
      ...     model, lambda model, x: jax.vmap(model)(x), lambda z, x: jnp.mean(z**2))
      >>> params = jax.tree.map(jnp.ones_like, eqx.filter(model, eqx.is_inexact_array))
      >>> float(mean_square(params, jnp.eye(2)))
      1.0
    """
    static = eqx.filter(model, eqx.is_inexact_array, inverse=True)
    return Objective(lambda params, batch: call(eqx.combine(params, static), batch), loss, mask)


def rules(structure: str | Structure) -> list[Rule]:
    """Return the rule table of a structure for Equinox's layout: weights are (out, in, ...).

    Those of recurrent cells, `weight_ih` and `weight_hh`, among them.

    Example:
      >>> [rule.rows for rule in rules("kfac")]
      [1, None]
    """
    return [
        Rule(match=lambda path, shape: path.split("/")[-1].startswith("weight") and len(shape) > 1,
             structure=structure, rows=1),
        Rule(match="*", structure="diagonal"),
    ]  # fmt: skip
