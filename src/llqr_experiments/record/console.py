"""What a person sees of a run: a progress bar, refit lines, a closing table."""

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import llqr
from llqr_experiments.files import names
from llqr_experiments.record.clock import Clock

T = TypeVar("T")

REASONS = {
    "nonfinite": "not finite",
    "inverted": "direction turned",
    "rejected": "objective not lower",
    "flat": "no curvature",
}
"""Why a block kept its old arrays, by the words of `llqr.STATUS`."""


SHOWN = ("loss", "relative error", "exact/damping", "exact/refused")
"""Of what training measures, besides accuracies."""


class Display:
    """A live bar on a terminal; lines every `report_freq` steps elsewhere.

    Args:
      total: steps of the run.
      report_freq: steps between lines where there is no terminal.
      quiet: show nothing.
    """

    def __init__(self, total: int, report_freq: int, *, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        self._total, self._report_freq = total, report_freq
        self._full = False
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, metrics="compiling")

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar; that the disk is full, once."""
        if any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT)):
            if self._full:
                return
            self._full = True
            text += " What else cannot be written for this reason is not told again."
        self.console.print(text, soft_wrap=True)

    def progress(self, step: int, rates: dict[str, float]) -> None:
        """Show training metrics measured at `step`."""
        known = {name.removeprefix("train "): value for name, value in rates.items()}
        metrics = "   ".join(
            f"{name.removeprefix('exact/')} {shown(name, value)}"
            for name, value in known.items()
            if name in SHOWN or "accuracy" in name
        )
        self._bar.update(self._task, completed=step, metrics=metrics)
        if not self.console.is_terminal and step % self._report_freq == 0:
            self.say(f"step {step:>6} of {self._total}   {metrics}")

    def evaluation(self, step: int, found: dict[str, float]) -> None:
        """Print what an evaluation found."""
        self._bar.update(self._task, completed=step)
        values = [f"{name} {shown(name, value)}" for name, value in found.items()]
        self.say(f"step {step:>6}   {'   '.join(values)}")

    def follow(self, items: Iterable[T], total: int, what: str, every: int) -> Iterator[T]:
        """Yield items with a bar of their own; without a terminal, with a line now and then."""
        task = self._bar.add_task(what, total=total, metrics="")
        for i, item in enumerate(items, 1):
            yield item
            self._bar.update(task, completed=i)
            if not self.console.is_terminal and i % every == 0:
                self.say(f"{what}: {i} of {total} batches")
        self._bar.remove_task(task)

    def refit(self, step: int, report: llqr.Report, seconds: float) -> None:
        """Print what a refit did."""
        guarded = Counter(b.status for b in report.blocks if b.status in REASONS)
        line = (
            f"step {step:>6}   refit {report.refits}: objective {report.objective_before:.4g} -> "
            f"{report.objective_after:.4g}, {seconds:.2f} s, {guarded.total()} of "
            f"{len(report.blocks)} blocks guarded"
        )
        if guarded:
            reasons = [f"{REASONS[word]}: {n}" for word, n in guarded.items()]
            line += " [yellow](" + ", ".join(reasons) + ")[/]"
        if any(b.status == "indefinite" for b in report.blocks):
            line += ", [yellow]curvature along the step negative: more damping[/]"
        self.say(line)

    def closing(self, results: dict[str, str], clock: Clock, folder: Path) -> None:
        """Print the closing table."""
        seconds, total = clock.seconds, clock.elapsed()
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in results.items():
            table.add_row(name, value)
        split = "   ".join(f"{name} {value:.1f} s" for name, value in _largest_first(seconds))
        other = total - sum(seconds.values())
        table.add_row("time", f"{total:.1f} s:   {split}   other {max(other, 0):.1f} s")
        running = sum(seconds[name] for name in ("training", "refit", "data", "logging")) or 1.0
        shares = (f"{name} {100 * seconds[name] / running:.1f} %" for name in ("data", "logging"))
        table.add_row("waiting", f"of the time of training and refits: {', '.join(shares)}")
        table.add_row("files", ", ".join(names(folder)))
        self.console.print()
        self.console.print(table)
        self.console.print(f"[bold]in[/]     {folder}", soft_wrap=True)


def _largest_first(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])


def shown(name: str, value: float) -> str:
    """A measured value as people write it: an accuracy in percent, others with four digits.

    >>> shown("test accuracy", 97.5), shown("test loss", 0.5), shown("test relative error", 2e-5)
    ('97.50 %', '0.5000', '2.000e-05')
    """
    if "accuracy" in name:
        return f"{value:.2f} %"
    if name == "exact/refused":
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.3e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def counts(sizes: dict[str, int]) -> str:
    """Sizes by name: "1,438 train, 359 test"."""
    return ", ".join(f"{size:,} {name}" for name, size in sizes.items())
