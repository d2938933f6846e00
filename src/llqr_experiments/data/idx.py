"""Reader for the IDX files that MNIST and Fashion-MNIST are published in.

An IDX file is a header followed by the array in C order, everything big-endian:

  bytes          meaning
  0-1            zero
  2              code of the element type (`_DTYPES`)
  3              number of dimensions d
  4 .. 4+4d-1    the d sizes, unsigned 32-bit
  the rest       the elements
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from llqr_experiments.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_DTYPES = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
REMEDY = "Delete the file and download it again."


def read_idx(path: str | Path) -> np.ndarray:
    """Read one IDX file, gzip-compressed or plain.

    The first bytes decide whether the file is compressed: a browser or a mirror may have
    unpacked it and kept the suffix.

    Args:
      path: the file.

    Returns:
      The array in native byte order, with the shape and element type the header announces.

    Raises:
      DataError: the file cannot be read, is a broken gzip stream, has no valid IDX header, or
        holds more or fewer bytes than its header announces.
    """
    path = Path(path)
    payload = _read_payload(path)
    dtype, shape = _parse_header(path, payload)
    start = 4 + 4 * len(shape)
    expected = math.prod(shape) * dtype.itemsize
    found = len(payload) - start
    if found != expected:
        raise DataError(
            f"{path}: {found} bytes of data after the header, expected {expected} for the "
            f"announced shape {shape} of {dtype.name}. {REMEDY}"
        )
    # `astype` copies, so the array is writable and does not keep the whole payload alive.
    return (
        np.frombuffer(payload, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
    )


def _read_payload(path: Path) -> bytes:
    """Return the uncompressed bytes of `path`."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path.absolute()}: cannot be read ({error.strerror or error}), expected an IDX file. "
            "Check the path and its permissions, or download the file again."
        ) from error
    if not raw.startswith(_GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except EOFError as error:
        raise DataError(
            f"{path}: truncated gzip stream, it stops after {len(raw)} compressed bytes; expected "
            f"a complete one. {REMEDY}"
        ) from error
    except (OSError, zlib.error) as error:
        raise DataError(
            f"{path}: corrupt gzip stream ({error}), expected a valid one. {REMEDY}"
        ) from error


def _parse_header(path: Path, payload: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Return the element type and the shape that the header of `payload` announces."""
    magic = payload[:4]
    if len(magic) < 4 or magic[:2] != b"\x00\x00":
        raise DataError(
            f"{path}: not an IDX file, it starts with bytes {magic.hex(' ') or '(none)'}; expected "
            f"00 00, a type code and a number of dimensions. {REMEDY}"
        )
    code, ndim = magic[2], magic[3]
    if code not in _DTYPES:
        legal = ", ".join(f"0x{c:02x}" for c in _DTYPES)
        raise DataError(
            f"{path}: unknown IDX type code 0x{code:02x}, expected one of {legal}. {REMEDY}"
        )
    if ndim == 0 or len(payload) < 4 + 4 * ndim:
        raise DataError(
            f"{path}: the IDX header announces {ndim} dimensions, but {len(payload) - 4} bytes "
            f"follow it; expected 1 dimension or more and 4 bytes for each. {REMEDY}"
        )
    return _DTYPES[code], struct.unpack_from(f">{ndim}I", payload, 4)
