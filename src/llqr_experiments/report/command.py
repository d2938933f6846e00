"""Files and command line of reports."""

import argparse
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from llqr_experiments.errors import ConfigError
from llqr_experiments.files import replacing
from llqr_experiments.report.charts import NAMES, pictures
from llqr_experiments.report.page import page
from llqr_experiments.report.runs import FILES, Run, named, read
from llqr_experiments.report.sections import KINDS, sections


def write(runs: Sequence[Path], out: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Write the report of runs, and its PNGs into a folder beside it that has its name.

    A folder that exists but cannot be read as a run is left out, and the page says so.

    Args:
      runs: their folders; one given twice counts once.
      out: the page, *.html.
      say: is told why a folder is left out.

    Returns:
      The page.

    Raises:
      ConfigError: a folder does not exist, none is a run, or `out` is no name of a page.
    """
    if not runs:
        raise ConfigError("a report needs a run.")
    if out.suffix not in (".html", ".htm") or out.is_dir():
        raise ConfigError(f"{out} is no name of a page: it must end with .html.")
    found, left_out = _read(runs)
    for reason in left_out:
        say(reason)
    parts = sections(named(found))
    drawn = [
        [(picture, _png(picture.figure)) for picture in pictures(part.kind, part.runs)]
        for part in parts
    ]
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("", *(f"{kind}-" for kind in KINDS)):  # of an earlier report
        for name in NAMES:
            (folder / f"{prefix}{name}.png").unlink(missing_ok=True)
    for part, some in zip(parts, drawn, strict=True):
        for picture, png in some:
            with replacing(folder / f"{part.prefix}{picture.name}.png") as file:
                file.write(png)
    # What is no text in a name or a translation (half of a surrogate pair) becomes "?".
    with replacing(out) as file:
        file.write(page(parts, drawn, left_out).encode(errors="replace"))
    return out


def _read(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Runs, and why others are none."""
    found, left_out = [], []
    for folder in dict.fromkeys(folders):
        if not folder.exists():
            raise ConfigError(f"there is no folder {folder}.")
        try:
            found.append(read(folder))
        except ConfigError as error:
            left_out.append(str(error))
    if not found:
        raise ConfigError("\n".join(left_out))
    return found, left_out


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report, and say where it is.

    Args:
      arguments: of the command line, without the program's name; None reads them from there.

    Returns:
      The exit status: 2 where no folder is a run.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llqr_experiments.report", description="Compare runs on one HTML page."
    )
    parser.add_argument("run", nargs="+", type=Path, help=f"folder with {', '.join(FILES)}")
    parser.add_argument(
        "--out", type=Path, help="the page; default: report.html, in the run's folder if it is one"
    )
    options = parser.parse_args(arguments)
    default = options.run[0] if len(options.run) == 1 else Path()
    errors = Console(stderr=True, highlight=False)

    def complain(word: str, color: str, text: str) -> None:
        errors.print(word, style=f"bold {color}", end=" ")
        errors.print(text, markup=False, soft_wrap=True)

    try:
        page_name = options.out or default / "report.html"
        out = write(options.run, page_name, partial(complain, "Left out:", "yellow"))
    except (ConfigError, OSError) as error:
        complain("Error:", "red", str(error))
        return error.code if isinstance(error, ConfigError) else 1
    console = Console(highlight=False)
    console.print("Report:", style="bold", end=" ")
    console.print(f"{out} (pictures in {out.with_suffix('')}/)", markup=False, soft_wrap=True)
    return 0
