"""Streaming refits against a numpy loop, closed forms and the dense inverse."""

import dataclasses
import itertools
import math
from functools import cache, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import llqr
from llqr import metrics
from llqr.errors import LayoutWarning
from llqr.refit.options import Streaming
from llqr.structures import plan as plans
from llqr.structures import trees
from llqr.structures.rules import rule_table
from tests import cases
from tests.cases import Case
from tests.oracle import flat

ROWS, LAMBDA = 12, 0.05


def forward(params: Any, batch: Any) -> Any:
    x = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    return x @ params["second"]["kernel"]


def loss(z: Any, batch: Any) -> Any:
    """Squares, not a cross-entropy, whose gradient has a null space where bases are arbitrary."""
    target = jax.nn.one_hot(batch["y"], z.shape[-1], dtype=z.dtype)
    return jnp.mean(jnp.sum((z - target) ** 2, axis=-1))


OBJECTIVE = llqr.Objective(forward, loss)
METRIC = "gaussian"
slope = jax.jit(jax.grad(OBJECTIVE))


def parameters(dtype: Any = np.float64) -> Any:
    rng = np.random.default_rng(0)
    tree = {
        "first": {"kernel": rng.normal(size=(5, 4)), "bias": rng.normal(size=4)},
        "second": {"kernel": rng.normal(size=(4, 3))},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def batch(seed: int, dtype: Any = np.float64) -> Any:
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(ROWS, 5)), dtype)
    return {"x": x, "y": jnp.asarray(rng.integers(0, 3, ROWS), jnp.int32)}


def part(data: Any, options: Streaming, number: int) -> Any:
    """The examples of a refit's probes: every second, or fourth, from another one each time."""
    parts = round(1 / options.probe_share)
    return jax.tree.map(lambda x: x[number % parts :: parts], data)


@partial(jax.jit, static_argnames=("seed", "probes"))
def drawn(params: Any, data: Any, number: Any, seed: int, probes: int) -> Any:
    """The library's draws of labels, and the dense Jacobian that pulls them back."""
    bound = OBJECTIVE.bind(data)
    key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))[0]
    outputs, metric = bound.outputs(params), metrics.resolve(METRIC)
    labels = [
        metrics.sample(metric, one, outputs, bound.mask(), "mean")
        for one in jax.random.split(key, probes)
    ]
    return labels, jax.jacobian(bound.outputs)(params)


def probe(params: Any, data: Any, options: Streaming, number: int) -> list[Any]:
    data = part(data, options, number)
    labels, jacobian = drawn(params, data, number, options.seed, options.probes)
    return [jax.tree.map(lambda j, w=w: np.tensordot(w, j, axes=2), jacobian) for w in labels]


def turned(s: Any, v: Any) -> Any:
    """Q of S V in units of the largest eigenvalue, and of half the digits of V."""
    x = s @ v
    return np.linalg.qr(x / np.max(np.sum(v * x, axis=0)) + np.sqrt(np.finfo(v.dtype).eps) * v)[0]


@cache  # for all modes of the library's loop
def numpy_loop(options: Streaming, structure: str, steps: int, rate: float) -> Any:
    """The whole method for e-kfac and diagonal, every formula of the module written out."""
    params = jax.tree.map(np.asarray, parameters())
    names = [("first", "bias"), ("first", "kernel"), ("second", "kernel")]
    m = dict.fromkeys(names, 0.0)
    state = {}
    for n in names:
        shape = params[n[0]][n[1]].shape
        matrix = len(shape) == 2 and structure == "e-kfac"
        rows, cols = shape if matrix else (0, 0)
        state[n] = {
            "matrix": matrix, "sl": np.zeros((rows, rows)), "sr": np.zeros((cols, cols)),
            "vl": np.eye(rows), "vr": np.eye(cols), "c": np.zeros(shape), "d": np.ones(shape),
            "q": np.zeros(shape),
        }  # fmt: skip
    number = 0
    for step in range(steps):
        data = batch(step)
        gradient = jax.tree.map(np.asarray, slope(params, data))
        for n in names:
            g, s = gradient[n[0]][n[1]], state[n]
            m[n] = options.momentum * m[n] + g
            for side, moment in (("sl", g @ g.T), ("sr", g.T @ g)) if s["matrix"] else ():
                if len(moment) <= options.wide or step < options.warmup or step % 2 == 0:
                    b = options.basis_decay
                    s[side] = b * s[side] + (1 - b) * moment
        if step < options.warmup or step % options.every == 0:
            draws = probe(params, data, options, number)
            number += 1
            a = min(options.spectrum_decay, 1 - 1 / number)
            for n in names:
                s, squares = state[n], []
                for v, side in (("vl", "sl"), ("vr", "sr")) if s["matrix"] else ():
                    if len(s[v]) <= options.wide or number <= 4 or (number - 1) % 5 == 0:
                        s[v] = turned(s[side], s[v])
                for h in draws:
                    x = h[n[0]][n[1]]
                    squares.append((s["vl"].T @ x @ s["vr"] if s["matrix"] else x) ** 2)
                s["c"] = a * s["c"] + (1 - a) * np.mean(squares, axis=0)
            for s in state.values():
                s["d"] = 1 / (s["c"] / s["c"].max() + LAMBDA)
        for n in names:
            s, v, g = state[n], m[n], gradient[n[0]][n[1]]
            if options.nesterov:
                v = options.momentum * v + g

            def inside(x: Any, s: Any = s) -> Any:
                return s["vl"].T @ x @ s["vr"] if s["matrix"] else x

            u = s["d"] * inside(v)
            target = 0.05 if n[1] == "bias" else 0.2
            u = target * u / np.sqrt(np.mean(u**2))
            if options.signal_decay is not None:
                e = min(options.signal_decay, 1 - 1 / (step + 1))
                s["q"] = e * s["q"] + (1 - e) * inside(g) ** 2
                mean = (1 - options.momentum) * inside(m[n])
                noise = np.sqrt((1 - options.momentum) / (1 + options.momentum))
                u = np.minimum(np.abs(mean) / np.sqrt(s["q"]), 1) / noise * u
            u = s["vl"] @ u @ s["vr"].T if s["matrix"] else u
            params[n[0]][n[1]] = params[n[0]][n[1]] - rate * u
    return params


