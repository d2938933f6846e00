"""Evaluation: one compiled step, every example exactly once."""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llqr
from llqr.typing import Array, Params
from llqr_experiments import data
from llqr_experiments.layout import Layout
from llqr_experiments.task.tasks import STATISTICS, examples, keep, measure, sums_of

BINS, RESERVOIR = 50, 200_000


@partial(jax.jit, static_argnames="forward")
def _accumulate(
    forward: Callable[..., Array], params: Params, totals: dict[str, Array], batch: dict[str, Any]
) -> dict[str, Array]:
    return jax.tree.map(jnp.add, totals, measure(forward(params, batch), batch))


@partial(jax.jit, static_argnames="forward")
def _examples(forward: Callable[..., Array], params: Params, batch: dict[str, Any]) -> Any:
    return examples(forward(params, batch), batch)


class Histograms:
    """Distributions over examples, collected during an evaluation.

    Over more than 200,000 examples, a random choice of that many.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[np.ndarray]] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """Add one number for each of some examples."""
        self._values.setdefault(name, []).append(values)

    def write(self, path: Path, step: int) -> None:
        """Append one JSON line for each histogram: step, name, counts, edges."""
        with path.open("a", encoding="utf-8") as file:
            for name, parts in self._values.items():
                values = np.concatenate(parts)
                if len(values) > RESERVOIR:
                    values = np.random.default_rng(0).choice(values, RESERVOIR, replace=False)
                counts, edges = np.histogram(values, BINS)
                row = {"step": step, "name": name, "counts": counts.tolist()}
                file.write(json.dumps(row | {"edges": edges.round(6).tolist()}) + "\n")


def evaluate(
    objective: llqr.Objective,
    model: tuple[Params, Any],
    batches: Iterable[data.Batch],
    histograms: Histograms | None = None,
    name: str = "test",
    layout: Layout | None = None,
) -> dict[str, float]:
    """Return the sums of `tasks.measure` over a whole split.

    Args:
      objective: forward function.
      model: its parameters and running statistics.
      batches: of the split, all of one shape or of a few.
      histograms: where to add p(correct) and loss of every example; None: nowhere.
      name: of the split, in the histograms.
      layout: over devices: batches are of the rows that this process holds; None: one device.
    """
    params, statistics = model
    totals: dict[str, Array] = {}
    for batch in batches:
        if not totals:
            totals = {key: jnp.zeros(()) for key in sums_of(batch)}
            totals = layout.place(totals, layout.everywhere) if layout else totals
        batch = layout.join(batch) if layout else batch
        batch = {**batch, STATISTICS: statistics}
        totals = _accumulate(objective.forward, params, totals, batch)
        if histograms is not None:
            kept, found = keep(batch), _examples(objective.forward, params, batch)
            kept, found = layout.whole((kept, found)) if layout else (kept, found)
            for key, values in found.items():
                histograms.add(f"{name}/{key}_hist", np.asarray(values)[np.asarray(kept)])
    return {key: float(total) for key, total in totals.items()}
