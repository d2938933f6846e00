"""Runs side by side, several seeds a curve: a picture and a table in Markdown.

    uv run python benchmarks/curves.py out.png "plain=outputs/a outputs/b" "LLQR=outputs/c"
    uv run python benchmarks/curves.py out.png --log ...    # steps on a logarithmic axis

A curve is the mean over runs of equal length, with the range of its seeds. The table has mean and
range of the last value of each metric, of the first steps with an accuracy, and of the seconds of
training until then, without compilation and evaluation.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

COLORS = ("#8aa6c1", "#c8452c", "#e3a43b", "#5b8c5a")
PANELS = ("train loss", "test loss", "test accuracy")
WINDOW = 5  # logged values in a running mean of the training loss


def series(run: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [(row["step"], row[name]) for row in rows if name in row]
    if not found:
        raise SystemExit(f"{run} has no {name!r} in its metrics.jsonl: curves are of {PANELS}.")
    steps, values = map(np.asarray, zip(*found, strict=True))
    if name == "train loss" and len(values) > WINDOW:
        kernel = np.ones(WINDOW) / WINDOW
        steps, values = steps[WINDOW - 1 :], np.convolve(values, kernel, "valid")
    return steps, values


def draw(groups: dict[str, list[Path]], out: Path, log: bool) -> None:
    """One panel for each metric."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for color, (label, runs) in zip(COLORS, groups.items(), strict=False):
            found = [series(run, name) for run in runs]
            steps, values = found[0][0], np.stack([v for _, v in found])
            axes.plot(steps, values.mean(0), color=color, label=label)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        axes.set(title=name, xlabel="step", yscale="linear" if "acc" in name else "log")
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, ncols=len(groups), loc="outside lower center")
    figure.savefig(out, dpi=130)


def summary(run: Path) -> dict[str, float]:
    """What a run ended with."""
    meta: dict[str, Any] = json.loads((run / "meta.json").read_text())
    found = {k: v for k, v in meta["results"].items() if k.startswith(("test", "first"))}
    rows = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    refits, last = [row["step"] for row in rows if "refit steps" in row], rows[-1]["step"]

    def seconds(step: float) -> float:
        """Of steps and refits until then, all of one kind alike."""
        done = sum(refit < step for refit in refits) / max(len(refits), 1)
        return meta["time"]["training"] * step / last + meta["time"].get("refit", 0.0) * done

    for name in [k for k in found if k.startswith("first")]:
        found[name.replace("first step", "seconds to first step")] = seconds(found[name])
    return found | {"seconds of steps and refits": seconds(last)}


def table(groups: dict[str, list[Path]]) -> str:
    """Mean and range over the seeds, in Markdown."""
    found = {label: [summary(run) for run in runs] for label, runs in groups.items()}
    names = list(dict.fromkeys(k for runs in found.values() for run in runs for k in run))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for label, runs in found.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs if name in run]
            missing = f" in {len(values)} of {len(runs)}" if len(values) < len(runs) else ""
            cells.append(_spread(values) + missing if values else "never")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.4g} ({min(values):.4g} - {max(values):.4g})"


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description="Runs side by side.")
    parser.add_argument("out", type=Path)
    parser.add_argument("groups", nargs="+", help='"label=run run ..."')
    parser.add_argument("--log", action="store_true", help="logarithmic steps")
    arguments = parser.parse_args()
    groups = {}
    if len(arguments.groups) > len(COLORS):
        raise SystemExit(f"at most {len(COLORS)} curves, got {len(arguments.groups)}.")
    for group in arguments.groups:
        label, _, runs = group.partition("=")
        groups[label] = [Path(run) for run in runs.split()]
    draw(groups, arguments.out, arguments.log)
    print(table(groups))


if __name__ == "__main__":
    main()
