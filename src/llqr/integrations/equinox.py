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
    """
    static = eqx.filter(model, eqx.is_inexact_array, inverse=True)
    return Objective(lambda params, batch: call(eqx.combine(params, static), batch), loss, mask)


def rules(structure: str | Structure) -> list[Rule]:
    """Return the rule table of a structure for Equinox's layout: weights are (out, in, ...)."""
    return [
        Rule(match=lambda path, shape: path.endswith("weight") and len(shape) > 1,
             structure=structure, rows=1),
        Rule(match="*", structure="diagonal"),
    ]  # fmt: skip
