"""The error that every fault in a dataset is reported with."""


class DataError(ValueError):
    """A dataset is missing, broken or contradicts itself.

    The message says what was found, what was expected and what to do about it.
    """
