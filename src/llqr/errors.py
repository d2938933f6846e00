"""What goes wrong, and checks of options: the value, what is legal, and the nearest name."""

import difflib
from collections.abc import Iterable
from typing import Any

import jax


class NonConvexError(ValueError):
    """The quadratic has no minimum: a direction of non-positive curvature was met."""


class NoObjectiveError(ValueError):
    """No objective arrived where a refit can happen."""


class LayoutWarning(UserWarning):
    """What a leaf or a batch was taken for was found out: from names, shapes or by tracing."""


def unknown(kind: str, value: object, legal: Iterable[str], *, see: str | None = None) -> str:
    """Return the message for a name that is not one of `legal`.

    Args:
      kind: what the name should have been.
      value: the name.
      legal: the names that exist.
      see: where they are listed; None lists them here.

    Example:
      >>> unknown("structure", "e-kfca", ["diagonal", "e-kfac"])
      "unknown structure 'e-kfca': did you mean 'e-kfac'? Legal: diagonal, e-kfac"
    """
    names = sorted(legal)
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), lower, n=1, cutoff=0.5)
    hint = f": did you mean {lower[near[0]]!r}?" if near else "."
    return f"unknown {kind} {value!r}{hint} {see or 'Legal: ' + ', '.join(names)}"


def check_choice(name: str, value: object, legal: Iterable[str]) -> None:
    """Raise ValueError if `value` is not one of the names."""
    names = list(legal)
    if not isinstance(value, str) or value not in names:
        raise ValueError(unknown(name, value, names))


def check_range(
    name: str, value: Any, *, low: float, high: float = float("inf"), open_low: bool = False
) -> None:
    """Raise ValueError if a number is out of range, TypeError if it is none.

    Schedules, arrays and None pass.
    """
    if value is None or callable(value) or isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not (low <= value <= high) or (open_low and value == low):
        left = "(" if open_low else "["
        right = ")" if high == float("inf") else "]"
        raise ValueError(f"{name} must lie in {left}{low:g}, {high:g}{right}, got {value!r}.")


def check_integer(name: str, value: Any, *, low: int) -> None:
    """Raise TypeError if a value is no Python int, ValueError if it is too small; None passes."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a Python int, got {value!r}.")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value!r}.")
