"""What a report on a preconditioner means, in words: what looks wrong, and what to try."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from llqr.refit.remedies import Remedies

ACROSS, ALONG = 0.05, 0.999
"""Cosines of P h and h below which little of h is left, and above which P does nothing to it."""

TINY = 1e-6
"""Blocks without a larger entry have been clamped to the least that is positive."""


@runtime_checkable
class Reported(Protocol):
    """One block, as `llqr.inspect` reports it."""

    @property
    def leaf(self) -> str:
        """Path of its first leaf."""
        ...

    @property
    def status(self) -> str:
        """A word of `llqr.STATUS`."""
        ...

    @property
    def maximum(self) -> float:
        """Largest entry of its arrays."""
        ...


def advise(
    refits: int,
    cosine: float,
    blocks: Sequence[Reported],
    remedies: Remedies,
    *,
    steps: int = 1,
    directed: bool = True,
    dropped: int = 0,
) -> tuple[str, ...]:
    """Return what looks wrong and what to try; empty if nothing does.

    Args:
      refits: how many there were.
      cosine: of P h and h in the last one, all blocks together.
      blocks: what it did to each.
      remedies: of the way in which P is learned.
      steps: of the optimizer so far: before the first, no refit need have been due.
      directed: whether there was an h: streaming refits have none before the first step.
      dropped: how many gradients were not finite.

    Example:
      >>> from llqr.refit.remedies import PUBLISHED
      >>> advise(0, 0.0, [], PUBLISHED)[0]
      'P was never refitted here: is a refit due, and does `objective` reach it?'
    """
    found = []
    if dropped:
        found.append(
            f"{dropped} gradients so far were not finite, and nothing remembers them: look at the "
            "loss there, a smaller learning rate, or clip before the optimizer."
        )
    if not refits:
        return (*found, remedies.never) if steps else ()
    for status, told in remedies.by_status.items():
        leaves = [block.leaf for block in blocks if block.status == status]
        if leaves:
            found.append(f"{len(leaves)} of {len(blocks)} blocks ({_few(leaves)}) {told}.")
    clamped = [block.leaf for block in blocks if block.maximum < TINY]
    if clamped and remedies.clamped:
        found.append(
            f"{len(clamped)} of {len(blocks)} blocks ({_few(clamped)}) are zero but for rounding: "
            f"{remedies.clamped}."
        )
    elif directed and any(block.status in ("updated", "indefinite") for block in blocks):
        if cosine < ACROSS:
            found.append(f"P turns the direction away, cosine {cosine:.3f}: {remedies.across}.")
        elif cosine > ALONG:
            found.append(f"P hardly changes the direction, cosine {cosine:.4f}: {remedies.along}.")
    return tuple(found)


def _few(leaves: list[str]) -> str:
    return ", ".join(leaves[:3]) + (f" and {len(leaves) - 3} more" if leaves[3:] else "")
