"""What all pictures share: the look of each run, axes with a legend below."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llqr_experiments.report.runs import Point, Run, differences

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
"""One for each run: Okabe and Ito's, which colour-blind readers tell apart, less the yellow."""
DASHES = ("-", "--", ":", "-.")
"""The next one when the colours are used up, so that 28 runs look different."""
PHASES = ("#77AADD", "#EE8866", "#44BB99", "#EEDD88", "#FFAABB", "#AAAA00", "#99DDFF", "#BBCC33")
"""One for each phase: Tol's light scheme, which is none of the runs' colours."""

LABEL = 48
"""Most characters of a run in a legend: what fits in a picture on a phone."""
BRIEF = 4
"""Most differing options that are repeated wherever a run is named."""


class Picture(NamedTuple):
    """A figure with what is said about it.

    Attributes:
      name: of its PNG, without suffix.
      title: above it.
      caption: below it.
      alt: for those who cannot see it.
      figure: itself.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure


def color(i: int) -> str:
    """Return the colour of run i."""
    return COLORS[i % len(COLORS)]


def dash(i: int) -> str:
    """Return the line style of run i."""
    return DASHES[i // len(COLORS) % len(DASHES)]


def line(i: int) -> dict[str, Any]:
    """Return the look of run i."""
    return {"color": color(i), "linestyle": dash(i)}


def canvas(handles: Sequence[Any], rows: float = 2.6) -> tuple[Figure, Axes]:
    """Return axes `rows` inches high above a legend that has room of its own."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = 3 if longest <= 12 else 2 if longest <= 20 else 1
    lines = -(-len(handles) // columns)
    figure = Figure(figsize=(5, rows + 0.5 + 0.21 * lines), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False)
    return figure, axes


def legend(runs: Sequence[Run], series: Sequence[Any], *words: tuple[str, Any]) -> list[Line2D]:
    """Return lines of the runs that have a series, and of `words`, each with its style."""
    chosen = differences(runs)
    lines = []
    for i, run in enumerate(runs):
        values = [f"{k}={row[i]}" for k, row in chosen.items()]
        label = " ".join([run.name, *values] if len(values) <= BRIEF else [run.name])
        if series[i]:
            lines.append(Line2D([], [], **line(i), linewidth=2.5, label=plain(label)))
    return lines + [Line2D([], [], color="#666", label=word, **style) for word, style in words]


def plain(label: str, most: int = LABEL) -> str:
    """Return a label cut short, with no mathematics for matplotlib and nothing but text."""
    cut = label if len(label) <= most else label[: most - 1] + "…"
    return cut.encode(errors="replace").decode().replace("$", r"\$")


def draw(axes: Axes, points: Sequence[Point], x: str, i: int, **style: Any) -> None:
    """Draw a series of run i over "steps" or "seconds"; what is not finite is a gap."""
    xs = [point.step if x == "steps" else point.seconds for point in points]
    ys = [math.nan if point.value is None else point.value for point in points]
    axes.plot(xs, ys, **(line(i) | style))


def values(*series: Sequence[Sequence[Point]]) -> list[float]:
    """Return all finite values of several runs."""
    return [p.value for runs in series for points in runs for p in points if p.value is not None]


def ends(runs: Sequence[Run], series: Sequence[Sequence[Point]], text: str) -> str:
    """Say for every run what its last value is."""
    found = [
        (run.name, points[-1].value) for run, points in zip(runs, series, strict=True) if points
    ]
    return "; ".join(
        f"{name} {'is not finite' if value is None else text.format(value)}"
        for name, value in found
    ) or "nothing was logged"  # fmt: skip