def library_loop(options: Streaming, structure: str, steps: int, rate: float, mode: str) -> Any:
    tx = llqr.llqr(
        optax.sgd(rate), structure=structure, metric=METRIC, damping=LAMBDA, refit=options
    )
    params, state = parameters(), tx.init(parameters())

    def step(params: Any, state: Any, batch: Any, due: Any) -> Any:
        grads = jax.grad(OBJECTIVE)(params, batch)
        bound = None if due is False else OBJECTIVE.bind(batch)
        updates, state = tx.update(grads, state, params, objective=bound, refresh=due)
        return optax.apply_updates(params, updates), state

    if mode != "eager":
        step = jax.jit(step, static_argnums=3)
    for i in range(steps):
        due = None if mode == "cond" else bool(options.is_due(i))
        params, state = step(params, state, batch(i), due)
    return params, state


@pytest.mark.parametrize("mode", ["static", "cond", "eager"])
@pytest.mark.parametrize(
    ("structure", "changes"),
    [
        ("e-kfac", {}),
        ("e-kfac", {"probes": 2, "momentum": 0.0}),
        ("e-kfac", {"nesterov": False}),
        ("e-kfac", {"wide": 3}),
        ("e-kfac", {"signal_decay": None}),
        ("e-kfac", {"signal_decay": 0.5}),
        ("e-kfac", {"probe_share": 0.5}),
        ("e-kfac", {"probe_share": 1.0}),
        ("diagonal", {}),
    ],
)
def test_the_library_is_the_numpy_loop(structure: str, changes: Any, mode: str) -> None:
    options = Streaming(**{"every": 2, "warmup": 3, "spectrum_decay": 0.7, **changes})
    expected = numpy_loop(options, structure, 13, 0.1)
    found, state = library_loop(options, structure, 13, 0.1, mode)
    # Half of the digits, where S has no full rank yet; nothing hangs on them with no bases.
    atol = 1e-12 if structure == "diagonal" else 1e-8
    np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=atol)
    assert int(llqr.find(state).refit.refits) == 8  # at 0, 1, 2, 4, .., 12
    assert llqr.find(state).refit.words == ("updated",) * 3


# --- closed forms ---------------------------------------------------------------------------


def _signs(key: Any, z: Any) -> Any:
    """Draws whose squares are exactly 1, so that one probe shows a diagonal C."""
    return jax.random.rademacher(key, z.shape, z.dtype)


SIGNS = llqr.Metric(lambda z, r: 0.5 * jnp.sum((z - r) ** 2, axis=-1), sample=_signs)


def test_the_spectrum_converges_to_the_inverse_curvature_in_fixed_bases() -> None:
    """z = S_a U^T W V S_b: C is diagonal in the bases U and V, which the gradient shows too."""
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.normal(size=(k, k)))[0] for k in (4, 3))
    a, b = np.array([3.0, 2.0, 1.0, 0.5]), np.array([2.0, 1.0, 0.3])
    ahead, behind = jnp.asarray(a[:, None] * u.T), jnp.asarray(v * b)
    objective = llqr.Objective(
        lambda w, _: ahead @ w["kernel"] @ behind, lambda z, _: jnp.sum(z**2)
    ).bind(jnp.zeros(()))
    gradient = {"kernel": jnp.asarray(u[:, :3] @ np.diag([3.0, 2.0, 1.0]) @ v.T)}
    params = {"kernel": jnp.ones((4, 3))}
    tx = llqr.scale_by_llqr(
        structure="e-kfac", metric=SIGNS, damping=0.1, divergence_reduction="sum", graft="none",
        refit=Streaming(spectrum_decay=0.9, momentum=0.0),
    )  # fmt: skip
    state = tx.init(params)
    step = jax.jit(partial(tx.update, refresh=True))
    for _ in range(300):
        updates, state = step(gradient, state, params, objective=objective)
    c = np.outer(a**2, b**2)
    spectrum = np.asarray(state.blocks["spectrum"]["kernel"])
    np.testing.assert_allclose(
        np.sort(spectrum.ravel()), np.sort((1 / (c + 0.1)).ravel()), rtol=1e-9
    )
    plan = plans.make_plan(params, rule_table("e-kfac"), 10)
    found = plan[0].as_matrix(trees.unpack(plan, state.blocks, params)[0])
    model = llqr.linearize(objective, params, SIGNS, damping=0.1)
    np.testing.assert_allclose(found, np.linalg.inv(model.as_matrix()), rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        flat(updates), np.linalg.solve(model.as_matrix(), flat(gradient)), atol=1e-9
    )


def _sampled(case: Case) -> list[Any]:
    return [m for m in case.metrics if metrics.can_sample(metrics.resolve(cases.metric(m)))]


