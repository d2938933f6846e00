r"""What of a refit is installed: EMA with the old arrays, projection, guards, in this order.

A block keeps its old arrays if the new ones are not finite or turn its share of h.Ph
non-positive, and every block does if Phi did not decrease, or if C is zero along all of P h: Phi
has then no minimum but that of the damping, and P would grow for nothing. Where Phi curves down
along P h (newton; gauss_newton of some losses), what lowers it is installed, and the status says
so.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llqr.refit.learner import Blocks, Seen
from llqr.refit.objective import Phi
from llqr.refit.record import STATUS
from llqr.refit.setup import Setup
from llqr.structures import matrix as mx
from llqr.structures import trees
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan, each
from llqr.tree import all_finite, cosine, vdot
from llqr.typing import Array, Bool, Float, Int, Number


class Verdict(NamedTuple):
    """What is installed, and why."""

    installed: Blocks
    before: Float[Array, ""]  # Phi at the start of the refit
    after: Float[Array, ""]  # Phi of what was proposed
    status: Int[Array, " matrices"]
    cosine: Float[Array, ""]  # of P h and h, for what is installed
    cosines: Float[Array, " matrices"]


def judge(
    setup: Setup,
    phi: Phi,
    xs: Seen,
    old: Blocks,
    new: Blocks,
    ema_decay: Number,
    before: Float[Array, ""] | None,
) -> Verdict:
    """Return what of the new arrays is installed.

    Args:
      setup: of the refit.
      phi: on the directions by which the refit is judged; its `blocks` are the start.
      xs: the direction of descent, h.
      old: arrays before the refit.
      new: arrays as the inner solver left them.
      ema_decay: d in [0, 1].
      before: Phi at the start, where it is known; None: it is computed.
    """
    refit, plan = setup.refit, setup.plan
    if setup.averages:
        new = _average(plan, old, new, ema_decay)
    finite = each(plan, lambda _, arrays: all_finite(arrays), new)  # the clamp would hide -inf

    def project(block: Block, arrays: Arrays) -> Arrays:
        return mx.project(block.structure, arrays, allow_inversion=refit.allow_grad_inversion)

    new = tuple(each(plan, project, new))
    upright = [jnp.ones_like(f) for f in finite]
    if not refit.allow_grad_inversion:
        upright = each(plan, _upright, xs, trees.product(plan, new, xs))
    keep = [f & u for f, u in zip(finite, upright, strict=True)]
    proposed = tuple(each(plan, lambda _, *choice: _choose(*choice), keep, new, old))
    before = phi.value(phi.blocks) if before is None else before
    after, flat, down = phi.value_and_bend(proposed)
    decreased = (after < before) & jnp.isfinite(after)  # False for NaN too
    installed = _choose(decreased & ~flat, proposed, old)

    def status(
        decreased: Array, flat: Array, down: Array, _: Block, finite: Array, upright: Array,
        new: Arrays, old: Arrays,
    ) -> Array:  # fmt: skip
        return _status(finite, upright, decreased, flat, down, _same(new, old))

    found = each(plan, status, finite, upright, new, old, shared=(decreased, flat, down))
    pxs = trees.product(plan, installed, xs)
    angles = each(plan, lambda _, x, px: cosine(x, px), xs, pxs)
    return Verdict(
        installed, before, after, trees.in_order(plan, found), cosine(xs, pxs),
        trees.in_order(plan, angles),
    )  # fmt: skip


def _upright(_: Block, x: Array, px: Array) -> Bool[Array, ""]:
    """Whether its share of h.Ph is positive, or its h is zero."""
    return (vdot(x, px) > 0) | jnp.all(x == 0)


def _average(plan: Plan, old: Blocks, new: Blocks, decay: Number) -> Blocks:
    """Return d old + (1 - d) new on what is learned; memories and constants stay new."""
    averaged: list[Arrays] = []
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


def _choose(flag: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(flag, n, o), new, old)
