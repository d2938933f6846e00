"""The curves of the study in docs/performance.md, from what is kept of it.

    uv run python -m benchmarks.study_curves FOLDER

What measured it is in commit 69dd264; benchmarks/suite has taken its place.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.reporting import RESULTS

AXES = {
    "step": "steps",
    "gradients": "gradient evaluations (training batches)",
    "seconds": "seconds",
}


def draw(study: dict[str, Any], path: Path) -> None:
    """Draw the training loss of every method that came to its end, mean over seeds."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(f"{study['workload']}: mean over seeds, tuned learning rates")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for row in study["rows"]:
        runs = list(row["runs"].values())
        if len({len(points) for points in runs}) > 1:
            continue
        ours = row["method"].startswith("LLQR")
        style = {"lw": 2.2, "ls": "-"} if ours else {"lw": 1.2, "ls": "--"}
        for axes, key in zip(panels, AXES, strict=True):
            axes.plot(_mean(runs, key), _mean(runs, "loss"), label=row["method"], **style)
    for axes, (key, label) in zip(panels, AXES.items(), strict=True):
        axes.set(xlabel=label, yscale="log", xscale="linear" if key == "step" else "log")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="training loss")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=4,
                  loc="outside lower center", fontsize=8)  # fmt: skip
    figure.savefig(path, dpi=120)


def _mean(runs: list[Any], key: str) -> np.ndarray:
    return np.mean([[point[key] for point in points] for points in runs], axis=0)


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(RESULTS.glob("study_*.json")):
        study = json.loads(path.read_text())
        draw(study, folder / f"{study['workload']}.png")


if __name__ == "__main__":
    main()
