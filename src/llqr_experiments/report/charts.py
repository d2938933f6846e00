"""Pictures of runs of one kind."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Patch

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
from llqr_experiments.record.plots import FEW, LONG, logarithmic
from llqr_experiments.report import canvas, scores
from llqr_experiments.report.canvas import PHASES, Picture
from llqr_experiments.report.runs import Point, Run

CURVES = {
    "images": (LOSS, ACCURACY),
    "operations": (LOSS, ACCURACY),
    "text": (LOSS, ACCURACY, PERPLEXITY),
    "translation": (LOSS, ACCURACY, BLEU),
    "equations": (LOSS, ERROR),
    "tables": (LOSS, ERROR),
    "other": (),
}
"""What is drawn over steps and over seconds, by kind of runs."""

AXES = ("steps", "seconds")

NAMES = (
    *(f"{y.name}-over-{x}" for y in (LOSS, ACCURACY, ERROR, PERPLEXITY, BLEU) for x in AXES),
    "refits", "sharpness", "time",
)  # fmt: skip
"""Of all pictures that a report may have."""

STYLES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 0.9, "alpha": 0.6},
    "train_eval": {"linewidth": 1.2, "marker": "^", "markersize": 3.5},
    "valid": {"linewidth": 1.5, "marker": "s", "markersize": 3.5, "fillstyle": "none"},
    "test": {"linewidth": 1.8, "marker": "o", "markersize": 3.5},
}
"""How splits are told apart; the colour is the run's."""
REACHED: dict[str, Any] = {"linestyle": "", "marker": "D", "markersize": 6,
                           "markeredgecolor": "white"}  # fmt: skip
MILESTONE = "first evaluation at a milestone"


def pictures(kind: str, runs: Sequence[Run]) -> list[Picture]:
    """Draw all that the runs have logged.

    Args:
      kind: of all of them.
      runs: in the order of their colours.

    Returns:
      The pictures; those for which no run has values are left out.
    """
    drawn = [_curves(kind, runs, y, x) for y in CURVES[kind] for x in AXES]
    drawn += [_refits(runs), _sharpness(runs), _time(runs)]
    return [picture for picture in drawn if picture]


class Line(NamedTuple):
    """One curve for each run.

    Attributes:
      label: what all of them show.
      style: which tells them from the other curves of a run.
      series: run by run.
    """

    label: str
    style: dict[str, Any]
    series: list[list[Point]]


def _lines(runs: Sequence[Run], quantity: Quantity) -> list[Line]:
    """A quantity of every split; what counts most comes last."""
    names = [name for run in runs for name in run.names()]
    found = measures.splits(quantity, names)
    whole = {"linestyle": "", "markersize": 6} if quantity is BLEU else {}  # few of them
    lines = [
        Line(measures.SPLITS[split], STYLES[split] | whole, [run.series(name) for run in runs])
        for split, name in found.items()
    ]
    sampled = measures.splits(SAMPLED, names) if quantity is BLEU else {}
    return [
        Line(f"{measures.SPLITS[split]}, a sample of it", STYLES[split],
             [run.series(name) for run in runs])
        for split, name in sampled.items()
    ] + lines  # fmt: skip


def _curves(kind: str, runs: Sequence[Run], quantity: Quantity, x: str) -> Picture | None:
    lines = _lines(runs, quantity)
    values = canvas.values(*(line.series for line in lines))
    if not values:
        return None
    reached = _reached(runs) if quantity is ACCURACY else []
    words = [(line.label, line.style) for line in lines]
    words += [(MILESTONE, REACHED)] if any(reached) else []
    known = [any(every) for every in zip(*(line.series for line in lines), strict=True)]
    figure, axes = canvas.canvas(canvas.legend(runs, known, *words))
    for line in lines:  # evaluations above every training curve
        for i, points in enumerate(line.series):
            many = {"marker": ""} if len(points) > FEW and "linestyle" not in line.style else {}
            canvas.draw(axes, points, x, i, **line.style | many)
    for i, points in enumerate(reached):
        canvas.draw(axes, points, x, i, **REACHED)
    axes.set(xlabel="step" if x == "steps" else "time (s)", ylabel=quantity.label)
    notes = _limits(axes, quantity, lines, values)
    steps = [p.step for line in lines for points in line.series for p in points if p.step > 0]
    if x == "steps" and kind in LONG and logarithmic(axes, "x", steps):
        notes.append("steps on a logarithmic scale")
    if x == "seconds":
        notes.append("the time includes setup and compilation")
    first = ", ".join(line.label for line in lines)
    caption = f"{'; '.join([first[0].upper() + first[1:], *notes])}."
    title = f"{quantity.name[0].upper()}{quantity.name[1:]} over {x}"
    ends = canvas.ends(runs, lines[-1].series, "ends at {:.4g}")
    alt = f"{title}, one curve a run. On the {lines[-1].label}: {ends}."
    return Picture(f"{quantity.name}-over-{x}", title, caption, alt, figure)


def _limits(
    axes: Axes, quantity: Quantity, lines: Sequence[Line], values: Sequence[float]
) -> list[str]:
    """Set the limits that show most of a quantity, and say which they are."""
    if quantity in (LOSS, ERROR, PERPLEXITY):
        return [f"{quantity.name} on a logarithmic scale"] * logarithmic(axes, "y", values)
    if quantity is BLEU:
        axes.set_ylim(bottom=0)
    elif max(values) > 80:
        evaluated = [line.series for line in lines if line.label != measures.SPLITS["train"]]
        bottom = _bottom(canvas.values(*evaluated))
        axes.set_ylim(bottom, 100 + 0.02 * (100 - bottom))
        return [f"the axis starts at {bottom:.0f} %"] * (bottom > 0)
    return []


