r"""One matrix of two sides (kfac): what happens to it at a step, and at a refit.

P = Q^T Q with Q = A x B, and with h a Fisher probe, w = Q h, u = Q^T w,
r = (C / top + lambda) u - h, a = Q r:

    A <- (I - eta E / s) A,  E = sym(a w^T),  s = max(|E|_2, |w|^2 / rows)      B with a^T w

These are the relative coordinates of Q, in which the step is like Newton's near the solution; with
eta < 1 no side can lose its rank or sign. `top` is the largest eigenvalue of C, by one warm-started
power step for each refit.

Sources: Layerwise LQR (arXiv 2605.04230) for the objective; relative steps as in preconditioned SGD
on matrix Lie groups (Li, arXiv 1512.04202).
"""

from collections.abc import Sequence

import jax.numpy as jnp

from llqr.refit.momentum import MOMENTUM, is_usable, momentum, towards
from llqr.refit.options import Streaming
from llqr.structures import matrix as mx
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.tree import all_finite, divide
from llqr.typing import Array, Float, Number

NORM_STEPS = 4
"""Power steps behind |E|_2: with eta = 0.3, an estimate three times too small would still do."""


def slots(options: Streaming, block: Block) -> tuple[str, ...]:
    """Names of what is remembered of a matrix."""
    del options
    return (MOMENTUM, *block.bases)


def init(block: Block, slots: Sequence[str]) -> Arrays:
    """Return what is remembered of a matrix before the first step: A and B are the identity."""
    del slots
    sides = {slot: jnp.eye(size, dtype=block.dtype) for slot, size in block.bases.items()}
    return {MOMENTUM: jnp.zeros(block.shape, block.dtype), **sides}


def observe(
    options: Streaming, wide: Array, block: Block, arrays: Arrays, memory: Arrays, x: Array
) -> tuple[Arrays, Array]:
    """Return what is remembered after one more gradient x, and x."""
    del wide, block, arrays
    return memory | {MOMENTUM: momentum(options, memory[MOMENTUM], x, is_usable(x))}, x


def follow(
    options: Streaming, number: Array, block: Block, bases: Arrays, arrays: Arrays, memory: Arrays,
    probes: list[Array], usable: Array,
) -> tuple[Arrays, Arrays]:  # fmt: skip
    """Return P and what is remembered as they are: it takes all matrices together to move."""
    del options, number, block, bases, probes, usable
    return arrays, memory


def moved(
    options: Streaming, block: Block, arrays: Arrays, memory: Arrays, r: Array, h: Array
) -> tuple[Arrays, Arrays]:
    """Return P, and A and B in what is remembered, after one relative step.

    The probe is h, and r = (C / top + lambda) P h - h.
    """
    w, a = _between(memory, h), _between(memory, r)
    sides: Arrays = {}
    for slot in block.bases:
        e = a @ w.T if slot == "left" else a.T @ w
        e = 0.5 * (e + e.T)
        size = jnp.maximum(_spectral_norm(e), jnp.sum(w * w) / e.shape[0])
        side = memory[slot] - options.rate * divide(e, size) @ memory[slot]
        sides[slot] = jnp.where(all_finite([side]), side, memory[slot])
    return arrays | {slot: q.T @ q for slot, q in sides.items()}, memory | sides


def top(memory: Arrays) -> Array:
    """Return 1: C is divided by its largest eigenvalue."""
    return jnp.ones((), memory[MOMENTUM].dtype)


def solved(damping: Number, arrays: Arrays, memory: Arrays, top: Array) -> Arrays:
    """Return P as it is: there is no spectrum."""
    del damping, memory, top
    return arrays


def step(
    options: Streaming, count: Array, block: Block, arrays: Arrays, memory: Arrays, g: Array
) -> tuple[Arrays, Array, Array, Array]:
    """Return what is remembered, P v, and P v and v: nothing is weighed here."""
    del count
    v = towards(options, g, memory[MOMENTUM])
    found = product(block, arrays, v)
    return memory, found, found, v


def product(block: Block, arrays: Arrays, m: Array) -> Array:
    """Return P m."""
    return mx.product(block.structure, arrays, m)


def project(block: Block, arrays: Arrays, x: Array) -> Array:
    """Return a gradient as the step sees it: as it is."""
    del block, arrays
    return x


def reexpress(block: Block, old: Arrays, new: Arrays, m: Array) -> Array:
    """Return a momentum where other arrays are installed: it lies in no bases."""
    del block, old, new
    return m


def _between(factors: Arrays, x: Array) -> Array:
    """A X B^T."""
    x = factors["left"] @ x if "left" in factors else x
    return x @ factors["right"].T if "right" in factors else x


def _spectral_norm(e: Float[Array, "d d"]) -> Float[Array, ""]:
    """|E|_2 of a symmetric E, from below: a few power steps from its longest row."""
    v = e[jnp.argmax(jnp.sum(e * e, axis=1))]
    for _ in range(NORM_STEPS):
        v = e @ divide(v, jnp.sqrt(jnp.sum(v * v)))
    return jnp.sqrt(jnp.sum(v * v))
