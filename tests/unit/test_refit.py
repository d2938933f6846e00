"""The inner problem against the formulas of the papers, written again in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr import metrics
from llqr.refit.published import learn
from llqr.refit.record import no_refit
from llqr.refit.setup import Inputs, Numbers, Setup
from llqr.structures import plan as plans
from llqr.structures import trees
from llqr.structures.rules import rule_table
from llqr.tree import freeze
from tests import oracle
from tests.cases import product

M, H, K, ROWS = 4, 5, 3, 7


def forward(params, batch):
    return jnp.tanh(batch["x"] @ params["w0"] + params["b0"]) @ params["w1"]


def loss(outputs, batch):
    targets = jax.nn.one_hot(batch["y"], K, dtype=outputs.dtype)
    return optax.softmax_cross_entropy(outputs, targets).mean()


OBJECTIVE = llqr.Objective(forward, loss)


def problem(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    params = {
        "b0": 0.3 * jax.random.normal(keys[0], (H,)),
        "w0": jax.random.normal(keys[1], (M, H)),
        "w1": jax.random.normal(keys[2], (H, K)),
    }
    batch = {"x": jax.random.normal(keys[3], (ROWS, M)), "y": jnp.arange(ROWS) % K}
    return params, OBJECTIVE.bind(batch)


def dense_model(params, bound, metric, damping):
    """g and C + lambda I in numpy, from jax.hessian and the sum of per-row Fisher matrices."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    g = jax.grad(lambda v: bound(unravel(v)))(flat)
    if metric == "newton":
        c = jax.hessian(lambda v: bound(unravel(v)))(flat)
    else:
        rows = jax.jacobian(lambda v: bound.outputs(unravel(v)))(flat)
        s = np.asarray(jax.nn.softmax(bound.outputs(params)))
        fisher = np.stack([np.diag(p) - np.outer(p, p) for p in s])
        c = np.einsum("rkn,rkl,rlm->nm", rows, fisher, rows)
    return np.asarray(g), np.asarray(c) + damping * np.eye(flat.size)


# Leaves in flattening order: b0, w0, w1. Structures in numpy: P x and its pull-back.


def np_product(kind, a, x):
    if kind == "psd-e-kfac":
        return oracle.product("e-kfac", a | {"spectrum": a["spectrum"] ** 2 + 1e-12}, x)
    return oracle.product(kind, a, x)


def np_pull_back(kind, a, x, gamma):
    if kind == "psd-e-kfac":
        r = a["spectrum"]
        out = oracle.pull_back("e-kfac", a | {"spectrum": r**2 + 1e-12}, x, gamma)
        return out | {"spectrum": 2 * r * out["spectrum"]}
    if kind == "dense":
        return {"left": np.outer(gamma, x)}
    return oracle.pull_back(kind, a, x, gamma)


def np_identity(kind, shape):
    m, n = shape
    eyes, ones = {"left": np.eye(m), "right": np.eye(n)}, {"left": np.ones(m), "right": np.ones(n)}
    return {
        "scalar": {"spectrum": np.ones(())},
        "diagonal": {"spectrum": np.ones(shape)},
        "dense": {"left": np.eye(m)},
        "diag-kfac": ones,
        "kfac": eyes,
        "e-kfac": eyes | {"spectrum": np.ones(shape)},
        "psd-e-kfac": eyes | {"spectrum": np.full(shape, np.sqrt(1 - 1e-12))},
        "sep-e-kfac": eyes | {"left_spectrum": np.ones(m), "right_spectrum": np.ones(n)},
    }[kind]


SHAPES = ((1, H), (M, H), (H, K))
"""Of b0, w0 and w1 as matrices."""


def np_blocks(structure):
    """(kind, matrix shape, start and end in the flat parameters) of every block."""
    size = H + M * H + H * K
    if structure in ("scalar", "dense"):  # the whole module as one column
        return [(structure, (size, 1), 0, size)]
    ends = [0, H, H + M * H, size]
    kinds = ["diagonal", structure, structure]
    return list(zip(kinds, SHAPES, ends[:-1], ends[1:], strict=True))


