"""Error messages that name the nearest legal choice."""

import difflib
from collections.abc import Iterable


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
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {value!r}{hint} {see or 'Legal: ' + ', '.join(names)}"
