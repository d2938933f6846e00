"""What a refit is asked for (`Refit`, `Problem`), and what it reports (`RefitInfo`)."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from llqr import metrics, solvers
from llqr._errors import check_choice, check_integer, check_range
from llqr._tree import Frozen
from llqr._types import Array, Bool, Float, Int, Number, PyTree, Schedule
from llqr.metrics import Reduction
from llqr.route import Route
from llqr.solvers import SOLVERS, SolverLike
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan

Probe: TypeAlias = Literal["gradient", "minibatch", "gaussian", "fisher"]

Blocks: TypeAlias = tuple[Arrays, ...]
"""The arrays of every block of a plan."""

WHOLE = Route()

STATUS = ("none", "updated", "kept", "nonfinite", "inverted", "rejected")
"""What a refit did to a block, by the number in `RefitInfo.status`: not refitted yet; new arrays
installed; nothing changed; or old arrays kept by a guard: new ones were not finite, turned
the direction, or the objective did not decrease."""


@dataclass(frozen=True, kw_only=True)
class Refit:
    """When and how the preconditioner is learned. Defaults are the papers'.

    Args:
      every: a refit is due when (count - start) is a multiple of this number of update
        calls; an int >= 1, or a schedule count -> int.
      start: no refit before this count.
      until: no refit at or after this count; None: never stops.
      steps: inner steps of one refit, a Python int; the most, with a tolerance.
      tolerance: stop when an inner step changes the objective by less than this share of it;
        0: never.
      learning_rate: of the inner solver; a number > 0, or a schedule of the count.
      anneal: let the learning rate fall linearly to zero over the refit, which averages out
        the noise of random directions.
      solver: a name of `llqr.solvers.SOLVERS`, or any optax transformation that needs nothing
        but gradients and parameters: it sees the clipped gradient, and its updates are added
        as they are (learning_rate and momentum do not enter).
      momentum: of the solver "momentum".
      clip_norm: largest L2 norm of the gradient of each stored array; None: no clipping.
      clip_value: largest absolute entry of that gradient; None: no clipping.
      warm_start: start from the current arrays; False: from the identity, and the guard then
        asks whether the objective fell below the identity's. Structures with a memory always
        start from it.
      ema_decay: d in [0, 1]; arrays become d old + (1 - d) new. A number or a schedule.
        Memories are left out.
      normalize_gradient: use h = -g / |g|.
      allow_grad_inversion: allow P to turn the sign of gradients: entries of elementwise
        blocks are not clamped to >= 1e-8 and blocks with h.Ph <= 0 are not guarded.
      probe: directions h. "gradient": the refit batch's own, the published method;
        "minibatch": the gradient of a quarter of its rows; "gaussian": N(0, I); "fisher": the
        gradient for labels drawn from the model, with covariance C (and a tenth of the damping
        on top, so that directions in which the batch has no curvature stay where they are).
      probes: how many directions at once; 1 with "gradient".
      fresh_batches: a batch of its own for every inner step: the objective's batch then has
        one more axis in front, of length `steps`.
      per_example: the mean of one problem for each example, with that example's gradient
        and curvature, in place of one problem for the batch. It holds several copies of the
        parameters for each example.
      seed: of probes and of the fresh vectors of structures with a memory; the number of the
        refit and the inner step are folded into it.

    Raises:
      ValueError: a value outside its range, or options that exclude each other.
      TypeError: a value of a wrong type.
    """

    every: int | Schedule = 1000
    start: int = 0
    until: int | None = None
    steps: int = 50
    tolerance: float = 0.0
    learning_rate: float | Schedule = 1e-3
    anneal: bool = False
    solver: SolverLike = "momentum"
    momentum: float = 0.9
    clip_norm: float | None = 5.0
    clip_value: float | None = None
    warm_start: bool = True
    ema_decay: float | Schedule = 0.0
    normalize_gradient: bool = False
    allow_grad_inversion: bool = False
    probe: Probe = "gradient"
    probes: int = 1
    fresh_batches: bool = False
    per_example: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("Refit: steps", self.steps, low=1)
        check_integer("Refit: probes", self.probes, low=1)
        check_integer("Refit: start", self.start, low=0)
        check_integer("Refit: until", self.until, low=0)
        check_integer("Refit: seed", self.seed, low=0)
        if not isinstance(self.solver, optax.GradientTransformation):
            check_choice("solver", self.solver, SOLVERS)
        check_choice("probe", self.probe, get_args(Probe))
        for name in ("every", "learning_rate", "ema_decay", "clip_norm", "momentum", "tolerance"):
            if isinstance(getattr(self, name), jax.Array):
                raise TypeError(
                    f"Refit: {name} must be a Python number, or a schedule where it may change "
                    "(options are static), not an array."
                )
        if not callable(self.every):
            check_integer("Refit: every", self.every, low=1)
        check_range("Refit: learning_rate", self.learning_rate, low=0, open_low=True)
        check_range("Refit: tolerance", self.tolerance, low=0)
        check_range("Refit: momentum", self.momentum, low=0, high=1)
        check_range("Refit: clip_norm", self.clip_norm, low=0, open_low=True)
        check_range("Refit: clip_value", self.clip_value, low=0, open_low=True)
        check_range("Refit: ema_decay", self.ema_decay, low=0, high=1)
        why = None
        if self.probe == "gradient" and self.probes != 1:
            why = f"probe='gradient' is one fixed direction: probes must be 1, not {self.probes}"
        elif self.per_example and self.probe != "gradient":
            why = f"per_example learns on each example's gradient, not on probe={self.probe!r}"
        elif self.normalize_gradient and self.probe != "gradient":
            why = f"normalize_gradient has no effect with probe={self.probe!r}"
        elif self.tolerance and (self.fresh_batches or self._random):
            why = "fresh batches and probes change the objective at every step: tolerance must be 0"
        elif self.anneal and self.solver in solvers.DETERMINISTIC:
            why = f"solver={self.solver!r} finds its own lengths: anneal has no effect"
        elif self.fresh_batches and self.solver in solvers.DETERMINISTIC:
            why = f"solver={self.solver!r} needs one objective for all steps: no fresh_batches"
        elif self.until is not None and self.until < self.start:
            why = f"until={self.until} lies before start={self.start}"
        if why:
            raise ValueError(f"Refit: {why}.")

    @property
    def _random(self) -> bool:
        return self.probe != "gradient" and self.solver not in solvers.DETERMINISTIC

    @property
    def batched(self) -> bool:
        """Whether there are several directions at once, on a leading axis."""
        return self.per_example or self.probe != "gradient"

    def is_due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Return whether a refit is due before update call number `count`, counted from 0."""
        every = self.every
        if callable(every):  # a schedule gives floats
            every = jnp.maximum(jnp.round(every(count)), 1).astype(count.dtype)
        offset = count - self.start
        due = (offset >= 0) & (offset % every == 0)
        return due if self.until is None else due & (count < self.until)


