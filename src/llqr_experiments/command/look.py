"""A look into a checkpoint: `python -m llqr_experiments.checkpoint outputs/<date>/<time>`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from llqr_experiments.errors import ConfigError, DataError
from llqr_experiments.run.checkpoint import BEST, LATEST, find, read, steps


def describe(run: Path, step: int | None = None, kind: str = LATEST) -> Table:
    """Return what is in a checkpoint, as a table; the newest one if no step is given."""
    folder = find(run)
    have = steps(folder, kind)
    if not have or (step is not None and step not in have):
        raise ConfigError(f"{folder / kind} has the steps {have}, not {step}.")
    step = have[-1] if step is None else step
    arrays, meta = read(folder, step, kind)
    facts = ", ".join(
        f"{name} {value}" for name, value in meta.items() if isinstance(value, int | float | str)
    )
    table = Table(title=f"{folder / kind / str(step)}\n{facts}", title_justify="left", box=None)
    for name in ("array", "shape", "dtype", "norm", "min", "max"):
        table.add_column(name, justify="left" if name == "array" else "right")
    for name, array in arrays.items():
        numbers = array.astype(np.float64)
        extremes = (numbers.min(), numbers.max()) if array.size else (np.nan, np.nan)
        figures = (np.linalg.norm(numbers.ravel()), *extremes)
        shape = "x".join(map(str, array.shape)) or "scalar"
        table.add_row(name, shape, str(array.dtype), *(f"{x:.4g}" for x in figures))
    size = sum(array.nbytes for array in arrays.values())
    table.caption = f"{len(arrays)} arrays, {size / 2**20:.2f} MiB, all as they were written"
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what is in a checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m llqr_experiments.checkpoint", description="Look into a checkpoint."
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", type=int, help="which one; the newest by default")
    parser.add_argument("--best", action="store_true", help="the one with the best evaluation")
    given = parser.parse_args(arguments)
    try:
        table = describe(given.run, given.step, BEST if given.best else LATEST)
    except (ConfigError, DataError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {error}", soft_wrap=True)
        sys.exit(error.code)
    Console(highlight=False).print(table)
