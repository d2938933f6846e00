"""What is minimised: a forward function and a loss on its outputs.

LLQR differs from a first-order optimizer in one input: it must see the model's outputs,
not only the loss, because its metrics are divergences between outputs. An `Objective`
keeps the two functions apart. The functions are static (they are part of the pytree's
structure, so a jitted function that takes an objective compiles once); the batch is data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from llqr._types import Array, Float, Params, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Objective:
    """A model and its training loss.

    Define the functions once, at module level or before the training loop: a function
    made anew for each call is a new static value, and everything that depends on it
    compiles again.

    Args:
      forward: `(params, batch) -> outputs`. Outputs are an array of shape [..., classes]
        (logits or log-probabilities, one row for each prediction) or a pytree of arrays.
      loss: `(outputs, batch) -> scalar`. The training loss; it does its own masking.
      mask: `(batch) -> bool array`, or a pytree of them like the outputs. True marks the
        rows that count; its shape is the outputs' without the last axis. Rows that are
        False are excluded from the metric and from every row count. None: all rows count.

    Example:
      >>> import jax, jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda params, batch: batch["x"] @ params["w"],
      ...     loss=lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2),
      ... )
      >>> params = {"w": jnp.ones((3, 1))}
      >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.zeros((2, 1))}
      >>> loss, grads = jax.value_and_grad(objective)(params, batch)
      >>> float(loss)
      9.0
    """

    forward: Callable[[Params, Any], PyTree] = field(metadata={"static": True})
    loss: Callable[[PyTree, Any], Float[Array, ""]] = field(metadata={"static": True})
    mask: Callable[[Any], PyTree] | None = field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        for name, value in (("forward", self.forward), ("loss", self.loss)):
            if not callable(value):
                raise TypeError(f"Objective: {name} must be a function, got {value!r}.")

    def __call__(self, params: Params, batch: Any) -> Float[Array, ""]:
        """Return the loss of `params` on `batch`."""
        return self.loss(self.forward(params, batch), batch)

    def bind(self, batch: Any) -> "BoundObjective":
        """Return the objective on one batch: what `update(..., objective=...)` takes.

        The batch may differ from the training batch (other examples, or more of them),
        and anything else that `forward` needs as data (batch statistics, a dropout key)
        travels in it.
        """
        return BoundObjective(self, batch)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundObjective:
    """An `Objective` with its batch: a function of the parameters only."""

    objective: Objective
    batch: Any

    def __call__(self, params: Params) -> Float[Array, ""]:
        """Return the loss of `params`."""
        return self.objective(params, self.batch)

    def outputs(self, params: Params) -> PyTree:
        """Return the model's outputs at `params`."""
        return self.objective.forward(params, self.batch)

    def loss(self, outputs: PyTree) -> Float[Array, ""]:
        """Return the loss of given outputs."""
        return self.objective.loss(outputs, self.batch)

    def mask(self) -> PyTree | None:
        """Return which rows count, or None if all do."""
        return None if self.objective.mask is None else self.objective.mask(self.batch)
