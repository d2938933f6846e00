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

    every step    S_L <- b S_L + (1 - b) G G^T,  S_R likewise,  m <- mu m + G,  v = G + mu m
    every k       V_L <- qr(S_L V_L), V_R <- qr(S_R V_R)
                  c <- a c + (1 - a) (V_L^T h V_R)^2,   D = 1 / (c / top + lambda)
    P v           = V_L (D * (V_L^T v V_R)) V_R^T

with v = m where `nesterov` is off. For fixed bases, D is the minimiser of the objective of a probe
(`llqr.refit.objective`), E[1/2 u.(C / top + lambda I) u - h.u] with u = P h, wherever C couples no
two entries there: each entry is 1/2 D^2 c (c + lambda) - D c, c in units of top. No inner loop and
no product with C are needed, and P is positive by construction. A matrix without bases (structure
"diagonal", and vectors) has V = I. With divergence_reduction="unit", each block of C is taken in
units of its own largest entry, so that lambda says how ill-conditioned a block may be at most; how
long its update is, the graft decides.

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

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llqr import _loops, metrics
from llqr._errors import check_integer, check_range
from llqr._tree import Frozen, all_finite, cosine, divide, norm, normal_like, vdot
from llqr._types import Array, Bool, Float, Int, Number, Params, PRNGKeyArray, PyTree
from llqr.curvature import model as quadratic
from llqr.curvature.model import QuadraticModel
from llqr.curvature.route import Route
from llqr.metrics import Reduction
from llqr.objective import BoundObjective
from llqr.refit.directions import FISHER_FLOOR
from llqr.refit.record import STATUS, RefitInfo
from llqr.refit.setup import WHOLE, Blocks
from llqr.structures import plan as plans
from llqr.structures.matrix import Arrays, Structure
from llqr.structures.plan import Block, Plan

DAMPING = 1e-4
"""Default lambda, in units of the largest eigenvalue of C."""


WIDE_TURNS, WIDE_FOLLOWS = 5, 2
"""Wide sides turn at the first refits and then at every fifth, and follow every second gradient."""

NORM_STEPS = 4
"""Power steps behind |E|_2: with eta = 0.3, an estimate three times too small would still do."""


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """How P follows the training: `refit=llqr.Streaming()` in place of `llqr.Refit`.

    A step with a refit costs one more transpose sweep of the network, so that the default takes
    1.1 gradients a step. It works for the structures e-kfac (with its embedding rules, e-kfac-gpt),
    diagonal and kfac, which takes 1.3; the metric must be one from which labels can be drawn.

    Args:
      every: k, steps from refit to refit, after the warm-up.
      warmup: so many steps from `start` on have a refit each.
      start: no refit before this count.
      until: no refit at or after this count; None: never stops.
      momentum: mu in [0, 1); P multiplies the momentum m.
      nesterov: it multiplies G + mu m instead.
      basis_decay: b in [0, 1), of the second moments of the gradient.
      spectrum_decay: a in [0, 1], of the curvature c: a mean over the first refits, and then a
        running mean; 1: the mean over all.
      probes: h drawn at each refit.
      wide: sides longer than this turn and follow more rarely.
      rate: eta in (0, 1), of kfac.
      seed: of the probes; the number of the refit is folded into it.

    Raises:
      ValueError: a value outside its range.
      TypeError: a value of a wrong type.

    Example:
      >>> import optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.01), structure="e-kfac", refit=llqr.Streaming())
      >>> [step for step in range(50) if llqr.Streaming().is_due(step) and step >= 20]
      [20, 30, 40]

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230, for the
      objective. Vyas et al., SOAP, arXiv 2409.11321, for the bases. Li, Preconditioned
      Stochastic Gradient Descent, arXiv 1512.04202, for kfac's relative steps.
    """

    every: int = 10
    warmup: int = 20
    start: int = 0
    until: int | None = None
    momentum: float = 0.9
    nesterov: bool = True
    basis_decay: float = 0.95
    spectrum_decay: float = 0.9
    probes: int = 1
    wide: int = 256
    rate: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("every", 1), ("warmup", 0), ("start", 0), ("until", 0),
                          ("probes", 1), ("wide", 1), ("seed", 0)):  # fmt: skip
            check_integer(f"Streaming: {name}", getattr(self, name), low=low)
        for name, high in (("momentum", 1), ("basis_decay", 1), ("spectrum_decay", 1), ("rate", 1)):
            value = getattr(self, name)
            check_range(f"Streaming: {name}", value, low=0, high=high)
            if value == 1 and name != "spectrum_decay":
                raise ValueError(f"Streaming: {name} must be below 1, got {value!r}.")
        if self.until is not None and self.until < self.start:
            raise ValueError(f"Streaming: until={self.until} lies before start={self.start}.")

    def is_due(self, count: int | Int[Array, ""]) -> bool | Bool[Array, ""]:
        """Return whether step number `count`, from 0, has a refit; for an int, a Python bool."""
        offset = count - self.start
        due = (offset >= 0) & ((offset < self.warmup) | (offset % self.every == 0))
        return due if self.until is None else due & (count < self.until)


