"""How long P g is: the length of the gradient, or a root mean square of its own."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from llqr._tree import divide, norm
from llqr._types import Params
from llqr.structures import plan as plans

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
    ps, gs = jax.tree.leaves(scaled), jax.tree.leaves(updates)
    groups = [block.leaves for block in plan] if graft == "block" else [range(len(ps))]
    out = list(ps)
    for group in groups:
        p, g = [ps[i] for i in group], [gs[i] for i in group]
        have, want = norm(p), norm(g)
        ratio = divide(want, have, 1.0)
        for i, x in zip(group, p, strict=True):
            out[i] = (ratio * x).astype(x.dtype)
    return jax.tree.unflatten(jax.tree.structure(scaled), out)


def _to_rms(plan: plans.Plan, scaled: Params) -> Params:
    leaves, treedef = jax.tree.flatten(scaled)
    for block in plan:
        for i, name, shape in zip(block.leaves, block.names, block.shapes, strict=True):
            want = RMS_MATRIX if plans.matrix_like(name, shape) else RMS_VECTOR
            x = leaves[i].astype(plans.at_least_float32(leaves[i].dtype))
            rms = jnp.sqrt(jnp.mean(x * x))
            leaves[i] = (divide(jnp.asarray(want, x.dtype), rms) * x).astype(leaves[i].dtype)
    return treedef.unflatten(leaves)
