"""Runs side by side on one page: `python -m llqr_experiments.report RUN [RUN ...]`.

The page is one file that needs no network. Reading, drawing and writing are apart: `read` makes
a `Run` of a folder, `pictures` makes figures of runs, `page` makes HTML of both.
"""

import argparse
import base64
import html
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from omegaconf import OmegaConf
from rich.console import Console

from llqr_experiments.errors import ConfigError

FILES = ("config.yaml", "meta.json", "metrics.jsonl")
"""What makes a folder a run."""

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
ABSENT = "—"


class Point(NamedTuple):
    """A value that was logged; None where it was not finite."""

    step: int
    seconds: float
    value: float | None


@dataclass(frozen=True)
class Run:
    """What a run has written.

    Attributes:
      folder: where it is.
      name: what the page calls it.
      options: option -> value, with dots in the names of nested ones.
      config: text of config.yaml.
      meta: of meta.json.
      rows: of metrics.jsonl, with the seconds of all sessions added up.
      unreadable: lines of metrics.jsonl that are cut off.
    """

    folder: Path
    name: str
    options: dict[str, Any]
    config: str
    meta: dict[str, Any]
    rows: list[dict[str, Any]]
    unreadable: int

    def series(self, name: str) -> list[Point]:
        """Return what was logged under a name, by step; of two at one step, the later."""
        found = {row["step"]: row for row in self.rows if name in row}
        return [Point(step, row["seconds"], row[name]) for step, row in sorted(found.items())]

    def phases(self) -> dict[str, float]:
        """Return seconds by phase, the rest as "other"; empty if they were not logged.

        They are in a row, under "time <phase>", or in meta.json, under "time".
        """
        last = self.rows[-1]["session"] if self.rows else 0.0
        noted = self.meta.get("time")
        found = [({k[5:]: v for k, v in r.items() if k.startswith("time ")}, r) for r in self.rows]
        for split, row in reversed(found):
            if split:
                return _with_rest(split, row["session"])
        return _with_rest(noted, last) if isinstance(noted, dict) else {}


def _with_rest(split: dict[str, Any], total: float) -> dict[str, float]:
    known = {name: value for name, value in split.items() if _finite(value) is not None}
    total = known.pop("total", total)
    rest = {"other": total - sum(known.values())}
    return {name: value for name, value in (rest | known).items() if value > 0}


# --- reading --------------------------------------------------------------------------------


def read(folder: Path) -> Run:
    """Read a run.

    Args:
      folder: with config.yaml, meta.json and metrics.jsonl.

    Returns:
      The run, named after its folder.

    Raises:
      ConfigError: the folder is no run, or a file of it cannot be read.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}.")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        inside = any((sub / FILES[-1]).is_file() for sub in folder.iterdir())
        hint = f" Folders in it are runs: give those, {folder}/*/." if inside else ""
        raise ConfigError(f"{folder} is no run: it lacks {', '.join(missing)}.{hint}")
    try:
        config = (folder / "config.yaml").read_text()
        options = _flat(OmegaConf.to_container(OmegaConf.create(config), resolve=False))
        meta = json.loads((folder / "meta.json").read_text())
        rows, unreadable = _rows((folder / "metrics.jsonl").read_bytes())
    except Exception as error:  # of YAML, JSON, text or file: one message names the run
        raise ConfigError(f"{folder} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"{folder} cannot be read: meta.json is no object.")
    return Run(folder, folder.name, options, config, meta, rows, unreadable)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def _rows(text: bytes) -> tuple[list[dict[str, Any]], int]:
    """Rows of a metrics.jsonl, and how many lines are none: a killed run cuts its last."""
    rows, unreadable = [], 0
    for line in filter(None, text.decode(errors="replace").split("\n")):
        try:
            row = json.loads(line)
            values = {k: _finite(v) for k, v in row.items()}
            rows.append(values | {"step": int(row["step"]), "seconds": float(row["seconds"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            unreadable += 1
    return _lineage(rows), unreadable


def _finite(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if number else None


def _lineage(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what a resumed run did again, and add up the seconds of all sessions.

    A resumed run appends, from the step of its checkpoint on: what the killed session wrote
    past that step did not lead to what follows. Its clock may go on or start at zero.
    """
    kept: list[dict[str, Any]] = []
    step, elapsed = 0, 0.0
    for row in rows:
        if row["step"] < step and not any(name.startswith("time ") for name in row):
            kept = [old for old in kept if old["step"] <= row["step"]]
            elapsed = 0.0
        before = kept[-1]["seconds"] if kept else 0.0
        if row["seconds"] + elapsed < before:
            elapsed = before
        step = row["step"]
        kept.append(row | {"seconds": row["seconds"] + elapsed, "session": row["seconds"]})
    return kept