@pytest.mark.parametrize(
    ("case", "metric"),
    [(case, m) for case in cases.CASES for m in _sampled(case)[:2]],
    ids=cases.label,
)
def test_probes_show_the_curvature_of_every_case(case: Case, metric: Any) -> None:
    """c tends to the diagonal of C: masks, shared weights, several outputs, convolutions."""
    params, bound = case.params, case.bound
    tx = llqr.scale_by_llqr(
        structure="diagonal", metric=cases.metric(metric), damping=0.1, graft="none",
        divergence_reduction="mean",
        refit=Streaming(spectrum_decay=1.0, momentum=0.0, probe_share=1.0),
    )  # fmt: skip
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def refits(state: Any) -> Any:
        def one(state: Any, _: Any) -> Any:
            return tx.update(zeros, state, params, objective=bound, refresh=True)[1], None

        return jax.lax.scan(one, state, length=600)[0]

    state = refits(tx.init(params))
    found = flat(state.stream.statistics["spectrum"])
    model = llqr.linearize(bound, params, cases.metric(metric), divergence_reduction="mean")
    expected = np.diagonal(model.as_matrix())
    np.testing.assert_allclose(found, expected, rtol=0.35, atol=0.05 * expected.max())
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=0.08)


# --- two sides ------------------------------------------------------------------------------


def test_kfac_converges_to_the_inverse_of_a_kronecker_product() -> None:
    """C = A^T A x B B^T, with lambda near 0: P = Q^T Q must become its inverse."""
    rng = np.random.default_rng(5)
    a, b = (jnp.asarray(rng.normal(size=(k, k)) + 2 * np.eye(k)) for k in (4, 3))
    objective = llqr.Objective(lambda w, _: a @ w["kernel"] @ b, lambda z, _: jnp.sum(z**2)).bind(
        jnp.zeros(())
    )
    params = {"kernel": jnp.ones((4, 3))}
    tx = llqr.scale_by_llqr(
        structure="kfac", metric="gaussian", damping=1e-6, divergence_reduction="unit",
        graft="none", refit=Streaming(rate=0.05, momentum=0.0),
    )  # fmt: skip

    @jax.jit
    def refits(state: Any) -> Any:
        def one(state: Any, _: Any) -> Any:
            return tx.update(params, state, params, objective=objective, refresh=True)[1], None

        return jax.lax.scan(one, state, length=3000)[0]

    state = refits(tx.init(params))
    plan = plans.make_plan(params, rule_table("kfac"), 10)
    found = np.asarray(plan[0].as_matrix(trees.unpack(plan, state.blocks, params)[0]))
    model = llqr.linearize(objective, params, "gaussian", divergence_reduction="mean")
    c = np.asarray(model.as_matrix())
    top = np.linalg.eigvalsh(c).max()
    c = c / top
    product = np.linalg.cholesky(c).T @ found @ np.linalg.cholesky(c)
    assert np.linalg.cond(c) > 50
    assert np.abs(np.linalg.eigvalsh(product) - 1).max() < 0.5
    assert np.linalg.eigvalsh(found).min() > 0
    np.testing.assert_allclose(state.stream.top, top, rtol=1e-3)


def test_one_relative_step_is_that_of_numpy() -> None:
    params, bound = parameters(), OBJECTIVE.bind(batch(0))
    options = Streaming(every=1, momentum=0.0, seed=5)
    tx = llqr.scale_by_llqr(
        structure="kfac", metric=METRIC, damping=LAMBDA, divergence_reduction="mean", graft="none",
        refit=options,
    )  # fmt: skip
    state = tx.init(params)
    a, b = np.eye(5), np.eye(4)
    for number in range(3):
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        key, noise = jax.random.split(key)
        h = probe(params, bound.batch, options, number)[0]
        isotropic = llqr.tree.normal_like(params, noise)
        h = jax.tree.map(lambda x, n: x + np.sqrt(0.1 * LAMBDA) * n, h, isotropic)
        seen = OBJECTIVE.bind(part(bound.batch, options, number))
        model = llqr.linearize(seen, params, METRIC, damping=LAMBDA, divergence_reduction="mean")
        u = llqr.precondition(tx, state, h)
        r = jax.tree.map(jnp.subtract, model.product(u), h)
        x, y = (np.asarray(t["first"]["kernel"]) for t in (h, r))
        w, q = a @ x @ b.T, a @ y @ b.T
        new = []
        for side, e in ((a, q @ w.T), (b, q.T @ w)):
            e = (e + e.T) / 2
            v = e[np.argmax((e * e).sum(axis=1))]
            for _ in range(4):
                v = e @ (v / np.linalg.norm(v))
            assert np.linalg.norm(v) > 0.8 * np.linalg.norm(e, 2)  # what it estimates
            size = max(np.linalg.norm(v), (w * w).sum() / len(e))
            new.append(side - 0.3 * e / size @ side)
        a, b = new
        _, state = tx.update(params, state, params, objective=bound, refresh=True)
        found = {s: np.asarray(state.blocks[s]["first"]["kernel"]) for s in ("left", "right")}
        np.testing.assert_allclose(found["left"], a.T @ a, rtol=1e-10)
        np.testing.assert_allclose(found["right"], b.T @ b, rtol=1e-10)
    info = state.refit
    assert float(info.objective_after) < float(info.objective_before)


# --- what a user can rely on ----------------------------------------------------------------


def test_the_learning_rate_is_not_swallowed_and_leaves_have_their_length() -> None:
    params, bound = parameters(), OBJECTIVE.bind(batch(0))
    grads = jax.grad(bound)(params)
    found = {}
    for rate in (0.1, 0.3):
        plain = Streaming(signal_decay=None)
        tx = llqr.streaming(rate, weight_decay=0.01, damping=LAMBDA, refit=plain)
        updates, _ = tx.update(grads, tx.init(params), params, objective=bound, refresh=True)
        found[rate] = jax.tree.map(lambda u, p, r=rate: u + r * 0.01 * p, updates, params)
        rms = jax.tree.map(lambda u, r=rate: float(jnp.sqrt(jnp.mean(u**2))) / r, found[rate])
        np.testing.assert_allclose(flat(rms), [0.05, 0.2, 0.2], rtol=1e-12)
    np.testing.assert_allclose(flat(found[0.3]), 3 * flat(found[0.1]), rtol=1e-12)


