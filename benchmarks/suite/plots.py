"""The report's pictures: profiles, curves, sensitivity to the rate."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .methods import METHODS
from .statistics import profile
from .summary import Entry, Result, tasks

FACTORS = np.geomspace(1, 16, 65).tolist()
COLUMNS = 3
COLORS = colormaps["tab20"].colors  # type: ignore[attr-defined]
WORSE = 1.2
"""Losses above this times that at the start are left out of the sensitivity to rates."""


def style(name: str) -> dict[str, Any]:
    """Return how a method is drawn: one colour everywhere, LLQR in thick lines."""
    number = list(METHODS).index(name) if name in METHODS else len(METHODS)
    ours = name.startswith("LLQR")
    return {"color": COLORS[number % 20], "lw": 2.2 if ours else 1.2, "ls": "-" if ours else "--"}


def profiles(results: list[Result], path: Path) -> None:
    """Draw the share of tasks done within a factor of the best method."""
    axes_names = {"gradients": "gradient evaluations", "seconds": "seconds without compilation"}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, (axis, label) in zip(
        figure.subplots(1, 2, sharey=True), axes_names.items(), strict=True
    ):
        for name, shares in profile(tasks(results, axis), FACTORS).items():
            axes.step(FACTORS, shares, where="post", label=name, **style(name))
        axes.set(xscale="log", xlabel=f"{label}, times the least of all", ylim=(0, 1.02))
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        _clean(axes)
    figure.axes[0].set_ylabel("share of workloads and targets")
    _save(figure, path)


def curves(results: list[Result], path: Path) -> None:
    """Draw the median loss of each method against gradient evaluations."""

    def draw(axes: Any, result: Result, name: str, entry: Entry) -> None:
        runs = [trial["columns"] for trial in entry.runs.values()]
        length = min(len(run["step"]) for run in runs)
        losses = np.array([[_or_nan(x) for x in run[result.measure][:length]] for run in runs])
        places = np.median([run["gradients"][:length] for run in runs], axis=0)
        axes.plot(places, np.median(losses, axis=0), label=name, **style(name))

    _grid(results, path, draw, "gradient evaluations", targets=True)


def sensitivity(results: list[Result], path: Path) -> None:
    """Draw the loss at the end against the rate, in units of the customary one."""

    def draw(axes: Any, result: Result, name: str, entry: Entry) -> None:
        if entry.method.rate is None:
            return
        found = {r / entry.method.rate: loss for r, loss in entry.rates.items()}
        kept = {r: loss for r, loss in found.items() if loss < WORSE * result.fixed["start"]}
        axes.plot(list(kept), list(kept.values()), marker=".", label=name, **style(name))
        axes.set_xscale("log")

    _grid(results, path, draw, "rate / customary rate")


def _grid(
    results: list[Result], path: Path, draw: Any, label: str, *, targets: bool = False
) -> None:
    height = math.ceil(len(results) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 3.1 * height + 1), layout="constrained")
    panels = figure.subplots(height, COLUMNS, squeeze=False).ravel()
    for axes, result in zip(panels, results, strict=False):
        for name, entry in result.entries.items():
            draw(axes, result, name, entry)
        if targets:
            for value in result.fixed["targets"].values():
                axes.axhline(value, color="0.7", lw=0.7, zorder=0)
        axes.set(title=f"{result.name} ({result.measure})", xlabel=label, yscale="log")
        _clean(axes)
    for axes in panels[len(results) :]:
        axes.remove()
    _save(figure, path)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _clean(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    lines: Mapping[str, Any] = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(lines.values()), list(lines), frameon=False, ncols=5,
                  loc="outside lower center", fontsize=8)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
