r"""Streaming refits: P follows the training, a little at every step, instead of stopping for it.

At every step each matrix observes the gradient; every k steps a refit draws probes h, gradients for
labels drawn from the model, and each matrix follows them; the step is P times the momentum. What
happens to one matrix is told in `eigen`, for those with a spectrum between bases, and in `factors`,
for kfac. With divergence_reduction="unit", each block of C is taken in units of its own largest
entry, so that lambda says how ill-conditioned a block may be at most (kfac: in units of the largest
eigenvalue of C); how long its update is, the graft decides.

Sources: Layerwise LQR (arXiv 2605.04230) for the objective; bases as in SOAP (arXiv 2409.11321).
"""

import functools
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llqr import coupling, metrics
from llqr.curvature import model as quadratic
from llqr.curvature.model import QuadraticModel
from llqr.refit import factors
from llqr.refit.directions import fisher_probe, floored
from llqr.refit.following import (
    Following,
    Memory,
    columns,
    kind_of,
    largest,
    record,
    top_of,
    turned,
    unless,
)
from llqr.refit.learner import Asked, Held, Setting
from llqr.refit.options import Streaming
from llqr.refit.remedies import STREAMING, Remedies
from llqr.structures import trees
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays, Structure
from llqr.structures.plan import Plan, each
from llqr.tree import norm, vdot, widen
from llqr.typing import Array, Bool, Float, Int, Number, Params


@dataclass(frozen=True)
class Streamed(Following):
    """The streaming way: statistics at every step, a probe now and then. A `Learner`."""

    remedies: ClassVar[Remedies] = STREAMING
    remembers: ClassVar[str] = "momentum, second moments and curvature"
    needs_objective: ClassVar[bool] = True
    needs: ClassVar[str] = (
        "with probes: the closed form needs one spectrum between two bases (e-kfac, e-kfac-gpt, "
        "diagonal), and the relative steps two sides (kfac). Use one of these, or refits that "
        "learn any structure, llqr.Refit."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not metrics.can_sample(self.setting.metric.tree):
            raise ValueError(
                "streaming refits need a metric from which labels can be drawn: "
                f"{metrics.SAMPLED} (gaussian for a mean of squares, gauss_newton times a number)."
            )

    @staticmethod
    def takes(options: Any) -> bool:
        """Whether these are its options."""
        return isinstance(options, Streaming) and options.probe == "fisher"

    def follows(self, structure: Structure) -> bool:
        """Whether it takes a structure: between bases, or of two sides that can move."""
        moves = any(side.streams == "basis" for side in structure.sides.values())
        kind = kind_of(structure)
        return kind is not None and (kind is not factors or moves)

    def follow(self, plan: Plan, held: Held, asked: Asked) -> Held:
        """Return what is held after new bases, one more probe, and the spectrum that follows.

        A block whose probe is not finite keeps its curvature.
        """
        options, setting, damping = self.options, self.setting, asked.damping
        was, info = held.memory.blocks, held.info
        model, probes, noise = _draw(self, info.refits, asked)
        # Block -> what it sees of each probe.
        seen = [list(hs) for hs in zip(*(trees.gather(plan, h) for h in probes), strict=True)]
        # Labels drawn say nothing of these matrices: to follow would only lengthen their steps.
        flat, usable = columns(each(plan, lambda _, hs: _flat_usable(hs), seen), 2)

        def follow(number: Array, block: Block, *own: Any) -> tuple[Arrays, Arrays]:
            return kind_of(block.structure).follow(options, number, block, *own)

        number = info.refits + 1
        bases = turned(self, plan, held, number, flat)
        found = each(plan, follow, bases, held.arrays, was, seen, usable, shared=(number,))
        arrays, blocks = columns(found, 2)
        tops = [top_of(setting, block, own) for block, own in zip(plan, blocks, strict=True)]
        power, top, values = held.memory.power, largest(tops), None
        if self.moves:
            power, top = _power_step(setting, model, held.memory)
            model = replace(model, top_eigenvalue=top)
            moved, values = _move(options, plan, model, arrays, blocks, probes[0], noise)
            kept = list(zip(held.arrays, was, strict=True))
            arrays, blocks = columns(each(plan, lambda _, *x: unless(*x), flat, kept, moved), 2)

        def solved(damping: Number, block: Block, flat: Array, own: Arrays, *more: Any) -> Arrays:
            return unless(flat, own, kind_of(block.structure).solved(damping, own, *more))

        def phi(damping: Number, block: Block, *own: Any) -> tuple[Array, ...]:
            return kind_of(block.structure).objectives(damping, *own)

        new = each(plan, solved, flat, arrays, blocks, tops, shared=(damping,))
        if values is None:
            both = columns(each(plan, phi, arrays, new, blocks, tops, shared=(damping,)), 2)
            values = tuple(jnp.sum(trees.in_order(plan, x)) for x in both)
        info = record(plan, tuple(new), blocks, info, usable, flat, values)
        memory = Memory(tuple(blocks), power, jnp.asarray(top, jnp.float32))
        return Held(tuple(new), memory, info, [])


def _draw(
    learner: Streamed, number: Int[Array, ""], asked: Asked
) -> tuple[QuadraticModel, list[Params], Array]:
    """The model on the part of the batch that probes see, the probes, and a key for noise."""
    options, setting, params, objective = (
        learner.options, learner.setting, asked.params, asked.objective
    )  # fmt: skip
    if setting.reduction != "sum":
        objective = coupling.part(objective, params, options.probe_share, number)
    if learner.moves:  # products with C in half precision would lose what a step changes
        if setting.route.layerwise:
            params = widen(params)
        else:
            objective, params = objective.widened(params)
    model = quadratic.linearize(
        objective, params, setting.metric.tree, damping=asked.damping,
        divergence_reduction=metrics.over_rows(setting.reduction), route=setting.route,
    )  # fmt: skip
    key, noise = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), number))
    keys, axis_name = jax.random.split(key, options.probes), setting.route.axis_name
    probe = partial(fisher_probe, setting.metric.tree, setting.reduction, model, objective)
    # One after the other, not a vmap: one probe is the rule, and a batch of pull-backs through
    # convolutions is slower than as many of them.
    return model, [probe(k, axis_name) for k in keys], noise


