"""Whether something fits into the memory of this machine, before it is made."""

import os

from llqr_experiments.errors import ConfigError


def check(size: int, what: str) -> None:
    """Raise ConfigError if something is larger than the memory of this machine.

    Larger requests do not fail where they are made: the system ends the process later.

    Args:
      size: in bytes.
      what: it is, for the message.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > there:
        raise ConfigError(
            f"{what} takes {size / 2**30:,.1f} GiB, and this machine has {there / 2**30:,.1f} GiB."
        )
