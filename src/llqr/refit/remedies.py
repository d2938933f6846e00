"""What to try where a refit did not do what it should: by the way to learn P."""

from typing import NamedTuple


class Remedies(NamedTuple):
    """What to try, in words that name options of one way to learn P."""

    never: str  # where there was no refit yet
    by_status: dict[str, str]  # a word of `STATUS` -> what happened to the blocks, and what to try
    clamped: str | None  # where blocks are zero but for rounding; None: they cannot be
    across: str  # where P turns the direction away
    along: str  # where P hardly changes the direction


_FLAT = (
    "kept their old P, because the metric has no curvature there: another metric "
    '("bernoulli" for one logit, "gaussian" for numbers), or parameters that do not reach the '
    "outputs"
)

_NEVER = "P was never refitted here: is a refit due, and does `objective` reach it?"

PUBLISHED = Remedies(
    never=_NEVER,
    by_status={
        "rejected": (
            "kept their old P, because the refit's objective did not fall: divide its "
            'learning_rate by 10, or solver="relative" with learning_rate=0.1; '
            'solver="cg_zoom_hz" finds its lengths'
        ),
        "inverted": (
            "kept their old P, because the new one would turn the direction uphill: divide Refit's "
            "learning_rate by 10, or a structure that is positive by construction "
            '("psd-e-kfac")'
        ),
        "nonfinite": (
            "kept their old P, because the new one was not finite: divide Refit's learning_rate by "
            "10, clip_norm=1, more damping"
        ),
        "flat": _FLAT,
        "indefinite": (
            "have negative curvature along the step, which has no minimum then: multiply damping "
            'by 10, or metric="ngd", which is never negative'
        ),
        "kept": "did not move: a gradient or a learning rate of the refit that is zero",
    },
    clamped="inner steps overshot, divide Refit's learning_rate by 10",
    across="more damping, or ema_decay=0.5",
    along="raise Refit's learning_rate or steps, or less damping",
)

STREAMING = Remedies(
    never=_NEVER,
    by_status={
        "nonfinite": (
            "kept their curvature, because a probe was not finite: look at the loss and the "
            "outputs there; a smaller learning rate"
        ),
        "flat": _FLAT,
    },
    clamped=None,
    across="more damping",
    along="less damping, which says how ill-conditioned a block may be",
)

GRADIENTS = Remedies(
    never="P was never refitted here: is a refit due, and does `update` reach it?",
    by_status={
        "nonfinite": (
            "left out the last gradient, which was not finite: look at the loss there; a smaller "
            "learning rate"
        ),
        "flat": (
            "kept their old P, because no gradient reached them yet: parameters that do not reach "
            "the loss, or gradients that were not finite"
        ),
    },
    clamped=None,
    across="more damping",
    along="less damping, which says how ill-conditioned a block may be",
)
