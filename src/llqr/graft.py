"""How long P g is: the length of the gradient, or a root mean square of its own."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from llqr._tree import accurate_dtype, divide, norm
from llqr._types import Params
from llqr.structures import plan as plans
from llqr.structures.rules import matrix_like

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
    of = plans.each(
        plan, lambda _, g, p: _as_long_as(g, p), *(plans.gather(plan, x) for x in (updates, scaled))
    )
    return plans.scatter(plan, of, scaled)


def _as_long_as(want: Params, have: Params) -> Params:
    ratio = divide(norm(want), norm(have), 1.0)
    return jax.tree.map(lambda x: (ratio * x).astype(x.dtype), have)


def _to_rms(plan: plans.Plan, scaled: Params) -> Params:
    leaves, treedef = jax.tree.flatten(scaled)
    for view in [view for block in plan for source in block.sources for view in source.views]:
        want = RMS_MATRIX if matrix_like(view.name, view.shape) else RMS_VECTOR
        x = leaves[view.leaf]
        wide = x.astype(accurate_dtype(x))
        rms = jnp.sqrt(jnp.mean(wide * wide, axis=view.order[view.stack :], keepdims=True))
        leaves[view.leaf] = (divide(jnp.asarray(want, wide.dtype), rms) * wide).astype(x.dtype)
    return treedef.unflatten(leaves)
