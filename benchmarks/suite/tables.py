"""The report's tables, in Markdown."""

import math
import statistics
from collections.abc import Iterable, Sequence

from . import agenda
from .protocol import THRESHOLD, Tier
from .statistics import geometric_mean, interval, margin, verdict
from .summary import REFERENCE, Entry, Result, generalisation, ratios

AXES = {
    "gradients": "gradient evaluations",
    "step": "steps",
    "seconds": "seconds",
    "all seconds": "seconds with compilation",
}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, numbers to the right.

    >>> print(markdown(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|--:|
    | x | 1 |
    """
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def means(results: list[Result]) -> str:
    """Return geometric means of costs by those of the reference, sorted by gradients."""
    columns = {axis: ratios(results, axis, REFERENCE) for axis in AXES}
    names = sorted(columns["gradients"], key=lambda name: columns["gradients"][name][0])
    rows = [
        [name, *(f"{columns[axis][name][0]:.2f}" for axis in AXES),
         str(columns["gradients"][name][1])]
        for name in names
    ]  # fmt: skip
    return markdown(["method", *AXES.values(), "workloads x targets"], rows)


def at_the_end(results: list[Result]) -> str:
    """Return losses at the end by those of the reference, and accuracies; sorted by test loss."""
    found = generalisation(results, REFERENCE)
    rows = []
    for name in sorted(found, key=lambda name: geometric_mean(found[name]["test"])):
        row = found[name]
        train, test = (geometric_mean(row[column]) for column in ("train", "test"))
        cells = [name, f"{train:.3f}", f"{test:.3f}", str(len(row["test"])), "", "", ""]
        if row["accuracy"]:
            accuracy, gained = (100 * statistics.mean(row[c]) for c in ("accuracy", "gained"))
            cells[-3:] = f"{accuracy:.1f}", f"{gained:+.1f}", str(len(row["accuracy"]))
        rows.append(cells)
    head = ["method", "training loss", "test loss", "workloads", "test accuracy, %",
            f"above {REFERENCE}'s", "workloads with classes"]  # fmt: skip
    return markdown(head, rows)


def costs(result: Result, axis: str) -> str:
    """Return what each target costs: the median over seeds, and its interval."""
    names = list(result.fixed["targets"])
    rows = []
    for method in result.entries:
        cells = [_cell(result.costs(method, target, axis)) for target in names]
        rows.append([method, *cells])
    head = [f"{name}: {result.fixed['targets'][name]:g}" for name in names]
    return markdown([AXES[axis], *head], rows)


def ends(result: Result) -> str:
    """Return the losses at the end, tuned and not, sorted."""
    rows = []
    classes = any(entry.accuracies() for entry in result.entries.values())
    order = sorted(result.entries, key=lambda name: _middle(result.ends(name).values()))
    for name in order:
        entry = result.entries[name]
        trials = list(entry.runs.values())
        usual = [agenda.final(t, result.measure) for t in entry.usual.values()]
        rows.append(
            [
                name,
                _setting(entry),
                _spread(list(result.ends(name).values())),
                _spread([_last(t, "train") for t in trials]),
                _spread([_last(t, "test") for t in trials]),
                *([_percent(entry.accuracies())] if classes else []),
                _spread(usual) if usual else "",
                f"{_median(entry.last('gradients')):,.0f}",
                f"{entry.pace * _median(entry.last('gradients')):.2g}",
                f"{entry.compilation:.1f}",
                f"{_median(t['memory'] for t in trials) / 2**20:.1f}",
            ]
        )
    head = ["method", "rate", f"{result.measure} loss", "train", "test",
            *(["test accuracy, %"] if classes else []), "untuned", "gradients", "seconds",
            "compilation, s", "memory, MiB"]  # fmt: skip
    return markdown(head, rows)


def wins(results: list[Result], method: str, tier: Tier) -> str:
    """Return a method against each other one: ahead, level or behind, by the protocol's rule."""
    others = list(dict.fromkeys(n for r in results for n in r.entries if n != method))
    rows = []
    for result in results:
        if method not in result.entries:
            continue
        mine, row = result.ends(method), [result.name]
        for other in others:
            if other not in result.entries:
                row.append("")
                continue
            value = margin(mine, result.ends(other))
            row.append(f"{verdict(value)} ({value:+.1f})")
        rows.append(row)
    caption = (
        f"Loss at the end, {tier.seeds} seeds: mean log ratio x sqrt(n) / standard deviation; "
        f"ahead or behind where it is beyond {THRESHOLD:g}."
    )
    return f"{markdown([method + ' against', *others], rows)}\n\n{caption}"


def count(results: list[Result], method: str) -> dict[str, int]:
    """Return how often a method is ahead of, level with and behind others."""
    found = {"ahead": 0, "level": 0, "behind": 0}
    for result in results:
        if method in result.entries:
            for other in result.entries:
                if other != method:
                    found[verdict(margin(result.ends(method), result.ends(other)))] += 1
    return found


def _setting(entry: Entry) -> str:
    rate = "" if entry.method.rate is None else f"{entry.setting.rate:g}"
    rate += ", at the end of the grid" if entry.edge else ""
    if entry.setting.alternative is None:
        return rate
    other = entry.method.alternatives[entry.setting.alternative]
    return f"{rate} {', '.join(f'{k} {v}' for k, v in other.items())}"


def _last(trial: dict, measure: str) -> float:
    return agenda.final(trial, measure)


def _middle(values: Iterable[float]) -> float:
    return statistics.median_high(list(values))


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def _spread(values: list[float]) -> str:
    failed = sum(math.isinf(v) for v in values)
    if failed == len(values):
        return "diverged"
    kept = [v for v in values if math.isfinite(v)]
    spread = statistics.stdev(kept) if len(kept) > 1 else 0.0
    note = f", {failed} diverged" if failed else ""
    return f"{statistics.mean(kept):.4g} ± {spread:.2g}{note}"


def _percent(shares: list[float]) -> str:
    """Return shares in percent, nothing where none was measured."""
    values = [100 * share for share in shares]
    if not values:
        return ""
    return (
        f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"
    )


def _cell(values: list[float]) -> str:
    middle, low, high = interval(values, lambda x: float(sorted(x)[len(x) // 2]))
    reached = sum(map(math.isfinite, values))
    if math.isinf(middle):
        return f"not reached ({reached} of {len(values)})"
    top = "∞" if math.isinf(high) else f"{high:.3g}"
    return f"{middle:.3g} ({low:.3g} - {top})"
