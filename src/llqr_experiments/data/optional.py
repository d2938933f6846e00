"""Packages that only some data needs."""

import importlib
from typing import Any

from llqr_experiments.errors import DataError


def require(module: str, *, extra: str, reason: str) -> Any:
    """Import a module of a package that may not be installed.

    Args:
      module: its full name.
      extra: the extra of llqr that the package is in.
      reason: what needs it, the beginning of the message.

    Raises:
      DataError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:  # it is installed, and lacks something itself
            raise
        raise DataError(
            f"{reason} needs the package {package}, which is not installed. Install it with "
            f"`uv sync --extra {extra}` or `pip install 'llqr[{extra}]'`."
        ) from error
