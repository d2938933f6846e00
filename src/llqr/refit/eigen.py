r"""One matrix between bases: what happens to it at a step, and at a refit.

  symbol      meaning                                                       shape
  G, m        gradient of the step, and its momentum                        [r, n]
  h           Fisher probe: gradient for labels drawn from the model,       [r, n]
              E h h^T = C
  S_L, S_R    running second moments of G: G G^T, G^T G                     [r, r], [n, n]
  V_L, V_R    bases: orthogonal, from S                                     like S
  g, v        G in the bases; what P multiplies: g + mu m, or m             [r, n]
  c, D        curvature and spectrum of P, in the bases                     [r, n]
  top         largest c of a matrix; 1 where C is not scaled                []
  q, s        mean square of g; signal: 1 for noise                         [r, n]

    moments     S_L <- b S_L + (1 - b) G G^T,  S_R likewise,  m <- mu m + g,  g = V_L^T G V_R
    turn        V_L <- qr(S_L V_L),  V_R <- qr(S_R V_R)  (`turning`),  m in the new bases
    curvature   c <- a c + (1 - a) (V_L^T h V_R)^2
    spectrum    D = 1 / (c / top + lambda)
    signal      q <- e q + (1 - e) g^2
                s = min(1, (1 - mu) |m| / sqrt(q)) / sqrt((1 - mu) / (1 + mu))
    step        V_L (s * D * v) V_R^T, or V_L (s * ns(D * v)) V_R^T

The momentum lies in the bases, so that a step projects the gradient alone. For fixed bases, D is
the minimiser of the objective of a probe (`llqr.refit.objective`), E[1/2 u.(C / top + lambda I) u -
h.u] with u = P h, wherever C couples no two entries there: each entry is 1/2 D^2 c (c + lambda) -
D c, c in units of top. No inner loop and no product with C are needed, and P is positive by
construction. A matrix without bases (structure "diagonal", and vectors) has V = I.

The weight s is where gradients say what labels drawn from the model cannot: whether an entry of
the mean gradient is known. An entry on which gradients agree keeps up to sqrt((1 + mu) / (1 - mu))
times the length that one of noise has; one that swings from step to step, because the step is too
long for it, gets shorter at once, without waiting for the learning rate to decay. As the length
(the graft) is given before, a whole leaf becomes shorter too. `signal_decay=None` leaves s at 1.

With `Streaming.orthogonalize`, ns(x) has the length of x, and singular values near to one another:
no direction leads the step because P took its curvature for small on little evidence. A change of
bases leaves ns the same, so that it is done in them; and before entries are weighed, so that those
which swing stay short.

Sources: Layerwise LQR (arXiv 2605.04230) for the objective; bases as in SOAP (arXiv 2409.11321).
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp

from llqr import _loops
from llqr._linalg import newton_schulz
from llqr.refit.momentum import MOMENTUM, is_usable, momentum, towards
from llqr.refit.options import Streaming
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.tree import divide, norm, sums
from llqr.typing import Array, Bool, Float, Int, Number

SQUARES, CURVATURE = "squares", "spectrum"
"""Slots of q and c. States of 0.2.0 keep c under the name of the spectrum that follows from it."""


def slots(options: Streaming, block: Block) -> tuple[str, ...]:
    """Names of what is remembered of a matrix."""
    weighs = options.signal_decay is not None and not block.seldom
    return (MOMENTUM, CURVATURE, *block.bases, *[SQUARES] * weighs)


def init(block: Block, slots: Sequence[str]) -> Arrays:
    """Return what is remembered of a matrix before the first step: zeros."""
    sizes = {slot: (size, size) for slot, size in block.bases.items()}
    return {slot: jnp.zeros(sizes.get(slot, block.shape), block.dtype) for slot in slots}


def observe(
    options: Streaming, wide: Bool[Array, ""], block: Block, arrays: Arrays, memory: Arrays,
    x: Array,
) -> tuple[Arrays, Array]:  # fmt: skip
    """Return the moments after one more gradient x, and it in the bases: g.

    Moments stay as they were where the gradient is not finite. Wide sides follow when it is `wide`.
    """
    b, usable = options.basis_decay, is_usable(x)
    g = project(block, arrays, x)
    new = memory | {MOMENTUM: momentum(options, memory[MOMENTUM], g, usable)}

    def moments(slot: str, s: Array) -> tuple[Array]:
        moment = x @ x.T if slot == "left" else x.T @ x
        return (jnp.where(usable, b * s + (1 - b) * moment, s),)

    for slot in block.bases:
        (new[slot],) = _in_turn(options, wide, partial(moments, slot), memory[slot])
    return new, g


def _in_turn(
    options: Streaming, due: Bool[Array, ""], run: Callable[..., tuple[Array, ...]], side: Array,
    *others: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """Run on a side, and what goes with it; on a wide one, only where that is due."""
    if len(side) <= options.wide:
        return run(side, *others)
    return _loops.when(due, run, side, *others)


def follow(
    options: Streaming, number: Int[Array, ""], block: Block, bases: Arrays, arrays: Arrays,
    memory: Arrays, probes: list[Array], usable: Bool[Array, ""],
) -> tuple[Arrays, Arrays]:  # fmt: skip
    """Return P in other bases, and what is remembered after the probes h of refit `number`, from 1.

    Curvature stays as it was where they are not `usable`: not finite, or all zero.
    """
    arrays, memory = turn(bases, arrays, memory)
    return arrays, curvature(options, number, block, arrays, memory, probes, usable)


def turn(bases: Arrays, arrays: Arrays, memory: Arrays) -> tuple[Arrays, Arrays]:
    """Return P in other bases, and what is remembered with the momentum in them."""
    old = {slot: arrays[slot] for slot in bases}
    m = _into(bases, _out_of(old, memory[MOMENTUM]))
    return arrays | bases, memory | {MOMENTUM: m}


def curvature(
    options: Streaming, number: Int[Array, ""], block: Block, arrays: Arrays, memory: Arrays,
    probes: list[Array], usable: Bool[Array, ""],
) -> Arrays:  # fmt: skip
    """Return what is remembered, with the squares of probes in c: a mean, then a running one."""
    squared = [jnp.square(project(block, arrays, h)) for h in probes]
    fresh = functools.reduce(jnp.add, squared) / len(probes)
    a = jnp.minimum(options.spectrum_decay, 1 - 1 / number.astype(fresh.dtype))
    c = jnp.where(usable, a * memory[CURVATURE] + (1 - a) * fresh, memory[CURVATURE])
    return memory | {CURVATURE: c}


def top(memory: Arrays) -> Float[Array, ""]:
    """Return the largest curvature of a matrix."""
    return jnp.max(memory[CURVATURE], initial=0.0)


def solved(damping: Number, arrays: Arrays, memory: Arrays, top: Array) -> Arrays:
    """Return P with the spectrum D that minimises the objective of a probe."""
    c = memory[CURVATURE]
    d = 1 / (c / jnp.asarray(top, c.dtype) + jnp.asarray(damping, c.dtype))
    # Where no probe was finite yet, nothing is known.
    return arrays | {"spectrum": jnp.where(jnp.max(c, initial=0.0) > 0, d, arrays["spectrum"])}


def objectives(
    damping: Number, before: Arrays, after: Arrays, memory: Arrays, top: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of 1/2 D^2 c (c + lambda) - D c for two P: the objective of a probe without couplings."""
    c = memory[CURVATURE] / jnp.asarray(top, memory[CURVATURE].dtype)
    squared = 0.5 * c * (c + jnp.asarray(damping, c.dtype))
    was, is_ = sums(*(squared * d * d - d * c for d in (before["spectrum"], after["spectrum"])))
    return was.astype(jnp.float32), is_.astype(jnp.float32)


