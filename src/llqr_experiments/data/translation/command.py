"""The command that prepares a corpus: its parser, progress bars, the summary."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Command:
    """A command `python -m MODULE prepare SOURCE --out FOLDER --merges N`.

    Attributes:
      module: its path.
      description: in a sentence.
      prepare: `(source, out, *, merges, track) -> stages that were run`.
      source: what it takes, in words.
      out: the folder by default.
      merges: byte pairs to merge by default.
      steps: what it does, for --help.
      url: of the corpus, if there is a sub-command `download`.
      download: `(folder, console)`, that sub-command.
    """

    module: str
    description: str
    prepare: Callable[..., Sequence[str]]
    source: str
    out: str
    merges: int
    steps: str
    url: str = ""
    download: Callable[[Path, Console], None] | None = None

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command line; return the exit status."""
        options = self._parser().parse_args(arguments)

        def run(console: Console) -> None:
            if options.command == "download" and self.download:
                self.download(options.out, console)
                return
            with progress(console) as track:
                ran = self.prepare(options.source, options.out, merges=options.merges, track=track)
            summarise(console, options.out, ran)

        return guarded(run)

    def _parser(self) -> argparse.ArgumentParser:
        prog = f"python -m {self.module}"
        parser = argparse.ArgumentParser(prog=prog, description=self.description)
        commands = parser.add_subparsers(dest="command", required=True)
        prepare = commands.add_parser("prepare", help=self.steps, description=self.steps)
        source = self.source.upper().replace(" ", "_")
        prepare.add_argument("source", metavar=source, help=self.source, type=Path)
        prepare.add_argument(
            "--out", type=Path, default=Path(self.out), help="default: %(default)s"
        )
        prepare.add_argument(
            "--merges",
            type=_positive,
            default=self.merges,
            help="byte pairs to merge, on both languages together; default: %(default)s",
        )
        if self.download:
            download = commands.add_parser("download", help=f"fetch {self.url}")
            download.add_argument(
                "--out", type=Path, default=Path("data"), help="default: %(default)s"
            )
        return parser


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
