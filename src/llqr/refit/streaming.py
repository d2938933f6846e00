r"""Streaming refits: P follows the training, a little at every step, instead of stopping for it.

  symbol      meaning                                                       shape
  G, m        gradient of the step, and its momentum                        [r, n]
  h           Fisher probe: gradient for labels drawn from the model,       [r, n]
              E h h^T = C
  S_L, S_R    running second moments of G: G G^T, G^T G                     [r, r], [n, n]
  V_L, V_R    bases: orthogonal, from S                                     like S
  c, D        curvature and spectrum of P in those bases                    [r, n]
  top         largest c of a block; 1 where C is not scaled                 []
  lambda      damping                                                       []
  q, s        mean square of G in the bases; signal: 1 for noise            [r, n]

    every step    S_L <- b S_L + (1 - b) G G^T,  S_R likewise,  m <- mu m + G,  v = G + mu m
    every k       V_L <- qr(S_L V_L), V_R <- qr(S_R V_R)
                  c <- a c + (1 - a) (V_L^T h V_R)^2,   D = 1 / (c / top + lambda)
    P v           = V_L (D * (V_L^T v V_R)) V_R^T
    every step    q <- e q + (1 - e) (V_L^T G V_R)^2
                  s = min(1, (1 - mu) |V_L^T m V_R| / sqrt(q)) / sqrt((1 - mu) / (1 + mu))
    update        u = V_L (s * D * (V_L^T v V_R)) V_R^T, times what gives P v its length

with v = m where `nesterov` is off. For fixed bases, D is the minimiser of the objective of a probe
(`llqr.refit.objective`), E[1/2 u.(C / top + lambda I) u - h.u] with u = P h, wherever C couples no
two entries there: each entry is 1/2 D^2 c (c + lambda) - D c, c in units of top. No inner loop and
no product with C are needed, and P is positive by construction. A matrix without bases (structure
"diagonal", and vectors) has V = I. With divergence_reduction="unit", each block of C is taken in
units of its own largest entry, so that lambda says how ill-conditioned a block may be at most; how
long its update is, the graft decides.

The weight s is where gradients say what labels drawn from the model cannot: whether an entry of
the mean gradient is known. An entry on which gradients agree keeps up to sqrt((1 + mu) / (1 - mu))
times the length that one of noise has; one that swings from step to step, because the step is too
long for it, gets shorter at once, without waiting for the learning rate to decay. As the length
(the graft) is given before, a whole leaf becomes shorter too. `signal_decay=None` leaves s at 1.

A QR factorisation of a side of 784 takes as long as 30 gradients of a small network, so sides
longer than `wide` turn at the first refits and then at every fifth only, and follow every second
gradient.

Structure "kfac" has no spectrum. There P = Q^T Q with Q = A x B, and with w = Q h, u = Q^T w,
r = (C / top + lambda) u - h, a = Q r:

    A <- (I - eta E / s) A,  E = sym(a w^T),  s = max(|E|_2, |w|^2 / rows)      B with a^T w

These are the relative coordinates of Q, in which the step is like Newton's near the solution; with
eta < 1 no side can lose its rank or sign. There, `top` is the largest eigenvalue of C by one
warm-started power step for each refit.

Sources: Layerwise LQR (arXiv 2605.04230) for the objective; bases as in SOAP (arXiv 2409.11321);
relative steps as in preconditioned SGD on matrix Lie groups (Li, arXiv 1512.04202).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llqr import _loops, metrics
from llqr.curvature import model as quadratic
from llqr.curvature.model import QuadraticModel
from llqr.objective import BoundObjective
from llqr.refit.directions import fisher_probe
from llqr.refit.record import STATUS, RefitInfo
from llqr.refit.relative import power_step, relative_step
from llqr.refit.setup import Blocks
from llqr.refit.spectrum import (
    WIDE_FOLLOWS,
    closed_objective,
    follow,
    into,
    largest,
    observed,
    solved,
    tops_of,
    weighed,
)
from llqr.refit.stream import (
    MOMENTUM,
    SQUARES,
    StreamSetup,
    StreamState,
    bases_of,
    kind_of,
    pack,
    statistics_of,
    unpack,
)
from llqr.structures import matrix as mx
from llqr.structures import plan as plans
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan
from llqr.tree import accurate_dtype, all_finite, cosine, normal_like
from llqr.tree import widen as widened
from llqr.typing import Array, Bool, Float, Int, Number, Params


def init(setup: StreamSetup, params: Params, slots: tuple[str, ...]) -> StreamState:
    """Return the state before the first step.

    Args:
      setup: of the run.
      params: the parameters.
      slots: of the preconditioner's state, so that trees of both are alike.

    Returns:
      Zeros; for kfac A and B the identity, and a normal draw for the power steps.
    """

    def first(block: Block, slot: str, shape: tuple[int, ...]) -> Array:
        side = kind_of(block.structure) == "sides" and slot != MOMENTUM
        return jnp.eye(*shape, dtype=block.dtype) if side else jnp.zeros(shape, block.dtype)

    arrays = [
        {
            slot: block.repeated(first(block, slot, shape))
            for slot, shape in statistics_of(setup.options, block).items()
        }
        for block in setup.plan
    ]
    weighs = setup.options.signal_decay is not None and "spectrum" in slots
    names = (*slots, MOMENTUM, *[SQUARES] * weighs)
    packed = plans.pack(setup.plan, arrays, params, names)
    power = normal_like(_wide_zeros(params), jax.random.key(0)) if setup.two_sided else None
    return StreamState(packed, power, jnp.ones((), jnp.float32))


def _wide_zeros(params: Params) -> Params:
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=accurate_dtype(p)), params)


def observe(
    setup: StreamSetup, blocks: Blocks, stream: StreamState, gradient: Params, count: Int[Array, ""]
) -> tuple[StreamState, list[Array]]:
    """Return the state after one more gradient, momentum and second moments, and V_L^T G V_R.

    A block whose gradient is not finite keeps its moments.

    Args:
      setup: of the run.
      blocks: the arrays of P.
      stream: the state so far.
      gradient: G, like the parameters.
      count: steps so far.

    Returns:
      The state, and the gradient of each block in its bases, float32 at least.
    """
    options, statistics = setup.options, unpack(setup, stream.statistics, gradient)
    often = (count < options.start + options.warmup) | (count % WIDE_FOLLOWS == 0)
    x, run = plans.gather(setup.plan, gradient), partial(observed, options)
    found = plans.each(setup.plan, run, blocks, statistics, x, shared=(often,))
    new, seen = ([pair[i] for pair in found] for i in (0, 1))
    return stream._replace(statistics=pack(setup, new, stream, gradient)), seen


def scale(
    setup: StreamSetup, blocks: Blocks, stream: StreamState, seen: list[Array], gradient: Params,
    count: Int[Array, ""],
) -> tuple[StreamState, Params, Params, Params]:  # fmt: skip
    """Return the state, P v weighed by signal, and trees as long as P v itself and as v.

    Args:
      setup: of the run.
      blocks: the arrays of P.
      stream: the state, this step's gradient in its momentum.
      seen: the gradient of each block in its bases.
      gradient: G, like the parameters.
      count: steps so far.
    """
    plan, like = setup.plan, widened(gradient)
    if not plan:
        return stream, like, like, like
    statistics, run = unpack(setup, stream.statistics, gradient), partial(weighed, setup.options)
    each = plans.each(plan, run, blocks, statistics, seen, shared=(count,))
    new, found, lengths, vector = zip(*each, strict=True)
    stream = stream._replace(statistics=pack(setup, list(new), stream, gradient))
    found = [block.within(x) for block, x in zip(plan, found, strict=True)]
    return stream, *(plans.scatter(plan, x, like) for x in (found, lengths, vector))


def refit(
    setup: StreamSetup, blocks: Blocks, info: RefitInfo, stream: StreamState, seen: list[Array],
    gradient: Params | None, params: Params, objective: BoundObjective, damping: Number,
) -> tuple[Blocks, RefitInfo, StreamState, list[Array]]:  # fmt: skip
    """Return P after one refit: new bases, one more probe, the spectrum that follows.

    Args:
      setup: of the run.
      blocks: the arrays of P.
      info: the record so far.
      stream: the state, this step's gradient in it.
      seen: that gradient in the bases.
      gradient: like the parameters; None: there is none, and nothing was seen.
      params: the current parameters.
      objective: on the training batch.
      damping: lambda > 0.

    Returns:
      The arrays of P, the record, the state, and the gradient in the new bases; a block whose
      probe is not finite keeps its curvature.
    """
    python = _loops.in_python(params)
    run = _loops.compiled if python and not setup.route.layerwise else _loops.direct
    return run(_merged, setup, blocks, info, stream, seen, gradient, params, objective, damping)


def _merged(
    setup: StreamSetup, blocks: Blocks, info: RefitInfo, stream: StreamState, seen: list[Array],
    gradient: Params | None, *inputs: Any,
) -> tuple[Blocks, RefitInfo, StreamState, list[Array]]:  # fmt: skip
    """A refit in which like matrices are one block."""
    plan, inside = setup.plan, lambda block, arrays, x: into(bases_of(block, arrays), x)
    setup = replace(setup, plan=plans.merge(plan))
    blocks, info, stream = _refit(setup, plans.merged(plan, blocks), info, stream, *inputs)
    blocks = plans.separated(plan, blocks)
    if gradient is not None:
        seen = plans.each(plan, inside, blocks, plans.gather(plan, gradient))
    return blocks, info, stream, seen


def _refit(
    setup: StreamSetup, blocks: Blocks, info: RefitInfo, stream: StreamState, params: Params,
    objective: BoundObjective, damping: Number,
) -> tuple[Blocks, RefitInfo, StreamState]:  # fmt: skip
    options, plan = setup.options, setup.plan
    sides = setup.two_sided
    if setup.reduction != "sum":
        objective = _part(setup, params, objective, info.refits)
    model = _linearize(setup, params, objective, damping, widen=sides)
    key = jax.random.fold_in(jax.random.key(options.seed), info.refits)
    key, noise = jax.random.split(key)
    keys = jax.random.split(key, options.probes)
    # One after the other, not a vmap: one probe is the rule, and a batch of pull-backs through
    # convolutions is slower than as many of them.
    probes = [
        fisher_probe(setup.metric.tree, setup.reduction, model, objective, k, setup.route.axis_name)
        for k in keys
    ]
    was = unpack(setup, stream.statistics, params)
    # Block -> what it sees of each probe.
    seen = [list(hs) for hs in zip(*(plans.gather(plan, h) for h in probes), strict=True)]
    # Labels drawn say nothing of these matrices: to follow would only lengthen their steps.
    flat = plans.each(plan, lambda _, hs: _all_zero(hs), seen)
    keep = plans.each(plan, lambda _, hs: all_finite(hs) & ~_all_zero(hs), seen)
    number, turn = info.refits + 1, partial(follow, options)
    followed = plans.each(plan, turn, blocks, was, seen, keep, shared=(number,))
    new, statistics = ([pair[i] for pair in followed] for i in (0, 1))
    tops = tops_of(setup, statistics)
    power, top = stream.power, largest(tops)
    if sides:
        power, top = power_step(setup, model, stream)
        model = replace(model, top_eigenvalue=top)
        new, statistics, before, after = relative_step(
            setup,
            model,
            new,
            statistics,
            probes[0],
            noise,
        )
    old = new
    statistics = plans.each(plan, _unless, flat, was, statistics)
    new = plans.each(plan, solved, new, statistics, tops, shared=(damping,))
    if not sides:
        before, after = (
            closed_objective(plan, arrays, statistics, tops, damping) for arrays in (old, new)
        )
    stream = stream._replace(
        statistics=pack(setup, statistics, stream, params), power=power,
        top=jnp.asarray(top, jnp.float32),
    )  # fmt: skip
    new = plans.each(plan, _unless, flat, blocks, new)
    record = _record(plan, new, statistics, info, keep, flat, before, after)
    return tuple(new), record, stream


def _unless(_: Block, flat: Bool[Array, ""], old: Arrays, new: Arrays) -> Arrays:
    return {slot: jnp.where(flat, old[slot], new[slot]) for slot in new}


def _all_zero(arrays: list[Array]) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(x == 0) for x in arrays]))


def _part(
    setup: StreamSetup, params: Params, objective: BoundObjective, number: Int[Array, ""]
) -> BoundObjective:
    """Return the objective on the examples of one refit's probes."""
    share = setup.options.probe_share
    part = objective.part(share, number)
    if part is not objective:
        try:
            jax.eval_shape(part.outputs, params)
        except Exception as error:
            error.add_note(
                f"llqr: the model failed on the part of a batch that probes see (probe_share="
                f"{share:g}). Objective(batch_axes=...) says where the examples are; with "
                "Streaming(probe_share=1.0) probes see the whole batch."
            )
            raise
    return part