def _flat_usable(hs: list[Array]) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether probes are all zero, and whether they are neither that nor not finite."""
    # NaN where there is one.
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(h), initial=0.0) for h in hs])
    return largest == 0, jnp.isfinite(largest) & (largest != 0)


def _power_step(setting: Setting, model: QuadraticModel, memory: Memory) -> tuple[Params, Number]:
    """One step of the power iteration; its length estimates the largest eigenvalue."""
    if setting.reduction != "unit":
        return memory.power, 1.0
    power = quadratic.power_step(None, model.curvature, memory.power)
    length = norm(power)
    usable = jnp.isfinite(length) & (length > 0)
    power = jax.tree.map(lambda new, old: jnp.where(usable, new, old), power, memory.power)
    return power, jnp.where(usable, length, memory.top.astype(length.dtype))


def _move(
    options: Streaming, plan: Plan, model: QuadraticModel, arrays: list[Arrays],
    blocks: list[Arrays], h: Params, noise: Array,
) -> tuple[list[tuple[Arrays, Arrays]], tuple[Array, ...]]:  # fmt: skip
    """Move what has two sides by relative steps; and Phi of the probe before and after."""
    h = floored(model, h, noise)
    seen = trees.gather(plan, h)

    def phi(arrays: list[Arrays]) -> tuple[Params, Float[Array, ""]]:
        u = trees.scatter(plan, trees.product(plan, arrays, seen), h)
        return u, 0.5 * model.bilinear(u, u) - vdot(h, u)

    def move(block: Block, *own: Any) -> tuple[Arrays, Arrays]:
        return kind_of(block.structure).moved(options, block, *own)

    u, before = phi(arrays)
    residual = trees.gather(plan, jax.tree.map(jnp.subtract, model.product(u), h))
    found = each(plan, move, arrays, blocks, residual, seen)
    after = phi([new for new, _ in found])[1]
    return found, (before.astype(jnp.float32), after.astype(jnp.float32))
