"""What text was made into, on disk: token arrays and tokenizers, each verified when opened.

An entry is a file and a note beside it, `<file>.json`, with the SHA-256 of the file. The note is
written last. A file without a note, or that is not what its note says, is made again.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llqr_experiments import files
from llqr_experiments.errors import DataError

_log = logging.getLogger(__name__)
Write = Callable[[BinaryIO], None]


def key(**parts: str | int) -> str:
    """Return a short name for content that is determined by `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def entry(path: Path, write: Write, **note: str | int) -> Path:
    """Return `path`, made by `write` unless it is there and whole.

    Args:
      path: of the file.
      write: writes the content to an open file.
      note: what the entry is, for people.

    Raises:
      DataError: the folder cannot be written.
    """
    beside = path.with_name(f"{path.name}.json")
    if fault := _fault(path, beside):
        if fault != "missing":
            _log.warning("%s is %s: it is made again", path, fault)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without its old note, so that the two never meet.
            beside.unlink(missing_ok=True)
            with files.replacing(path) as file:
                write(file)
            content = json.dumps({**note, "sha256": files.sha256(path)}, indent=1)
            files.write(beside, content)
        except OSError as error:
            raise DataError(
                f"{path.absolute()}: cannot be written ({error.strerror or error}). Make room "
                "there, or name another folder with dataset.cache_dir."
            ) from error
    return path


def tokens(
    path: Path, groups: Callable[[], Iterable[np.ndarray]], dtype: np.dtype, **note: str | int
) -> np.ndarray:
    """Return an array of tokens, (n,), as a read-only memory map of its entry.

    Args:
      path: of the entry, a `.npy` file.
      groups: makes the pieces of the array, which are never in memory together.
      dtype: of the entry.
      note: as for `entry`.

    Raises:
      DataError: as `entry`, and what `groups` raises.
    """

    def write(file: BinaryIO) -> None:
        # The header gives the length, which is known at the end. numpy pads it, so that it takes
        # as many bytes for every length.
        start = _header(file, dtype, 0)
        count = 0
        for group in groups():
            file.write(group.astype(dtype).tobytes())
            count += len(group)
        file.seek(0)
        if _header(file, dtype, count) != start:
            raise AssertionError("numpy wrote headers of two lengths for arrays of one dimension.")

    return np.load(entry(path, write, **note), mmap_mode="r")


def _header(file: BinaryIO, dtype: np.dtype, count: int) -> int:
    """Write the header of an array of `count` elements; return where it ends."""
    fields = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.tell()


def _fault(path: Path, beside: Path) -> str:
    """Return what is wrong with an entry, an empty string for nothing."""
    try:
        expected: Any = json.loads(beside.read_bytes())["sha256"]
    except FileNotFoundError:
        return "without a note" if path.exists() else "missing"
    except (OSError, ValueError, KeyError, TypeError):
        return "beside a note that cannot be read"
    try:
        return "" if files.sha256(path) == expected else "not what its note says"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
