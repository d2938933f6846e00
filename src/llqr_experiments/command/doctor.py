"""What is wrong with a run: `python -m llqr_experiments.doctor outputs/<date>/<time>`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llqr_experiments.errors import ConfigError
from llqr_experiments.report.diagnosis import Finding, diagnose, figures
from llqr_experiments.report.runs import Run, read


def tell(run: Run) -> str:
    """Return what looks wrong with a run, what to try, and the figures that were looked at."""
    found = diagnose(run)
    parts = [_paragraph(number, finding) for number, finding in enumerate(found, 1)]
    if not found:
        parts = ["Nothing in the record looks wrong. docs/tuning.md says what else to try."]
    looked = "\n".join(f"  {name}: {value}" for name, value in figures(run))
    return "\n\n".join([f"{run.folder}: step {run.last()}", *parts, f"Looked at\n{looked}"])


def _paragraph(number: int, finding: Finding) -> str:
    return (
        f"{number}. {finding.what[0].upper()}{finding.what[1:]}.\n"
        f"   seen: {finding.figures}\n   try:  {finding.advice}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what is wrong with runs."""
    parser = argparse.ArgumentParser(
        prog="python -m llqr_experiments.doctor",
        description="Say what looks wrong with a run, from its record, and what to try.",
    )
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run")
    console = Console(highlight=False)
    for number, folder in enumerate(parser.parse_args(arguments).run):
        try:
            told = tell(read(folder))
        except ConfigError as error:
            Console(stderr=True).print(f"[bold red]Error:[/] {error}", soft_wrap=True)
            sys.exit(error.code)
        console.print("\n" * bool(number) + told, markup=False, soft_wrap=True)
