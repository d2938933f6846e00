"""A spectrum between bases, followed: the closed form of `llqr.refit.streaming`."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp

from llqr import _loops
from llqr._linalg import orthonormal
from llqr.refit.stream import (
    MOMENTUM,
    SQUARES,
    Streaming,
    StreamSetup,
    bases_of,
    kind_of,
)
from llqr.structures import matrix as mx
from llqr.structures import plan as plans
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan
from llqr.tree import all_finite, divide, replicate
from llqr.typing import Array, Bool, Float, Int, Number, Params

WIDE_TURNS, WIDE_FOLLOWS = 5, 2
"""Wide sides turn at the first refits and then at every fifth, and follow every second gradient."""


def observed(
    options: Streaming, often: Bool[Array, ""], block: Block, arrays: Arrays, statistics: Arrays,
    x: Array,
) -> tuple[Arrays, Array]:  # fmt: skip
    """Return the statistics of a matrix after one more gradient, and V_L^T G V_R.

    Args:
      options: of streaming.
      often: whether wide sides follow this one.
      block: to which the matrix belongs.
      arrays: of P.
      statistics: by slot.
      x: the gradient.
    """
    bases, b = bases_of(block, arrays), options.basis_decay
    seen, finite = into(bases, x), jnp.all(jnp.isfinite(x))
    new = statistics | {MOMENTUM: options.momentum * statistics[MOMENTUM] + seen}

    def follow(slot: str, s: Array) -> tuple[Array]:
        moment = x @ x.T if slot == "left" else x.T @ x
        return (jnp.where(finite, b * s + (1 - b) * moment, s),)

    for slot in bases:
        (new[slot],) = now_or_rarely(options, often, partial(follow, slot), new[slot])
    return new, seen


def now_or_rarely(
    options: Streaming, due: Bool[Array, ""], run: Callable[..., tuple[Array, ...]], side: Array,
    *others: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """Run on a side, and what goes with it, now; on a wide one, only where that is due."""
    if len(side) <= options.wide:
        return run(side, *others)
    return _loops.when(due, run, side, *others)


def follow(
    options: Streaming, number: Int[Array, ""], block: Block, arrays: Arrays, statistics: Arrays,
    probes: list[Array], keep: Bool[Array, ""],
) -> tuple[Arrays, Arrays]:  # fmt: skip
    """Turn the bases of a matrix towards the second moments, and average the probe's squares.

    The momentum turns with them: it is the same in the coordinates of the parameters.
    """
    if kind_of(block.structure) != "spectrum":
        return arrays, statistics
    often = (number <= WIDE_TURNS - 1) | ((number - 1) % WIDE_TURNS == 0)

    def turn(slot: str, v: Array, momentum: Array) -> tuple[Array, Array]:
        new = orthonormal(statistics[slot] @ v)
        new = jnp.where(all_finite([new]), new, v)
        return new, into({slot: new}, out_of({slot: v}, momentum))

    bases, momentum = {}, statistics[MOMENTUM]
    for slot, v in bases_of(block, arrays).items():
        bases[slot], momentum = now_or_rarely(options, often, partial(turn, slot), v, momentum)

    fresh = jnp.mean(jnp.stack([jnp.square(into(bases, h)) for h in probes]), axis=0)
    a = jnp.minimum(options.spectrum_decay, 1 - 1 / number.astype(fresh.dtype))
    c = jnp.where(keep, a * statistics["spectrum"] + (1 - a) * fresh, statistics["spectrum"])
    return arrays | bases, statistics | {MOMENTUM: momentum, "spectrum": c}


def into(bases: Arrays, x: Array) -> Array:
    """V_L^T x V_R."""
    x = bases["left"].T @ x if "left" in bases else x
    return x @ bases["right"] if "right" in bases else x


def out_of(bases: Arrays, x: Array) -> Array:
    """V_L x V_R^T: the inverse of `into`."""
    x = bases["left"] @ x if "left" in bases else x
    # Without a transpose of its own, so that a side which is spread over devices is gathered once.
    return jnp.einsum("ij,kj->ik", x, bases["right"]) if "right" in bases else x


def turned(
    plan: Plan, statistics: dict[str, Any], old: Sequence[Arrays], new: Sequence[Arrays],
    like: Params,
) -> dict[str, Any]:  # fmt: skip
    """Return the statistics with the momentum in other bases, where it is the same.

    Args:
      plan: the blocks.
      statistics: of the state, a tree for each slot.
      old: the arrays of P, of each block, in whose bases it lies.
      new: those in whose bases it is to lie.
      like: a tree with the structure of the parameters.
    """

    def turn(block: Block, old: Arrays, new: Arrays, own: Arrays) -> Arrays:
        m = out_of(bases_of(block, old), own[MOMENTUM])
        return {MOMENTUM: into(bases_of(block, new), m)}

    kept = {MOMENTUM: statistics[MOMENTUM]}
    held = plans.unpack(plan, kept, like, lambda block: (MOMENTUM,))
    found = plans.each(plan, turn, old, new, held)
    return statistics | plans.pack(plan, found, like, (MOMENTUM,))


def towards(options: Streaming, seen: Array, momentum: Array) -> Array:
    """Return v, what P multiplies: m or, with `nesterov`, G + mu m."""
    return seen + options.momentum * momentum if options.nesterov else momentum


def weighed(
    options: Streaming, count: Int[Array, ""], block: Block, arrays: Arrays, statistics: Arrays,
    seen: Array,
) -> tuple[Arrays, Array, Array, Array]:  # fmt: skip
    """Return the statistics of a matrix, P v weighed by signal, and P v and v in the bases.

    Each entry is weighed by how far gradients agree on it: |mean| by root mean square, which for
    gradients without a signal is sqrt((1 - mu) / (1 + mu)), and up to 1 where they agree. Rows of
    embeddings are seldom in a batch, which is no disagreement: all of theirs count as agreeing.

    Args:
      options: of streaming.
      count: steps so far.
      block: to which the matrix belongs.
      arrays: of P.
      statistics: by slot, this gradient in the momentum.
      seen: the gradient in the bases.
    """
    mu, m, b = options.momentum, statistics[MOMENTUM], options.signal_decay
    v = towards(options, seen, m)
    if kind_of(block.structure) != "spectrum":
        found = mx.multiply(block.structure, arrays, v)
        return statistics, found, found, v
    found = d = arrays["spectrum"] * v
    if b is not None:
        # In units of what the mean of gradients without a signal comes to.
        most = 1 / math.sqrt((1 - mu) / (1 + mu))
        if SQUARES in statistics:
            b = jnp.minimum(b, 1 - 1 / (count + 1).astype(seen.dtype))
            square, squares = seen * seen, statistics[SQUARES]
            squares = jnp.where(all_finite([square]), b * squares + (1 - b) * square, squares)
            share = divide(jnp.abs((1 - mu) * m), jnp.sqrt(squares), 0.0)
            statistics = statistics | {SQUARES: squares}
            found = jnp.minimum(share, 1.0) * found
        found = most * found
    return statistics, out_of(bases_of(block, arrays), found), d, v


def tops_of(setup: StreamSetup, statistics: list[Arrays]) -> list[Array]:
    """By what the curvature of each matrix is divided: its largest entry; 1 where there is none.

    Parts of one matrix are divided by the largest entry of all of them.
    """

    def of_block(block: Block, own: Arrays) -> Array:
        if setup.reduction != "unit" or kind_of(block.structure) != "spectrum":
            return block.repeated(jnp.ones((), block.dtype))
        top = block.each(lambda c: jnp.max(c, initial=0.0), own["spectrum"])
        cut = block.sources[0].cut
        if cut is not None:  # all sources are cut alike
            top = jnp.max(replicate(top).reshape(-1, math.prod(cut.grid)), axis=1)
            top = jnp.repeat(top, math.prod(cut.grid))
        return jnp.where(top > 0, top, 1.0)

    return [of_block(block, own) for block, own in zip(setup.plan, statistics, strict=True)]


def largest(tops: list[Array]) -> Float[Array, ""]:
    """Return the largest of what matrices are divided by: for the record."""
    found = [replicate(top).ravel().astype(jnp.float32) for top in tops]
    return jnp.max(jnp.concatenate(found), initial=0.0) if found else jnp.zeros(())


def solved(damping: Number, block: Block, arrays: Arrays, statistics: Arrays, top: Array) -> Arrays:
    """Set the spectrum of a matrix to the minimiser of the probe objective."""
    if kind_of(block.structure) != "spectrum":
        return arrays
    c = statistics["spectrum"]
    d = 1 / (c / jnp.asarray(top, c.dtype) + jnp.asarray(damping, c.dtype))
    return arrays | {"spectrum": d}


def closed_objective(
    plan: Plan,
    blocks: list[Arrays],
    statistics: list[Arrays],
    tops: list[Array],
    damping: Number,
) -> Float[Array, ""]:
    """Sum of 1/2 D^2 c (c + lambda) - D c: the probe objective without couplings."""

    def one(damping: Number, block: Block, arrays: Arrays, own: Arrays, top: Array) -> Array:
        if kind_of(block.structure) != "spectrum":
            return jnp.zeros((), jnp.float32)
        d, c = arrays["spectrum"], own["spectrum"] / jnp.asarray(top, own["spectrum"].dtype)
        entries = 0.5 * d * d * c * (c + jnp.asarray(damping, c.dtype)) - d * c
        return jnp.sum(entries).astype(jnp.float32)

    found = plans.each(plan, one, blocks, statistics, tops, shared=(damping,))
    return jnp.sum(plans.in_order(plan, found))
