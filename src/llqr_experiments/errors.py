"""Errors that a user can mend: shown as a message, without a traceback."""

import difflib
from collections.abc import Iterable, Mapping


class RunError(Exception):
    """A run that cannot start or go on.

    Attributes:
      code: exit status of the process.
      title: the word before the message.
      everywhere: whether every process of a run has it, so that one says it for all.
    """

    code = 1
    title = "Error"
    everywhere = False


class ConfigError(RunError, ValueError):
    """An option with a value that is not legal, or two that contradict each other."""

    code = 2


class DataError(RunError, ValueError):
    """Data that is missing, corrupt, empty or not what the config says."""

    code = 2


class TrainingError(RunError, RuntimeError):
    """Training that cannot go on."""

    everywhere = True


class LostProcess(RunError):
    """Another process of the run is gone: this one must end at once, and waits for nothing."""

    title = "Ended"
    code = 75  # EX_TEMPFAIL: a scheduler may requeue the job


def unknown(
    kind: str,
    value: object,
    legal: Iterable[str],
    *,
    see: str | None = None,
    aliases: Mapping[str, str] | None = None,
) -> str:
    """Return the message for a name that is not one of `legal`.

    As in the library, whose import brings JAX along: a misspelt option is told before that.

    Args:
      kind: what the name should have been.
      value: the name.
      legal: the names that exist.
      see: where they are listed; None lists them here.
      aliases: what names that others use are called here.

    Example:
      >>> unknown("option", "LERNING_RATE", ["learning_rate", "damping"])
      "unknown option 'LERNING_RATE': did you mean 'learning_rate'? Legal: damping, learning_rate"
    """
    names = sorted(legal)
    lower = {name.lower(): name for name in names}
    asked = str(value).lower()
    near = (aliases or {}).get(asked)
    if near is None:
        found = difflib.get_close_matches(asked, lower, n=1, cutoff=0.5)
        near = lower[found[0]] if found else None
    hint = f": did you mean {near!r}?" if near else "."
    return f"unknown {kind} {value!r}{hint} {see or 'Legal: ' + ', '.join(names)}"