def moved(
    options: Streaming, block: Block, arrays: Arrays, memory: Arrays, r: Array, h: Array
) -> tuple[Arrays, Arrays]:
    """Return P and what is remembered as they are: `factors` moves."""
    del options, block, r, h
    return arrays, memory


def signal(
    options: Streaming, count: Int[Array, ""], block: Block, memory: Arrays, g: Array
) -> tuple[Arrays, Array | None]:
    """Return what is remembered after step `count`, from 0, and s up to its factor.

    The share |mean| by root mean square of g: for gradients without a signal sqrt((1 - mu) /
    (1 + mu)), and up to 1 where they agree. None for rows that are seldom in a batch, which is no
    disagreement: all of theirs count as agreeing.
    """
    if SQUARES not in memory:
        return memory, None
    q = squares(options, count, memory[SQUARES], g)
    memory = memory | {SQUARES: q}
    if options.signal_decay is None or block.seldom:
        return memory, None
    share = divide(jnp.abs((1 - options.momentum) * memory[MOMENTUM]), jnp.sqrt(q), 0.0)
    return memory, jnp.minimum(share, 1.0)


def squares(options: Streaming, count: Int[Array, ""], q: Array, g: Array) -> Array:
    """Return the running mean of g^2 after step `count`, from 0; without what is not finite."""
    decay = options.basis_decay if options.signal_decay is None else options.signal_decay
    e = jnp.minimum(decay, 1 - 1 / (count + 1).astype(g.dtype))
    return jnp.where(is_usable(g), e * q + (1 - e) * g * g, q)


