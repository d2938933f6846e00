"""Files on disk: written whole or not at all, and what names their content."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `target` when the block ends without an error.

    `target` never exists with a part of its content.
    """
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    file = aside.open("xb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write(target: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with replacing(target) as file:
        file.write(text.encode())


def names(folder: Path) -> list[str]:
    """Return what is in a folder, in order, without what is hidden."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
