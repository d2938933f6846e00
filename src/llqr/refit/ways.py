"""The ways to learn P."""

from typing import Any

from llqr.refit.gradients import Unprobed
from llqr.refit.published import Published
from llqr.refit.streaming import Streamed

WAYS: tuple[Any, ...] = (Published, Unprobed, Streamed)
"""Classes of learners, made of options and a setting: the first that takes the options."""


def way(options: Any) -> Any:
    """Return the class of learners that options ask for.

    Args:
      options: `llqr.Refit`, `llqr.Streaming`.

    Raises:
      TypeError: something else.
    """
    found = next((way for way in WAYS if way.takes(options)), None)
    if found is None:
        names = " or ".join(f"an {name}" for name in dict.fromkeys(way.name for way in WAYS))
        raise TypeError(f"refit must be {names}, got {options!r}.")
    return found


def name_of(kept: Any) -> str:
    """Return the type of the options with which a state was made, by what its learner kept."""
    return next((way.name for way in WAYS if way.owns(kept)), "other options")