class StreamState(NamedTuple):
    """What streaming refits remember besides P: arrays only, float32 at least."""

    momentum: Params  # m, like params
    # slot -> tree shaped like params, an array or None: S_L and S_R ("left", "right") and c
    # ("spectrum"); for kfac A and B ("left", "right")
    statistics: dict[str, Any]
    power: Params | None  # C v / |v| of the last power step, like params; None without kfac
    top: Float[Array, ""]  # by which C was last divided: the largest of all blocks


@dataclass(frozen=True)
class StreamSetup:
    """What stays the same over a run: static and hashable.

    Attributes:
      plan: the blocks.
      metric: a resolved metric, or a tree of them, flattened by `freeze`.
      reduction: over rows; "unit" divides C by `top`.
      options: of the refits.
      two_sided: whether a rule has a structure of two sides without a spectrum.
      route: how the network is linearised.
    """

    plan: Plan
    metric: Frozen
    reduction: Reduction
    options: Streaming
    two_sided: bool = False
    route: Route = WHOLE


def check_streamable(structures: Iterable[Structure], metric: PyTree) -> None:
    """Raise ValueError for a structure or a resolved metric that cannot be streamed."""
    if not metrics.can_sample(metric):
        raise ValueError(
            "streaming refits need a metric from which labels can be drawn: ngd, reverse_kl, "
            "renyi or gaussian (for a mean of squares, it is gauss_newton times a number)."
        )
    for structure in structures:
        if kind_of(structure) is None:
            raise ValueError(
                f"structure {structure.name!r} cannot be streamed: the closed form needs one "
                "spectrum between fixed bases (e-kfac, e-kfac-gpt, diagonal), and the relative "
                "steps two sides (kfac). Use one of these, or refits that learn any structure, "
                "llqr.Refit."
            )


def kind_of(structure: Structure) -> str | None:
    """Return how a structure is streamed: "spectrum", "sides", or None for not at all.

    Example:
      >>> from llqr.structures import STRUCTURES
      >>> [kind_of(STRUCTURES[name]) for name in ("e-kfac", "kfac", "sym-kfac")]
      ['spectrum', 'sides', None]
    """
    plain = not (structure.positive or structure.normalize) and structure.view == "leaf"
    known = {structure.left, structure.right} <= {"identity", "dense", "diagonal"}
    if not (plain and known):
        return None
    return {"full": "spectrum", "none": "sides"}.get(structure.spectrum)


def _dense(block: Block) -> tuple[str, ...]:
    """Slots of the sides that are learned: a diagonal side of a long axis stays the identity."""
    sides = {"left": block.structure.left, "right": block.structure.right}
    return tuple(slot for slot, name in sides.items() if name == "dense")