def _named(runs: Sequence[Run]) -> list[Run]:
    """Name runs by as many of the last parts of their paths as tell them apart."""
    runs = list({run.folder: run for run in runs}.values())
    for count in range(1, max(len(run.folder.parts) for run in runs) + 1):
        names = ["/".join(run.folder.parts[-count:]) for run in runs]
        if len(set(names)) == len(runs):
            return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    return runs


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the options that are not the same in all runs: name -> value in each run."""
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    values = {name: [_spelt(run.options.get(name, ABSENT)) for run in runs] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def _spelt(value: Any) -> str:
    """As in a config: null, true, 0.1."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


# --- figures --------------------------------------------------------------------------------


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


NAMES = (*(f"{y}-over-{x}" for y in ("loss", "accuracy") for x in ("steps", "seconds")),
         "refits", "sharpness", "time")  # fmt: skip
"""Of all pictures that a report may have."""


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Draw all that the runs have logged.

    Args:
      runs: in the order of their colours.

    Returns:
      The pictures; those for which no run has values are left out.
    """
    drawn = [_curves(runs, y, x) for y in ("loss", "accuracy") for x in ("steps", "seconds")]
    drawn += [_refits(runs), _sharpness(runs), _time(runs)]
    return [picture for picture in drawn if picture]


def color(i: int) -> str:
    """Return the colour of run i."""
    return COLORS[i % len(COLORS)]


def dash(i: int) -> str:
    """Return the line style of run i."""
    return DASHES[i // len(COLORS) % len(DASHES)]


def _canvas(handles: Sequence[Any], rows: float = 2.6) -> tuple[Figure, Axes]:
    """Axes `rows` inches high above a legend that has room of its own."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = 3 if longest <= 12 else 2 if longest <= 20 else 1
    lines = -(-len(handles) // columns)
    figure = Figure(figsize=(5, rows + 0.5 + 0.21 * lines), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False)
    return figure, axes


def _legend(runs: Sequence[Run], series: Sequence[Any], *words: tuple[str, Any]) -> list[Line2D]:
    """Lines of the runs that have a series, and of `words`, each with its style."""
    chosen = differences(runs)
    lines = []
    for i, run in enumerate(runs):
        values = [f"{k}={row[i]}" for k, row in chosen.items()]
        label = " ".join([run.name, *values] if len(values) <= BRIEF else [run.name])
        if series[i]:
            lines.append(Line2D([], [], **_line(i), linewidth=2.5, label=_plain(label)))
    return lines + [Line2D([], [], color="#666", label=word, **style) for word, style in words]


def _line(i: int) -> dict[str, Any]:
    return {"color": color(i), "linestyle": dash(i)}


def _plain(label: str) -> str:
    """Short, and with nothing that matplotlib reads as mathematics."""
    return _clip(label, LABEL).replace("$", r"\$")


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _draw(axes: Axes, points: Sequence[Point], x: str, i: int, **style: Any) -> None:
    xs = [point.step if x == "steps" else point.seconds for point in points]
    ys = [math.nan if point.value is None else point.value for point in points]  # nan: a gap
    axes.plot(xs, ys, **_line(i), **style)


def _curves(runs: Sequence[Run], name: str, x: str) -> Picture | None:
    train = [run.series(f"train {name}") for run in runs]
    test = [run.series(f"test {name}") for run in runs]
    values = [p.value for points in (*train, *test) for p in points if p.value is not None]
    if not values:
        return None
    legend = _legend(
        runs,
        [a + b for a, b in zip(train, test, strict=True)],
        ("thin: training batch", {"linewidth": 0.9, "alpha": 0.7}),
        ("bold: test set", {"linewidth": 2, "marker": "o", "markersize": 4}),
    )
    figure, axes = _canvas(legend)
    for i in range(len(runs)):
        _draw(axes, train[i], x, i, linewidth=0.9, alpha=0.55)
    for i in range(len(runs)):  # above every training curve
        _draw(axes, test[i], x, i, linewidth=1.8, marker="o", markersize=3.5)
    unit = "cross-entropy" if name == "loss" else "%"
    axes.set(xlabel=x.removesuffix("s") if x == "steps" else "time (s)", ylabel=f"{name} ({unit})")
    caption = "Training batches and test set"
    if name == "loss" and min(values) > 0:
        axes.set_yscale("log")
        caption += ", on a logarithmic scale"
    if name == "accuracy":
        bottom = _bottom(test)
        axes.set_ylim(bottom, 100 + 0.02 * (100 - bottom))
        caption += f"; the axis starts at {bottom:.0f} %" if bottom else ""
    caption += "." if x == "steps" else ". The time includes setup and compilation."
    ends = _ends(runs, test, "ends at {:.4g}")
    title = f"{name.capitalize()} over {x}"
    alt = f"{title}, one curve a run. On the test set: {ends}."
    return Picture(f"{name}-over-{x}", title, caption, alt, figure)


def _bottom(test: Sequence[Sequence[Point]]) -> float:
    """Where an axis of accuracies starts, so that runs close to 100 % can be told apart."""
    values = [p.value for points in test for p in points if p.value is not None]
    return max(0.0, math.floor(min(values) - (100 - min(values)))) if values else 0.0


def _ends(runs: Sequence[Run], series: Sequence[Sequence[Point]], text: str) -> str:
    """Say for every run what its last value is."""
    ends = [
        (run.name, points[-1].value) for run, points in zip(runs, series, strict=True) if points
    ]
    return "; ".join(
        f"{name} {'is not finite' if value is None else text.format(value)}" for name, value in ends
    ) or "nothing was logged"  # fmt: skip


def _refits(runs: Sequence[Run]) -> Picture | None:
    befores, afters = (
        [run.series(f"refit objective {when}") for run in runs] for when in ("before", "after")
    )
    values = [p.value for points in (*befores, *afters) for p in points if p.value is not None]
    if not values:
        return None
    dot: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": ""}
    words = ("before", dot | {"fillstyle": "none"}), ("after", dot)
    figure, axes = _canvas(_legend(runs, afters, *words))
    steps = sorted({p.step for points in (*befores, *afters) for p in points})
    place = {step: k for k, step in enumerate(steps)}
    refitted = [i for i, points in enumerate(afters) if points]
    for k, i in enumerate(refitted):
        shift = 0.6 * ((k + 0.5) / len(refitted) - 0.5)  # refits at one step stand side by side
        ends = [{place[p.step] + shift: p.value for p in x[i]} for x in (befores, afters)]
        before, after = ({x: y for x, y in end.items() if y is not None} for end in ends)
        both = [x for x in after if x in before]
        axes.vlines(both, [before[x] for x in both], [after[x] for x in both], color(i), lw=1)
        axes.plot(list(before), list(before.values()), color=color(i), fillstyle="none", **dot)
        axes.plot(list(after), list(after.values()), color=color(i), **dot)
    axes.set(xlabel="step of the refit", ylabel="refit objective", xlim=(-0.6, len(steps) - 0.4))
    ticks = range(0, len(steps), -(-len(steps) // 6))
    axes.set_xticks(ticks, [f"{steps[k]:,}" for k in ticks])
    if min(values) > 0:
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=1)
    alt = f"Refit objective before and after each refit. The last: {_ends(runs, afters, '{:.4g}')}."
    caption = "What a refit lowers, before and after it, on a logarithmic scale"
    caption += "." if min(values) > 0 else " that is linear between -1 and 1."
    return Picture("refits", "Refit objective", caption, alt, figure)


def _sharpness(runs: Sequence[Run]) -> Picture | None:
    found = [run.series("sam sharpness") for run in runs]
    if not any(found):
        return None
    figure, axes = _canvas(_legend(runs, found))
    for i, points in enumerate(found):
        _draw(axes, points, "steps", i, linewidth=1.4)
    axes.axhline(0, color="#666", linewidth=0.8)
    axes.set(xlabel="step", ylabel="perturbed - clean loss")
    alt = f"SAM sharpness over steps. {_ends(runs, found, 'ends at {:.4g}')}."
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
    figure, axes = _canvas(handles, rows=0.7 + 0.34 * len(splits))
    left = [0.0] * len(splits)
    for name, fill in zip(names, fills, strict=True):
        widths = [split.get(name, 0.0) for split in splits.values()]
        axes.barh(range(len(splits)), widths, left=left, height=0.7, **fill, **edge)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(splits)), [_plain(_clip(runs[i].name, 18)) for i in splits])
    axes.tick_params(axis="y", length=12, width=4)
    for i, tick in zip(splits, axes.yaxis.get_major_ticks(), strict=True):  # the run's colour
        tick.tick1line.set_markeredgecolor(color(i))
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


