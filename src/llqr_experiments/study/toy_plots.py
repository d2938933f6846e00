"""The picture of a toy problem: paths over the function's contours, and f over iterations."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from llqr_experiments.study.courses import Course
from llqr_experiments.study.toy_functions import Toy

# The exact methods take the same steps: a broad line under a dashed one shows both.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#e3a43b", "linewidth": 5, "marker": "o", "markersize": 8, "alpha": 0.9},
    {"color": "#1d1d1d", "linewidth": 1.4, "linestyle": "--", "marker": "o", "markersize": 3},
    {"color": "#c8452c", "linewidth": 1.3},
    {"color": "#2f6fb0", "linewidth": 1.3},
)
GRID = 301
FLOOR = 1e-13  # below, f - minimum is rounding


def paths(toy: Toy, courses: dict[str, Course], title: str, out: Path) -> None:
    """Draw the paths on contours of log f in the first two variables, and f over iterations.

    Args:
      toy: the function; variables after the second are drawn at their values at the minimum.
      courses: method -> what it did, in the order of drawing.
      title: above the picture.
      out: PNG to write.
    """
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    start = next(iter(courses.values())).thetas[0]
    figure.colorbar(_contours(left, toy, start), ax=left, label="log10(f - minimum)",
                    pad=0.01, format="%.1f")  # fmt: skip
    for style, (name, course) in zip(STYLES, courses.items(), strict=False):
        points = np.array(course.thetas)
        left.plot(points[:, 0], points[:, 1], label=name, **style)
        gaps = np.maximum(np.array(course.values) - toy.value, FLOOR)
        right.plot(np.arange(len(gaps)) + 1, gaps, **style)
    left.plot(*start[:2], "s", color="white", markeredgecolor="black", markersize=8, label="start")
    left.plot(*toy.minimum[:2], "*", color="white", markeredgecolor="black", markersize=15,
              label="minimum")  # fmt: skip
    first = next(iter(courses.values())).values[0] - toy.value
    # A method that diverges leaves the picture: its numbers are in the table.
    least = min(np.nanmin(course.values) for course in courses.values()) - toy.value
    right.set(ylim=(0.3 * max(least, FLOOR), 100 * max(first, 1.0)))
    right.set(xscale="log", yscale="log", xlabel="iteration + 1", ylabel="f - minimum")
    right.spines[["top", "right"]].set_visible(False)
    right.grid(alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, ncols=6,
                  loc="outside lower center")  # fmt: skip
    figure.savefig(out, dpi=130)


def _contours(axes: Any, toy: Toy, start: np.ndarray) -> Any:
    """Draw log-spaced contours in the toy's view, widened to show the start."""
    views = [
        (min(low, at - 0.05 * (high - low)), max(high, at + 0.05 * (high - low)))
        for (low, high), at in zip(toy.view, start[:2], strict=True)
    ]
    x, y = (np.linspace(*view, GRID) for view in views)
    with jax.enable_x64(True):
        row = jax.vmap(lambda u, v: toy(jnp.array([u, v, *toy.minimum[2:]])), (0, None))
        at = jax.jit(jax.vmap(row, (None, 0)))
        gaps = np.asarray(at(jnp.array(x), jnp.array(y))) - toy.value
    low, high = np.log10(np.maximum(np.percentile(gaps, [0.2, 100]), 1e-6))
    gaps, levels = np.clip(gaps, 10**low, 10**high), np.logspace(low, high, 24)
    drawn = axes.contourf(x, y, np.log10(gaps), np.log10(levels), cmap="GnBu_r")
    axes.contour(x, y, np.log10(gaps), np.log10(levels)[4:], colors="white", linewidths=0.3)
    axes.set(xlim=views[0], ylim=views[1], xlabel="theta 1", ylabel="theta 2")
    return drawn
