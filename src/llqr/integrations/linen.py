"""Flax Linen: an objective over `variables["params"]`, other collections as data."""

from collections.abc import Callable, Mapping
from typing import Any

from llqr.objective import BoundObjective, Objective


def objective(
    apply: Callable[[Mapping[str, Any], Any], Any], loss: Callable[[Any, Any], Any],
    mask: Callable[[Any], Any] | None = None,
) -> Objective:  # fmt: skip
    """Return the objective `loss(apply(variables, batch), batch)`.

    Args:
      apply: (variables, batch) -> outputs, e.g. a wrapper of `module.apply` in inference
        mode: `lambda v, batch: model.apply(v, batch["x"], train=False)`.
      loss: (outputs, batch) -> scalar.
      mask: (batch) -> which rows count; None: all.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> model = nn.Dense(1, use_bias=False)
      >>> mean_square = objective(
      ...     lambda variables, x: model.apply(variables, x), lambda z, x: jnp.mean(z**2))
      >>> float(bind(mean_square, jnp.eye(2))({"kernel": jnp.ones((2, 1))}))
      1.0
    """
    return Objective(
        lambda params, data: apply({"params": params, **data[1]}, data[0]),
        lambda outputs, data: loss(outputs, data[0]),
        None if mask is None else lambda data: mask(data[0]),
    )


def bind(objective: Objective, batch: Any, **collections: Any) -> BoundObjective:
    """Return the objective on a batch, with the other collections as data.

    Args:
      objective: from `objective`.
      batch: what its functions take.
      **collections: by name, such as batch_stats=variables["batch_stats"].
    """
    return objective.bind((batch, collections))