# --- page -----------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 0 0 .2rem }
.lead { font-size: 1.1rem; margin: 0 0 1rem }
.scroll { overflow-x: auto; border: 1px solid #ddd; border-radius: 4px }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  overflow-wrap: normal }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; border-top: 1px solid #eee }
thead th { border-top: 0; background: #f6f6f6; vertical-align: bottom }
thead th.number { white-space: normal }
th:first-child { position: sticky; left: 0; background: #fff; min-width: 8.5rem; max-width: 16rem;
  overflow-wrap: anywhere }
thead th:first-child { background: #f6f6f6 }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.best { font-weight: 700 }
.note { color: #555; font-size: .85rem; font-weight: 400 }
.status { min-width: 10rem }
.warn { color: #8a3b00 }
.key { vertical-align: middle; margin-right: .4rem }
code, pre { font: .85rem/1.45 ui-monospace, monospace }
.options a { white-space: nowrap }
.options code { display: inline-block; background: #f2f2f2; border-radius: 3px;
  padding: 0 .3rem; margin: 0 .2rem .2rem 0; white-space: nowrap }
.pictures { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)) }
figure { margin: 0; min-width: 0 }
img { display: block; width: 100%; height: auto }
figcaption { font-size: .85rem; color: #555 }
.run { border-top: 1px solid #ddd; padding: .8rem 0 }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem .8rem;
  margin: .3rem 0; font-size: .9rem }
dt { color: #555 }
dd { margin: 0 }
summary { cursor: pointer; font-size: .9rem }
pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; margin: .4rem 0 }
@media (max-width: 40rem) {
  body { padding: .8rem } h1 { font-size: 1.3rem }
  th:first-child { max-width: 8.5rem } th, td { padding: .35rem .5rem } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="lead">{lead}</p>
{body}
</body>
</html>
"""

escape = html.escape


def page(runs: Sequence[Run], drawn: Sequence[tuple[Picture, bytes]]) -> str:
    """Return the report as HTML.

    Args:
      runs: in the order of their colours.
      drawn: pictures, each with its PNG.
    """
    what = list(dict.fromkeys(_problem(run) for run in runs))
    title = f"{len(runs)} runs compared" if len(runs) > 1 else runs[0].name
    title += f": {', '.join(what)}"
    parts = [_summary(runs), "<h2>Curves</h2>", _figures(drawn)]
    if len(runs) > 1:
        parts += ['<h2 id="options">Options that differ</h2>', _options(runs)]
    parts += ["<h2>How to run them again</h2>" if len(runs) > 1 else "<h2>How to run it again</h2>"]
    parts += [_origin(run, i) for i, run in enumerate(runs)]
    return PAGE.format(
        title=escape(title), style=STYLE, lead=escape(_lead(runs)), body="\n".join(parts)
    )


def _problem(run: Run) -> str:
    names = (run.options.get(f"{part}.name", ABSENT) for part in ("dataset", "architecture"))
    return ", ".join(str(name) for name in names)


def _lead(runs: Sequence[Run]) -> str:
    """Say what came out, in a sentence."""
    found = []
    for name, best, unit in (("test accuracy", max, " %"), ("test loss", min, "")):
        ends = {run.name: end for run in runs if (end := _final(run, name)) is not None}
        if not ends:
            continue
        value = best(ends.values())
        winners = ", ".join(name for name, end in ends.items() if end == value)
        word = "Highest" if best is max else "Lowest"
        text = f"{word} final {name}: {value:.4g}{unit} ({winners})."
        found.append(text if len(runs) > 1 else f"Final {name}: {value:.4g}{unit}.")
    return " ".join(found) or "Nothing was evaluated on the test set."


def _final(run: Run, name: str) -> float | None:
    points = run.series(name)
    return points[-1].value if points else None


def _best(run: Run, name: str, best: Callable[..., Any]) -> Point | None:
    points = [p for p in run.series(name) if p.value is not None]
    return best(points, key=lambda p: p.value, default=None)


def status(run: Run) -> str:
    """Say whether a run reached its end, from meta.json and what was logged."""
    if not run.rows:
        return "nothing logged"
    last, total = max(row["step"] for row in run.rows), run.meta.get("steps")
    if "finished" in run.meta:
        return "finished"
    losses = run.series("train loss")
    if losses and losses[-1].value is None:
        return f"stopped: loss not finite at step {losses[-1].step:,}"
    if not isinstance(total, int):
        return "finished" if run.phases() else "not known"
    evaluated = any(p.step >= total for p in run.series("test loss"))
    return "finished" if evaluated else f"not finished: step {last:,} of {total:,}"


def _summary(runs: Sequence[Run]) -> str:
    chosen = differences(runs)
    head, columns = [], []
    for name, best, unit in (("test accuracy", max, " %"), ("test loss", min, "")):
        head += [f"final {name}", f"best {name}"]
        columns.append(_scores([_final(run, name) for run in runs], best, unit))
        points = [_best(run, name, best) for run in runs]
        steps = [f'<br><span class="note">step {p.step:,}</span>' if p else "" for p in points]
        columns.append(_scores([p and p.value for p in points], best, unit, steps))
    rows = []
    for i, run in enumerate(runs):
        steps = f"{max((row['step'] for row in run.rows), default=0):,}"
        seconds = _duration(run.rows[-1]["seconds"]) if run.rows else ABSENT
        codes = [f"<code>{escape(f'{k}={row[i]}')}</code>" for k, row in chosen.items()]
        if len(codes) > BRIEF:
            codes[BRIEF:] = [f'<a href="#options">and {len(codes) - BRIEF} more</a>']
        rows.append(
            f'<th scope="row">{_key(i)}{escape(run.name)}</th>'
            + "".join(column[i] for column in columns)
            + f'<td class="number">{steps}</td><td class="number">{seconds}</td>{_status(run)}'
            + (f'<td class="options">{" ".join(codes)}</td>' if chosen else "")
        )
    last = ["status", "differs in"] if chosen else ["status"]
    return _table("Summary", ["run", *head, "steps", "time", *last], rows, range(1, 7))


def _status(run: Run) -> str:
    state = status(run)
    tone = "status" if state == "finished" else "status warn"
    if run.unreadable:
        state += f"; {run.unreadable} unreadable line{'s' * (run.unreadable > 1)} skipped"
    return f'<td class="{tone}">{escape(state)}</td>'


def _scores(
    values: Sequence[float | None],
    best: Callable[..., Any],
    unit: str,
    notes: Sequence[str] | None = None,
) -> list[str]:
    """Cells of a column; the best of several is bold."""
    found = [value for value in values if value is not None]
    top = best(found) if len(values) > 1 and found else None
    cells = []
    for value, note in zip(values, notes or [""] * len(values), strict=True):
        mark = " best" if value is not None and value == top else ""
        text = ABSENT if value is None else (f"{value:.2f}{unit}" if unit else f"{value:.4f}")
        cells.append(f'<td class="number{mark}">{text}{note}</td>')
    return cells


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest} s"
    )


def _key(i: int) -> str:
    """The run's line, as in the pictures."""
    pattern = {"-": "", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[dash(i)]
    return (
        f'<svg class="key" width="22" height="8" aria-hidden="true"><path d="M0 4H22" stroke="'
        f'{color(i)}" stroke-width="4" stroke-dasharray="{pattern or "none"}"/></svg>'
    )


def _table(
    label: str, head: Sequence[str], rows: Sequence[str], numbers: Sequence[int] = ()
) -> str:
    """A table in a box that scrolls, so that the page does not."""
    kinds = [' class="number"' if k in numbers else "" for k in range(len(head))]
    cells = (f'<th scope="col"{kind}>{text}</th>' for kind, text in zip(kinds, head, strict=True))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>\n'
        f"<thead><tr>{''.join(cells)}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _figures(drawn: Sequence[tuple[Picture, bytes]]) -> str:
    if not drawn:
        return "<p>No run has logged anything that could be drawn.</p>"
    figures = (
        f"<figure><h3>{escape(picture.title)}</h3>"
        f'<img alt="{escape(picture.alt)}" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}"><figcaption>{escape(picture.caption)}</figcaption>'
        "</figure>"
        for picture, png in drawn
    )
    return '<div class="pictures">\n' + "\n".join(figures) + "\n</div>"


def _options(runs: Sequence[Run]) -> str:
    chosen = differences(runs)
    if not chosen:
        return "<p>None: all runs have the same config.</p>"
    head = ["option", *(f"{_key(i)}{escape(run.name)}" for i, run in enumerate(runs))]
    rows = [
        f'<th scope="row"><code>{escape(name)}</code></th>'
        + "".join(f"<td><code>{escape(value)}</code></td>" for value in values)
        for name, values in chosen.items()
    ]
    return _table("Options that differ", head, rows)


def _origin(run: Run, i: int) -> str:
    versions = run.meta.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    devices = run.meta.get("devices")
    facts = {
        "command": f"<code>{escape(str(run.meta.get('command') or ABSENT))}</code>",
        "commit": _commit(run.meta.get("commit")),
        "started": escape(str(run.meta.get("started") or ABSENT)),
        "versions": escape(
            ", ".join(f"{name} {version}" for name, version in versions.items() if version)
            + (f", Python {run.meta['python']}" if "python" in run.meta else "")
        ),
        "devices": escape(", ".join(map(str, devices)) if isinstance(devices, list) else ABSENT),
        "platform": escape(str(run.meta.get("platform") or ABSENT)),
        "folder": f"<code>{escape(str(run.folder))}</code>",
    }
    terms = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return (
        f'<section class="run"><h3>{_key(i)}{escape(run.name)}</h3><dl>{terms}</dl>'
        f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details></section>"
    )


def _commit(commit: Any) -> str:
    if not isinstance(commit, str):
        return ABSENT
    changed = " with changes that were not committed" if commit.endswith("+") else ""
    return f"<code>{escape(commit.removesuffix('+'))}</code>{changed}"


# --- files and command line -----------------------------------------------------------------


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of runs, and its PNGs into a folder beside it that has its name.

    Args:
      runs: their folders; one given twice counts once.
      out: the page, *.html.

    Returns:
      The page.

    Raises:
      ConfigError: a folder is no run, or `out` is no name of a page.
    """
    if not runs:
        raise ConfigError("a report needs a run.")
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise ConfigError(f"{out} is no name of a page: it must end with .html.")
    read_runs = _named([read(folder) for folder in runs])
    drawn = [(picture, _png(picture.figure)) for picture in pictures(read_runs)]
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:  # of an earlier report
        (folder / f"{name}.png").unlink(missing_ok=True)
    for picture, png in drawn:
        (folder / f"{picture.name}.png").write_bytes(png)
    out.write_text(page(read_runs, drawn), encoding="utf-8")
    return out


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report, and say where it is.

    Args:
      arguments: of the command line, without the program's name; None reads them from there.

    Returns:
      The exit status: 2 where a folder is no run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llqr_experiments.report", description="Compare runs on one HTML page."
    )
    parser.add_argument("run", nargs="+", type=Path, help=f"folder with {', '.join(FILES)}")
    parser.add_argument(
        "--out", type=Path, help="the page; default: report.html, in the run's folder if it is one"
    )
    options = parser.parse_args(arguments)
    default = options.run[0] if len(options.run) == 1 else Path()
    try:
        out = write(options.run, options.out or default / "report.html")
    except (ConfigError, OSError) as error:
        console = Console(stderr=True, highlight=False)
        console.print("Error:", style="bold red", end=" ")
        console.print(str(error), markup=False, soft_wrap=True)
        return error.code if isinstance(error, ConfigError) else 1
    console = Console(highlight=False)
    console.print("Report:", style="bold", end=" ")
    console.print(f"{out} (pictures in {out.with_suffix('')}/)", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