def step(
    options: Streaming, count: Int[Array, ""], block: Block, arrays: Arrays, memory: Arrays,
    g: Array,
) -> tuple[Arrays, Array, Array, Array]:  # fmt: skip
    """Return what is remembered, P v weighed by signal, and P v and v in the bases."""
    mu = options.momentum
    v = towards(options, g, memory[MOMENTUM])
    memory, share = signal(options, count, block, memory, g)
    found = d = arrays["spectrum"] * v
    if options.orthogonal and is_orthogonalized(block):
        even = newton_schulz(d)
        found = divide(norm(d), norm(even)) * even
    if share is not None:
        found = share * found
    if options.signal_decay is not None:
        # In units of what the mean of gradients without a signal comes to.
        found = 1 / math.sqrt((1 - mu) / (1 + mu)) * found
    return memory, _out_of(_bases(block, arrays), found), d, v


def is_orthogonalized(block: Block) -> bool:
    """Whether steps of a block may be orthogonalised: of a matrix whose rows are in every batch."""
    return bool(block.bases) and min(block.shape) > 1 and not block.seldom


def product(block: Block, arrays: Arrays, m: Array) -> Array:
    """Return P m in the bases, for m in them."""
    del block
    return arrays["spectrum"] * m


def project(block: Block, arrays: Arrays, x: Array) -> Array:
    """Return a gradient as the step sees it: in the bases."""
    return _into(_bases(block, arrays), x)


def reexpress(block: Block, old: Arrays, new: Arrays, m: Array) -> Array:
    """Return a momentum that lies in old bases in new ones, where it is the same."""
    return project(block, new, _out_of(_bases(block, old), m))


def _bases(block: Block, arrays: Arrays) -> Arrays:
    """V_L and V_R of a matrix: its sides that are no fixed identity."""
    return {slot: arrays[slot] for slot in block.bases}


def _into(bases: Arrays, x: Array) -> Array:
    """V_L^T x V_R."""
    x = bases["left"].T @ x if "left" in bases else x
    return x @ bases["right"] if "right" in bases else x


def _out_of(bases: Arrays, x: Array) -> Array:
    """V_L x V_R^T: the inverse of `_into`."""
    x = bases["left"] @ x if "left" in bases else x
    # Without a transpose of its own, so that a side which is spread over devices is gathered once.
    return jnp.einsum("ij,kj->ik", x, bases["right"]) if "right" in bases else x
