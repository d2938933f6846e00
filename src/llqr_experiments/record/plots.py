"""The picture of a run: loss and accuracy of every split, perplexity or BLEU where there is one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from llqr_experiments.data.kinds import KINDS
from llqr_experiments.files import replacing
from llqr_experiments.record import measures
from llqr_experiments.record.measures import (
    ACCURACY,
    BLEU,
    ERROR,
    LOSS,
    PERPLEXITY,
    SAMPLED,
    Quantity,
)

Rows = Sequence[dict[str, Any]]

COLORS = {"train": "#8aa6c1", "train_eval": "#3f6a94", "valid": "#d9962b", "test": "#c8452c"}
REFIT, MILESTONES = "#7a7a7a", ("#5b8c5a", "#2f5d2e")
FEW = 40
"""Most evaluations that are marked one by one."""
LONG = tuple(kind.name for kind in KINDS.values() if kind.long)
"""Kinds of data whose runs are told by orders of magnitude: steps on a logarithmic axis."""


def curves(metrics: Path, title: str, out: Path, kind: str = "images") -> None:
    """Draw what a metrics.jsonl holds over steps, with refits and milestones marked.

    Args:
      metrics: the file of a run.
      title: above the picture.
      out: PNG to write.
      kind: of the run's data, see `data.kinds.KINDS`.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    with replacing(out) as file:
        draw(rows, title, kind).savefig(file, dpi=130, format="png")


def draw(rows: Rows, title: str, kind: str = "images") -> Figure:
    """Return the picture of the rows of a metrics.jsonl; see `curves`."""
    panels = _panels(rows)
    figure = Figure(figsize=(5 * len(panels), 4.3), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        panel(axes, rows)
        if kind in LONG:
            logarithmic(axes, "x", [row["step"] for row in rows if row["step"] > 0])
        _mark(axes, rows, after=0 if kind in LONG else -1)
        axes.set(xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        found = zip(*axes.get_legend_handles_labels(), strict=True)
        handles |= {label: handle for handle, label in found if label not in handles}
    figure.legend(list(handles.values()), list(handles), frameon=False, fontsize=9,
                  ncols=3 * len(panels), loc="outside lower center")  # fmt: skip
    return figure


def logarithmic(axes: Axes, which: str, values: Sequence[float]) -> bool:
    """Make an axis logarithmic, with ticks in plain numbers, if its values span a decade.

    Args:
      axes: of a plot.
      which: "x" or "y".
      values: on that axis, finite.

    Returns:
      Whether it is logarithmic now.
    """
    if not values or min(values) <= 0 or max(values) < 10 * min(values):
        return False
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    if max(values) < 100 * min(values):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if min(values) >= 1e-4 and max(values) <= 1e6:
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    return True


def _panels(rows: Rows) -> list[Any]:
    """What draws each panel: at least the loss, and how much of it is right."""
    names = _names(rows)
    panels = [_loss, _error if measures.splits(ERROR, names) else _accuracy]
    if measures.splits(BLEU, names) or measures.splits(SAMPLED, names):
        panels.append(_bleu)
    elif measures.splits(PERPLEXITY, names):
        panels.append(_perplexity)
    return panels


def _loss(axes: Axes, rows: Rows) -> None:
    logarithmic(axes, "y", _lines(axes, rows, LOSS))


def _accuracy(axes: Axes, rows: Rows) -> None:
    values = _lines(axes, rows, ACCURACY)
    if values and max(values) > 80:
        axes.set_ylim(top=101)


def _error(axes: Axes, rows: Rows) -> None:
    logarithmic(axes, "y", _lines(axes, rows, ERROR))


def _perplexity(axes: Axes, rows: Rows) -> None:
    logarithmic(axes, "y", _lines(axes, rows, PERPLEXITY))


def _bleu(axes: Axes, rows: Rows) -> None:
    """Samples joined by a line, whole splits as diamonds."""
    style = {"fillstyle": "none", "marker": "o", "label": "valid set, a sample of it"}
    _lines(axes, rows, SAMPLED, **style)
    _lines(axes, rows, BLEU, linestyle="", marker="D", markersize=6)
    axes.set_ylim(bottom=0)


def _lines(axes: Axes, rows: Rows, quantity: Quantity, **style: Any) -> list[float]:
    """Draw one line for each split, and return the values."""
    values = []
    for split, name in measures.splits(quantity, _names(rows)).items():
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        marked = split != "train" and len(points) <= FEW
        own: dict[str, Any] = {"marker": "o", "markersize": 3.5} if marked else {"linewidth": 1.2}
        own |= {"color": COLORS[split], "label": measures.SPLITS[split]} | style
        if points:
            axes.plot(*zip(*points, strict=True), **own)
        values += [value for _, value in points]
    axes.set(ylabel=quantity.label)
    return values


def _mark(axes: Axes, rows: Rows, after: int) -> None:
    """Mark refits and milestones past a step: a logarithmic axis has no place for 0."""
    refits = [row["step"] for row in rows if "refit objective after" in row]
    for i, step in enumerate(step for step in refits if step > after):
        label = "refit" if i == 0 else None
        axes.axvline(step, color=REFIT, linewidth=0.8, linestyle=":", label=label)
    reached = {name: row[name] for row in rows for name in row if measures.milestone(name)}
    for i, (name, step) in enumerate(reached.items()):
        label = f"{measures.milestone(name)}: step {step:,.0f}"
        axes.axvline(step, color=MILESTONES[i % len(MILESTONES)], linewidth=1.2, linestyle="--",
                     label=label)  # fmt: skip


def _names(rows: Rows) -> set[str]:
    return {name for row in rows for name in row}
