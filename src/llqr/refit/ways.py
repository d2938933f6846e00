"""The ways to learn P, by the type of their options."""

from typing import Any

from llqr.refit.options import Refit, Streaming
from llqr.refit.published import Published
from llqr.refit.streaming import Streamed

WAYS: dict[type, Any] = {Refit: Published, Streaming: Streamed}
"""Type of options -> learner of (options, setting)."""


def way(options: Any) -> Any:
    """Return the class of learners that options ask for.

    Args:
      options: `llqr.Refit`, `llqr.Streaming`.

    Raises:
      TypeError: something else.
    """
    found = next((way for kind, way in WAYS.items() if isinstance(options, kind)), None)
    if found is None:
        names = " or ".join(f"an {way.name}" for way in WAYS.values())
        raise TypeError(f"refit must be {names}, got {options!r}.")
    return found


def name_of(kept: Any) -> str:
    """Return the name of the options with which a state was made, by what its learner kept."""
    return next((way.name for way in WAYS.values() if way.owns(kept)), "other options")