def statistics_of(block: Block) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array that a block's statistics hold, by slot."""
    shapes = {}
    for slot in _dense(block):
        size = block.shape[0] if slot == "left" else block.shape[1]
        shapes[slot] = (size, size)
    return shapes | ({"spectrum": block.shape} if kind_of(block.structure) == "spectrum" else {})


def init(setup: StreamSetup, params: Params, slots: tuple[str, ...]) -> StreamState:
    """Return the state before the first step.

    Args:
      setup: of the run.
      params: the parameters.
      slots: of the preconditioner's state, so that trees of both are alike.

    Returns:
      Zeros; for kfac A and B the identity, and a normal draw for the power steps.
    """
    zeros = _zeros_like(params)
    arrays = [
        {
            slot: jnp.eye(*shape, dtype=block.dtype)
            if kind_of(block.structure) == "sides"
            else jnp.zeros(shape, block.dtype)
            for slot, shape in statistics_of(block).items()
        }
        for block in setup.plan
    ]
    packed = plans.pack(setup.plan, arrays, params, slots)
    power = normal_like(_zeros_like(params), jax.random.key(0)) if setup.two_sided else None
    return StreamState(zeros, packed, power, jnp.ones((), jnp.float32))


def _zeros_like(params: Params) -> Params:
    return jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=plans.at_least_float32(jnp.result_type(p))), params
    )


def observe(
    setup: StreamSetup, stream: StreamState, gradient: Params, count: Int[Array, ""]
) -> tuple[StreamState, Params]:
    """Return the state after one more gradient, momentum and second moments, and what P sees.

    A block whose gradient is not finite keeps its moments.

    Args:
      setup: of the run.
      stream: the state so far.
      gradient: G, like the parameters.
      count: steps so far.

    Returns:
      The state, and m or, with `nesterov`, G + mu m: like the parameters, float32 at least.
    """
    options, statistics = setup.options, _unpack(setup.plan, stream.statistics, gradient)
    momentum = jax.tree.map(
        lambda m, g: options.momentum * m + g.astype(m.dtype), stream.momentum, gradient
    )
    leaves = jax.tree.leaves(gradient)
    often = (count < options.start + options.warmup) | (count % WIDE_FOLLOWS == 0)
    new = [
        _observed(options, block, own, leaves[block.leaves[0]], often)
        for block, own in zip(setup.plan, statistics, strict=True)
    ]
    seen = momentum
    if options.nesterov:
        seen = jax.tree.map(
            lambda m, g: options.momentum * m + g.astype(m.dtype), momentum, gradient
        )
    statistics = _pack(setup, new, stream, gradient)
    return stream._replace(momentum=momentum, statistics=statistics), seen


def _observed(
    options: Streaming, block: Block, statistics: Arrays, gradient: Array, often: Bool[Array, ""]
) -> Arrays:
    sides = _dense(block) if kind_of(block.structure) == "spectrum" else ()
    if not sides:
        return statistics
    x, b, new = block.matrix(gradient), options.basis_decay, dict(statistics)
    finite = jnp.all(jnp.isfinite(x))

    def follow(slot: str, s: Array) -> Array:
        moment = x @ x.T if slot == "left" else x.T @ x
        return jnp.where(finite, b * s + (1 - b) * moment, s)

    for slot in sides:
        new[slot] = _now_or_rarely(options, new[slot], often, partial(follow, slot))
    return new


def _now_or_rarely(
    options: Streaming, side: Array, due: Bool[Array, ""], run: Callable[[Array], Array]
) -> Array:
    """Run on a side now; on a wide one, only where that is due."""
    if len(side) <= options.wide:
        return run(side)
    return jax.lax.cond(due, run, lambda kept: kept, side)


