"""Download of one file: verified, and atomic."""

import hashlib
import http.client
import logging
import urllib.request
from collections.abc import Generator
from pathlib import Path

from llqr_experiments.data.progress import progress
from llqr_experiments.errors import DataError
from llqr_experiments.files import replacing

_log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 10.0
_CHUNK_BYTES = 1 << 20


def fetch(url: str, folder: Path, md5: str | None) -> Path:
    """Download `url` into `folder` under its own name.

    A run that is killed half-way leaves no half file under that name: the bytes go to a temporary
    file beside the target, which is renamed once they are verified.

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
    target = folder / url.rsplit("/", 1)[-1]
    chunks = _chunks(url)
    # The folder is made only when there is something to put into it.
    first = next(chunks, b"")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            digest, size = hashlib.md5(first, usedforsecurity=False), len(first)
            file.write(first)
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
            if md5 is not None and digest.hexdigest() != md5:
                raise DataError(
                    f"{url}: downloaded {size} bytes with MD5 {digest.hexdigest()}, expected "
                    f"{md5}; a proxy may have answered instead of the mirror"
                )
    except OSError as error:
        raise DataError(f"{target.absolute()}: cannot be written ({error})") from error
    finally:
        chunks.close()
    _log.info("downloaded %s to %s", url, target.absolute())
    return target


def _chunks(url: str) -> Generator[bytes, None, None]:
    """Yield the bytes of a URL piece by piece, with a progress bar."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            length = getattr(response, "length", None)
            with progress(f"downloading {url.rsplit('/', 1)[-1]}", length) as advance:
                while chunk := response.read(_CHUNK_BYTES):
                    advance(len(chunk))
                    yield chunk
            # A connection that is cut shows in the number of bytes that are left.
            if length and getattr(response, "length", 0):
                raise http.client.IncompleteRead(b"", response.length)
    # The second is not an OSError.
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: download failed ({error})") from error
