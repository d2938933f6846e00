"""Equinox: an objective over `eqx.filter(model, eqx.is_inexact_array)`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from llqr.objective import Objective
from llqr.structures import Rule, Structure
from llqr.structures.rules import for_leaf, rule_table


def objective(
    model: Any, call: Callable[[Any, Any], Any], loss: Callable[[Any, Any], Any],
    mask: Callable[[Any], Any] | None = None, batch_axes: Callable[[Any], Any] | None = None,
) -> Objective:  # fmt: skip
    """Return the objective `loss(call(model, batch), batch)`.

    Its parameters are `eqx.filter(model, eqx.is_inexact_array)`; the rest of `model` is
    frozen here, so build it from `eqx.nn.inference_mode(model)` and once for a training.

    Args:
      model: an Equinox module.
      call: (model, batch) -> outputs, e.g. `lambda model, batch: jax.vmap(model)(batch["x"])`.
      loss: (outputs, batch) -> scalar.
      mask: (batch) -> which rows count; None: all.
      batch_axes: (batch) -> axes of the examples, see `llqr.Objective`.

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
    return Objective(
        lambda params, batch: call(eqx.combine(params, static), batch), loss, mask, batch_axes
    )


def rules(structure: str | Structure = "auto", model: Any = None) -> list[Rule]:
    """Return the rule table of a structure for Equinox's layout: weights are (out, in, ...).

    Those of recurrent cells, `weight_ih` and `weight_hh`, among them. Layers that were made under
    `eqx.filter_vmap` have one more axis in front: with the model, its modules say so, and which
    weights are embeddings; without, names and shapes do.

    Args:
      structure: of all matrices: a name, "auto", or a `Structure`.
      model: the module, or its parameters.

    Example:
      >>> [(rule.rows, rule.stack) for rule in rules("kfac")]
      [(1, 'auto'), (None, 'auto')]
      >>> make = eqx.filter_vmap(lambda key: eqx.nn.Linear(2, 3, key=key))
      >>> import jax
      >>> rules("kfac", make(jax.random.split(jax.random.key(0), 6)))[0].stack
      (0,)
    """
    matrices = rule_table(structure)[0].structure
    table: list[Rule] = []
    modules, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_has_weight)
    for path, module in modules:
        if _has_weight(module) and module.weight is not None:
            leaf = "/".join([jax.tree_util.keystr((part,), simple=True) for part in path])
            stack = tuple(range(module.weight.ndim - _axes(module)))
            table += for_leaf(
                f"{leaf}/weight".lstrip("/"), matrices, stack, rows=1,
                seldom=isinstance(module, eqx.nn.Embedding),
            )  # fmt: skip
    return [
        *table,
        Rule(match=_is_weight, structure=matrices, rows=1, stack="auto"),
        Rule(match="*", structure="diagonal", stack="auto"),
    ]


def _is_weight(path: str, shape: tuple[int, ...]) -> bool:
    return path.split("/")[-1].startswith("weight") and len(shape) > 1


def _has_weight(x: Any) -> bool:
    return isinstance(x, eqx.nn.Linear | eqx.nn.Embedding | eqx.nn.Conv | eqx.nn.ConvTranspose)


def _axes(module: Any) -> int:
    """How many axes the weight of one such module has."""
    return getattr(module, "num_spatial_dims", 0) + 2