def test_a_zero_gradient_gives_a_zero_update() -> None:
    params, bound = parameters(), OBJECTIVE.bind(batch(0))
    tx = llqr.streaming(0.1, damping=LAMBDA)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, objective=bound, refresh=True)
    assert not flat(updates).any()
    assert np.isfinite(flat(llqr.find(state).blocks)).all()


@pytest.mark.parametrize("structure", ["e-kfac", "kfac"])
def test_what_is_not_finite_is_not_installed(structure: str) -> None:
    params = parameters()
    tx = llqr.scale_by_llqr(structure=structure, damping=LAMBDA, refit=Streaming())
    update = jax.jit(partial(tx.update, refresh=True))
    grads = jax.grad(OBJECTIVE)(params, batch(0))
    _, state = update(grads, tx.init(params), params, objective=OBJECTIVE.bind(batch(0)))
    bad = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), grads)
    broken = batch(1) | {"x": batch(1)["x"].at[:, 0].set(jnp.inf)}
    _, after = update(bad, state, params, objective=OBJECTIVE.bind(broken))
    assert np.isfinite(flat(after.blocks)).all()
    assert np.isfinite(flat(after.stream.statistics)).all()
    assert "nonfinite" in after.refit.words
    if structure == "kfac":  # what C was last divided by, while it cannot be told
        np.testing.assert_array_equal(after.stream.top, state.stream.top)
    assert int(after.refit.guarded) > 0


def test_refusals_name_the_way_out() -> None:
    params = parameters()
    for structure in ("psd-e-kfac", "dense", "scalar", "rms_norm-e-kfac", "sep-e-kfac", "h-kfac"):
        with pytest.raises(ValueError, match="cannot be streamed"):
            llqr.scale_by_llqr(structure=structure, refit=Streaming())
    for metric in ("newton", "gauss_newton"):
        with pytest.raises(ValueError, match="labels can be drawn"):
            llqr.scale_by_llqr(metric=metric, refit=Streaming())
    for base in (optax.adam(1e-3), optax.adamw(1e-3), optax.sgd(0.1, momentum=0.9)):
        with pytest.raises(ValueError, match="the base optimizer keeps a"):
            llqr.llqr(base, structure="e-kfac", refit=Streaming()).init(params)
    llqr.llqr(optax.sgd(0.1, momentum=0.9), refit=Streaming(momentum=0.0)).init(params)
    for changes in ({"refit": Streaming()}, {"graft": "rms"}):
        with pytest.raises(ValueError, match="would swallow it"):
            llqr.llqr(optax.sgd(0.1), precondition="update", **changes)
    with pytest.raises(ValueError, match="damping"):
        llqr.scale_by_llqr(damping=0.0, refit=Streaming())
    with pytest.raises(ValueError, match="identity_scaling"):
        llqr.scale_by_llqr(identity_scaling=2.0, refit=Streaming())
    for bad in ({"every": 0}, {"momentum": 1.0}, {"rate": 1.0}, {"basis_decay": -0.1},
                {"until": 3, "start": 5}, {"probe_share": 0.0}, {"probe_share": 1.5}):  # fmt: skip
        with pytest.raises(ValueError, match="Streaming"):
            Streaming(**bad)


def test_a_step_without_a_refit_needs_no_objective_and_one_with_it_does() -> None:
    params = parameters()
    tx = llqr.streaming(0.1)
    grads = jax.grad(OBJECTIVE)(params, batch(0))
    _, state = tx.update(grads, tx.init(params), params, refresh=False)
    assert int(llqr.find(state).refit.refits) == 0
    with pytest.raises(ValueError, match="needs objective="):
        tx.update(grads, state, params)


def test_due_steps() -> None:
    options = Streaming(every=10, warmup=3, start=5, until=40)
    assert [i for i in range(60) if options.is_due(i)] == [5, 6, 7, 15, 25, 35]
    assert isinstance(options.is_due(3), bool)


def _uneven(bound: Any) -> Any:
    """The same objective, with something in its batch that has another number of rows."""
    return llqr.Objective(lambda p, b: forward(p, b[0]), lambda z, b: loss(z, b[0])).bind(
        (bound.batch, jnp.zeros(7))
    )


@pytest.mark.parametrize("reduction", ["unit", "mean", "sum"])
def test_probes_see_the_whole_batch_where_it_has_no_part_of_known_scale(reduction: Any) -> None:
    params, bound = parameters(), OBJECTIVE.bind(batch(0))
    grads = jax.grad(bound)(params)

    def spectrum(bound: Any, share: float) -> Any:
        tx = llqr.scale_by_llqr(
            structure="e-kfac", metric=METRIC, divergence_reduction=reduction,
            refit=Streaming(probe_share=share),
        )  # fmt: skip
        state = tx.init(params)
        _, state = tx.update(grads, state, params, objective=bound, refresh=True)
        return flat(state.blocks["spectrum"])

    whole = spectrum(bound, 1.0)
    if reduction == "sum":  # no part, whatever the batch
        uneven = spectrum(_uneven(bound), 0.25)
    else:
        with pytest.warns(LayoutWarning, match="7, 12 entries on their first axes"):
            uneven = spectrum(_uneven(bound), 0.25)
    np.testing.assert_array_equal(uneven, whole)
    assert np.array_equal(spectrum(bound, 0.25), whole) == (reduction == "sum")