class RefitInfo(NamedTuple):
    """What the last refit did; zeros and NaN before the first."""

    refits: Int[Array, ""]  # how many so far
    steps: Int[Array, ""]  # inner steps of the last one
    objective_before: Float[Array, ""]  # Phi at the start of the refit
    objective_after: Float[Array, ""]  # Phi of what the refit proposes to install
    cosine: Float[Array, ""]  # of P h and h, for what was installed
    status: Int[Array, " blocks"]  # what was done to each block: index into `STATUS`
    cosines: Float[Array, " blocks"]  # of P h and h in each block; 0 where h or P h is zero

    def count(self, *words: str) -> Int[Array, ""]:
        """Return how many blocks have one of these words of `STATUS`."""
        found = [jnp.sum(self.status == STATUS.index(w), dtype=jnp.int32) for w in words]
        return sum(found, start=jnp.zeros((), jnp.int32))

    @property
    def guarded(self) -> Int[Array, ""]:
        """Blocks that kept their old arrays in the last refit because of a guard."""
        return self.count("nonfinite", "inverted", "rejected")


def no_refit(blocks: int) -> RefitInfo:
    """Return the record before the first refit, for a number of blocks."""
    # An array of its own for each field: a state that repeats a buffer cannot be donated.
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    nan = lambda *shape: jnp.full(shape, jnp.nan, jnp.float32)  # noqa: E731
    status = jnp.zeros((blocks,), jnp.int32)
    return RefitInfo(zero(), zero(), nan(), nan(), nan(), status, nan(blocks))


class Hyper(NamedTuple):
    """The numbers of one refit that may change between refits without a recompilation."""

    learning_rate: Number
    ema_decay: Number
    damping: Number


def hyper_at(refit: Refit, count: Int[Array, ""], damping: Number) -> Hyper:
    """Return the numbers of a refit at `count`."""

    def at(value: Any) -> Any:
        return value(count) if callable(value) else value

    return Hyper(at(refit.learning_rate), at(refit.ema_decay), damping)


@dataclass(frozen=True)
class Problem:
    """What stays the same over all refits of a run: static and hashable.

    Args:
      plan: the blocks.
      metric: a resolved metric, or a tree of them, flattened by `freeze`.
      reduction: over rows.
      scale: sigma at which blocks are initialised.
      refit: the refit's options.
      route: how curvature products are computed.
      base: optimizer whose update P multiplies; None: P multiplies the gradient.
    """

    plan: Plan
    metric: Frozen
    reduction: Reduction
    scale: float
    refit: Refit
    route: Route = WHOLE
    base: optax.GradientTransformation | None = None

    @property
    def solver(self) -> solvers.Solver:
        """The inner solver."""
        refit = self.refit
        return solvers.make(
            refit.solver,
            momentum=refit.momentum,
            clip_norm=refit.clip_norm,
            clip_value=refit.clip_value,
        )

    @property
    def has_memory(self) -> bool:
        """Whether a block has a memory."""
        return any(block.structure.has_memory for block in self.plan)

    @property
    def compiled(self) -> bool:
        """Whether a refit must be one compiled function on every device.

        The pieces of the reference route cannot cross `jit`, and a line search has a loop
        of its own, which chunks that are looped over in Python cannot be inside of.
        """
        searches = self.refit.solver in solvers.LINE_SEARCHES
        return self.route.layerwise or (searches and self.route.chunk_size is not None)

    def check(self) -> None:
        """Raise ValueError if the options exclude each other."""
        curved = [b.structure.name for b in self.plan if not b.structure.linear]
        if self.refit.solver == "cg" and curved:
            raise ValueError(
                "solver='cg' needs structures that are linear in their arrays (scalar, "
                f"diagonal, dense), but there is {curved[0]!r}; 'cg_zoom_hz' takes any."
            )


def check_options(refit: Refit, metric: PyTree, reduction: Reduction, route: Route) -> None:
    """Raise ValueError if options of a refit exclude each other."""
    why = None
    if refit.probe == "fisher" and not metrics.can_sample(metric):
        why = (
            "probe='fisher' needs a metric from which labels can be drawn: ngd, reverse_kl, "
            "renyi or gaussian"
        )
    elif refit.per_example and route.chunk_size is not None:
        why = "per_example splits the batch already: chunk_size must be None"
    elif refit.per_example and reduction == "unit":
        why = (
            "per_example has one curvature for each example: divergence_reduction='unit' needs "
            "that of the batch"
        )
    if why:
        raise ValueError(f"{why}.")
