"""What a refit is given: the part that stays the same over a run, and the part that changes."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import optax

from llqr.curvature.route import Route
from llqr.metrics import Reduction
from llqr.objective import BoundObjective
from llqr.refit.learner import WHOLE, Blocks
from llqr.refit.options import LINE_SEARCHES, Refit
from llqr.refit.record import RefitInfo
from llqr.structures.plan import Plan
from llqr.tree import Frozen
from llqr.typing import Array, Int, Number, Params


@dataclass(frozen=True)
class Setup:
    """What stays the same over all refits of a run: static and hashable.

    Attributes:
      plan: the blocks.
      metric: a resolved metric, or a tree of them, flattened by `freeze`.
      reduction: over rows.
      sigma: P is stored as sigma P.
      refit: the refit's options.
      route: how curvature products are computed.
      base: optimizer whose update P multiplies; None: P multiplies the gradient.
    """

    plan: Plan
    metric: Frozen
    reduction: Reduction
    sigma: float
    refit: Refit
    route: Route = WHOLE
    base: optax.GradientTransformation | None = None

    @property
    def has_memory(self) -> bool:
        """Whether a block has a memory."""
        return any(block.structure.has_memory for block in self.plan)

    @property
    def averages(self) -> bool:
        """Whether new arrays are averaged with old ones: a number 0 costs nothing."""
        decay = self.refit.ema_decay
        return not (isinstance(decay, float | int) and decay == 0)

    @property
    def compiled_whole(self) -> bool:
        """Whether a refit must be one compiled function on every device.

        The pieces of the layerwise route cannot cross `jit`, and a line search has a loop
        of its own, which chunks that are looped over in Python cannot be inside of.
        """
        searches = self.refit.solver in LINE_SEARCHES
        return self.route.layerwise or (searches and self.route.chunk_size is not None)

    def piece(self) -> "Setup":
        """Return the setup as one piece of the loop sees it.

        What the pieces receive as data (`Numbers`), and what only decides when a refit is due,
        has one value here: changing it compiles nothing again.
        """
        refit = replace(
            self.refit, every=1, start=0, until=None, steps=1, learning_rate=1.0,
            ema_decay=float(self.averages),
        )  # fmt: skip
        return replace(self, refit=refit)

    def check(self) -> None:
        """Raise ValueError if the options do not fit the blocks."""
        curved = [b.structure.name for b in self.plan if not b.structure.linear]
        if self.refit.solver == "cg" and curved:
            raise ValueError(
                "solver='cg' needs structures that are linear in their arrays (scalar, "
                f"diagonal, dense), but there is {curved[0]!r}; 'cg_zoom_hz' takes any."
            )


class Numbers(NamedTuple):
    """The numbers of one refit that may change between refits without a recompilation."""

    learning_rate: Number
    ema_decay: Number
    damping: Number
    steps: Number


def numbers_at(refit: Refit, count: Int[Array, ""], damping: Number) -> Numbers:
    """Return the numbers of a refit, schedules evaluated.

    Args:
      refit: the options.
      count: update calls before the refit.
      damping: lambda >= 0.
    """

    def at(value: Any) -> Any:
        return value(count) if callable(value) else value

    return Numbers(at(refit.learning_rate), at(refit.ema_decay), damping, refit.steps)


class Inputs(NamedTuple):
    """What one refit starts from: a pytree."""

    blocks: Blocks  # the current arrays
    info: RefitInfo  # the record so far
    params: Params  # at which the model is linearised
    objective: BoundObjective  # on the refit batch
    numbers: Numbers
    base_state: Any = ()  # of `Setup.base`