def test_a_model_that_needs_the_whole_batch_says_how_to_give_it() -> None:
    def rigid(params: Any, batch: Any) -> Any:
        return forward(params, {"x": batch["x"].reshape(ROWS, 5)})

    params, bound = parameters(), llqr.Objective(rigid, loss).bind(batch(0))
    grads, tx = jax.grad(bound)(params), llqr.streaming(0.1, metric=METRIC)
    with pytest.warns(LayoutWarning, match=r"fails on a part \(TypeError.*probe_share=1\.0"):
        tx.update(grads, tx.init(params), params, objective=bound, refresh=True)
    told = llqr.Objective(rigid, loss, batch_axes=lambda batch: 0)
    bound = told.bind(batch(0))
    with pytest.raises(TypeError, match="reshape") as caught:
        tx.update(grads, tx.init(params), params, objective=bound, refresh=True)
    note = "".join(caught.value.__notes__)
    assert "probe_share=0.25" in note
    assert "Streaming(probe_share=1.0)" in note
    tx = llqr.streaming(0.1, metric=METRIC, refit=Streaming(probe_share=1.0))
    tx.update(grads, tx.init(params), params, objective=bound, refresh=True)


def _flops(function: Any, *args: Any) -> float:
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


@pytest.mark.parametrize(("share", "most"), [(0.25, 0.45), (1.0, 0.8)])
def test_a_step_with_a_refit_costs_one_more_pull_back(share: float, most: float) -> None:
    """On the whole batch the forward pass is shared: 3 sweeps of the network become 5, never 6."""
    widths, rows = (64, 64, 64, 10), 2048
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=s)) for s in itertools.pairwise(widths)]
    data = {"x": jnp.asarray(rng.normal(size=(rows, 64))), "y": jnp.zeros(rows, jnp.int32)}

    def deep(params: Any, batch: Any) -> Any:
        x = batch["x"]
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    objective = llqr.Objective(deep, loss)
    tx = llqr.streaming(0.1, refit=Streaming(probe_share=share))
    state = tx.init(params)

    def step(params: Any, state: Any, data: Any, due: bool) -> Any:
        grads = jax.grad(objective)(params, data)
        return tx.update(grads, state, params, objective=objective.bind(data), refresh=due)

    plain = _flops(lambda p, d: jax.grad(objective)(p, d), params, data)
    without = _flops(partial(step, due=False), params, state, data)
    with_refit = _flops(partial(step, due=True), params, state, data)
    assert with_refit - without < most * plain
    assert with_refit < 2 * plain


def test_two_kinds_of_step_compile_once_each_and_never_wait() -> None:
    tx, options = llqr.streaming(0.1), Streaming()
    params = parameters()
    state = tx.init(params)
    traces = []

    @partial(jax.jit, static_argnames="due")
    def step(params: Any, state: Any, batch: Any, due: bool) -> Any:
        traces.append(due)
        grads = jax.grad(OBJECTIVE)(params, batch)
        bound = OBJECTIVE.bind(batch)
        updates, state = tx.update(grads, state, params, objective=bound, refresh=due)
        return optax.apply_updates(params, updates), state

    batches = [batch(i) for i in range(30)]
    for i in (0, 25):
        step(params, state, batches[i], due=options.is_due(i))
    with jax.transfer_guard_device_to_host("disallow"):
        for i, data in enumerate(batches):
            params, state = step(params, state, data, due=options.is_due(i))
    assert sorted(traces) == [False, True]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_have_float32_statistics(dtype: Any) -> None:
    params = parameters(dtype)
    tx = llqr.scale_by_llqr(structure="e-kfac", refit=Streaming())
    state = tx.init(params)
    for i in range(3):
        data = batch(i, dtype)
        grads = jax.grad(OBJECTIVE)(params, data)
        updates, state = tx.update(
            grads, state, params, objective=OBJECTIVE.bind(data), refresh=True
        )
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    held = (state.stream.statistics, state.blocks)
    assert {x.dtype for x in jax.tree.leaves(held)} == {jnp.dtype(jnp.float32)}
    assert np.isfinite(flat(updates)).all()
    assert state.refit.words == ("updated",) * 3


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_batch_gives_the_numbers_of_one_device(axis: Any) -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis,))
    params, data = parameters(), batch(0)
    tx = llqr.scale_by_llqr(structure="e-kfac", metric=SIGNS, refit=Streaming())

    @jax.jit
    def step(params: Any, state: Any, data: Any) -> Any:
        grads = jax.grad(OBJECTIVE)(params, data)
        bound = OBJECTIVE.bind(data)
        return tx.update(grads, state, params, objective=bound, refresh=True)

    expected, _ = jax.block_until_ready(step(params, tx.init(params), data))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("data"))
        spread = jax.tree.map(lambda x: jax.device_put(x, rows), data)
        everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        found, _ = jax.block_until_ready(step(everywhere, tx.init(everywhere), spread))
    np.testing.assert_allclose(flat(found), flat(expected), rtol=0, atol=1e-7)


