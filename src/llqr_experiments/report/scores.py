"""What a run ends with, by kind: the columns of tables, and a sentence about the best."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from llqr_experiments.record import measures
from llqr_experiments.report.runs import ABSENT, Point, Run

Pick = Callable[..., Any]
"""`max` or `min`: which of several values is the best."""


class Score(NamedTuple):
    """A number for each run.

    Attributes:
      title: of its column.
      of: run -> the number, where it was reached.
      better: `max` or `min`.
      form: of the number.
      note: what is told besides: the "step" at which it was logged, or the "time"; "" for nothing.
      absent: what stands for none.
    """

    title: str
    of: Callable[[Run], Point | None]
    better: Pick
    form: str
    note: str = ""
    absent: str = ABSENT


class Metric(NamedTuple):
    """A metric of the record, and which values of a run count: "final", "best"."""

    name: str
    better: Pick
    form: str
    ends: tuple[str, ...] = ("final", "best")


PERCENT, PLAIN = "{:.2f} %", "{:.4f}"
_ACCURACY, _LOSS = Metric("test accuracy", max, PERCENT), Metric("test loss", min, PLAIN)

_NUMBERS = (
    Metric("test relative error", min, "{:.3g}"),
    Metric("train loss", min, "{:.3g}", ("final",)),
)

METRICS: dict[str, tuple[Metric, ...]] = {
    "images": (_ACCURACY, _LOSS),
    "operations": (_ACCURACY, _LOSS),
    "text": (
        Metric("test perplexity", min, "{:.2f}", ("final",)),
        Metric("valid perplexity", min, "{:.2f}"),
        Metric("valid loss", min, PLAIN, ("final",)),
        Metric("test accuracy", max, PERCENT, ("final",)),
    ),
    "translation": (
        Metric("test bleu", max, "{:.2f}", ("final",)),
        Metric("valid bleu", max, "{:.2f}", ("best",)),
        Metric("valid bleu_sampled", max, "{:.2f}", ("best",)),
        Metric("valid loss", min, PLAIN),
        Metric("valid_ppl", min, "{:.2f}", ("final",)),
        Metric("valid token_accuracy", max, PERCENT, ("final",)),
    ),
    "equations": _NUMBERS,
    "tables": _NUMBERS,
    "other": (),
}
"""What runs are compared by. The first two are named in the sentence above the table."""

WRITTEN = {
    "bleu_sampled": "BLEU of a sample",
    "bleu": "BLEU",
    "_ppl": " perplexity",
    "token_accuracy": "token accuracy",
}
"""Names of the record that people write in another way."""

GROKKED = measures.first_step("test accuracy", 95)
"""What operations are told by, even where no run has reached it."""


def columns(kind: str, runs: Sequence[Run]) -> list[Score]:
    """Return the columns that some run has a value for, milestones last.

    Args:
      kind: of all runs.
      runs: to look into.
    """
    shown = [score for metric in METRICS[kind] for score in _ends(metric)]
    return [s for s in shown if any(map(s.of, runs))] + milestones(kind, runs)


def _ends(metric: Metric) -> Iterable[Score]:
    found = {
        "final": Score(f"final {_title(metric.name)}", partial(final, name=metric.name),
                       metric.better, metric.form),
        "best": Score(f"best {_title(metric.name)}", partial(_best, metric=metric),
                      metric.better, metric.form, "step"),
    }  # fmt: skip
    return (found[end] for end in metric.ends)


def _title(name: str) -> str:
    """As people write it."""
    for recorded, written in WRITTEN.items():
        name = name.replace(recorded, written)
    return name


def milestones(kind: str, runs: Sequence[Run]) -> list[Score]:
    """Return a column for each milestone: its first step, and the time to it."""
    default = [GROKKED] if kind == "operations" else []
    names = sorted({name for run in runs for name in run.names() if measures.milestone(name)})
    return [
        Score(f"steps to {measures.milestone(name)}", partial(reached, name=name), min,
              "{:,.0f}", "time", "not reached")
        for name in names or default
    ]  # fmt: skip


def reached(run: Run, name: str) -> Point | None:
    """Return a milestone's step as a value, with the seconds to it.

    A run that goes on from another has its milestones, but not the time to them: NaN.
    """
    points = [point for point in run.series(name) if point.value is not None]
    if not points:
        return None
    first = points[0]
    seconds = first.seconds if first.step == first.value else float("nan")
    return Point(int(first.value or 0), seconds, first.value)


def final(run: Run, name: str) -> Point | None:
    """Return the last value that was logged, None if it is not finite."""
    points = run.series(name)
    return points[-1] if points and points[-1].value is not None else None


def _best(run: Run, metric: Metric) -> Point | None:
    points = [p for p in run.series(metric.name) if p.value is not None]
    return metric.better(points, key=lambda p: p.value, default=None)


def lead(kind: str, runs: Sequence[Run]) -> str:
    """Say what came out, in a sentence or two."""
    found = []
    for metric in METRICS[kind]:
        ends = {r.name: end.value for r in runs if (end := final(r, metric.name)) is not None}
        values = [value for value in ends.values() if value is not None]
        if not values or len(found) == 2:
            continue
        top = metric.better(values)
        unit = " %" if metric.form == PERCENT else ""
        title, winners = _title(metric.name), ", ".join(n for n, v in ends.items() if v == top)
        word = "Highest" if metric.better is max else "Lowest"
        text = f"{word} final {title}: {top:.4g}{unit} ({winners})."
        found.append(text if len(runs) > 1 else f"Final {title}: {top:.4g}{unit}.")
    found += [_first(score, runs) for score in milestones(kind, runs)]
    return " ".join(filter(None, found)) or "Nothing was evaluated."


def _first(milestone: Score, runs: Sequence[Run]) -> str:
    """Who reached a milestone first."""
    steps = {run.name: p.step for run in runs if (p := milestone.of(run)) is not None}
    if not steps:
        return ""
    least, what = min(steps.values()), milestone.title.removeprefix("steps to ")
    winners = ", ".join(name for name, step in steps.items() if step == least)
    return f"First with {what}: step {least:,}" + (f" ({winners})." if len(runs) > 1 else ".")