def np_refit(blocks, start, g, c, *, steps, rate, mu, clip, ema):
    """`steps` heavy-ball steps with per-array clipping, EMA, clamp of elementwise blocks."""
    part = lambda v, block: v[block[2] : block[3]].reshape(block[1])  # noqa: E731
    arrays = [dict(a) for a in start]
    traces = [{slot: np.zeros_like(x) for slot, x in a.items()} for a in start]
    hit = False

    def control():
        return np.concatenate(
            [np_product(b[0], a, part(-g, b)).ravel() for b, a in zip(blocks, arrays, strict=True)]
        )

    values = []
    for _ in range(steps):
        u = control()
        values.append(g @ u + 0.5 * u @ c @ u)
        gamma = g + c @ u
        for block, a, trace in zip(blocks, arrays, traces, strict=True):
            for slot, grad in np_pull_back(
                block[0], a, part(-g, block), part(gamma, block)
            ).items():
                norm = np.sqrt((grad**2).sum())
                if clip is not None and norm > clip:
                    grad, hit = grad * (clip / norm), True
                trace[slot] = mu * trace[slot] + grad
            for slot in a:
                a[slot] = a[slot] - rate * trace[slot]
    for block, a, before in zip(blocks, arrays, start, strict=True):
        for slot in a:
            a[slot] = ema * before[slot] + (1 - ema) * a[slot]
            if block[0] in ("scalar", "diagonal"):
                a[slot] = np.maximum(a[slot], 1e-8)
    u = control()
    return arrays, values[0], g @ u + 0.5 * u @ c @ u, hit


def prepare(structure, metric="ngd", seed=0, **options):
    params, bound = problem(seed)
    plan = plans.make_plan(params, rule_table(structure), 10_000)
    refit = llqr.Refit(**options)
    static = Setup(plan, freeze(metrics.resolve(metric)), "sum", 1.0, refit)
    return params, bound, plan, static


def run_refit(static, *inputs):
    """One refit from (blocks, info, params, objective, numbers[, base state])."""
    return learn(static, Inputs(*inputs))


def hyper(refit, damping=0.0):
    return Numbers(refit.learning_rate, refit.ema_decay, damping, refit.steps)


NUMPY = (
    "scalar", "diagonal", "dense", "diag-kfac", "kfac", "e-kfac", "sep-e-kfac", "psd-e-kfac",
)  # fmt: skip


@pytest.mark.parametrize("steps", [1, 5, 50])
@pytest.mark.parametrize("metric", ["ngd", "newton"])
@pytest.mark.parametrize("structure", NUMPY)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_two_refits_equal_numpy(structure, metric, steps, clip):
    options = {"steps": steps, "learning_rate": 5e-4, "momentum": 0.8, "clip_norm": clip}
    params, bound, plan, static = prepare(structure, metric, ema_decay=0.95, **options)
    spec, damping = np_blocks(structure), 0.2
    blocks, info = trees.identity(plan, 1.0), no_refit(len(plan))
    expected = [np_identity(kind, shape) for kind, shape, *_ in spec]
    for count in (1, 2):
        g, c = dense_model(params, bound, metric, damping)
        blocks, info = run_refit(static, blocks, info, params, bound, hyper(static.refit, damping))
        expected, before, after, clipped = np_refit(
            spec, expected, g, c, steps=steps, rate=5e-4, mu=0.8, clip=clip, ema=0.95
        )
        assert clipped == (clip is not None), "the case does not test what it says"
        for mine, theirs in zip(blocks, expected, strict=True):
            assert mine.keys() == theirs.keys()
            for slot, a in mine.items():
                np.testing.assert_allclose(a.reshape(theirs[slot].shape), theirs[slot], rtol=1e-12,
                                           atol=1e-14)  # fmt: skip
        assert int(info.refits) == count
        assert int(info.guarded) == 0
        np.testing.assert_allclose(info.objective_before, before, rtol=1e-6)  # kept in float32
        np.testing.assert_allclose(info.objective_after, after, rtol=1e-6)
        params = jax.tree.map(lambda p: 1.1 * p, params)


