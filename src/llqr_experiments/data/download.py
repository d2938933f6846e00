"""Download of one file: verified, and atomic."""

import hashlib
import http.client
import logging
import os
import tempfile
import urllib.request
from pathlib import Path

from llqr_experiments.errors import DataError

_log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 10.0


def fetch(url: str, folder: Path, md5: str | None) -> Path:
    """Download `url` into `folder` under its own name.

    A run that is killed half-way leaves no half file: the bytes are verified in memory, written
    to a temporary file beside the target, and renamed.

    Args:
      url: what to get; its last component names the file.
      folder: where to put it; made if it does not exist.
      md5: hexadecimal digest the bytes must have; None if none is published, and only the length
        that the server announces is checked.

    Returns:
      The path of the file.

    Raises:
      DataError: the URL cannot be fetched, has other bytes, or `folder` cannot be written.
    """
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            payload = response.read()
    # The second is not an OSError: a connection that is cut raises IncompleteRead.
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: download failed ({error})") from error
    found = hashlib.md5(payload, usedforsecurity=False).hexdigest()
    if md5 is not None and found != md5:
        raise DataError(
            f"{url}: downloaded {len(payload)} bytes with MD5 {found}, expected {md5}; a proxy may "
            "have answered instead of the mirror"
        )
    target = folder / url.rsplit("/", 1)[-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(target, payload)
    except OSError as error:
        raise DataError(f"{target.absolute()}: cannot be written ({error})") from error
    _log.info("downloaded %s to %s", url, target.absolute())
    return target


def _write_atomically(target: Path, payload: bytes) -> None:
    """Write `target` so that it never exists with a part of its content."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        # `mkstemp` makes the file private; a dataset may be shared.
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
