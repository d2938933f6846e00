"""Tables of runs: what each ends with, means over seeds, options that differ."""

import math
import statistics
from collections.abc import Sequence

from llqr_experiments.report.canvas import BRIEF
from llqr_experiments.report.markup import codes, duration, escape, key, number, table
from llqr_experiments.report.runs import ABSENT, Point, Run, differences, status
from llqr_experiments.report.scores import Score, columns
from llqr_experiments.report.sections import SEEDS, Section, same_but_seeds


def summary(section: Section) -> str:
    """Return the table of runs, one a row."""
    runs = section.runs
    scores = columns(section.kind, runs)
    cells = [_scores(score, runs) for score in scores]
    chosen = differences(runs)
    rows = []
    for i, run in enumerate(runs):
        time = duration(run.rows[-1]["seconds"]) if run.rows else ABSENT
        rows.append(
            f'<th scope="row">{key(i)}{escape(run.name)}</th>'
            + "".join(column[i] for column in cells)
            + number(f"{run.last():,}")
            + number(time)
            + _status(run)
            + (_differs(chosen, i, section.prefix) if chosen else "")
        )
    head = ["run", *_titles(scores), "steps", "time", "status", *(["differs in"] if chosen else [])]
    return table("Summary", head, rows, range(1, len(scores) + 3))


def _titles(scores: Sequence[Score]) -> list[str]:
    return [escape(score.title).replace(" %", "&nbsp;%") for score in scores]


def _scores(score: Score, runs: Sequence[Run]) -> list[str]:
    """Cells of a column; the best of several is bold."""
    points = [score.of(run) for run in runs]
    found = [point.value for point in points if point and point.value is not None]
    top = score.better(found) if len(runs) > 1 and found else None
    cells = []
    for point in points:
        if point is None or point.value is None:
            cells.append(number(score.absent))
            continue
        text = score.form.format(point.value)
        cells.append(number(text, _note(score, point), best=point.value == top))
    return cells


def _note(score: Score, point: Point) -> str:
    if score.note == "step":
        return f"step {point.step:,}"
    timed = score.note == "time" and math.isfinite(point.seconds)
    return f"after {duration(point.seconds)}" if timed else ""


def _status(run: Run) -> str:
    state = status(run)
    tone = "status" if state == "finished" else "status warn"
    if run.unreadable:
        state += f"; {run.unreadable} unreadable line{'s' * (run.unreadable > 1)} skipped"
    return f'<td class="{tone}">{escape(state)}</td>'


def _differs(chosen: dict[str, list[str]], i: int, prefix: str) -> str:
    return f'<td class="options">{_pairs(chosen, i, prefix)}</td>'


def _pairs(chosen: dict[str, list[str]], i: int, prefix: str) -> str:
    pairs = [f"{name}={values[i]}" for name, values in chosen.items()]
    more = f' <a href="#{prefix}options">and {len(pairs) - BRIEF} more</a>'
    return codes(pairs[:BRIEF]) + more * (len(pairs) > BRIEF)


def seeds(section: Section) -> str:
    """Return means over the seeds of each configuration; nothing where none has several."""
    runs = section.runs
    groups = same_but_seeds(runs)
    if max(map(len, groups)) < 2:
        return ""
    scores = columns(section.kind, runs)
    ended = [[runs[i] for i in group if status(runs[i]) == "finished"] for group in groups]
    cells = [_means(score, ended) for score in scores]
    chosen = {k: v for k, v in differences(runs).items() if k not in SEEDS}
    rows = []
    for k, (group, whole) in enumerate(zip(groups, ended, strict=True)):
        names = ", ".join(runs[i].name for i in group)
        what = _pairs(chosen, group[0], section.prefix)
        what += f'<br><span class="note">{escape(names)}</span>' if what else escape(names)
        left = len(group) - len(whole)
        rows.append(
            f'<th scope="row">{what}</th>'
            + number(str(len(whole)), f"and {left} not finished" if left else "")
            + "".join(column[k] for column in cells)
            + number(_spread([run.rows[-1]["seconds"] for run in whole], "{:,.1f} s"))
        )
    head = ["configuration", "runs", *_titles(scores), "time"]
    return table("Means over seeds", head, rows, range(1, len(head)), "codes") + (
        '<p class="note">Finished runs that differ in init_key and rng_seed only: mean ± standard '
        "deviation over the runs (of the sample, n - 1).</p>"
    )


def _means(score: Score, groups: Sequence[Sequence[Run]]) -> list[str]:
    """Cells of a column, one for each group; the best mean is bold."""
    found = [[p for run in group if (p := score.of(run))] for group in groups]
    every = [[p.value for p in points if p.value is not None] for points in found]
    means = [statistics.fmean(values) for values in every if values]
    top = score.better(means) if len(groups) > 1 and means else None
    cells = []
    for group, points, values in zip(groups, found, every, strict=True):
        if not values:
            cells.append(number(score.absent if group else ABSENT))
            continue
        few = len(values) < len(group)
        notes = [f"{len(values)} of {len(group)} runs"] * few
        times = [point.seconds for point in points if math.isfinite(point.seconds)]
        if score.note == "time" and times:
            notes.append(f"after {_spread(times, '{:,.1f} s')}")
        best = statistics.fmean(values) == top
        cells.append(number(_spread(values, score.form), ", ".join(notes), best=best))
    return cells


def _spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation; of one value, the value."""
    if not values:
        return ABSENT
    mean = form.format(statistics.fmean(values))
    if len(values) < 2:
        return mean
    digits, _, unit = mean.partition(" ")
    spread = form.format(statistics.stdev(values)).partition(" ")[0]
    return f"{digits} ± {spread} {unit}".rstrip()


def options(runs: Sequence[Run]) -> str:
    """Return the table of options that differ."""
    chosen = differences(runs)
    if not chosen:
        return "<p>None: all runs have the same config.</p>"
    head = ["option", *(f"{key(i)}{escape(run.name)}" for i, run in enumerate(runs))]
    rows = [
        f'<th scope="row"><code>{escape(name)}</code></th>'
        + "".join(f"<td><code>{escape(value)}</code></td>" for value in values)
        for name, values in chosen.items()
    ]
    return table("Options that differ", head, rows)