def _linearize(
    setup: StreamSetup, params: Params, objective: BoundObjective, damping: Number, *, widen: bool
) -> QuadraticModel:
    if widen:  # products with C in half precision would lose what a step changes
        if setup.route.layerwise:
            params = widened(params)
        else:
            objective, params = objective.widened(params)
    rows = metrics.over_rows(setup.reduction)
    return quadratic.linearize(
        objective, params, setup.metric.tree, damping=damping, divergence_reduction=rows,
        route=setup.route,
    )  # fmt: skip


def _record(
    plan: Plan, blocks: list[Arrays], statistics: list[Arrays], info: RefitInfo,
    keep: list[Bool[Array, "..."]], flat: list[Bool[Array, "..."]], before: Float[Array, ""],
    after: Float[Array, ""],
) -> RefitInfo:  # fmt: skip
    def product(block: Block, arrays: Arrays, m: Array) -> Array:  # cosines are those of P m and m
        if kind_of(block.structure) == "spectrum":
            return arrays["spectrum"] * m
        return mx.multiply(block.structure, arrays, m)

    ms = [own[MOMENTUM] for own in statistics]
    pms = plans.each(plan, product, blocks, ms)
    code = {word: i for i, word in enumerate(STATUS)}
    kept, zero = plans.in_order(plan, keep), plans.in_order(plan, flat)
    status = jnp.where(kept, code["updated"], jnp.where(zero, code["flat"], code["nonfinite"]))
    cosines = plans.in_order(plan, plans.each(plan, lambda _, pm, m: cosine(pm, m), pms, ms))
    return RefitInfo(
        refits=info.refits + 1,
        steps=jnp.ones((), jnp.int32),
        objective_before=before,
        objective_after=after,
        cosine=cosine(pms, ms).astype(jnp.float32),
        status=status.astype(jnp.int32),
        cosines=cosines.astype(jnp.float32),
    )
