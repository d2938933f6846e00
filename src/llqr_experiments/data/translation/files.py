"""Text files, read strictly, and a chain of stages that write them and can be interrupted.

A file appears under its name only when it is whole; a stage counts as done only when
`metadata.json` has the SHA-256 of everything it wrote.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llqr_experiments.errors import DataError
from llqr_experiments.files import sha256, write

METADATA = "metadata.json"
_FORMAT = 1


class Track(Protocol):
    """Passes an iterable on, and may show how far it is."""

    def __call__(self, items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
        """Return the items; there are `total`, and `description` says what is done to them."""
        ...


def untracked(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """Pass the items on and show nothing."""
    del total, description
    return items


def read_lines(path: Path, name: str | None = None) -> list[str]:
    """Return the lines of a UTF-8 file without their ends.

    Only a line feed ends a line: the Unicode separators that `str.splitlines` also knows occur
    inside sentences, and would shift one language against the other.

    Args:
      path: the file.
      name: what errors call it; None for its path.

    Raises:
      DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path.absolute()}: cannot be read ({error.strerror or error}). Check the path and "
            "its permissions."
        ) from error
    try:
        text = payload.decode("utf-8").removeprefix("\ufeff")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        line = payload.count(b"\n", 0, error.start) + 1
        byte = error.start - (payload.rfind(b"\n", 0, error.start) + 1) + 1
        raise DataError(
            f"{name or path}, line {line}, byte {byte}: 0x{payload[error.start]:02x} is not valid "
            f"UTF-8 ({error.reason}). Convert the file to UTF-8, or get it again."
        ) from error
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, each with a line feed, and wait until they are on the disk."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by a JSON document, at once."""
    write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Return the document in `path`, or None if there is none that can be read."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a preparation.

    Attributes:
      name: what messages and `metadata.json` call it.
      needs: files it reads, outputs of other stages, below the folder.
      outputs: files it writes, below the folder.
      run: `run(inputs, outputs, track)`, with a path for each of `needs` and of `outputs`. It is
        deterministic. The outputs lie elsewhere until it has returned.
    """

    name: str
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[Sequence[Path], Sequence[Path], Track], None]


def run_stages(
    folder: Path,
    stages: Sequence[Stage],
    products: Sequence[str],
    recipe: Mapping[str, Any],
    track: Track = untracked,
) -> list[str]:
    """Make the products, doing only what is not done.

    Args:
      folder: where the files go; made if it does not exist.
      stages: in any order.
      products: the files that are wanted.
      recipe: everything the files depend on: checksums of the inputs, options, versions. A
        stage that was done by another recipe is done again.
      track: shows the progress of a stage.

    Returns:
      The names of the stages that were run, in order.

    Raises:
      DataError: a stage raises it, the folder cannot be written, or another process works in it.
    """
    makers = {output: stage for stage in stages for output in stage.outputs}
    with _locked(folder):
        for left in folder.glob(".partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        found = read_json(folder / METADATA)
        metadata = found if isinstance(found, dict) and found.get("format") == _FORMAT else {}
        if metadata.get("recipe") != dict(recipe):
            metadata = {"format": _FORMAT, "recipe": dict(recipe), "stages": {}}
        done, ran = set(), []

        def ensure(stage: Stage) -> None:
            if stage.name in done:
                return
            if not _is_whole(folder, stage, metadata["stages"]):
                if metadata.get("complete", True):
                    # Said before the first product changes: they may be of different recipes.
                    metadata["complete"] = False
                    write_json(folder / METADATA, metadata)
                for need in stage.needs:
                    ensure(makers[need])
                metadata["stages"][stage.name] = _run(folder, stage, track)
                write_json(folder / METADATA, metadata)
                ran.append(stage.name)
            done.add(stage.name)

        for product in products:
            ensure(makers[product])
        metadata["complete"] = True
        write_json(folder / METADATA, metadata)
    return ran


def check_complete(folder: Path) -> None:
    """Raise `DataError` if `run_stages` has begun in a folder and not finished."""
    metadata = read_json(folder / METADATA)
    if isinstance(metadata, dict) and metadata.get("complete") is False:
        raise DataError(
            f"{folder.absolute()}: its preparation was interrupted, and its files may not belong "
            "together. Run the command that prepared it again; it goes on where it stopped."
        )


def _is_whole(folder: Path, stage: Stage, records: Mapping[str, Any]) -> bool:
    """Return whether every output of a stage is there, with the checksum it was written with."""
    record = records.get(stage.name)
    if not isinstance(record, dict) or set(record) != set(stage.outputs):
        return False
    paths = {output: folder / output for output in stage.outputs}
    return all(path.is_file() and sha256(path) == record[o] for o, path in paths.items())


def _run(folder: Path, stage: Stage, track: Track) -> dict[str, str]:
    """Run one stage and move its outputs into place; return their checksums."""
    partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
    try:
        temporary = [partial / str(i) for i in range(len(stage.outputs))]
        stage.run([folder / need for need in stage.needs], temporary, track)
        checksums = {}
        for output, path in zip(stage.outputs, temporary, strict=True):
            checksums[output] = sha256(path)
            (folder / output).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, folder / output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checksums


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold it against other processes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"{folder.absolute()}: cannot be written ({error.strerror or error}). Choose another "
            "folder with --out."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{folder.absolute()}: another process prepares data in this folder. Wait until "
                "it has finished, or choose another folder with --out."
            ) from error
        yield
