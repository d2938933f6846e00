"""The study's table and curves."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from methods import is_ours
from rich.table import Table

PICTURES = Path(__file__).parent.parent / "docs" / "images"
ERRORS = 2.0
"""Standard errors of a difference of means above which it counts."""

Row = dict[str, Any]


def last(row: Row, key: str) -> list[float]:
    """Return the values of all seeds at the end."""
    return [points[-1][key] for points in row["runs"].values()]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Return mean and standard deviation, 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def margin(row: Row, other: Row, key: str = "loss") -> float:
    """Return by how many standard errors of the difference a row's mean is below another's."""
    (a, s), (b, t) = (mean_and_spread(last(r, key)) for r in (row, other))
    error = (s**2 / len(row["runs"]) + t**2 / len(other["runs"])) ** 0.5
    return (b - a) / error if error > 0 else 0.0


def verdict(row: Row, peers: list[Row]) -> str:
    """Say whether a row is ahead of the best of its peers, which has the lowest mean."""
    peers = [peer for peer in peers if np.isfinite(last(peer, "loss")).all()]
    if not peers or not np.isfinite(last(row, "loss")).all() or len(row["runs"]) < 2:
        return ""
    best = min(peers, key=lambda peer: statistics.mean(last(peer, "loss")))
    errors = margin(row, best)
    if abs(errors) <= ERRORS:
        return f"level with {best['method']}"
    return f"{'ahead of' if errors > 0 else 'behind'} {best['method']}, {abs(errors):.0f} s.e."


def table(name: str, rows: list[Row]) -> Table:
    """Return the table that a person reads, sorted by training loss."""
    seeds = sorted({len(row["runs"]) for row in rows})
    out = Table(
        title=f"{name}: after {rows[0]['runs']['0'][-1]['step']} steps, seeds: "
        f"{', '.join(map(str, seeds))}; mean ± standard deviation",
        caption="Against the best method that is not LLQR; a difference counts above "
        f"{ERRORS:g} standard errors.",
    )
    columns = ("method", "rate", "training loss", "test loss", "gradients", "seconds",
               "step / plain step", "training loss against the others")  # fmt: skip
    for column in columns:
        out.add_column(column, justify="left" if column in (columns[0], columns[-1]) else "right")
    peers = [row for row in rows if not is_ours(row["method"])]
    for row in sorted(rows, key=lambda row: statistics.mean(last(row, "loss"))):
        ours = is_ours(row["method"])
        out.add_row(
            row["method"],
            f"{row['rate']:g}",
            "{:.4g} ± {:.2g}".format(*mean_and_spread(last(row, "loss"))),
            "{:.4g} ± {:.2g}".format(*mean_and_spread(last(row, "test"))),
            f"{statistics.mean(last(row, 'gradients')):,.0f}",
            f"{statistics.mean(last(row, 'seconds')):.1f}",
            f"{row['cost']['ratio']:.2f}",
            verdict(row, peers) if ours else "",
        )
    return out


def draw(name: str, rows: list[Row]) -> None:
    """Draw the training loss against steps, gradient evaluations and seconds."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(f"{name}: mean over seeds, tuned learning rates")
    axes = figure.subplots(1, 3, sharey=True)
    for row in rows:
        runs = list(row["runs"].values())
        if len({len(points) for points in runs}) > 1:
            continue  # one has diverged
        style = {"lw": 2.2, "ls": "-"} if is_ours(row["method"]) else {"lw": 1.2, "ls": "--"}
        losses = np.mean([[p["loss"] for p in points] for points in runs], axis=0)
        for axis, key in zip(axes, ("step", "gradients", "seconds"), strict=True):
            places = np.mean([[p[key] for p in points] for points in runs], axis=0)
            axis.plot(places, losses, label=row["method"], **style)
    labels = ("steps", "gradient evaluations (training batches)", "seconds")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xlabel=label, yscale="log", xscale="linear" if label == "steps" else "log")
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="training loss")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=4,
                  loc="outside lower center", fontsize=8)  # fmt: skip
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"study-{name}.png", dpi=120)
