"""Flax Linen: an objective over `variables["params"]`, other collections as data."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from llqr.objective import FIRST, BoundObjective, Objective
from llqr.structures import Rule, layouts
from llqr.structures.rules import StructureLike, for_leaf, rule_table
from llqr.tree import leaf_names


def objective(
    apply: Callable[[Mapping[str, Any], Any], Any], loss: Callable[[Any, Any], Any],
    mask: Callable[[Any], Any] | None = None, batch_axes: Callable[[Any], Any] | None = None,
) -> Objective:  # fmt: skip
    """Return the objective `loss(apply(variables, batch), batch)`.

    Args:
      apply: (variables, batch) -> outputs, e.g. a wrapper of `module.apply` in inference
        mode: `lambda v, batch: model.apply(v, batch["x"], train=False)`.
      loss: (outputs, batch) -> scalar.
      mask: (batch) -> which rows count; None: all.
      batch_axes: (batch) -> axes of the examples, see `llqr.Objective`. The collections that `bind`
        adds have none.

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
        lambda data: (FIRST if batch_axes is None else batch_axes(data[0]), None),
    )


def bind(objective: Objective, batch: Any, **collections: Any) -> BoundObjective:
    """Return the objective on a batch, with the other collections as data.

    Args:
      objective: from `objective`.
      batch: what its functions take.
      **collections: by name, such as batch_stats=variables["batch_stats"].
    """
    return objective.bind((batch, collections))


def rules(params: Any, structure: StructureLike = "auto") -> list[Rule]:
    """Return the rule table of a structure, with the stacks that Linen's metadata name.

    `nn.scan(..., metadata_params={nn.PARTITION_NAME: "layers"})` names the axis of the layers of
    every leaf that has names of axes (`nn.with_partitioning`, `nn.with_logical_partitioning`). In
    all other leaves, and for `nn.scan` without names, names and shapes decide (`structure="auto"`).

    Args:
      params: `variables["params"]` as `init` returns it, before `nn.unbox`; or with it.
      structure: of all matrices; see `llqr.llqr`.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = nn.Partitioned(jnp.zeros((8, 6, 4)), names=("embed", "layers", "mlp"))
      >>> rules({"layers": {"kernel": kernel}})[0].stack
      (1,)
    """
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    boxes = jax.tree.leaves(params, is_leaf=is_box)
    table: list[Rule] = []
    for path, box in zip(leaf_names(jax.tree.map(lambda _: 0, params, is_leaf=is_box)), boxes,
                         strict=True):  # fmt: skip
        names = getattr(box, "names", None)
        if names:
            seldom = True if len(names) == 2 and names[0] == "vocab" else None
            table += for_leaf(path, structure, layouts.stack_axes(names), seldom=seldom)
    return [*table, *rule_table(structure)]
