"""Bases turn together: all sides of one length at once, whatever matrices they belong to.

A deep network has many sides and few lengths, so that what is compiled, and on accelerators what is
launched, does not grow with its depth:

    V_L <- qr(S_L V_L),  V_R <- qr(S_R V_R)
"""

import math
from collections.abc import Hashable, Sequence

import jax.numpy as jnp

from llqr import _loops
from llqr._linalg import orthonormal
from llqr.refit.options import Streaming
from llqr.structures.block import AT_ONCE, Block, end_to_end, in_batches, parted
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan
from llqr.tree import all_finite, divide, replicate
from llqr.typing import Array, Bool, Float, Int


def turned(
    options: Streaming, number: Int[Array, ""], plan: Plan, arrays: Sequence[Arrays],
    moments: Sequence[Arrays], stays: Sequence[Array] = (),
) -> list[Arrays]:  # fmt: skip
    """Return the bases of each block, turned towards its second moments: V_L and V_R.

    Args:
      options: which sides are wide: they turn at some refits only.
      number: of the refit, from 1.
      plan: the blocks.
      arrays: of each block, with its bases.
      moments: of each block, S_L and S_R in the slots of the bases that turn; a block without
        has none of them.
      stays: whether the matrices of a block keep their bases, of each; none, if it is not given.
    """
    groups: dict[Hashable, list[tuple[int, str]]] = {}
    for i, block in enumerate(plan):
        for slot, size in block.bases.items():
            if slot in moments[i] and size:  # an empty side has nothing to turn
                alone = i if block.owned else None  # each device turns what it holds
                groups.setdefault((size, block.dtype, alone), []).append((i, slot))
    found: list[Arrays] = [{} for _ in plan]
    for sides in groups.values():
        blocks = [plan[i] for i, _ in sides]
        vs, ss = ([x[i][slot] for i, slot in sides] for x in (arrays, moments))
        kept = [
            stays[i] if stays else jnp.zeros(x.shape[:-2], bool)
            for (i, _), x in zip(sides, vs, strict=True)
        ]
        new = _together(options, number, blocks, vs, ss, kept)
        for (i, slot), v in zip(sides, new, strict=True):
            found[i][slot] = v
    return found


def _together(
    options: Streaming, number: Int[Array, ""], blocks: list[Block], vs: list[Array],
    ss: list[Array], kept: list[Array],
) -> list[Array]:  # fmt: skip
    """Turn sides of one length."""
    size, counts = vs[0].shape[-1], [block.count for block in blocks]

    def run(v: Array, s: Array, kept: Array) -> tuple[Array, ...]:
        if blocks[0].owned:
            return blocks[0].each(_turned, v, s, kept), s, kept
        if v.ndim == 2:
            return _turned(v, s, kept), s, kept
        return in_batches(_turned, (v, s, kept), max(1, AT_ONCE // size**2)), s, kept

    due = True if size <= options.wide else options.turns_wide(number)
    if len(vs) == 1:
        new, *_ = _loops.when(due, run, vs[0], ss[0], kept[0])
        return [new]
    joined = [end_to_end(xs, counts, (size, size)) for xs in (vs, ss)]
    stay = jnp.concatenate([replicate(x).ravel() for x in kept])
    new, *_ = _loops.when(due, run, *joined, stay)
    return [x.reshape(v.shape) for x, v in zip(parted(new, counts), vs, strict=True)]


def _turned(
    v: Float[Array, "d d"], s: Float[Array, "d d"], stays: Bool[Array, ""]
) -> Float[Array, "d d"]:
    """One orthogonal iteration: Q of S V, in units of the largest eigenvalue of S.

    With a little of V: half the digits belong to it where S sees nothing. Rounding would choose
    there, and machines would differ; so a basis stays where it was.
    """
    x = s @ v
    little = math.sqrt(jnp.finfo(v.dtype).eps)
    new = orthonormal(divide(x, jnp.max(jnp.sum(v * x, axis=0))) + little * v)
    return jnp.where(all_finite([new]) & ~stays, new, v)
