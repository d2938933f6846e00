"""Reader for pickles of plain data: a pickle is a program, and this runs none of it.

What it can make are dictionaries, lists, tuples, numbers, strings and arrays of numbers. Pickles
name every other thing that they use, and the names admitted here are those that arrays and
bytes take:

  name                      stands for
  multiarray._reconstruct   `_empty`, a new array without entries
  numpy.ndarray             a mark that `_empty` takes and that cannot be called
  numpy.dtype               `_dtype`, the types of numbers
  _codecs.encode            `_bytes`, how Python 3 writes bytes that Python 2 can read
"""

import io
import pickle
from typing import Any

import numpy as np

from llqr_experiments.errors import DataError

_NDARRAY = object()
# numpy renamed its private package in version 2; old pickles have the old name.
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


def loads(payload: bytes, where: str) -> Any:
    """Read a pickle that was written by Python 2 or 3.

    Args:
      payload: the pickle.
      where: it is from, for messages.

    Returns:
      Its value. Strings of Python 2 are bytes.

    Raises:
      DataError: the pickle is broken, or names anything but an array of numbers.

    Example:
      >>> loads(pickle.dumps({"labels": [3, 1]}), "here")
      {'labels': [3, 1]}
    """
    try:
        return _Unpickler(io.BytesIO(payload), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    # A broken pickle can raise anything: it runs out of stack, of memory or of bytes.
    except Exception as error:
        raise DataError(
            f"{where}: broken pickle ({type(error).__name__}: {error}). Get the file again."
        ) from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES and name == "_reconstruct":
            return _empty
        if module == "numpy" and name == "ndarray":
            return _NDARRAY
        if module == "numpy" and name == "dtype":
            return _dtype
        if module == "_codecs" and name == "encode":
            return _bytes
        raise DataError(
            f"the pickle asks for {module}.{name}, expected arrays, lists, dictionaries and "
            "strings only. It is no official file and may be malicious: do not use it."
        )


def _empty(kind: object, shape: tuple[int, ...], code: bytes | str) -> np.ndarray:
    """Return the array that the pickle's next instruction fills."""
    if kind is not _NDARRAY:
        raise DataError("the pickle makes an array of an unknown kind.")
    return np.empty(0, np.uint8)


def _dtype(code: bytes | str, align: bool = False, copy: bool = False) -> np.dtype:
    """Return a type of numbers: an array of anything else may hold objects."""
    text = code.decode("ascii") if isinstance(code, bytes) else code
    if not (len(text) == 2 and text[0] in "biuf" and text[1] in "1248"):
        raise DataError(f"the pickle holds an array of type {text!r}, expected numbers.")
    return np.dtype(text, align=False, copy=True)


def _bytes(text: str, encoding: bytes | str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise DataError(f"the pickle encodes bytes as {encoding!r}, expected latin1.")
    return text.encode("latin1")
