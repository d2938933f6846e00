"""The picture of a run."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

TRAIN, TEST, REFIT = "#8aa6c1", "#c8452c", "#7a7a7a"


def curves(metrics: Path, title: str, out: Path) -> None:
    """Draw loss and accuracy of a metrics.jsonl over steps, with the refits marked.

    Args:
      metrics: the file of a run.
      title: above the picture.
      out: PNG to write.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, name, unit in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("cross-entropy", "%"), strict=True
    ):
        _line(axes, rows, f"train {name}", color=TRAIN, linewidth=1, label="training batch")
        _line(axes, rows, f"test {name}", color=TEST, marker="o", markersize=4, label="test set")
        for i, row in enumerate(r for r in rows if "refit objective after" in r):
            axes.axvline(row["step"], color=REFIT, linewidth=0.8, linestyle=":",
                         label="refit" if i == 0 else None)  # fmt: skip
        axes.set(xlabel="step", ylabel=f"{name} ({unit})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if name == "loss":
            axes.set_yscale("log")
        else:
            axes.set_ylim(top=101)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(out, dpi=130)


def _line(axes: Any, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
