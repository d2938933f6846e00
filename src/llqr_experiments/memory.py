"""What a refit holds in memory while it runs, as the compiler lays it out: nothing is run."""

from typing import Any

import jax
import optax

import llqr
from llqr._types import Params

COUNT_ALL: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""On CPU, what XLA hands to a kernel library as a whole hides its buffers: hand over nothing."""


def of_refit(
    tx: optax.GradientTransformation, opt_state: Any, params: Params, objective: llqr.BoundObjective
) -> int:
    """Return XLA's temporary memory of one refit as one compiled function, in bytes.

    The largest sum of buffers alive at once, on top of parameters, optimizer state and the new
    P. On a CPU, where a refit is driven from Python, this is what it would need in one piece.

    Args:
      tx: with a preconditioner.
      opt_state: its state, or the shapes.
      params: parameters, or their shapes.
      objective: on the refit batch, or its shapes.
    """
    refit = jax.jit(lambda *given: llqr.refresh(tx, *given))
    options = COUNT_ALL if jax.default_backend() == "cpu" else None
    analysis = refit.lower(opt_state, params, objective).compile(options).memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes
