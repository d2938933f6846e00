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
from .workloads import MAKERS

FACTORS = np.geomspace(1, 16, 65).tolist()
COLUMNS = 2  # more are too small on a phone
COLORS = colormaps["tab20"].colors  # type: ignore[attr-defined]
FIRST = ("characters", "fashion-resnet", "mnist1d", "poisson", *MAKERS)
"""Workloads of the picture on the first page, in order of preference: one of each kind. Those of
another set follow as they come."""

BESIDE = {"AdamW": "C0", "Muon": "C1", "SOAP": "C2", "LLQR streaming": "C3"}
"""Methods of that picture, and their colours."""

SHOWN = 2.1
"""Gradient evaluations that curves are drawn up to, by the median of what methods spend."""

WORSE = 1.2
"""Losses above this times that at the start are left out of the sensitivity to rates."""


def style(name: str) -> dict[str, Any]:
    """Return how a method is drawn: one colour everywhere, LLQR in thick lines.

    Colours come round again after twenty methods, with dots in place of dashes.
    """
    number = list(METHODS).index(name) if name in METHODS else len(METHODS)
    ours = name.startswith("LLQR")
    line = "-" if ours else "--" if number < len(COLORS) else ":"
    return {"color": COLORS[number % len(COLORS)], "lw": 2.2 if ours else 1.2, "ls": line}


def profiles(results: list[Result], path: Path) -> None:
    """Draw the share of tasks done within a factor of the best method."""
    axes_names = {"gradients": "gradient evaluations", "seconds": "seconds without compilation"}
    figure = Figure(figsize=(7, 8.5), layout="constrained")
    for axes, (axis, label) in zip(figure.subplots(2, 1), axes_names.items(), strict=True):
        for name, shares in profile(tasks(results, axis), FACTORS).items():
            axes.step(FACTORS, shares, where="post", label=name, **style(name))
        axes.set(xscale="log", xlabel=f"{label}, times the least of all", ylim=(0, 1.02))
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.set_ylabel("share of workloads and targets")
        _clean(axes)
    _save(figure, path)


def curves(results: list[Result], path: Path) -> None:
    """Draw the median loss of each method against gradient evaluations."""

    def draw(axes: Any, result: Result, name: str, entry: Entry) -> None:
        places, losses = _course(result, entry)
        axes.plot(places, np.median(losses, axis=0), label=name, **style(name))

    _grid(results, path, draw, "gradient evaluations", targets=True)


def first_page(results: list[Result], path: Path) -> list[str]:
    """Draw the loss of four methods on up to four workloads: medians, and all seeds between.

    Returns:
      The names of the workloads; none, and no picture, if no workload has all four methods.
    """
    there = {result.name: result for result in results if set(BESIDE) <= set(result.entries)}
    chosen = [there[name] for name in dict.fromkeys((*FIRST, *there)) if name in there][:4]
    if not chosen:
        return []
    figure = Figure(figsize=(6, 2.5 * math.ceil(len(chosen) / 2) + 0.4), layout="constrained")
    panels = figure.subplots(math.ceil(len(chosen) / 2), 2, squeeze=False).ravel()
    for axes, result in zip(panels, chosen, strict=False):
        for name, color in BESIDE.items():
            places, losses = _course(result, result.entries[name])
            band = {"color": color, "alpha": 0.15, "lw": 0}
            axes.fill_between(places, losses.min(0), losses.max(0), **band)
            width = 2.4 if name.startswith("LLQR") else 1.4
            axes.plot(places, np.median(losses, axis=0), label=name, color=color, lw=width)
        axes.set_title(f"{result.name} ({result.measure} loss)", fontsize=10)
        axes.set(yscale="log", xlabel="gradient evaluations")
        _clean(axes)
    for axes in panels[len(chosen) :]:
        axes.remove()
    _save(figure, path, columns=4, size=9, dpi=160)
    return [result.name for result in chosen]


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
        axes.set_yscale("log")
        if targets:
            for value in result.fixed["targets"].values():
                axes.axhline(value, color="0.7", lw=0.7, zorder=0)
            courses = [_course(result, entry) for entry in result.entries.values()]
            axes.set_xlim(0, SHOWN * np.median([places[-1] for places, _ in courses]))
            least = min(np.nanmin(np.median(losses, axis=0)) for _, losses in courses)
            axes.set_ylim(least / 2, 2 * result.fixed["start"])
        axes.set(title=f"{result.name} ({result.measure})", xlabel=label)
        _clean(axes)
    for axes in panels[len(results) :]:
        axes.remove()
    _save(figure, path)


def _course(result: Result, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Return gradient evaluations [n], and the loss there of every seed [seeds, n]."""
    runs = [trial["columns"] for trial in entry.runs.values()]
    length = min(len(run["step"]) for run in runs)
    losses = np.array([[_or_nan(x) for x in run[result.measure][:length]] for run in runs])
    return np.median([run["gradients"][:length] for run in runs], axis=0), losses


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _clean(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path, columns: int = 5, size: int = 8, dpi: int = 110) -> None:
    lines: Mapping[str, Any] = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(lines.values()), list(lines), frameon=False, ncols=columns,
                  loc="outside lower center", fontsize=size)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
