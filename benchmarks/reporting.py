"""What benchmarks share: arguments, the environment, medians with their spread, tables, JSON."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MEBIBYTE = 2**20


def environment(**more: Any) -> dict[str, Any]:
    """Return where the figures were measured."""
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **more,
    }


def spread(values: Iterable[float]) -> list[float]:
    """Return [median, smallest, largest]."""
    values = list(values)
    return [f(values) for f in (statistics.median, min, max)]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    table = Table(title=title)
    for column, value in rows[0].items():
        table.add_column(column, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    Console(width=160).print(table)


def write(name: str, environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"{name}.json"
    out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")
    print(f"written to {out}")


def ask(
    description: str, names: Iterable[str], *, repeats: int, quick: str
) -> tuple[list[str], int, bool]:
    """Return what the command line asks for: some of the names, repeats, and whether it is quick.

    Args:
      description: of the benchmark.
      names: what can be measured; all of it, if none is asked for.
      repeats: unless it says otherwise; one where it is quick.
      quick: what a quick benchmark is.
    """
    known = list(names)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", default=known, help=", ".join(known))
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--quick", action="store_true", help=quick)
    given = parser.parse_args()
    if unknown := set(given.names) - set(known):
        parser.error(f"unknown {sorted(unknown)}: choose from {', '.join(known)}")
    return given.names, 1 if given.quick else given.repeats, given.quick


def _cell(value: Any) -> str:
    if isinstance(value, list):
        middle, low, high = value
        return f"{middle:.2f} ({low:.2f} - {high:.2f})"
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
