"""What the commands that prepare a corpus share: the parser, progress bars, the summary."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llqr_experiments.data.translation.files import Track
from llqr_experiments.data.translation.recipe import LANGUAGES, SPLITS
from llqr_experiments.errors import RunError


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Track]:
    """Yield a `Track` that draws a bar for each thing it follows."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:

        def track(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
            return bars.track(items, total=total, description=description)

        yield track


def add_prepare(
    commands: Any, source: str, out: str, merges: int, help: str
) -> argparse.ArgumentParser:
    """Add the sub-command `prepare SOURCE --out FOLDER --merges N`."""
    prepare = commands.add_parser("prepare", help=help, description=help)
    prepare.add_argument("source", metavar=source.upper().replace(" ", "_"), help=source, type=Path)
    prepare.add_argument("--out", type=Path, default=Path(out), help="default: %(default)s")
    prepare.add_argument(
        "--merges",
        type=_positive,
        default=merges,
        help="byte pairs to merge, on both languages together; default: %(default)s",
    )
    return prepare


def summarise(console: Console, folder: Path, ran: Sequence[str]) -> None:
    """Print what a prepared folder holds."""
    console.print(f"ran: {', '.join(ran)}" if ran else "nothing to do: every file is whole")
    for split in SPLITS:
        pairs = (folder / f"{split}.{LANGUAGES[0]}").read_bytes().count(b"\n")
        console.print(f"{split}: {pairs:,} pairs")
    merges = (folder / "code").read_bytes().count(b"\n") - 1
    console.print(f"code: {merges:,} merges")
    console.print(f"{folder.absolute()} is ready; its folder work/ may be deleted", soft_wrap=True)


def guarded(command: Callable[[Console], None]) -> int:
    """Run a command; return its exit status, after printing an error that a user can mend."""
    try:
        command(Console())
    except RunError as error:
        # Not through rich: a path may look like markup, and is not to be wrapped.
        print(f"{error.title}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
