"""An index of encoded images in folders or tar archives, kept in a file beside the data.

The index of ImageNet is 1.3 million file names with their labels, which take a minute to collect
and 80 MB to hold. It is rebuilt when the names, sizes or times of modification of what it was
made from are others; those of a folder change when a file in it is added or removed.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from llqr_experiments.errors import DataError
from llqr_experiments.files import replacing

_log = logging.getLogger(__name__)

FILE_NAME = "llqr-index.npz"
_FORMAT = 1
_COLUMNS = ("container", "name", "offset", "size", "label")


@dataclasses.dataclass(frozen=True)
class Index:
    """Where n encoded images lie and what is on them.

    Attributes:
      containers: folders or tar archives, as paths below the root.
      container: (n,) int32, the container of each image.
      name: (n,) bytes, its name there, as the file system encodes it.
      offset: (n,) int64, its first byte in an archive; -1 in a folder.
      size: (n,) int64, its number of bytes; -1 in a folder.
      label: (n,) int32.
    """

    containers: tuple[str, ...]
    container: np.ndarray
    name: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def select(self, index: np.ndarray) -> "Index":
        """Return the index of the images `index`, integers, in this order."""
        columns = {column: getattr(self, column)[index] for column in _COLUMNS}
        return dataclasses.replace(self, **columns)

    def where(self, root: Path, i: int) -> str:
        """Return where image `i` is, for messages."""
        container, name = root / self.containers[self.container[i]], os.fsdecode(self.name[i])
        return f"{container}/{name}" if self.offset[i] < 0 else f"{container}, member {name}"

    def read(self, root: Path, i: int) -> bytes:
        """Return the bytes of image `i`; safe in any number of threads.

        Raises:
          DataError: they cannot be read, or are not there any more.
        """
        path = root / self.containers[self.container[i]]
        try:
            if self.offset[i] < 0:
                return (path / os.fsdecode(self.name[i])).read_bytes()
            # Opened anew: no position is shared between threads, and no limit of open files met.
            with path.open("rb") as file:
                file.seek(self.offset[i])
                content = file.read(self.size[i])
        except OSError as error:
            raise DataError(f"{self.where(root, i)}: cannot be read ({error}).") from error
        if len(content) != self.size[i]:
            raise DataError(
                f"{self.where(root, i)}: {len(content)} bytes, expected {self.size[i]}. The "
                "archive has changed since the run began: start it again."
            )
        return content


def table(container: str, rows: Iterable[tuple[str, int, int, int]]) -> Index:
    """Return the index of one container.

    Args:
      container: a path below the root.
      rows: name, offset, size and label of each image.
    """
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    names, offsets, sizes, labels = columns
    return Index(
        (container,),
        np.zeros(len(names), np.int32),
        np.array([os.fsencode(name) for name in names], dtype=np.bytes_),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        np.array(labels, np.int32),
    )


def joined(parts: Sequence[Index]) -> Index:
    """Return one index of the images of several, one after the other."""
    counts = [len(part.containers) for part in parts]
    starts = np.cumsum([0, *counts[:-1]])
    columns = {column: [getattr(part, column) for part in parts] for column in _COLUMNS}
    columns["container"] = [
        part.container + np.int32(start) for part, start in zip(parts, starts, strict=True)
    ]
    return Index(
        tuple(name for part in parts for name in part.containers),
        **{column: np.concatenate(arrays) for column, arrays in columns.items()},
    )


@dataclasses.dataclass(frozen=True)
class Form:
    """A way in which images lie in a folder.

    Attributes:
      name: of the form.
      sources: folders and files that the index is made from, as paths below the root.
      build: makes the index of each split.
    """

    name: str
    sources: tuple[str, ...] = dataclasses.field(compare=False)
    build: Callable[[], dict[str, Index]] = dataclasses.field(compare=False)


def indices(root: Path, form: Form) -> dict[str, Index]:
    """Return the index of each split: from its file if that is up to date, or made anew.

    Where the file cannot be written, the index is made once in a process.
    """
    return _read_or_build(root.absolute(), _key(root, form), form)


def _key(root: Path, form: Form) -> str:
    """Return a digest of what the index depends on."""
    facts = []
    for source in sorted(form.sources):
        status = (root / source).stat()
        # What the size of a folder is, is up to the file system.
        size = None if (root / source).is_dir() else status.st_size
        facts.append((source, size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps([_FORMAT, form.name, facts]).encode()).hexdigest()


@functools.lru_cache(maxsize=2)
def _read_or_build(root: Path, key: str, form: Form) -> dict[str, Index]:
    path = root / FILE_NAME
    found = _read(path, key)
    if found is not None:
        return found
    built = form.build()
    try:
        _write(path, key, built)
    except OSError as error:
        _log.warning("%s: the index is not kept (%s) and will be made again", path, error)
    return built


def _read(path: Path, key: str) -> dict[str, Index] | None:
    """Return what the file holds; None if there is none, or it is broken or out of date."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            splits = file["splits"].tolist()
            return {
                split: Index(
                    tuple(file[f"{split}/containers"].tolist()),
                    **{column: file[f"{split}/{column}"] for column in _COLUMNS},
                )
                for split in splits
            }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s: cannot be read (%s) and is made again", path, error)
        return None


def _write(path: Path, key: str, splits: dict[str, Index]) -> None:
    arrays = {"key": np.array(key), "splits": np.array(list(splits))}
    for split, index in splits.items():
        arrays[f"{split}/containers"] = np.array(index.containers)
        arrays |= {f"{split}/{column}": getattr(index, column) for column in _COLUMNS}
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)
