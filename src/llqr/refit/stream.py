"""What streaming refits are asked for, and what they remember; `llqr.refit.streaming` is how."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from llqr import metrics
from llqr.curvature.route import Route
from llqr.errors import check_integer, check_range
from llqr.metrics import Reduction
from llqr.refit.setup import WHOLE
from llqr.structures import plan as plans
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays, Structure
from llqr.structures.plan import Plan
from llqr.structures.rules import embedding_like
from llqr.tree import Frozen
from llqr.typing import Array, Bool, Float, Int, Params, PyTree

DAMPING = 1e-4
"""Default lambda, in units of the largest curvature of each block."""

MOMENTUM, SQUARES = "momentum", "squares"
"""Slots of the momentum, and of the running mean of the squares of the gradient, in the bases."""


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """How P follows the training: `refit=llqr.Streaming()` in place of `llqr.Refit`.

    A step with a refit costs one more gradient, of a quarter of the batch, so that the default
    takes 1.03 gradients a step. It works for the structures e-kfac (with its embedding rules,
    e-kfac-gpt), diagonal and kfac, which takes 1.08; the metric must be one from which labels
    can be drawn.

    Args:
      every: k, steps from refit to refit, after the warm-up. None: none by themselves, not even
        in the warm-up; they come from outside only (`llqr.refresh`), and `update` needs no
        objective.
      warmup: so many steps from `start` on have a refit each.
      start: no refit before this count.
      until: no refit at or after this count; None: never stops.
      momentum: mu in [0, 1); P multiplies the momentum m.
      nesterov: it multiplies G + mu m instead.
      basis_decay: b in [0, 1), of the second moments of the gradient.
      spectrum_decay: a in [0, 1], of the curvature c: a mean over the first refits, and then a
        running mean; 1: the mean over all.
      signal_decay: in [0, 1), of the squares of the gradient in the bases. Each entry of P m is
        weighed by the share of the gradient that agrees from step to step, |mean| by root mean
        square; embeddings count as agreeing, and matrices of kfac are not weighed. None: none is.
      probes: h drawn at each refit.
      probe_share: in (0, 1], of the examples of the batch on which they are drawn, another part
        of them at each refit: a probe sums over examples with random signs, and what it says of
        the curvature is hardly less uncertain with all of them. Where examples lie, the
        objective's `batch_axes` say. All examples are taken where the arrays of a batch do not
        agree on their number, and with divergence_reduction="sum", whose scale depends on it.
      wide: sides longer than this turn and follow more rarely.
      rate: eta in (0, 1), of kfac.
      seed: of the probes; the number of the refit is folded into it.

    Raises:
      ValueError: a value outside its range.
      TypeError: a value of a wrong type.

    Example:
      >>> import optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.01), structure="e-kfac", refit=llqr.Streaming())
      >>> [step for step in range(50) if llqr.Streaming().is_due(step) and step >= 20]
      [20, 30, 40]

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230, for the
      objective. Vyas et al., SOAP, arXiv 2409.11321, for the bases. Li, Preconditioned
      Stochastic Gradient Descent, arXiv 1512.04202, for kfac's relative steps.
    """

    every: int | None = 10
    warmup: int = 10
    start: int = 0
    until: int | None = None
    momentum: float = 0.9
    nesterov: bool = True
    basis_decay: float = 0.95
    spectrum_decay: float = 0.9
    signal_decay: float | None = 0.95
    probes: int = 1
    probe_share: float = 0.25
    wide: int = 256
    rate: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("every", 1), ("warmup", 0), ("start", 0), ("until", 0),
                          ("probes", 1), ("wide", 1), ("seed", 0)):  # fmt: skip
            check_integer(f"Streaming: {name}", getattr(self, name), low=low)
        check_range("Streaming: probe_share", self.probe_share, low=0, open_low=True, high=1)
        for name, high in (("momentum", 1), ("basis_decay", 1), ("spectrum_decay", 1),
                           ("signal_decay", 1), ("rate", 1)):  # fmt: skip
            value = getattr(self, name)
            if name == "signal_decay" and value is None:
                continue
            check_range(f"Streaming: {name}", value, low=0, high=high)
            if value == 1 and name != "spectrum_decay":
                raise ValueError(f"Streaming: {name} must be below 1, got {value!r}.")
        if self.until is not None and self.until < self.start:
            raise ValueError(f"Streaming: until={self.until} lies before start={self.start}.")

    def is_due(self, count: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
        """Return whether step number `count`, from 0, has a refit; for an int, a Python bool."""
        if self.every is None:
            return False if isinstance(count, int) else jnp.zeros_like(count, dtype=bool)
        offset = count - self.start
        due = (offset >= 0) & ((offset < self.warmup) | (offset % self.every == 0))
        return due if self.until is None else due & (count < self.until)


class StreamState(NamedTuple):
    """What streaming refits remember besides P: arrays only, float32 at least."""

    # slot -> tree shaped like params, an array or None: the momentum and, where signal_decay is
    # given, q ("squares"), both in the bases; S_L and S_R ("left", "right"), c ("spectrum"); for
    # kfac A and B, and m as it is
    statistics: dict[str, Any]
    power: Params | None  # C v / |v| of the last power step, like params; None without kfac
    top: Float[Array, ""]  # by which C was last divided: the largest of all blocks


@dataclass(frozen=True)
class StreamSetup:
    """What stays the same over a run: static and hashable.

    Attributes:
      plan: the blocks.
      metric: a resolved metric, or a tree of them, flattened by `freeze`.
      reduction: over rows; "unit" divides C by `top`.
      options: of the refits.
      two_sided: whether a rule has a structure of two sides without a spectrum.
      route: how the network is linearised.
    """

    plan: Plan
    metric: Frozen
    reduction: Reduction
    options: Streaming
    two_sided: bool = False
    route: Route = WHOLE


def check_streamable(structures: Iterable[Structure], metric: PyTree) -> None:
    """Raise ValueError for a structure or a resolved metric that cannot be streamed."""
    if not metrics.can_sample(metric):
        raise ValueError(
            "streaming refits need a metric from which labels can be drawn: ngd, reverse_kl, "
            "renyi, bernoulli or gaussian (of a mean of squares, gauss_newton times a number)."
        )
    for structure in structures:
        if kind_of(structure) is None:
            raise ValueError(
                f"structure {structure.name!r} cannot be streamed: the closed form needs one "
                "spectrum between fixed bases (e-kfac, e-kfac-gpt, diagonal), and the relative "
                "steps two sides (kfac). Use one of these, or refits that learn any structure, "
                "llqr.Refit."
            )


def kind_of(structure: Structure) -> str | None:
    """Return how a structure is streamed: "spectrum", "sides", or None for not at all.

    Example:
      >>> from llqr.structures import STRUCTURES
      >>> [kind_of(STRUCTURES[name]) for name in ("e-kfac", "kfac", "sym-kfac")]
      ['spectrum', 'sides', None]
    """
    plain = not (structure.positive or structure.normalize) and structure.view == "leaf"
    known = {structure.left, structure.right} <= {"identity", "dense", "diagonal"}
    if not (plain and known):
        return None
    return {"full": "spectrum", "none": "sides"}.get(structure.spectrum)


def dense_sides(block: Block) -> tuple[str, ...]:
    """Slots of the sides that are learned: a diagonal side of a long axis stays the identity."""
    sides = {"left": block.structure.left, "right": block.structure.right}
    return tuple(slot for slot, name in sides.items() if name == "dense")


def bases_of(block: Block, arrays: Arrays) -> Arrays:
    """Return V_L and V_R of a matrix ("left", "right"); not of one that has no spectrum.

    Args:
      block: to which it belongs.
      arrays: of its P.
    """
    spectrum = kind_of(block.structure) == "spectrum"
    return {slot: arrays[slot] for slot in dense_sides(block)} if spectrum else {}


def is_embedding(block: Block) -> bool:
    """Whether a block holds embeddings, whose rows are seldom in a batch."""
    return any(map(embedding_like, block.names))


def statistics_of(options: Streaming, block: Block) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array that a block's statistics hold, by slot."""
    shapes = {MOMENTUM: block.shape}
    for slot in dense_sides(block):
        size = block.shape[0] if slot == "left" else block.shape[1]
        shapes[slot] = (size, size)
    if kind_of(block.structure) == "spectrum":
        shapes["spectrum"] = block.shape
        if options.signal_decay is not None and not is_embedding(block):
            shapes[SQUARES] = block.shape
    return shapes


def pack(
    setup: StreamSetup, arrays: list[Arrays], stream: StreamState, like: Params
) -> dict[str, Any]:
    """Return the statistics of all blocks as one tree for each slot."""
    return plans.pack(setup.plan, arrays, like, tuple(stream.statistics))


def unpack(setup: StreamSetup, trees: dict[str, Any], like: Params) -> tuple[Arrays, ...]:
    """Return the statistics of each block: the inverse of `pack`."""
    slots = partial(statistics_of, setup.options)
    return plans.unpack(setup.plan, trees, like, lambda block: tuple(slots(block)))
