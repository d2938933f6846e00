"""What a refit holds in memory while it runs, as the compiler lays it out: nothing is run."""

from typing import Any

import jax
import optax

import llqr
from llqr.typing import Params, PyTree

COUNT_ALL: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""On CPU, what XLA hands to a kernel library as a whole hides its buffers: hand over nothing."""


def compile_refit(
    tx: optax.GradientTransformation, opt_state: Any, params: Params, objective: llqr.BoundObjective
) -> jax.stages.Compiled:
    """Return one refit as one compiled function of `opt_state, params, objective`.

    Args:
      tx: with a preconditioner.
      opt_state: its state, or the shapes.
      params: parameters, or their shapes.
      objective: on the refit batch, or its shapes.
    """
    refit = jax.jit(lambda *given: llqr.refresh(tx, *given))
    options = COUNT_ALL if jax.default_backend() == "cpu" else None
    return refit.lower(opt_state, params, objective).compile(options)


def temporary(compiled: jax.stages.Compiled) -> int:
    """Return the most bytes that are held at once, on top of arguments and results.

    On a CPU, where a refit is driven from Python, this is what it would need in one piece.
    """
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def size(tree: PyTree) -> int:
    """Return the bytes of all arrays of a tree, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
