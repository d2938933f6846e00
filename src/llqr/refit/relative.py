"""Two sides without a spectrum, moved by relative steps: kfac in `llqr.refit.streaming`."""

from typing import Any

import jax
import jax.numpy as jnp

from llqr.curvature import model as quadratic
from llqr.curvature.model import QuadraticModel
from llqr.refit.directions import floored
from llqr.refit.stream import StreamSetup, StreamState, dense_sides, kind_of
from llqr.structures import plan as plans
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.tree import all_finite, divide, norm, vdot
from llqr.typing import Array, Float, Number, Params, PRNGKeyArray

NORM_STEPS = 4
"""Power steps behind |E|_2: with eta = 0.3, an estimate three times too small would still do."""


def power_step(
    setup: StreamSetup, model: QuadraticModel, stream: StreamState
) -> tuple[Params, Number]:
    """One step of the power iteration; its length estimates the largest eigenvalue."""
    if setup.reduction != "unit":
        return stream.power, 1.0
    power = quadratic.power_step(None, model.curvature, stream.power)
    length = norm(power)
    usable = jnp.isfinite(length) & (length > 0)
    power = jax.tree.map(lambda new, old: jnp.where(usable, new, old), power, stream.power)
    return power, jnp.where(usable, length, stream.top.astype(length.dtype))


def relative_step(
    setup: StreamSetup, model: QuadraticModel, blocks: list[Arrays], statistics: list[Arrays],
    h: Params, noise: PRNGKeyArray,
) -> tuple[list[Arrays], list[Arrays], Float[Array, ""], Float[Array, ""]]:  # fmt: skip
    """Move Q along its relative gradient; also Phi on this probe, before and after."""
    h = floored(model, h, noise)

    def phi(arrays: list[Arrays]) -> tuple[Params, Float[Array, ""]]:
        u = plans.multiply(setup.plan, arrays, h)
        return u, 0.5 * model.bilinear(u, u) - vdot(h, u)

    u, before = phi(blocks)
    residual = jax.tree.map(jnp.subtract, model.product(u), h)

    def move(block: Block, arrays: Arrays, own: Arrays, r: Array, x: Array) -> Any:
        if kind_of(block.structure) != "sides":
            return arrays, own
        own = _moved(setup.options.rate, block, own, r, x)
        return arrays | {slot: own[slot].T @ own[slot] for slot in dense_sides(block)}, own

    seen = [plans.gather(setup.plan, x) for x in (residual, h)]
    moved = plans.each(setup.plan, move, blocks, statistics, *seen)
    new, found = ([pair[i] for pair in moved] for i in (0, 1))
    return new, found, before.astype(jnp.float32), phi(new)[1].astype(jnp.float32)


def _moved(rate: float, block: Block, factors: Arrays, r: Array, h: Array) -> Arrays:
    """A and B after one relative step."""
    w, a = _between(factors, h), _between(factors, r)
    out = dict(factors)
    for slot in dense_sides(block):
        e = a @ w.T if slot == "left" else a.T @ w
        e = 0.5 * (e + e.T)
        size = jnp.maximum(_spectral_norm(e), jnp.sum(w * w) / e.shape[0])
        step = factors[slot] - rate * divide(e, size) @ factors[slot]
        out[slot] = jnp.where(all_finite([step]), step, factors[slot])
    return out


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
