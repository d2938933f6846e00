"""Text in tables: a dataset that Hugging Face's `datasets` saved, or the Parquet files of one.

  saved      dataset_dict.json, and a folder per split with state.json and Arrow files
  parquet    <split>-00000-of-00002.parquet and so on

Rows are read one batch at a time. A row that does not end in a line end gets one: so the empty
rows of WikiText are empty lines, where its files have lines of one space.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llqr_experiments.data.lines import Lines, TextFile, split
from llqr_experiments.data.optional import require
from llqr_experiments.errors import DataError

COLUMN = "text"
"""The column that is read."""


def saved(folder: Path) -> dict[str, Lines]:
    """Return split -> its text for a folder that `DatasetDict.save_to_disk` wrote.

    Raises:
      DataError: a file is missing or cannot be read.
    """
    found = {}
    for name in _field(folder / "dataset_dict.json", "splits"):
        entries = _field(folder / name / "state.json", "_data_files")
        found[name] = _lines([folder / name / entry["filename"] for entry in entries])
    return found


def parquet(folder: Path) -> dict[str, Lines]:
    """Return split -> its text for the Parquet files of a folder; empty if it has none.

    Raises:
      DataError: a file cannot be read.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*-*-of-*.parquet")):
        files.setdefault(path.name.rsplit("-", 3)[0], []).append(path)
    return {name: _lines(paths) for name, paths in files.items()}


def _field(path: Path, name: str) -> Any:
    """Return an entry of a JSON file."""
    try:
        return json.loads(path.read_bytes())[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path.absolute()}: expected JSON with an entry {name!r}, as save_to_disk of "
            f"`datasets` writes it ({error}). Save the dataset again."
        ) from error


def _lines(paths: list[Path]) -> Lines:
    """Return the text of Arrow or Parquet files, one after the other."""
    texts = [TextFile(path) for path in paths]
    contents = " ".join(text.digest() for text in texts)
    return Lines(
        size=sum(text.size() for text in texts),
        digest=hashlib.sha256(f"{COLUMN} {contents}".encode()).hexdigest(),
        read=functools.partial(_read, paths),
    )


def _read(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for number, row in enumerate(_rows(path)):
            text = row if number else row.removeprefix("\ufeff")  # of the file it was made from
            yield from split(text if text.endswith("\n") else f"{text}\n")


def _rows(path: Path) -> Iterator[str]:
    """Return the texts in the rows of a file.

    Raises:
      DataError: it cannot be read, or has no such column of strings.
    """
    arrow = require("pyarrow", extra="text", reason=f"{path.name}: a table of text")
    try:
        with contextlib.ExitStack() as stack:
            names, batches = _open(path, arrow, stack)
            if COLUMN not in names:
                raise DataError(
                    f"{path.absolute()}: no column {COLUMN!r}, there are {', '.join(names)}. "
                    "Rename the one with the text."
                )
            for batch in batches():
                for row in batch.column(COLUMN).to_pylist():
                    if not isinstance(row, str):
                        raise DataError(
                            f"{path.absolute()}: a row of {COLUMN!r} is {row!r}, expected a string."
                        )
                    yield row
    except (OSError, arrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path.absolute()}: cannot be read ({error}). Get or save the file again."
        ) from error


def _open(
    path: Path, arrow: Any, stack: contextlib.ExitStack
) -> tuple[list[str], Callable[[], Iterable[Any]]]:
    """Open a Parquet file or an Arrow stream, to be closed with `stack`.

    Returns:
      The names of the columns, and what gives the record batches, of the text at least.
    """
    if path.suffix == ".parquet":
        module = require("pyarrow.parquet", extra="text", reason=path.name)
        file = stack.enter_context(module.ParquetFile(path))
        return file.schema_arrow.names, lambda: file.iter_batches(columns=[COLUMN])
    source = stack.enter_context(arrow.memory_map(str(path)))
    stream = stack.enter_context(arrow.ipc.open_stream(source))
    return stream.schema.names, lambda: stream
