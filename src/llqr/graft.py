"""How long P g is: the length of the gradient, or a root mean square of its own."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from llqr.structures import plan as plans
from llqr.structures.rules import matrix_like
from llqr.tree import accurate_dtype, divide, norm
from llqr.typing import Params

Graft: TypeAlias = Literal["none", "global", "block", "rms"]

RMS_MATRIX, RMS_VECTOR = 0.2, 0.05
"""Root mean square of a leaf's update with graft="rms": those of Adam's, roughly, so that its
learning rates and weight decays carry over."""


def grafted(
    plan: plans.Plan, graft: Graft, scaled: Params, updates: Params, full: Params
) -> Params:
    """Return P g with another length; zero stays zero.

    Args:
      plan: the blocks.
      graft: "none": as it is; "global": the length of g; "block": of each block, that of the
        block of g; "rms": of each leaf, a fixed root mean square.
      scaled: P g.
      updates: g.
      full: what gets that length; where `scaled` is a part of it, it keeps its share.

    Returns:
      A tree like `scaled`, in its dtypes.
    """
    if graft == "none":
        return scaled
    if graft == "rms":
        return _to_rms(plan, scaled, full)
    if graft == "global":
        return _as_long_as(updates, scaled, full)
    seen = (plans.gather(plan, x) for x in (updates, scaled, full))
    of = plans.each(plan, lambda _, *x: _as_long_as(*x), *seen)
    return plans.scatter(plan, of, scaled)


def _as_long_as(want: Params, have: Params, full: Params) -> Params:
    ratio = divide(norm(want), norm(full), 1.0)
    return jax.tree.map(lambda x: (ratio * x).astype(x.dtype), have)


def _to_rms(plan: plans.Plan, scaled: Params, full: Params) -> Params:
    leaves, treedef = jax.tree.flatten(scaled)
    measured = jax.tree.leaves(full)
    for view in [view for block in plan for source in block.sources for view in source.views]:
        want = RMS_MATRIX if matrix_like(view.name, view.shape) else RMS_VECTOR
        x, whole = leaves[view.leaf], measured[view.leaf]
        wide, whole = (y.astype(accurate_dtype(y)) for y in (x, whole))
        rms = jnp.sqrt(jnp.mean(whole * whole, axis=view.order[view.stack :], keepdims=True))
        leaves[view.leaf] = (divide(jnp.asarray(want, wide.dtype), rms) * wide).astype(x.dtype)
    return treedef.unflatten(leaves)