def _bottom(values: Sequence[float]) -> float:
    """Where an axis of accuracies starts, so that runs close to 100 % can be told apart."""
    return max(0.0, math.floor(min(values) - (100 - min(values)))) if values else 0.0


def _reached(runs: Sequence[Run]) -> list[list[Point]]:
    """Where each run is at its milestones."""
    found = []
    for run in runs:
        names = [name for name in run.names() if measures.milestone(name)]
        first = [scores.reached(run, name) for name in names]
        steps = {point.step for point in first if point}
        metrics = {str(measures.metric(name)) for name in names}
        found.append([p for metric in metrics for p in run.series(metric) if p.step in steps])
    return found


def _refits(runs: Sequence[Run]) -> Picture | None:
    befores, afters = (
        [run.series(f"refit objective {when}") for run in runs] for when in ("before", "after")
    )
    values = canvas.values(befores, afters)
    if not values:
        return None
    dot: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": ""}
    words = ("before", dot | {"fillstyle": "none"}), ("after", dot)
    figure, axes = canvas.canvas(canvas.legend(runs, afters, *words))
    steps = sorted({p.step for points in (*befores, *afters) for p in points})
    place = {step: k for k, step in enumerate(steps)}
    refitted = [i for i, points in enumerate(afters) if points]
    for k, i in enumerate(refitted):
        shift = 0.6 * ((k + 0.5) / len(refitted) - 0.5)  # refits at one step stand side by side
        ends = [{place[p.step] + shift: p.value for p in x[i]} for x in (befores, afters)]
        before, after = ({x: y for x, y in end.items() if y is not None} for end in ends)
        both = [x for x in after if x in before]
        own: dict[str, Any] = {"color": canvas.color(i)}
        axes.vlines(both, [before[x] for x in both], [after[x] for x in both], **own, lw=1)
        axes.plot(list(before), list(before.values()), fillstyle="none", **own, **dot)
        axes.plot(list(after), list(after.values()), **own, **dot)
    axes.set(xlabel="step of the refit", ylabel="refit objective", xlim=(-0.6, len(steps) - 0.4))
    ticks = range(0, len(steps), -(-len(steps) // 6))
    axes.set_xticks(ticks, [f"{steps[k]:,}" for k in ticks])
    scale = "on a logarithmic scale" if logarithmic(axes, "y", values) else ""
    if min(values) <= 0 and max(map(abs, values)) > 10:
        axes.set_yscale("symlog", linthresh=1)
        scale = "on a logarithmic scale that is linear between -1 and 1"
    ended = canvas.ends(runs, afters, "{:.4g}")
    alt = f"Refit objective before and after each refit. The last: {ended}."
    caption = ", ".join(filter(None, ("What a refit lowers, before and after it", scale))) + "."
    return Picture("refits", "Refit objective", caption, alt, figure)


def _sharpness(runs: Sequence[Run]) -> Picture | None:
    found = [run.series("sam sharpness") for run in runs]
    if not any(found):
        return None
    figure, axes = canvas.canvas(canvas.legend(runs, found))
    for i, points in enumerate(found):
        canvas.draw(axes, points, "steps", i, linewidth=1.4)
    axes.axhline(0, color="#666", linewidth=0.8)
    axes.set(xlabel="step", ylabel="perturbed - clean loss")
    alt = f"SAM sharpness over steps. {canvas.ends(runs, found, 'ends at {:.4g}')}."
    caption = "How much higher the loss of a training batch is where SAM takes its gradient."
    return Picture("sharpness", "SAM sharpness", caption, alt, figure)


def _time(runs: Sequence[Run]) -> Picture | None:
    splits = {i: split for i, run in enumerate(runs) if (split := run.phases())}
    if not splits:
        return None
    names = _phase_names(splits.values())
    fills: list[dict[str, Any]] = [
        {"facecolor": PHASES[k % len(PHASES)], "hatch": "////" * (k >= len(PHASES))}
        for k in range(len(names))
    ]
    edge: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5}
    handles = [Patch(label=name, **f, **edge) for name, f in zip(names, fills, strict=True)]
    figure, axes = canvas.canvas(handles, rows=0.7 + 0.34 * len(splits))
    left = [0.0] * len(splits)
    for name, fill in zip(names, fills, strict=True):
        widths = [split.get(name, 0.0) for split in splits.values()]
        axes.barh(range(len(splits)), widths, left=left, height=0.7, **fill, **edge)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(splits)), [canvas.plain(runs[i].name, 18) for i in splits])
    axes.tick_params(axis="y", length=12, width=4)
    for i, tick in zip(splits, axes.yaxis.get_major_ticks(), strict=True):  # the run's colour
        tick.tick1line.set_markeredgecolor(canvas.color(i))
    axes.set(xlabel="time (s)")
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="y")
    most = [f"{runs[i].name}: {max(split, key=split.__getitem__)}" for i, split in splits.items()]
    alt = f"Time by phase, one bar a run. Most goes into: {'; '.join(most)}."
    caption = "Wall time by phase, as the run has logged it."
    return Picture("time", "Where the time goes", caption, alt, figure)


def _phase_names(splits: Iterable[dict[str, float]]) -> list[str]:
    """Phases of all runs, the longest first and "other" last."""
    totals: dict[str, float] = {}
    for split in splits:
        for name, seconds in split.items():
            totals[name] = totals.get(name, 0.0) + seconds
    return sorted(totals, key=lambda name: (name == "other", -totals[name]))
