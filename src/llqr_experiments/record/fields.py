"""The picture of a solution in two variables: what it is, what the network says, how far apart."""

from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from llqr_experiments.files import replacing

FILE = "solution.png"
"""In the folder of a run."""
SPAN = 1e-4
"""Least error with a colour of its own, by the largest."""


def draw(
    x: np.ndarray, exact: np.ndarray, found: np.ndarray, axes: tuple[str, ...], title: str
) -> Figure:
    """Return the solution, the network and the error between them, on a logarithmic scale.

    Args:
      x: points of a whole grid, (n, 2), in any order.
      exact: the solution there, (n,).
      found: by the network.
      axes: names of the two coordinates.
      title: above the picture.
    """
    across, up = (np.unique(column) for column in x.T)
    order = np.lexsort(x.T)  # by the second coordinate, then by the first
    shape = len(up), len(across)
    exact, found = exact[order].reshape(shape), found[order].reshape(shape)
    error = np.abs(found - exact)
    relative = np.linalg.norm(error) / max(np.linalg.norm(exact), np.finfo(float).tiny)
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    low, high = exact.min(), exact.max()
    largest = float(error.max())
    panels = (
        ("solution", exact, {"vmin": low, "vmax": high, "cmap": "viridis"}),
        ("network", found, {"vmin": low, "vmax": high, "cmap": "viridis"}),
        (
            f"|error|; {relative:.2e} of the solution in L2",
            np.maximum(error, SPAN * largest),
            {"norm": LogNorm(SPAN * largest, largest), "cmap": "magma"} if largest > 0 else {},
        ),
    )
    for place, (name, values, style) in zip(figure.subplots(1, 3), panels, strict=True):
        drawn = place.pcolormesh(across, up, values, shading="nearest", rasterized=True, **style)
        figure.colorbar(drawn, ax=place)
        place.set(xlabel=axes[0], ylabel=axes[1], aspect="auto")
        place.set_title(name, fontsize=10)
    return figure


def write(figure: Figure, folder: Path) -> None:
    """Write the picture into the folder of a run."""
    with replacing(folder / FILE) as file:
        figure.savefig(file, dpi=130, format="png")
