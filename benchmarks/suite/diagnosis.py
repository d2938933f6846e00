"""Why: what a workload's curvature is like, from the library's own diagnostics.

On a batch, at the start and after a training by streaming refits at the customary rate:

  cosine        of a step to the exact one, (C + lambda I)^-1 g
  share         of the exact step's decrease of J, each step at its best length
  cross-layer   1 - share of the block-diagonal step: what layers lose without each other
  conditioning  largest eigenvalue of C + lambda I by the mean one, and of P (C + lambda I)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg

import llqr

from . import store, workloads
from .methods import METHODS
from .protocol import multiplier
from .training import compiled
from .workloads.problem import Workload

SECTION = "diagnosis"
ROWS = 64
DAMPING = 1e-3
"""In units of the largest curvature."""

_POWER_STEPS, _TRACE_PROBES = 30, 32


def diagnose(workload: Workload, steps: int | None = None) -> dict[str, Any]:
    """Return the diagnosis of a workload.

    Args:
      workload: the workload.
      steps: of the training; None: the workload's own.
    """
    method = METHODS["LLQR streaming"]
    program = compiled(workload, method)
    batch, stream = next(workload.batches(1, ROWS)), workload.batches(0)
    carry = program.engine.start(workload.initial(0), next(stream), jax.random.key(0))
    total = min(steps or workload.steps, workload.steps)
    early, found = min(20, total), {}  # the warm-up: a refit in each step
    dtype = np.float64 if workload.float64 else np.float32
    for step in range(total):
        if step == early:
            found["early"] = _at(workload, carry, batch)
        kind = program.engine.kind(step)
        rate = np.asarray((method.rate or 0.0) * multiplier(step, total), dtype)
        carry = program.steps[kind](carry, next(stream), rate)
    found["end"] = _at(workload, carry, batch)
    return {"steps": total, "rows": min(ROWS, workload.batch), "damping": DAMPING, **found}


def _at(workload: Workload, carry: Any, batch: Any) -> dict[str, Any]:
    """Return the figures at one place of the training."""
    params, state = carry
    bound = workload.objective.bind(batch)
    options = {"metric": workload.metric, "damping": DAMPING, "divergence_reduction": "unit"}
    model = llqr.linearize(bound, params, **options)
    tx = llqr.streaming(1.0, metric=workload.metric)
    product = jax.jit(model.product)

    def preconditioned(x: Any) -> Any:
        return llqr.precondition(tx, state, x)

    found = llqr.quality(bound, params, structures=(), **options)
    cosines = {row.name: row.whole.cosine for row in found.rows}
    shares = {row.name: row.best_share for row in found.rows}
    step = jax.tree.map(jnp.negative, preconditioned(model.gradient))
    exact, _ = cg(product, jax.tree.map(jnp.negative, model.gradient), tol=1e-6, maxiter=5000)
    cosines["streaming"] = _dot(step, exact) / (_dot(step, step) * _dot(exact, exact)) ** 0.5
    slope, curved = _dot(model.gradient, step), _dot(step, product(step))
    shares["streaming"] = -(slope**2) / curved / 2 / found.objective
    return {
        "cosine": {name: round(value, 4) for name, value in cosines.items()},
        "share": {name: round(value, 4) for name, value in shares.items()},
        "cross-layer": round(1 - shares["block-diagonal"], 4),
        "conditioning": conditioning(product, params),
        "conditioning after P": conditioning(lambda x: preconditioned(product(x)), params),
    }


def conditioning(product: Callable[[Any], Any], params: Any) -> float:
    """Return the largest eigenvalue by the mean one: power steps, and probes of the trace."""
    size = sum(x.size for x in jax.tree.leaves(params))
    v, largest = _drawn(jax.random.key(0), params), 0.0
    for _ in range(_POWER_STEPS):
        norm = _dot(v, v) ** 0.5
        v = product(jax.tree.map(lambda x, norm=norm: x / norm, v))
        largest = _dot(v, v) ** 0.5
    probes = [_drawn(jax.random.key(i + 1), params) for i in range(_TRACE_PROBES)]
    trace = float(np.mean([_dot(p, product(p)) for p in probes]))
    return float(f"{largest * size / trace:.3g}")


def _drawn(key: Any, params: Any) -> Any:
    """Return signs in the shapes of the parameters."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def _dot(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(jnp.vdot(x, y)) for x, y in pairs)


def told(found: dict[str, Any]) -> str:
    """Return a diagnosis in words."""
    lines = []
    for name, at in (("after 20 steps", found.get("early")), ("at the end", found["end"])):
        if at is None:
            continue
        lines.append(
            f"- {name}: cosine to the exact step {at['cosine']['gradient']:.2f} of the gradient, "
            f"{at['cosine']['streaming']:.2f} of P g; share of its decrease "
            f"{at['share']['gradient']:.0%} and {at['share']['streaming']:.0%}, of the step "
            f"without terms between layers {at['share']['block-diagonal']:.0%}; largest by mean "
            f"eigenvalue {at['conditioning']:.3g}, behind P {at['conditioning after P']:.3g}."
        )
    return "\n".join(lines)


def write(names: list[str], folder: Path) -> None:
    """Diagnose workloads, and keep what was found."""
    for name in names:
        if name in workloads.FLOAT64:
            jax.config.update("jax_enable_x64", True)
        found = diagnose(workloads.load(name))
        store.keep(folder, name, SECTION, value=found)
        print(f"{name}\n{told(found)}", flush=True)
