"""Prototype of streaming refits, with every option that was tried; not a part of the library.

  symbol   meaning                                                                shape
  G        gradient of a leaf as a stack of matrices (blocks of its rows)         (s, m, n)
  S, V     running second moments of a side, and its basis                        (s, d, d)
  h        Fisher probe: gradient for labels drawn from the model, E h h^T = C    like G
  c        running mean of (V_L^T h V_R)^2                                        (s, m, n)
  D        1 / (c / max c + damping)^exponent                                     (s, m, n)
  m        momentum                                                               (s, m, n)

With `adapt` below 1, damping follows Levenberg and Marquardt: at a refit, the decrease of the loss
on its batch by the step is compared with that of the model g.u + 1/2 u.C u; above 3/4 of it damping
is multiplied by `adapt`, below 1/4 divided by it.

The step is d = V_L (D o (V_L^T m V_R)) V_R^T, scaled to a given root mean square in each leaf.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llqr import metrics


@dataclass(frozen=True)
class Options:
    """What was tried."""

    momentum: float = 0.9
    nesterov: bool = False
    damping: float = 1e-4
    exponent: float = 1.0
    spectrum_decay: float = 0.9
    statistics_decay: float = 0.95
    probes: int = 1
    source: str = "fisher"  # of the spectrum: fisher, microbatch, gradient (at each step)
    bases: str = "gradient"  # what bases follow: gradient, probe, momentum
    sort: bool = False
    cholesky: bool = False
    graft: str = "rms"  # rms, fan, metric, metric-leaf, global, none
    rms: float = 0.2
    vector_rms: float = 0.05
    block: int = 0
    max_side: int = 10_000
    max_norm: str = "all"  # c / max over all leaves or each: all, leaf
    coupled: int = 0  # steps of cg for a coupled spectrum
    coupled_probes: int = 4
    coupled_decay: float = 0.5
    embedding: str = "full"  # bases of an embedding: full, right, none
    embedding_rms: float = 0.0  # 0: as other matrices
    wide: int = 256  # sides above it follow when `wide` says so
    start: str = "qr"  # of the bases: eigh, qr
    adapt: float = 1.0  # factor of the damping at a refit, by how well the model predicts; 1: none


class Leaf(NamedTuple):
    """State of a leaf."""

    momentum: Any
    c: Any
    d: Any
    ratio: Any  # of the coupled spectrum to the closed form
    statistics: tuple[Any, Any]
    bases: tuple[Any, Any]


class State(NamedTuple):
    """State."""

    count: Any
    refits: Any
    rotations: Any
    key: Any
    hyper: dict[str, Any]
    leaves: list[Leaf]


HYPER = (
    "momentum", "damping", "exponent", "spectrum_decay", "statistics_decay", "rms", "vector_rms"
)  # fmt: skip


def streaming(options: Options | None = None, **changes: Any) -> Any:
    """Return the transformation; `update` takes objective, refresh, rotate and couple."""
    o = options or Options(**changes)

    def init(params: Any) -> State:
        def leaf(path: Any, x: Any) -> Leaf:
            z = jnp.zeros(_shape(x.shape, o.block), x.dtype)
            *s, m, n = z.shape
            sizes = [d if x.ndim > 1 and d <= o.max_side else 0 for d in (m, n)]
            if o.embedding != "full" and _is_embedding(path):
                sizes = [0, sizes[1] if o.embedding == "right" else 0]
            eye = [jnp.broadcast_to(jnp.eye(d), (*s, d, d)) if d else None for d in sizes]
            zero = [jnp.zeros((*s, d, d)) if d else None for d in sizes]
            return Leaf(z, z, z + 1, z + 1, (zero[0], zero[1]), (eye[0], eye[1]))

        zero = jnp.zeros((), jnp.int32)
        hyper = {name: jnp.float32(getattr(o, name)) for name in HYPER}
        leaves = [leaf(*x) for x in jax.tree.leaves_with_path(params)]
        return State(zero, zero, zero, jax.random.key(0), hyper, leaves)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        objective: Any = None,
        refresh: bool = False,
        rotate: bool | None = None,
        couple: bool = False,
        follow: bool = True,
        rotate_wide: bool | None = None,
        follow_wide: bool | None = None,
        rate: Any = None,
        **_: Any,
    ) -> tuple[Any, State]:
        rotate = refresh if rotate is None else rotate
        rotate_wide = rotate if rotate_wide is None else rotate_wide
        follow_wide = follow if follow_wide is None else follow_wide
        hp = state.hyper
        raw, treedef = jax.tree.flatten(updates)
        words = [_is_embedding(path) for path, _ in jax.tree.leaves_with_path(updates)]
        shapes = [_shape(x.shape, o.block) for x in raw]
        grads = [x.reshape(s) for x, s in zip(raw, shapes, strict=True)]
        old = state.leaves
        key, draw = jax.random.split(state.key)
        refits = state.refits

        def views(tree: Any) -> list[Any]:
            return [x.reshape(s) for x, s in zip(jax.tree.leaves(tree), shapes, strict=True)]

        probes: list[list[Any]] = []
        if (refresh and o.source == "fisher") or (refresh and o.bases == "probe"):
            probes = [views(h) for h in _fisher(objective, params, draw, o.probes)]
        elif refresh and o.source == "microbatch":
            probes = [views(h) for h in _microbatches(objective, params, o.probes)]
        # momentum
        m = [hp["momentum"] * leaf.momentum + g for leaf, g in zip(old, grads, strict=True)]
        # statistics and bases
        statistics = [leaf.statistics for leaf in old]
        if follow or follow_wide:
            if o.bases == "probe":
                sources, decay = ([probes[0]] if probes else []), hp["spectrum_decay"]
            else:
                sources, decay = [grads if o.bases == "gradient" else m], hp["statistics_decay"]
            for source in sources:
                statistics = [
                    _follow(s, x, decay, o.wide, follow, follow_wide)
                    for s, x in zip(statistics, source, strict=True)
                ]
        bases = [leaf.bases for leaf in old]
        c = [leaf.c for leaf in old]
        if rotate or rotate_wide:
            turned = [
                _turn(s, b, x, state.rotations == 0, o, rotate, rotate_wide)
                for s, b, x in zip(statistics, bases, c, strict=True)
            ]
            bases, c = [t[0] for t in turned], [t[1] for t in turned]
        # spectrum
        if o.source == "gradient":
            probes = [grads]
        d = [leaf.d for leaf in old]
        ratio = [leaf.ratio for leaf in old]
        if probes:
            refits = refits + 1
            a = jnp.minimum(hp["spectrum_decay"], 1 - 1 / refits)
            squares = [
                sum(_into(b, h[i]) ** 2 for h in probes) / len(probes) for i, b in enumerate(bases)
            ]
            c = [a * x + (1 - a) * q for x, q in zip(c, squares, strict=True)]
            top = [jnp.max(x) for x in c]
            if o.max_norm == "all":
                top = [jnp.max(jnp.stack(top))] * len(c)
            d = [(x / t + hp["damping"]) ** -hp["exponent"] for x, t in zip(c, top, strict=True)]
            if o.coupled and couple:
                new = _coupled(o, objective, params, draw, bases, d, top[0], views, treedef, raw)
                ratio = [
                    r**o.coupled_decay * (x / y) ** (1 - o.coupled_decay)
                    for r, x, y in zip(ratio, new, d, strict=True)
                ]
            d = [x * r for x, r in zip(d, ratio, strict=True)]
        # step
        lead = [g + hp["momentum"] * x for g, x in zip(grads, m, strict=True)] if o.nesterov else m
        rotated: list[Any] = [x * _into(b, y) for x, b, y in zip(d, bases, lead, strict=True)]
        steps = [_into(b, x, back=True) for b, x in zip(bases, rotated, strict=True)]
        steps = _graft(o, hp, steps, rotated, c, raw, grads, words)
        leaves = [Leaf(*parts) for parts in zip(m, c, d, ratio, statistics, bases, strict=True)]
        out = treedef.unflatten([-s.reshape(x.shape) for s, x in zip(steps, raw, strict=True)])
        if o.adapt < 1 and refresh:
            hp = hp | {"damping": _adapted(o, hp["damping"], objective, params, updates, out, rate)}
        new = State(state.count + 1, refits, state.rotations + int(rotate), key, hp, leaves)
        return out, new

    return optax.GradientTransformationExtraArgs(init, update)


def _is_embedding(path: Any) -> bool:
    return "embedding" in jax.tree_util.keystr(path)


def _shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    if len(shape) < 2:
        return 1, math.prod(shape)
    m, n = math.prod(shape[:-1]), shape[-1]
    count = -(-m // block) if block else 1
    while m % count:
        count += 1
    return (count, m // count, n) if count > 1 else (m, n)


def _into(bases: Any, x: Any, back: bool = False) -> Any:
    left, right = bases
    if left is not None:
        x = (left if back else left.mT) @ x
    return x if right is None else x @ (right.mT if back else right)


def _follow(
    statistics: Any, x: Any, decay: float, wide: int, narrow_too: bool, wide_too: bool
) -> Any:
    outer = (x @ x.mT, x.mT @ x) if statistics != (None, None) else (None, None)

    def one(s: Any, y: Any) -> Any:
        if s is None or not (wide_too if s.shape[-1] > wide else narrow_too):
            return s
        return decay * s + (1 - decay) * y

    return tuple(one(s, y) for s, y in zip(statistics, outer, strict=True))


def _orthogonal(x: Any, cholesky: bool) -> Any:
    if not cholesky:
        return jnp.linalg.qr(x)[0]
    for _ in range(2):
        x = x / jnp.linalg.norm(x, axis=-2, keepdims=True)
        gram = x.mT @ x + 1e-6 * jnp.eye(x.shape[-1])
        lower = jnp.linalg.cholesky(gram)
        x = jax.lax.linalg.triangular_solve(lower, x, left_side=False, lower=True, transpose_a=True)
    return x


def _turn(
    statistics: Any, bases: Any, c: Any, first: Any, o: Options, narrow_too: bool, wide_too: bool
) -> Any:
    """One orthogonal iteration of each basis (the first time eigenvectors), c sorted with it."""
    found = []
    for axis, (s, v) in enumerate(zip(statistics, bases, strict=True)):
        if s is None or not (wide_too if s.shape[-1] > o.wide else narrow_too):
            found.append(v)
            continue

        def iterate(s: Any, v: Any, c: Any, axis: int = axis) -> Any:
            product = s @ v
            if o.sort:
                order = jnp.argsort(-jnp.sum(v * product, -2), -1)
                product = jnp.take_along_axis(product, order[..., None, :], -1)
                where = order[..., :, None] if axis == 0 else order[..., None, :]
                c = jnp.take_along_axis(c, where, axis - 2)
            return _orthogonal(product, o.cholesky), c

        def start(s: Any, v: Any, c: Any) -> Any:
            return jnp.linalg.eigh(s)[1][..., ::-1], c

        if o.start == "eigh":
            v, c = jax.lax.cond(first, start, iterate, s, v, c)
        else:
            v, c = iterate(s, v, c)
        found.append(v)
    return tuple(found), c


def _graft(
    o: Options, hp: Any, steps: Any, rotated: Any, c: Any, raw: Any, grads: Any, words: Any
) -> Any:
    tiny = 1e-20
    if o.graft in ("rms", "fan"):

        def size(x: Any, word: bool) -> Any:
            if x.ndim < 2:
                return hp["vector_rms"]
            if word:
                return o.embedding_rms or hp["rms"]
            fan = math.prod(x.shape[:-1])
            return hp["rms"] * (8 / math.sqrt(fan) if o.graft == "fan" else 1)

        return [
            size(x, word) * s / jnp.sqrt(jnp.mean(s * s) + tiny)
            for s, x, word in zip(steps, raw, words, strict=True)
        ]
    if o.graft == "global":
        total = sum(jnp.sum(g * g) for g in grads)
        return [s * jnp.sqrt(total / sum(jnp.sum(x * x) for x in steps)) for s in steps]
    lengths = [jnp.sum(x * r * r) for x, r in zip(c, rotated, strict=True)]
    if o.graft == "metric":
        return [s / jnp.sqrt(sum(lengths) + tiny) for s in steps]
    if o.graft == "metric-leaf":
        return [s / jnp.sqrt(x + tiny) for s, x in zip(steps, lengths, strict=True)]
    return steps


def _fisher(objective: Any, params: Any, key: Any, count: int) -> list[Any]:
    outputs, pull = jax.vjp(objective.outputs, params)
    metric = metrics.resolve("ngd")
    return [
        pull(metrics.sample(metric, jax.random.fold_in(key, i), outputs, None, "mean"))[0]
        for i in range(count)
    ]


def _adapted(
    o: Options, damping: Any, objective: Any, params: Any, grads: Any, step: Any, rate: Any
) -> Any:
    """Damping after a look at how the loss on the batch follows its model along the step."""
    u = jax.tree.map(lambda x: rate * x, step)
    before, after = objective(params), objective(jax.tree.map(jnp.add, params, u))
    outputs, z = jax.jvp(objective.outputs, (params,), (u,))
    p = jax.nn.softmax(outputs)
    squares = jnp.sum(p * z * z, -1) - jnp.sum(p * z, -1) ** 2
    slope = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (grads, u)), strict=True))
    predicted = slope + 0.5 * jnp.mean(squares)
    ratio = (after - before) / jnp.where(predicted < 0, predicted, -1e-12)
    factor = jnp.where(ratio > 0.75, o.adapt, jnp.where(ratio < 0.25, 1 / o.adapt, 1.0))
    return jnp.clip(damping * factor, 1e-8, 1.0)


def _microbatches(objective: Any, params: Any, count: int) -> list[Any]:
    parts = objective.split(jax.tree.leaves(objective.batch)[0].shape[0] // count)
    return [jax.grad(parts[i])(params) for i in range(count)]


def _coupled(
    o: Options, objective: Any, params: Any, key: Any, bases: Any, d: Any, top: Any, views: Any,
    treedef: Any, raw: Any,
) -> Any:  # fmt: skip
    """Minimise E[1/2 u.(C/top + damping)u - h.u], u = V (D o V^T h), over D by cg from d."""
    outputs, push = jax.linearize(objective.outputs, params)
    pull = jax.linear_transpose(push, params)
    p = jax.nn.softmax(outputs)
    rows = math.prod(outputs.shape[:-1])

    def product(u: list[Any]) -> list[Any]:
        tree = treedef.unflatten([x.reshape(y.shape) for x, y in zip(u, raw, strict=True)])
        z = push(tree)
        z = (p * z - p * jnp.sum(p * z, -1, keepdims=True)) / rows
        return views(pull(z)[0])

    metric, w = metrics.resolve("ngd"), []
    for i in range(o.coupled_probes):
        h = pull(metrics.sample(metric, jax.random.fold_in(key, 100 + i), outputs, None, "mean"))
        w.append([_into(b, x) / jnp.sqrt(top) for b, x in zip(bases, views(h[0]), strict=True)])
    mean = [sum(y[i] ** 2 for y in w) / len(w) for i in range(len(d))]

    def normal(x: list[Any]) -> list[Any]:
        total = [jnp.zeros_like(y) for y in x]
        for wi in w:
            u = [_into(b, y * z, back=True) for b, y, z in zip(bases, x, wi, strict=True)]
            cu = [_into(b, y) / top for b, y in zip(bases, product(u), strict=True)]
            total = [
                t + z * (y + o.damping * s * z) for t, z, y, s in zip(total, wi, cu, x, strict=True)
            ]
        return [t / len(w) for t in total]

    # Preconditioned by the diagonal of the uncoupled system, w^2 (c + damping) = mean / d.
    scale = [y / (x + 0.1 / y + 1e-9) for x, y in zip(mean, d, strict=True)]
    dot = lambda x, y: sum(jnp.vdot(a, b) for a, b in zip(x, y, strict=True))  # noqa: E731
    x = list(d)
    r = [b - a for b, a in zip(mean, normal(x), strict=True)]
    z = [s * y for s, y in zip(scale, r, strict=True)]
    q, rz = z, dot(r, z)
    for _ in range(o.coupled):
        aq = normal(q)
        step = rz / (dot(q, aq) + 1e-30)
        x = [a + step * b for a, b in zip(x, q, strict=True)]
        r = [a - step * b for a, b in zip(r, aq, strict=True)]
        z = [s * y for s, y in zip(scale, r, strict=True)]
        new = dot(r, z)
        q = [a + new / (rz + 1e-30) * b for a, b in zip(z, q, strict=True)]
        rz = new
    # Positive: at least a tenth of the closed form, at most ten times.
    return [jnp.clip(a, 0.1 * b, 10 * b) for a, b in zip(x, d, strict=True)]
