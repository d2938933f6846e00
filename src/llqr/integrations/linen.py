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
      mask: (batch) -> which rows count.
    """
    return Objective(
        lambda params, data: apply({"params": params, **data[1]}, data[0]),
        lambda outputs, data: loss(outputs, data[0]),
        None if mask is None else lambda data: mask(data[0]),
    )


def bind(objective: Objective, batch: Any, **collections: Any) -> BoundObjective:
    """Bind a batch and the other collections: `bind(objective, batch, batch_stats=...)`."""
    return objective.bind((batch, collections))