def test_long_sides_stay_the_identity() -> None:
    """A vocabulary by rule, any long side by max_dim: no statistics of its square."""
    params = {"embedding": jnp.ones((50, 4)), "kernel": jnp.ones((4, 30))}
    tx = llqr.scale_by_llqr(structure="e-kfac-gpt", max_dim=20, refit=Streaming())
    state = tx.init(params)
    assert state.stream.statistics["left"]["embedding"] is None
    assert state.stream.statistics["right"]["embedding"].shape == (4, 4)
    assert state.stream.statistics["right"]["kernel"] is None
    stored = sum(x.size for x in jax.tree.leaves(state.stream.statistics))
    # Momentum and curvature of both, squares of one, two sides.
    assert stored == 2 * 50 * 4 + 3 * 4 * 30 + 2 * 4 * 4
    objective = llqr.Objective(
        lambda p, x: p["embedding"][x] @ p["kernel"], lambda z, x: -jnp.mean(z[:, 0])
    ).bind(jnp.arange(6))
    grads = jax.grad(objective)(params)
    updates, state = tx.update(grads, state, params, objective=objective, refresh=True)
    np.testing.assert_array_equal(state.blocks["left"]["embedding"], np.ones(50))
    rms = float(jnp.sqrt(jnp.mean(updates["embedding"] ** 2)))
    assert math.isclose(rms, 0.2 * math.sqrt(19), rel_tol=1e-6)  # counts as agreeing
    plain = llqr.scale_by_llqr(
        structure="e-kfac-gpt", max_dim=20, refit=Streaming(signal_decay=None)
    )
    updates, _ = plain.update(grads, plain.init(params), params, objective=objective, refresh=True)
    assert math.isclose(float(jnp.sqrt(jnp.mean(updates["kernel"] ** 2))), 0.2, rel_tol=1e-9)


def test_steps_are_long_where_gradients_agree_and_short_where_they_swing() -> None:
    """In full agreement sqrt(19) times the length of the graft; alternating, almost nothing."""
    params, bound = parameters(), OBJECTIVE.bind(batch(0))
    tx = llqr.scale_by_llqr(structure="e-kfac", damping=LAMBDA, refit=Streaming(warmup=1))
    grads = jax.grad(bound)(params)
    step = jax.jit(partial(tx.update, refresh=False))
    found = {}
    for sign in (1, -1):
        _, state = tx.update(grads, tx.init(params), params, objective=bound, refresh=True)
        for i in range(1, 200):
            g = jax.tree.map(lambda x, s=sign**i: s * x, grads)
            updates, state = step(g, state, params)
        found[sign] = np.array([float(jnp.sqrt(jnp.mean(u**2))) for u in jax.tree.leaves(updates)])
    np.testing.assert_allclose(found[1], math.sqrt(19) * np.array([0.05, 0.2, 0.2]), rtol=1e-6)
    # |m| = 1 / (1 + mu) of |g|, so that the share is 0.1 / 1.9.
    np.testing.assert_allclose(found[-1], found[1] * 0.1 / 1.9, rtol=1e-6)


def test_refresh_from_outside_and_sam_see_the_same_p() -> None:
    params, bound = parameters(), OBJECTIVE.bind(batch(0))
    tx = llqr.streaming(0.1, damping=LAMBDA)
    grads = jax.grad(bound)(params)
    _, state = tx.update(grads, tx.init(params), params, refresh=False)
    inside, outside = (
        tx.update(grads, tx.init(params), params, objective=bound, refresh=True)[1],
        llqr.refresh(tx, state, params, bound),
    )
    np.testing.assert_allclose(
        flat(llqr.find(inside).blocks), flat(llqr.find(outside).blocks), atol=1e-13
    )
    found = llqr.precondition(tx, inside, grads)
    arrays = llqr.blocks(tx, inside, params)["first/kernel"]
    g = np.asarray(grads["first"]["kernel"])
    left, right = (np.asarray(arrays[s]) for s in ("left", "right"))
    u = left @ (np.asarray(arrays["spectrum"]) * (left.T @ g @ right)) @ right.T
    np.testing.assert_allclose(found["first"]["kernel"], u, atol=1e-12)


def test_the_momentum_stays_where_other_bases_are_installed() -> None:
    options = Streaming(nesterov=False, signal_decay=None, every=None)
    tx = llqr.scale_by_llqr(structure="e-kfac", damping=LAMBDA, refit=options, graft="none")
    params, m = parameters(), 0.0
    state = tx.init(params)
    for i in range(3):
        g = jax.grad(OBJECTIVE)(params, batch(i))
        m = 0.9 * m + np.asarray(g["first"]["kernel"])
        _, state = tx.update(g, state, params)
        state = llqr.refresh(tx, state, params, OBJECTIVE.bind(batch(i)))
    rng, shape = np.random.default_rng(0), m.shape
    turn = [np.linalg.qr(rng.normal(size=(n, n)))[0] for n in shape]
    other = dict(zip(("left", "right"), turn, strict=True)) | {"spectrum": np.ones(shape)}
    state = llqr.install(tx, state, params, {"first/kernel": other})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(updates["first"]["kernel"], 0.9 * m, atol=1e-13)


@pytest.mark.parametrize("shard", ["params", "blocks"])
def test_an_embedding_of_the_shape_of_a_kernel_is_told_from_it(shard: Any) -> None:
    """Like matrices run as one block, and an embedding has no squares beside a kernel's."""
    shapes = {"embedding": (6, 6), "kernel": (6, 6), "other": (6, 6)}
    params = {
        k: jnp.cos(jnp.arange(36.0) + i).reshape(s) for i, (k, s) in enumerate(shapes.items())
    }

    def forward(p: Any, x: Any) -> Any:
        return jnp.tanh(p["embedding"][x] @ p["kernel"]) @ p["other"]

    bound = llqr.Objective(forward, lambda z, x: -jax.nn.log_softmax(z)[:, 0].mean()).bind(
        jnp.arange(6)
    )
    tx = llqr.scale_by_llqr(structure="e-kfac", refit=Streaming(warmup=2), shard=shard)
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        grads = jax.grad(bound)(params)
        updates, state = step(grads, state, params, objective=bound)
    rms = {k: float(jnp.sqrt(jnp.mean(u**2))) for k, u in updates.items()}
    assert math.isclose(rms["embedding"], 0.2 * math.sqrt(19), rel_tol=1e-6)
    assert max(rms["kernel"], rms["other"]) < 0.9 * rms["embedding"]