def refit(
    setup: StreamSetup, blocks: Blocks, info: RefitInfo, stream: StreamState, params: Params,
    objective: BoundObjective, damping: Number,
) -> tuple[Blocks, RefitInfo, StreamState]:  # fmt: skip
    """Return P after one refit: new bases, one more probe, the spectrum that follows.

    Args:
      setup: of the run.
      blocks: the arrays of P.
      info: the record so far.
      stream: the state, this step's gradient in it.
      params: the current parameters.
      objective: on the training batch.
      damping: lambda > 0.

    Returns:
      The arrays of P, the record and the state; a block whose probe is not finite keeps its
      curvature.
    """
    python = _loops.in_python(params)
    run = _loops.compiled if python and not setup.route.layerwise else _loops.direct
    return run(_refit, setup, blocks, info, stream, params, objective, damping)


def _refit(
    setup: StreamSetup, blocks: Blocks, info: RefitInfo, stream: StreamState, params: Params,
    objective: BoundObjective, damping: Number,
) -> tuple[Blocks, RefitInfo, StreamState]:  # fmt: skip
    options, plan = setup.options, setup.plan
    sides = setup.two_sided
    model = _linearize(setup, params, objective, damping, widen=sides)
    key = jax.random.fold_in(jax.random.key(options.seed), info.refits)
    key, noise = jax.random.split(key)
    keys = jax.random.split(key, options.probes)
    # One after the other, not a vmap: one probe is the rule, and a batch of pull-backs through
    # convolutions is slower than as many of them.
    probes = [jax.tree.leaves(_probe(setup, model, objective, k)) for k in keys]
    statistics = list(_unpack(plan, stream.statistics, params))
    new, keep = list(blocks), [all_finite([h[b.leaves[0]] for h in probes]) for b in plan]
    number = info.refits + 1
    for i, block in enumerate(plan):
        if kind_of(block.structure) == "spectrum":
            new[i], statistics[i] = _follow(
                options,
                block,
                new[i],
                statistics[i],
                [h[block.leaves[0]] for h in probes],
                number,
                keep[i],
            )
    tops = [_top(setup, block, own) for block, own in zip(plan, statistics, strict=True)]
    power, top = stream.power, _largest(tops)
    if sides:
        power, top = _power_step(setup, model, stream)
        model = replace(model, top_eigenvalue=top)
        new, statistics, before, after = _relative_step(
            setup,
            model,
            new,
            statistics,
            jax.tree.unflatten(jax.tree.structure(params), probes[0]),
            noise,
        )
    old = new
    new = [
        _solved(block, arrays, own, own_top, damping)
        for block, arrays, own, own_top in zip(plan, new, statistics, tops, strict=True)
    ]
    if not sides:
        before, after = (
            _closed_objective(plan, arrays, statistics, tops, damping) for arrays in (old, new)
        )
    stream = stream._replace(
        statistics=_pack(setup, statistics, stream, params), power=power,
        top=jnp.asarray(top, jnp.float32),
    )  # fmt: skip
    record = _record(plan, tuple(new), info, stream.momentum, keep, before, after)
    return tuple(new), record, stream


def _linearize(
    setup: StreamSetup, params: Params, objective: BoundObjective, damping: Number, *, widen: bool
) -> QuadraticModel:
    if widen:  # products with C in half precision would lose what a step changes
        params = jax.tree.map(lambda p: p.astype(plans.at_least_float32(p.dtype)), params)
    rows = metrics.over_rows(setup.reduction)
    return quadratic.linearize(
        objective, params, setup.metric.tree, damping=damping, divergence_reduction=rows,
        route=setup.route,
    )  # fmt: skip


def _probe(
    setup: StreamSetup, model: QuadraticModel, objective: BoundObjective, key: PRNGKeyArray
) -> Params:
    """The gradient for labels drawn from the model: one pull-back."""
    rows = metrics.over_rows(setup.reduction)
    drawn = metrics.sample(setup.metric.tree, key, model.outputs, objective.mask(), rows)
    return model.jacobian.vjp(drawn)


# --- a spectrum between bases ------------------------------------------------------------------