@pytest.mark.parametrize("structure", ["scalar", "dense", "e-kfac"])
def test_scan_and_python_loop_agree(structure):
    params, bound, plan, static = prepare(structure, steps=20)
    args = (
        trees.identity(plan, 1.0),
        no_refit(len(plan)),
        params,
        bound,
        hyper(static.refit),
    )
    python = run_refit(static, *args)
    traced = jax.jit(lambda *a: run_refit(static, *a))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), python, traced)


@pytest.mark.parametrize(
    ("structure", "metric"),
    [(name, "ngd") for name in sorted(llqr.STRUCTURES)]
    + [("e-kfac", m) for m in ("newton", "gauss_newton", "reverse_kl", "renyi", "gaussian")],
)
def test_a_refit_lowers_the_objective(structure, metric):
    params, bound, plan, static = prepare(structure, metric)
    start = trees.identity(plan, 1.0)
    blocks, info = run_refit(static, start, no_refit(len(plan)), params, bound, hyper(static.refit))
    model = llqr.linearize(bound, params, metric)
    h = jax.tree.map(jnp.negative, model.gradient)
    before, after = (model.value(product(plan, b, h)) for b in (start, blocks))
    assert after < before
    np.testing.assert_allclose(info.objective_before, before, rtol=1e-6)
    np.testing.assert_allclose(info.objective_after, after, rtol=1e-6)


def test_identity_scaling_moves_the_refit_but_not_its_start():
    params, bound, *_ = prepare("kfac")
    grads = jax.grad(bound)(params)
    moved = {}
    for scale in (1.0, 4.0):
        tx = llqr.scale_by_llqr(structure="kfac", identity_scaling=scale)
        state = tx.init(params)
        same, _ = tx.update(grads, state, params, refresh=False)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), same, grads)
        state = llqr.refresh(tx, state, params, bound)
        moved[scale], _ = tx.update(grads, state, params, refresh=False)
    assert not np.allclose(moved[1.0]["w0"], moved[4.0]["w0"], rtol=1e-3)


def test_cold_start_forgets_the_current_blocks():
    params, bound, plan, static = prepare("diagonal", warm_start=False, steps=3)
    info = no_refit(len(plan))
    wild = jax.tree.map(lambda a: 7.0 * a, trees.identity(plan, 1.0))
    cold = run_refit(static, wild, info, params, bound, hyper(static.refit))[0]
    fresh = run_refit(static, trees.identity(plan, 1.0), info, params, bound, hyper(static.refit))[
        0
    ]
    jax.tree.map(np.testing.assert_array_equal, cold, fresh)


def test_normalized_direction_is_the_unit_gradient():
    params, bound, plan, static = prepare("scalar", normalize_gradient=True, steps=1)
    info = run_refit(
        static,
        trees.identity(plan, 1.0),
        no_refit(len(plan)),
        params,
        bound,
        hyper(static.refit),
    )[1]
    g, c = dense_model(params, bound, "ngd", 0.0)
    h = -g / np.linalg.norm(g)
    np.testing.assert_allclose(info.objective_before, g @ h + 0.5 * h @ c @ h, rtol=1e-6)


def test_elementwise_clipping():
    params, bound, plan, static = prepare(
        "diagonal", steps=1, solver="sgd", clip_norm=None, clip_value=1e-3, learning_rate=1.0
    )
    start = trees.identity(plan, 1.0)
    blocks = run_refit(static, start, no_refit(len(plan)), params, bound, hyper(static.refit))[0]
    moves = np.concatenate([np.ravel(1 - b["spectrum"]) for b in blocks])
    assert np.abs(moves).max() == pytest.approx(1e-3)


