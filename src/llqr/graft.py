"""How long a step is: as long as the gradient, or a root mean square of its own."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from llqr.structures import trees
from llqr.structures.plan import Plan, each
from llqr.tree import accurate_dtype, divide, norm
from llqr.typing import Params

Graft: TypeAlias = Literal["none", "global", "block", "rms"]

RMS_MATRIX, RMS_VECTOR = 0.2, 0.05
"""Root mean square of a leaf's update with graft="rms": those of Adam's, roughly, so that its
learning rates and weight decays carry over."""


class Step(NamedTuple):
    """What P makes of a vector, before it has its length: trees like the parameters."""

    direction: Params  # P v, its entries weighed
    full: Params  # as long as all of P v
    vector: Params  # as long as v


def grafted(plan: Plan, graft: Graft, step: Step) -> Params:
    """Return a step with another length; zero stays zero.

    Args:
      plan: the blocks.
      graft: "none": as it is; "global": the length of v; "block": of each block, that of the
        block of v; "rms": of each leaf, a fixed root mean square.
      step: its direction keeps its share of what gets that length, `full`.

    Returns:
      A tree like the direction, in its dtypes.
    """
    direction, full, vector = step
    if graft == "none":
        return direction
    if graft == "rms":
        return _to_rms(plan, direction, full)
    if graft == "global":
        return _as_long_as(vector, direction, full)
    seen = (trees.gather(plan, x) for x in (vector, direction, full))
    of = each(plan, lambda _, *x: _as_long_as(*x), *seen)
    return trees.scatter(plan, of, direction)


def _as_long_as(want: Params, have: Params, full: Params) -> Params:
    ratio = divide(norm(want), norm(full), 1.0)
    return jax.tree.map(lambda x: (ratio * x).astype(x.dtype), have)


def _to_rms(plan: Plan, scaled: Params, full: Params) -> Params:
    leaves, treedef = jax.tree.flatten(scaled)
    measured = jax.tree.leaves(full)
    views = [view for block in plan for source in block.sources for view in source.views]
    for view in views:
        want = RMS_MATRIX if view.matrix else RMS_VECTOR
        x, whole = leaves[view.leaf], measured[view.leaf]
        wide, whole = x.astype(accurate_dtype(x)), whole.astype(accurate_dtype(whole))
        rms = jnp.sqrt(jnp.mean(whole * whole, axis=view.order[view.stack :], keepdims=True))
        leaves[view.leaf] = (divide(jnp.asarray(want, wide.dtype), rms) * wide).astype(x.dtype)
    return treedef.unflatten(leaves)