def _follow(
    options: Streaming, block: Block, arrays: Arrays, statistics: Arrays, probes: list[Array],
    number: Int[Array, ""], keep: Bool[Array, ""],
) -> tuple[Arrays, Arrays]:  # fmt: skip
    """Turn the bases towards the second moments, and average the probe's squares in them."""
    often = (number <= WIDE_TURNS - 1) | ((number - 1) % WIDE_TURNS == 0)

    def turn(slot: str, v: Array) -> Array:
        new = jnp.linalg.qr(statistics[slot] @ v)[0]
        return jnp.where(all_finite([new]), new, v)

    bases = {
        slot: _now_or_rarely(options, arrays[slot], often, partial(turn, slot))
        for slot in _dense(block)
    }

    def squared(h: Array) -> Array:
        x = block.matrix(h)
        x = bases["left"].T @ x if "left" in bases else x
        x = x @ bases["right"] if "right" in bases else x
        return x * x

    fresh = jnp.mean(jnp.stack([squared(h) for h in probes]), axis=0)
    a = jnp.minimum(options.spectrum_decay, 1 - 1 / number.astype(fresh.dtype))
    c = jnp.where(keep, a * statistics["spectrum"] + (1 - a) * fresh, statistics["spectrum"])
    return arrays | bases, statistics | {"spectrum": c}


def _top(setup: StreamSetup, block: Block, statistics: Arrays) -> Number:
    """By what a block's curvature is divided: its largest entry; 1 where there is none."""
    if setup.reduction != "unit" or kind_of(block.structure) != "spectrum":
        return 1.0
    top = jnp.max(statistics["spectrum"], initial=0.0)
    return jnp.where(top > 0, top, 1.0)


def _largest(tops: list[Number]) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.asarray(top, jnp.float32) for top in [0.0, *tops]]))


def _solved(
    block: Block, arrays: Arrays, statistics: Arrays, top: Number, damping: Number
) -> Arrays:
    """Set the spectrum to the minimiser of the probe objective."""
    if kind_of(block.structure) != "spectrum":
        return arrays
    c = statistics["spectrum"]
    d = 1 / (c / jnp.asarray(top, c.dtype) + jnp.asarray(damping, c.dtype))
    return arrays | {"spectrum": d}


def _closed_objective(
    plan: Plan,
    blocks: list[Arrays],
    statistics: list[Arrays],
    tops: list[Number],
    damping: Number,
) -> Float[Array, ""]:
    """Sum of 1/2 D^2 c (c + lambda) - D c: the probe objective without couplings."""
    total = jnp.zeros((), jnp.float32)
    for block, arrays, own, top in zip(plan, blocks, statistics, tops, strict=True):
        if kind_of(block.structure) == "spectrum":
            d, c = arrays["spectrum"], own["spectrum"] / jnp.asarray(top, own["spectrum"].dtype)
            entries = 0.5 * d * d * c * (c + jnp.asarray(damping, c.dtype)) - d * c
            total = total + jnp.sum(entries).astype(jnp.float32)
    return total


# --- two sides without a spectrum --------------------------------------------------------------


def _power_step(
    setup: StreamSetup, model: QuadraticModel, stream: StreamState
) -> tuple[Params, Number]:
    """One step of the power iteration; its length estimates the largest eigenvalue."""
    if setup.reduction != "unit":
        return stream.power, 1.0
    length = norm(stream.power)
    unit = jax.tree.map(lambda v: divide(v, length.astype(v.dtype)), stream.power)
    power = model.curvature.product(unit)
    length = norm(power)
    usable = jnp.isfinite(length) & (length > 0)
    power = jax.tree.map(lambda new, old: jnp.where(usable, new, old), power, stream.power)
    return power, jnp.where(usable, length, stream.top.astype(length.dtype))


