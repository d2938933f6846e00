"""How long P g is: the length of the gradient, or a root mean square of its own."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from llqr._tree import divide, norm
from llqr._types import Array, Params
from llqr.structures import plan as plans
from llqr.structures.view import View

Graft: TypeAlias = Literal["none", "global", "block", "rms"]

RMS_MATRIX, RMS_VECTOR = 0.2, 0.05
"""Root mean square of a leaf's update with graft="rms": those of Adam's, roughly, so that its
learning rates and weight decays carry over."""


def grafted(plan: plans.Plan, graft: Graft, scaled: Params, updates: Params) -> Params:
    """Return P g with another length; zero stays zero.

    Args:
      plan: the blocks.
      graft: "none": as it is; "global": the length of g; "block": of each block, that of the
        block of g; "rms": of each leaf, a fixed root mean square.
      scaled: P g.
      updates: g.

    Returns:
      A tree like `scaled`, in its dtypes.
    """
    if graft == "none":
        return scaled
    if graft == "rms":
        return _to_rms(plan, scaled)
    if graft == "global":
        return _as_long_as(updates, scaled)
    pieces = zip(plans.seen(plan, scaled), plans.seen(plan, updates), strict=True)
    return plans.assemble(plan, [_as_long_as(g, p) for p, g in pieces], scaled)


def _as_long_as(want: Params, have: Params) -> Params:
    ratio = divide(norm(want), norm(have), 1.0)
    return jax.tree.map(lambda x: (ratio * x).astype(x.dtype), have)


def _to_rms(plan: plans.Plan, scaled: Params) -> Params:
    def one(view: View, piece: Array) -> Array:
        want = RMS_MATRIX if plans.matrix_like(view.name, view.shape) else RMS_VECTOR
        x = piece.astype(plans.at_least_float32(piece.dtype))
        rms = jnp.sqrt(jnp.mean(x * x))
        return (divide(jnp.asarray(want, x.dtype), rms) * x).astype(piece.dtype)

    whole = plans.without_parts(plan)
    found = [
        [one(view, piece) for view, piece in zip(block.views, pieces, strict=True)]
        for block, pieces in zip(whole, plans.seen(whole, scaled), strict=True)
    ]
    return plans.assemble(whole, found, scaled)