def test_an_optax_transformation_as_solver_is_used_as_it_is():
    solver = optax.sgd(1e-3, momentum=0.5, nesterov=True)
    params, bound, plan, static = prepare("diagonal", steps=4, solver=solver, learning_rate=123.0,
                                        clip_norm=None)  # fmt: skip
    start = trees.identity(plan, 1.0)
    blocks = run_refit(static, start, no_refit(len(plan)), params, bound, hyper(static.refit))[0]
    g, c = dense_model(params, bound, "ngd", 0.0)
    d, state = jnp.ones(g.size), None
    for _ in range(4):
        grad = -g * (g + c @ (d * -g))
        state = solver.init(d) if state is None else state
        updates, state = solver.update(grad, state)
        d = d + updates
    mine = np.concatenate([np.ravel(b["spectrum"]) for b in blocks])
    np.testing.assert_allclose(mine, d, rtol=1e-10)


class TestGuards:
    """The old block stays, and is counted, where the new one is worse than none."""

    def learn(self, structure="diagonal", start=None, hyper_=None, **options):
        params, bound, plan, static = prepare(structure, **options)
        old = trees.identity(plan, 1.0) if start is None else start(plan)
        hyper_ = hyper(static.refit) if hyper_ is None else hyper_
        return old, *run_refit(static, old, no_refit(len(plan)), params, bound, hyper_)

    def test_nothing_that_is_not_finite_is_installed(self):
        old, new, info = self.learn("kfac", learning_rate=1e200, clip_norm=None, steps=3)
        jax.tree.map(np.testing.assert_array_equal, old, new)
        assert int(info.count("nonfinite")) == 3
        assert int(info.guarded) == 3

    def test_a_block_that_turns_the_gradient(self):
        """One huge step makes the scalar of w1's module negative; inversion is not allowed."""
        old, new, info = self.learn(
            [("w1", "kfac"), ("*", "diagonal")], learning_rate=0.0 + 1e-12, steps=1,
            start=lambda plan: ({"spectrum": jnp.ones(H)}, {"spectrum": jnp.ones((M, H))},
                                {"left": -jnp.eye(H), "right": jnp.eye(K)}),
        )  # fmt: skip
        assert int(info.count("inverted")) == 1
        np.testing.assert_array_equal(new[2]["left"], old[2]["left"])

    def test_allow_grad_inversion_lifts_clamp_and_guard(self):
        start = lambda plan: jax.tree.map(lambda a: -0.01 * a, trees.identity(plan, 1.0))  # noqa: E731
        _, clamped, _ = self.learn(start=start, learning_rate=1e-9, steps=1)
        assert min(float(b["spectrum"].min()) for b in clamped) == 1e-8
        _, free, info = self.learn(
            start=start, learning_rate=1e-9, steps=1, allow_grad_inversion=True
        )
        assert max(float(b["spectrum"].max()) for b in free) < 0
        assert int(info.count("inverted")) == 0

    def test_an_objective_that_did_not_decrease(self):
        old, new, info = self.learn(learning_rate=1e3, clip_norm=None, steps=1, solver="sgd",
                                    allow_grad_inversion=True)  # fmt: skip
        assert info.objective_after > info.objective_before
        assert int(info.count("rejected")) == 3
        jax.tree.map(np.testing.assert_array_equal, old, new)

    def test_a_zero_gradient_installs_nothing_and_breaks_nothing(self):
        params, _, plan, static = prepare("e-kfac")
        flat = llqr.Objective(lambda p, b: 0.0 * forward(p, b), loss).bind(problem()[1].batch)
        old = trees.identity(plan, 1.0)
        new, info = run_refit(static, old, no_refit(len(plan)), params, flat, hyper(static.refit))
        jax.tree.map(np.testing.assert_array_equal, old, new)
        assert int(info.count("inverted")) == 0

    def test_nan_in_the_batch_keeps_every_block(self):
        params, bound, plan, static = prepare("kfac")
        batch = {**bound.batch, "x": bound.batch["x"].at[0, 0].set(jnp.nan)}
        old = trees.identity(plan, 1.0)
        new, info = run_refit(
            static,
            old,
            no_refit(len(plan)),
            params,
            OBJECTIVE.bind(batch),
            hyper(static.refit),
        )
        jax.tree.map(np.testing.assert_array_equal, old, new)
        assert int(info.count("nonfinite")) == 3