def _relative_step(
    setup: StreamSetup, model: QuadraticModel, blocks: list[Arrays], statistics: list[Arrays],
    h: Params, noise: PRNGKeyArray,
) -> tuple[list[Arrays], list[Arrays], Float[Array, ""], Float[Array, ""]]:  # fmt: skip
    """Move Q along its relative gradient; also Phi on this probe, before and after."""
    root, floor = jnp.sqrt(model.top_eigenvalue), jnp.sqrt(FISHER_FLOOR * model.damping)
    h = jax.tree.map(lambda x, n: (x / root + floor * n).astype(x.dtype), h, normal_like(h, noise))

    def phi(arrays: list[Arrays]) -> tuple[Params, Float[Array, ""]]:
        u = plans.multiply(setup.plan, arrays, h)
        return u, 0.5 * model.bilinear(u, u) - vdot(h, u)

    u, before = phi(blocks)
    residual = jax.tree.map(jnp.subtract, model.product(u), h)
    rs, hs, new, found = jax.tree.leaves(residual), jax.tree.leaves(h), list(blocks), []
    for i, block in enumerate(setup.plan):
        own = statistics[i]
        if kind_of(block.structure) == "sides":
            r, x = (block.matrix(tree[block.leaves[0]]) for tree in (rs, hs))
            own = _moved(setup.options.rate, block, own, r, x)
            new[i] = new[i] | {slot: own[slot].T @ own[slot] for slot in _dense(block)}
        found.append(own)
    return new, found, before.astype(jnp.float32), phi(new)[1].astype(jnp.float32)


def _moved(rate: float, block: Block, factors: Arrays, r: Array, h: Array) -> Arrays:
    """A and B after one relative step."""
    w, a = _between(factors, h), _between(factors, r)
    out = dict(factors)
    for slot in _dense(block):
        e = a @ w.T if slot == "left" else a.T @ w
        e = 0.5 * (e + e.T)
        size = jnp.maximum(_spectral_norm(e), jnp.sum(w * w) / e.shape[0])
        step = factors[slot] - rate * divide(e, size) @ factors[slot]
        out[slot] = jnp.where(all_finite([step]), step, factors[slot])
    return out


def _between(factors: Arrays, x: Array) -> Array:
    """A X B^T."""
    x = factors["left"] @ x if "left" in factors else x
    return x @ factors["right"].T if "right" in factors else x


def _spectral_norm(e: Float[Array, "d d"]) -> Float[Array, ""]:
    """|E|_2 of a symmetric E, from below: a few power steps from its longest row."""
    v = e[jnp.argmax(jnp.sum(e * e, axis=1))]
    for _ in range(NORM_STEPS):
        v = e @ divide(v, jnp.sqrt(jnp.sum(v * v)))
    return jnp.sqrt(jnp.sum(v * v))


# --- records and trees -------------------------------------------------------------------------


def _record(
    plan: Plan, blocks: Blocks, info: RefitInfo, momentum: Params, keep: list[Bool[Array, ""]],
    before: Float[Array, ""], after: Float[Array, ""],
) -> RefitInfo:  # fmt: skip
    leaves = jax.tree.leaves(momentum)
    scaled = jax.tree.leaves(plans.multiply(plan, blocks, momentum))
    pairs = [(scaled[b.leaves[0]], leaves[b.leaves[0]]) for b in plan]
    code = {word: i for i, word in enumerate(STATUS)}
    status = [jnp.where(k, code["updated"], code["nonfinite"]) for k in keep]
    return RefitInfo(
        refits=info.refits + 1,
        steps=jnp.ones((), jnp.int32),
        objective_before=before,
        objective_after=after,
        cosine=cosine(*(list(side) for side in zip(*pairs, strict=True))).astype(jnp.float32)
        if plan
        else info.cosine,
        status=jnp.stack(status).astype(jnp.int32) if plan else info.status,
        cosines=jnp.stack([cosine(p, m) for p, m in pairs]).astype(jnp.float32)
        if plan
        else info.cosines,
    )


def _pack(
    setup: StreamSetup, arrays: list[Arrays], stream: StreamState, like: Params
) -> dict[str, Any]:
    return plans.pack(setup.plan, arrays, like, tuple(stream.statistics))


def _unpack(plan: Plan, trees: dict[str, Any], like: Params) -> tuple[Arrays, ...]:
    return plans.unpack(plan, trees, like, lambda block: tuple(statistics_of(block)))
