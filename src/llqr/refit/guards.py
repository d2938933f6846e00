r"""What of a refit is installed: EMA with the old arrays, projection, guards, in this order.

A block keeps its old arrays if the new ones are not finite or turn its share of h.Ph
non-positive, and every block does if Phi did not decrease, or if C is zero along all of P h: Phi
has then no minimum but that of the damping, and P would grow for nothing. Where Phi curves down
along P h (newton; gauss_newton of some losses), what lowers it is installed, and the status says
so.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llqr._tree import all_finite, cosine, vdot
from llqr._types import Array, Bool, Float, Int, Number, Params
from llqr.refit.objective import Phi
from llqr.refit.record import STATUS
from llqr.refit.setup import Blocks, Setup
from llqr.structures import matrix as mx
from llqr.structures import plan as plans
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan


class Verdict(NamedTuple):
    """What is installed, and why."""

    installed: Blocks
    before: Float[Array, ""]  # Phi at the start of the refit
    after: Float[Array, ""]  # Phi of what was proposed
    status: list[Int[Array, ""]]  # by block
    cosine: Float[Array, ""]  # of P h and h, for what is installed
    cosines: list[Float[Array, ""]]  # by block


def judge(
    setup: Setup,
    phi: Phi,
    h: Params,
    old: Blocks,
    new: Blocks,
    ema_decay: Number,
    before: Float[Array, ""] | None,
) -> Verdict:
    """Return what of the new arrays is installed.

    Args:
      setup: of the refit.
      phi: on the directions by which the refit is judged; its `blocks` are the start.
      h: the direction of descent.
      old: arrays before the refit.
      new: arrays as the inner solver left them.
      ema_decay: d in [0, 1].
      before: Phi at the start, where it is known; None: it is computed.
    """
    refit, plan = setup.refit, setup.plan
    if setup.averages:
        new = _average(plan, old, new, ema_decay)
    finite = [all_finite(arrays) for arrays in new]  # the clamp would hide -inf
    new = tuple(
        mx.project(block.structure, arrays, allow_inversion=refit.allow_grad_inversion)
        for block, arrays in zip(plan, new, strict=True)
    )
    upright = [jnp.array(True)] * len(plan)
    if not refit.allow_grad_inversion:
        upright = _upright(_pairs(plan, new, h))
    keep = [f & u for f, u in zip(finite, upright, strict=True)]
    proposed = _choose(keep, new, old)
    before = phi.value(phi.blocks) if before is None else before
    after = phi.value(proposed)
    decreased = (after < before) & jnp.isfinite(after)  # False for NaN too
    flat, down = phi.bent(proposed)
    installed = _choose([decreased & ~flat] * len(plan), proposed, old)
    status = [
        _status(f, u, decreased, flat, down, _same(a, b))
        for f, u, a, b in zip(finite, upright, new, old, strict=True)
    ]
    pairs = _pairs(plan, installed, h)
    whole = [[x for pair in pairs for x in pair[side]] for side in (0, 1)]
    angles = [cosine(x, px) for x, px in pairs]
    return Verdict(installed, before, after, status, cosine(*whole), angles)


def _pairs(plan: Plan, blocks: Blocks, h: Params) -> list[tuple[list[Array], list[Array]]]:
    """(h, P h) of each block."""
    return [
        (x, block.multiply(arrays, x))
        for block, arrays, x in zip(plan, blocks, plans.seen(plan, h), strict=True)
    ]


def _upright(pairs: list[tuple[list[Array], list[Array]]]) -> list[Bool[Array, ""]]:
    """Per block: whether its share of h.Ph is positive, or its h is zero."""
    return [(vdot(h, ph) > 0) | jnp.all(jnp.stack([jnp.all(x == 0) for x in h])) for h, ph in pairs]


def _average(plan: Plan, old: Blocks, new: Blocks, decay: Number) -> Blocks:
    """Return d old + (1 - d) new on what is learned; memories and constants stay new."""
    averaged = []
    for block, o, n in zip(plan, old, new, strict=True):
        mixed = {
            slot: (decay * o[slot] + (1 - decay) * n[slot]).astype(o[slot].dtype)
            for slot in block.structure.learned
        }
        averaged.append(n | mixed)
    return tuple(averaged)


def _same(a: Arrays, b: Arrays) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(a[slot] == b[slot]) for slot in a]))


def _status(
    finite: Bool[Array, ""], upright: Bool[Array, ""], decreased: Bool[Array, ""],
    flat: Bool[Array, ""], down: Bool[Array, ""], same: Bool[Array, ""],
) -> Int[Array, ""]:  # fmt: skip
    code = {word: i for i, word in enumerate(STATUS)}
    installed = jnp.where(down, code["indefinite"], code["updated"])
    choice = jnp.where(decreased, installed, code["rejected"])
    choice = jnp.where(flat, code["flat"], choice)
    choice = jnp.where(upright, choice, code["inverted"])
    choice = jnp.where(finite, choice, code["nonfinite"])
    return jnp.where(same, code["kept"], choice)


def _choose(flags: list[Bool[Array, ""]], new: Blocks, old: Blocks) -> Blocks:
    return tuple(
        jax.tree.map(lambda n, o, flag=flag: jnp.where(flag, n, o), ns, os)
        for flag, ns, os in zip(flags, new, old, strict=True)
    )