def test_refits_compile_once():
    traces = []

    def counted(params, batch):
        traces.append(None)
        return forward(params, batch)

    objective = llqr.Objective(counted, loss)
    params, bound = problem()
    tx = llqr.llqr(optax.sgd(0.1), structure="e-kfac")
    state = llqr.refresh(tx, tx.init(params), params, objective.bind(bound.batch))
    first = len(traces)
    for seed in (1, 2):
        params, bound = problem(seed)
        state = llqr.refresh(tx, state, params, objective.bind(bound.batch))
    assert first > 0
    assert len(traces) == first
    assert int(llqr.find(state).refit.refits) == 3


def test_schedules_of_the_count():
    """Rate and decay follow schedules: the same as numbers equal to their values then."""
    params, bound = problem()
    scheduled = llqr.scale_by_llqr(refit=llqr.Refit(
        learning_rate=lambda t: 1e-3 * (1.0 + t.astype(float)),
        ema_decay=lambda t: 0.1 * t.astype(float),
    ))  # fmt: skip
    fixed = llqr.scale_by_llqr(refit=llqr.Refit(learning_rate=3e-3, ema_decay=0.2))
    states = []
    for tx in (scheduled, fixed):
        state = tx.init(params)._replace(count=jnp.asarray(2, jnp.int32))
        states.append(llqr.refresh(tx, state, params, bound))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps must be >= 1, got 0"),
        ({"ema_decay": 1.5}, r"ema_decay must lie in \[0, 1\], got 1.5"),
        ({"ema_decay": -0.1}, r"ema_decay must lie in \[0, 1\], got -0.1"),
        ({"learning_rate": 0.0}, r"learning_rate must lie in \(0, inf\), got 0.0"),
        ({"every": 0}, r"every must be >= 1, got 0"),
        ({"momentum": 2.0}, r"momentum must lie in \[0, 1\], got 2.0"),
        ({"clip_norm": -1.0}, r"clip_norm must lie in \(0, inf\), got -1.0"),
        ({"solver": "momentm"}, r"unknown solver 'momentm': did you mean 'momentum'"),
        ({"solver": 3}, r"unknown solver 3"),
        ({"steps": 2.0}, r"steps must be a Python int, got 2.0"),
        ({"steps": True}, r"steps must be a Python int, got True"),
        ({"every": 1.5}, r"every must be a Python int, got 1.5"),
        ({"learning_rate": "fast"}, r"learning_rate must be a number, got 'fast'"),
        ({"start": 5, "until": 4}, r"until=4 lies before start=5"),
        ({"probe": "gausian"}, r"unknown probe 'gausian': did you mean 'gaussian'"),
        ({"probes": 2}, r"one fixed direction: probes must be 1, not 2"),
        ({"probe": "gaussian", "per_example": True}, r"per_example learns on each example"),
        ({"probe": "fisher", "normalize_gradient": True}, r"normalize_gradient has no effect"),
        ({"fresh_batches": True, "solver": "cg"}, r"'cg' needs one objective for all steps"),
        ({"fresh_batches": True, "tolerance": 0.1}, r"tolerance must be 0"),
        ({"probe": "fisher", "tolerance": 0.1}, r"tolerance must be 0"),
        ({"solver": "cg", "anneal": True}, r"anneal has no effect"),
        ({"learning_rate": jnp.ones(())}, r"learning_rate must be a Python number, or a schedule"),
    ],
)
def test_bad_options_say_what_is_legal(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        llqr.Refit(**options)
