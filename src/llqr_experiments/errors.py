"""Errors that a user can mend: shown as a message, without a traceback."""


class RunError(Exception):
    """A run that cannot start or go on.

    Attributes:
      code: exit status of the process.
      title: the word before the message.
    """

    code = 1
    title = "Error"


class ConfigError(RunError, ValueError):
    """An option with a value that is not legal, or two that contradict each other."""

    code = 2


class DataError(RunError, ValueError):
    """Data that is missing, corrupt, empty or not what the config says."""

    code = 2


class TrainingError(RunError, RuntimeError):
    """Training that cannot go on."""
