"""A spectrum between bases, followed: the closed form of `llqr.refit.streaming`."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from llqr import _loops
from llqr._tree import all_finite
from llqr._types import Array, Bool, Float, Int, Number
from llqr.refit.stream import Streaming, StreamSetup, dense_sides, kind_of
from llqr.structures import plan as plans
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Block, Plan

WIDE_TURNS, WIDE_FOLLOWS = 5, 2
"""Wide sides turn at the first refits and then at every fifth, and follow every second gradient."""


def observed(
    options: Streaming, block: Block, statistics: Arrays, gradient: Array, often: Bool[Array, ""]
) -> Arrays:
    """Return the statistics of a block after one more gradient: its second moments.

    Args:
      options: of streaming.
      block: of one leaf.
      statistics: by slot.
      gradient: of the leaf.
      often: whether wide sides follow this one.
    """
    sides = dense_sides(block) if kind_of(block.structure) == "spectrum" else ()
    if not sides:
        return statistics
    x, b, new = block.matrix(gradient), options.basis_decay, dict(statistics)
    finite = jnp.all(jnp.isfinite(x))

    def follow(slot: str, s: Array) -> Array:
        moment = x @ x.T if slot == "left" else x.T @ x
        return jnp.where(finite, b * s + (1 - b) * moment, s)

    for slot in sides:
        new[slot] = now_or_rarely(options, new[slot], often, partial(follow, slot))
    return new


def now_or_rarely(
    options: Streaming, side: Array, due: Bool[Array, ""], run: Callable[[Array], Array]
) -> Array:
    """Run on a side now; on a wide one, only where that is due."""
    if len(side) <= options.wide:
        return run(side)
    return _loops.when(due, lambda kept: (run(kept),), side)[0]


def follow(
    options: Streaming, block: Block, arrays: Arrays, statistics: Arrays, probes: list[Array],
    number: Int[Array, ""], keep: Bool[Array, ""],
) -> tuple[Arrays, Arrays]:  # fmt: skip
    """Turn the bases towards the second moments, and average the probe's squares in them."""
    often = (number <= WIDE_TURNS - 1) | ((number - 1) % WIDE_TURNS == 0)

    def turn(slot: str, v: Array) -> Array:
        new = jnp.linalg.qr(statistics[slot] @ v)[0]
        return jnp.where(all_finite([new]), new, v)

    bases = {
        slot: now_or_rarely(options, arrays[slot], often, partial(turn, slot))
        for slot in dense_sides(block)
    }

    def squared(h: Array) -> Array:
        x = block.matrix(h)
        x = bases["left"].T @ x if "left" in bases else x
        x = x @ bases["right"] if "right" in bases else x
        return x * x

    fresh = jnp.mean(jnp.stack([squared(h) for h in probes]), axis=0)
    a = jnp.minimum(options.spectrum_decay, 1 - 1 / number.astype(fresh.dtype))
    c = jnp.where(keep, a * statistics["spectrum"] + (1 - a) * fresh, statistics["spectrum"])
    return arrays | bases, statistics | {"spectrum": c}


def tops_of(setup: StreamSetup, statistics: list[Arrays]) -> list[Number]:
    """By what each block's curvature is divided: its largest entry; 1 where there is none.

    Parts of one matrix are divided by the largest entry of all of them.
    """

    def one(blocks: list[int]) -> Number:
        found = [statistics[i]["spectrum"] for i in blocks]
        top = jnp.max(jnp.stack([jnp.max(c, initial=0.0) for c in found]))
        return jnp.where(top > 0, top, 1.0)

    tops: list[Number] = [1.0] * len(setup.plan)
    if setup.reduction == "unit":
        for matrix in plans.matrices(setup.plan):
            if kind_of(setup.plan[matrix[0]].structure) == "spectrum":
                top = one(matrix)
                for i in matrix:
                    tops[i] = top
    return tops


def largest(tops: list[Number]) -> Float[Array, ""]:
    """Return the largest of what blocks are divided by: for the record."""
    return jnp.max(jnp.stack([jnp.asarray(top, jnp.float32) for top in [0.0, *tops]]))


def solved(
    block: Block, arrays: Arrays, statistics: Arrays, top: Number, damping: Number
) -> Arrays:
    """Set the spectrum to the minimiser of the probe objective."""
    if kind_of(block.structure) != "spectrum":
        return arrays
    c = statistics["spectrum"]
    d = 1 / (c / jnp.asarray(top, c.dtype) + jnp.asarray(damping, c.dtype))
    return arrays | {"spectrum": d}


def closed_objective(
    plan: Plan,
    blocks: list[Arrays],
    statistics: list[Arrays],
    tops: list[Number],
    damping: Number,
) -> Float[Array, ""]:
    """Sum of 1/2 D^2 c (c + lambda) - D c: the probe objective without couplings."""
    total = jnp.zeros((), jnp.float32)
    for block, arrays, own, top in zip(plan, blocks, statistics, tops, strict=True):
        if kind_of(block.structure) == "spectrum":
            d, c = arrays["spectrum"], own["spectrum"] / jnp.asarray(top, own["spectrum"].dtype)
            entries = 0.5 * d * d * c * (c + jnp.asarray(damping, c.dtype)) - d * c
            total = total + jnp.sum(entries).astype(jnp.float32)
    return total
