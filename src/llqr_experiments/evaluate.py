"""Evaluation: one compiled step, every example exactly once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import llqr
from llqr._types import Array, Params
from llqr_experiments import data
from llqr_experiments.tasks import measure


@partial(jax.jit, static_argnames="forward")
def _accumulate(
    forward: Callable[..., Array], params: Params, totals: dict[str, Array], batch: dict[str, Any]
) -> dict[str, Array]:
    return jax.tree.map(jnp.add, totals, measure(forward(params, batch), batch))


def evaluate(
    objective: llqr.Objective, params: Params, source: data.Source, batch_size: int
) -> dict[str, float]:
    """Return loss (natural log, no smoothing) and accuracy (percent) over a whole split."""
    totals = {name: jnp.zeros(()) for name in ("loss", "correct", "rows")}
    for batch in data.evaluation_batches(source, batch_size):
        totals = _accumulate(objective.forward, params, totals, batch)
    loss, correct, rows = (float(totals[name]) for name in ("loss", "correct", "rows"))
    return {"loss": loss / rows, "accuracy": 100.0 * correct / rows}
