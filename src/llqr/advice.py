"""What a report on a preconditioner means, in words: what looks wrong, and what to try."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

ACROSS, ALONG = 0.05, 0.999
"""Cosines of P h and h below which little of h is left, and above which P does nothing to it."""

TINY = 1e-6
"""Blocks without a larger entry have been clamped to the least that is positive."""


@runtime_checkable
class Seen(Protocol):
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


TRY = {
    "rejected": (
        "kept their old P, because the refit's objective did not fall: divide its learning_rate "
        'by 10, or solver="relative" with learning_rate=0.1; solver="cg_zoom_hz" finds its lengths'
    ),
    "inverted": (
        "kept their old P, because the new one would turn the direction uphill: divide Refit's "
        'learning_rate by 10, or a structure that is positive by construction ("psd-e-kfac")'
    ),
    "nonfinite": (
        "kept their old P, because the new one was not finite: divide Refit's learning_rate by 10, "
        "clip_norm=1, more damping"
    ),
    "flat": (
        "kept their old P, because the metric has no curvature there: another metric "
        '("bernoulli" for one logit, "gaussian" for numbers), or parameters that do not reach the '
        "outputs"
    ),
    "indefinite": (
        "have negative curvature along the step, which has no minimum then: multiply damping by "
        '10, or metric="ngd", which is never negative'
    ),
    "kept": "did not move: a gradient or a learning rate of the refit that is zero",
}
"""By status: what happened to the blocks, and what to try."""


def advise(refits: int, cosine: float, blocks: Sequence[Seen]) -> tuple[str, ...]:
    """Return what looks wrong and what to try; empty if nothing does.

    Args:
      refits: how many there were.
      cosine: of P h and h in the last one, all blocks together.
      blocks: what it did to each.

    Example:
      >>> advise(0, 0.0, [])[0]
      'P was never refitted here: is a refit due, and does `objective` reach it?'
    """
    if not refits:
        return ("P was never refitted here: is a refit due, and does `objective` reach it?",)
    found = []
    for status, told in TRY.items():
        leaves = [block.leaf for block in blocks if block.status == status]
        if leaves:
            found.append(f"{len(leaves)} of {len(blocks)} blocks ({_few(leaves)}) {told}.")
    clamped = [block.leaf for block in blocks if block.maximum < TINY]
    if clamped:
        found.append(
            f"{len(clamped)} of {len(blocks)} blocks ({_few(clamped)}) are zero but for rounding: "
            "inner steps overshot, divide Refit's learning_rate by 10."
        )
    elif any(block.status in ("updated", "indefinite") for block in blocks):
        if cosine < ACROSS:
            found.append(
                f"P turns the direction away, cosine {cosine:.3f}: more damping, or ema_decay=0.5."
            )
        elif cosine > ALONG:
            found.append(
                f"P hardly changes the direction, cosine {cosine:.4f}: raise Refit's learning_rate "
                "or steps, or less damping."
            )
    return tuple(found)


def _few(leaves: list[str]) -> str:
    return ", ".join(leaves[:3]) + (f" and {len(leaves) - 3} more" if leaves[3:] else "")