def test_a_state_with_other_weights_is_refused_with_the_way_out() -> None:
    params = parameters()
    usual, without = (
        llqr.scale_by_llqr(structure="e-kfac", refit=Streaming(signal_decay=b))
        for b in (0.95, None)
    )
    with pytest.raises(ValueError, match="signal_decay=None to go on with it"):
        usual.update(params, without.init(params), params, refresh=False)
    with pytest.raises(ValueError, match=r"signal_decay=0\.95 to go on with it"):
        without.update(params, usual.init(params), params, refresh=False)


def test_squares_that_are_not_finite_are_left_out() -> None:
    """A gradient that is finite, and whose square is not, is forgotten."""
    params = {"w": jnp.ones((3, 2), jnp.float32)}
    tx = llqr.scale_by_llqr(structure="e-kfac", refit=Streaming())
    state = tx.init(params)
    for size in (1.0, 1e20, *[1.0] * 5):
        grads = {"w": jnp.full((3, 2), size, jnp.float32)}
        _, state = tx.update(grads, state, params, refresh=False)
    np.testing.assert_allclose(state.stream.statistics["squares"]["w"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("structure", ["e-kfac", "kfac", "diagonal"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_gradient_that_is_not_finite_leaves_no_trace(structure: str, nesterov: bool) -> None:
    """Its step is not finite, for whoever looks; what is remembered is that of the others."""
    params = parameters()
    options = Streaming(nesterov=nesterov, every=None)
    tx = llqr.scale_by_llqr(structure=structure, metric=METRIC, refit=options)
    step = jax.jit(tx.update)
    gradients = [jax.grad(OBJECTIVE)(params, batch(i)) for i in range(3)]
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), gradients[0])

    def after(sequence: list[Any]) -> Any:
        state, updates = tx.init(params), None
        for g in sequence:
            updates, state = step(g, state, params)
        return updates, state

    updates, _ = after([gradients[0], bad])
    assert not any(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    _, expected = after(gradients)
    updates, found = after([gradients[0], bad, *gradients[1:]])
    assert (int(expected.refit.dropped), int(found.refit.dropped)) == (0, 1)
    assert np.isfinite(flat(updates)).all()
    for slot in ("momentum", "left", "right"):
        if slot in expected.stream.statistics:
            x, y = (flat(state.stream.statistics[slot]) for state in (found, expected))
            np.testing.assert_array_equal(x, y)


def test_moments_that_are_not_finite_are_left_out() -> None:
    """A gradient whose products overflow, though it is finite itself."""
    params = {"w": jnp.ones((3, 2), jnp.float32)}
    tx = llqr.scale_by_llqr(structure="e-kfac", refit=Streaming())
    state = tx.init(params)
    for size in (1.0, 1e25, 1.0):
        grads = {"w": jnp.full((3, 2), size, jnp.float32)}
        updates, state = tx.update(grads, state, params, refresh=False)
    assert np.isfinite(flat(state.stream.statistics)).all()
    assert np.isfinite(flat(updates)).all()


def test_a_rule_says_what_is_seldom_and_how_long_steps_are() -> None:
    """By name, an "embedding" is seldom and a "bias" as long as a vector: names only begin."""
    params = {"table": jnp.ones((6, 4)), "bias": jnp.ones((4, 3)), "embedding": jnp.ones((6, 4))}
    table = [
        llqr.Rule(match="table", structure="e-kfac", seldom=True),
        llqr.Rule(match="bias", structure="e-kfac", length="matrix"),
        llqr.Rule(match="embedding", structure="e-kfac", seldom=False, length="vector"),
        ("*", "diagonal"),
    ]
    tx = llqr.scale_by_llqr(structure=table, refit=Streaming(signal_decay=0.9))
    state = tx.init(params)
    kept = state.stream.statistics["squares"]
    assert {name for name, x in kept.items() if x is None} == {"table"}
    plain = llqr.scale_by_llqr(structure=table, refit=Streaming(signal_decay=None))
    grads = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    updates, _ = plain.update(grads, plain.init(params), params, refresh=False)
    rms = {k: float(jnp.sqrt(jnp.mean(u**2))) for k, u in updates.items()}
    assert rms == pytest.approx({"table": 0.2, "bias": 0.2, "embedding": 0.05})


@pytest.mark.wrong_type
def test_a_rule_knows_two_lengths() -> None:
    with pytest.raises(ValueError, match="length"):
        llqr.Rule(match="x", structure="kfac", length="long")  # pyright: ignore


def test_a_family_of_sides_of_ones_own_streams_where_its_form_allows() -> None:
    sides = llqr.structures.Side
    dense = llqr.structures.sides.SIDES["dense"]
    llqr.structures.register_side("test-dense", dataclasses.replace(dense, cost=lambda d, r: 2 * d))
    llqr.structures.register_side("test-rigid", dataclasses.replace(dense, streams=None))
    assert isinstance(dense, sides)
    own = llqr.Structure(name="own", left="test-dense", right="dense", spectrum="full")
    params, bound = parameters(), OBJECTIVE.bind(batch(0))
    grads = jax.grad(bound)(params)
    found = []
    for structure in (own, "e-kfac"):
        tx = llqr.scale_by_llqr(structure=structure, metric=METRIC, refit=Streaming())
        updates, _ = tx.update(grads, tx.init(params), params, objective=bound, refresh=True)
        found.append(flat(updates))
    np.testing.assert_array_equal(*found)
    rigid = dataclasses.replace(own, left="test-rigid")
    with pytest.raises(ValueError, match="'own' cannot be streamed"):
        llqr.scale_by_llqr(structure=rigid, refit=Streaming())
    with pytest.raises(ValueError, match="'dense' already"):
        llqr.structures.register_side("dense", dataclasses.replace(dense, square=False))


def test_nothing_to_train_is_no_error() -> None:
    tx = llqr.streaming(0.1)
    assert tx.update({}, tx.init({}), {}, refresh=False)[0] == {}


# --- what a slip would change ---------------------------------------------------------------


def _drawn(params: Any, seed: int) -> Any:
    """Numbers in the place of a gradient."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)


def test_wide_sides_follow_every_gradient_up_to_the_end_of_the_warm_up() -> None:
    """Which is counted from `start` on; before and after it, they follow every second."""
    options = Streaming(wide=2, start=4, warmup=2, momentum=0.0)
    tx = llqr.scale_by_llqr(structure="e-kfac", refit=options)
    params = {"w": jnp.ones((3, 2))}
    state, expected = tx.init(params), 0.0
    for step in range(9):
        gradient = _drawn(params, step)
        _, state = tx.update(gradient, state, params, refresh=False)
        if step < 4 + 2 or step in (6, 8):
            g = np.asarray(gradient["w"])
            expected = 0.95 * expected + 0.05 * g @ g.T
    np.testing.assert_allclose(state.stream.statistics["left"]["w"], expected, rtol=1e-12)


@pytest.mark.parametrize("structure", ["kfac", "e-kfac"])
def test_p_multiplies_the_nesterov_momentum(structure: str) -> None:
    options = Streaming(momentum=0.8, signal_decay=None)
    tx = llqr.scale_by_llqr(structure=structure, graft="none", refit=options)
    params = {"w": jnp.ones((3, 2))}
    first, second = (_drawn(params, seed) for seed in range(2))
    _, state = tx.update(first, tx.init(params), params, refresh=False)
    updates, _ = tx.update(second, state, params, refresh=False)
    expected = second["w"] + 0.8 * (0.8 * first["w"] + second["w"])  # P is the identity
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-12)


def test_the_momentum_of_what_the_outputs_do_not_depend_on_is_the_mean_of_its_gradients() -> None:
    """Its bases stay, and so does what lies in them."""
    refit = Streaming(nesterov=False, signal_decay=None)
    tx = llqr.scale_by_llqr(structure="e-kfac", metric=METRIC, refit=refit, graft="none")
    params, m = parameters() | {"unseen": {"kernel": jnp.ones((3, 2))}}, 0.0
    state = tx.init(params)
    for step in range(3):
        gradient = _drawn(params, step)
        m = 0.9 * m + np.asarray(gradient["unseen"]["kernel"])
        updates, state = tx.update(
            gradient, state, params, objective=OBJECTIVE.bind(batch(step)), refresh=True
        )
    assert state.refit.words == ("updated",) * 3 + ("flat",)
    np.testing.assert_allclose(updates["unseen"]["kernel"], m, rtol=1e-12)


@lru_cache
def _of_a_diagonal() -> tuple[Any, Any]:
    """Two states, one refit apart: the bases are the parameters' own."""
    tx = llqr.scale_by_llqr(
        structure="diagonal", metric=METRIC, damping=LAMBDA, divergence_reduction="mean",
        refit=Streaming(spectrum_decay=0.5),
    )  # fmt: skip
    params, found = parameters(), [tx.init(parameters())]
    for step in range(2):
        _, state = tx.update(
            _drawn(params, step), found[-1], params, objective=OBJECTIVE.bind(batch(step)),
            refresh=True,
        )  # fmt: skip
        found.append(state)
    return found[1], found[2]


def test_the_record_has_the_objective_of_the_old_spectrum_and_of_the_new_one() -> None:
    before, after = _of_a_diagonal()
    c = flat(after.stream.statistics["spectrum"])
    for state, value in (
        (before, after.refit.objective_before), (after, after.refit.objective_after)
    ):  # fmt: skip
        d = flat(state.blocks["spectrum"])
        expected = np.sum(0.5 * d**2 * c * (c + LAMBDA) - d * c)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_the_record_has_the_cosines_of_the_new_spectrum() -> None:
    _, state = _of_a_diagonal()
    ms, ds = (
        list(map(np.asarray, jax.tree.leaves(tree["spectrum" if i else "momentum"])))
        for i, tree in enumerate((state.stream.statistics, state.blocks))
    )
    expected = [
        np.sum(d * m**2) / np.linalg.norm(m) / np.linalg.norm(d * m)
        for d, m in zip(ds, ms, strict=True)
    ]
    np.testing.assert_allclose(state.refit.cosines, expected, rtol=1e-6)


@pytest.mark.parametrize("graft", ["global", "block"])
def test_a_graft_measures_p_before_it_is_weighed(graft: Any) -> None:
    """Else the weight by which all entries are alike would be divided out again."""
    tx = llqr.scale_by_llqr(structure="diagonal", graft=graft, refit=Streaming(nesterov=False))
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2))}
    state, gradient, d = tx.init(params), _drawn(params, 0), _drawn(params, 1)
    d = jax.tree.map(lambda x: x * x, d)
    state = llqr.install(tx, state, params, {name: {"spectrum": x} for name, x in d.items()})
    updates, _ = tx.update(gradient, state, params, refresh=False)
    pm = jax.tree.map(lambda d, g: np.asarray(d * g), d, gradient)
    length = lambda tree: float(np.linalg.norm(flat(tree)))  # noqa: E731
    for name, u in updates.items():
        ours, g = (pm, gradient) if graft == "global" else (pm[name], gradient[name])
        # Of one gradient, a tenth is in the momentum: the share on which gradients agree.
        weight = 0.1 * math.sqrt(19) * length(g) / length(ours)
        np.testing.assert_allclose(u, weight * pm[name], rtol=1e-12)
