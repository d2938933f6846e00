"""Every option of a refit has its effect: against numpy, or against what it must equal."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from llqr import solvers
from llqr.refit.directions import directions
from llqr.refit.learner import WHOLE
from llqr.refit.published import Linearized, phi_at
from llqr.refit.record import no_refit
from llqr.refit.setup import Inputs, Numbers, Setup, numbers_at
from llqr.structures import plan as plans
from llqr.structures import trees
from llqr.structures.rules import rule_table
from llqr.tree import freeze, vdot
from tests.cases import product
from tests.oracle import flat
from tests.unit.test_refit import (
    OBJECTIVE,
    ROWS,
    dense_model,
    forward,
    loss,
    problem,
    run_refit,
)


def make(structure: Any = "diagonal", metric: Any = "ngd", route: Any = None, **options: Any):
    """Return (plan, problem) for the parameters of `problem`."""
    reduction = options.pop("reduction", "sum")
    base = options.pop("base", None)
    plan = plans.make_plan(problem()[0], rule_table(structure), 10_000)
    static = Setup(
        plan, freeze(llqr.metrics.resolve(metric)), reduction, 1.0, llqr.Refit(**options),
        route or WHOLE, base,
    )  # fmt: skip
    static.check()
    return plan, static


def learn(plan, static, bound=None, blocks=None, damping=0.2, base_state=()):
    params, own = problem()
    blocks = trees.identity(plan, 1.0) if blocks is None else blocks
    hyper = numbers_at(static.refit, jnp.zeros((), jnp.int32), damping)
    return run_refit(static, blocks, no_refit(len(plan)), params, bound or own, hyper, base_state)


# --- solvers --------------------------------------------------------------------------------


def test_cg_solves_the_linear_inner_problem() -> None:
    """Diagonal P: Phi(d) = g.(d * h) + 1/2 (d * h).A (d * h); 40 numbers, badly conditioned."""
    plan, static = make(solver="cg", steps=300, allow_grad_inversion=True)
    blocks, info = learn(plan, static)
    params, bound = problem()
    g, a = dense_model(params, bound, "ngd", 0.2)
    d = np.linalg.solve(np.diag(g) @ a @ np.diag(g), g * g)
    np.testing.assert_allclose(flat(blocks), d, rtol=1e-6)
    np.testing.assert_allclose(info.objective_after, -g @ np.linalg.solve(a, g) / 2, rtol=1e-6)


def test_cg_is_numpy_conjugate_gradients() -> None:
    plan, static = make(solver="cg", steps=4, allow_grad_inversion=True)
    blocks, info = learn(plan, static)
    params, bound = problem()
    g, a = dense_model(params, bound, "ngd", 0.2)
    hessian, d = np.diag(g) @ a @ np.diag(g), np.ones(g.size)
    start = g @ (-g * d) + 0.5 * (g * d) @ a @ (g * d)
    r = -(hessian @ d - g * g)
    p = r
    for _ in range(4):
        alpha = r @ r / (p @ hessian @ p)
        d, new = d + alpha * p, r - alpha * hessian @ p
        p, r = new + (new @ new) / (r @ r) * p, new
    np.testing.assert_allclose(flat(blocks), d, rtol=1e-9)
    np.testing.assert_allclose(info.objective_before, start, rtol=1e-6)


def test_cg_stays_where_the_curvature_is_negative() -> None:
    plan, static = make(metric="newton", solver="cg", steps=60, allow_grad_inversion=True)
    blocks, info = learn(plan, static, damping=0.0)
    assert np.isfinite(flat(blocks)).all()
    assert np.isfinite(float(info.objective_after))


def test_cg_needs_a_linear_structure() -> None:
    for structure in ("e-kfac", "kfac", "psd-e-kfac", "low-rank-memory"):
        tx = llqr.scale_by_llqr(structure=structure, refit=llqr.Refit(solver="cg"))
        with pytest.raises(ValueError, match="needs structures that are linear in their arrays"):
            tx.init(problem()[0])
    for structure in ("scalar", "dense", "diagonal"):
        make(structure, solver="cg")


class Quadratic:
    """1/2 x.A x - b.x in the interface of the inner objective."""

    def __init__(self, a: np.ndarray, b: np.ndarray):
        self.a, self.b = jnp.asarray(a), jnp.asarray(b)

    def value_and_gradient(self, x):
        return 0.5 * x @ self.a @ x - self.b @ x, self.a @ x - self.b

    def product(self, d):
        return self.a @ d

    def along(self, x, d, t):
        y = x + t * d
        return self.value_and_gradient(y)[0], d @ (self.a @ y - self.b), d @ self.a @ d


@pytest.mark.parametrize("name", ["cg", "cg_zoom_hz", "cg_back_pr+"])
def test_conjugate_gradients_end_in_as_many_steps_as_there_are_dimensions(name: str) -> None:
    """On a quadratic, all of them are the one method: steepest descent would still be far."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    phi = Quadratic(q @ np.diag([1.0, 3.0, 10.0, 30.0, 100.0, 300.0]) @ q.T, rng.normal(size=6))
    solver = solvers.make(name, (), momentum=0.9, clip_norm=None, clip_value=None)
    x = jnp.zeros(6)
    state = solver.init(x, phi.value_and_gradient(x))
    for _ in range(6):
        x, state, _ = solver.step(phi, x, state, 1.0)
    np.testing.assert_allclose(x, np.linalg.solve(phi.a, phi.b), rtol=1e-7)


@pytest.mark.parametrize("structure", ["e-kfac", "psd-e-kfac"])
@pytest.mark.parametrize("name", ["cg_zoom_hz", "cg_back_pr+"])
def test_nonlinear_cg_on_structures(name: str, structure: str) -> None:
    """It beats the best of three rates of gradient descent in as many steps."""
    after = []
    for options in (
        {"solver": name},
        *({"solver": "sgd", "learning_rate": r} for r in (1e-3, 1e-2, 1e-1)),
    ):
        plan, static = make(structure, steps=8, clip_norm=None, **options)
        _, info = learn(plan, static)
        after.append(float(info.objective_after) if int(info.guarded) == 0 else 0.0)
    assert after[0] < min(after[1:])


def test_adam_and_relative_by_name() -> None:
    with jax.numpy_dtype_promotion("standard"):
        for name, same in (
            ("adam", optax.adam(1e-2)),
            ("relative", optax.chain(solvers.scale_by_relative(), optax.scale(-1e-2))),
        ):
            options = {"steps": 3, "clip_norm": None}
            named, _ = learn(*make("kfac", solver=name, learning_rate=1e-2, **options))
            given, _ = learn(*make("kfac", solver=same, **options))
            np.testing.assert_allclose(flat(named), flat(given), rtol=1e-12)


def test_relative_steps() -> None:
    rng = np.random.default_rng(0)
    s, g = np.eye(4) + 0.3 * rng.normal(size=(4, 4)), rng.normal(size=(4, 4))

    def run(slot: str, s: np.ndarray, g: np.ndarray) -> np.ndarray:
        tx = solvers.scale_by_relative()
        return np.asarray(
            tx.update(({slot: jnp.asarray(g)},), (), ({slot: jnp.asarray(s)},))[0][0][slot]
        )

    step = s @ g if np.sum(s @ g * g) > 0 else g
    np.testing.assert_allclose(
        run("left", s, g), np.linalg.norm(s) / 2 * step / np.linalg.norm(step), rtol=1e-12
    )
    uphill = run("right", -np.eye(4), g)  # S G would climb
    assert np.sum(uphill * g) > 0
    np.testing.assert_allclose(run("left", 7 * s, g), 7 * run("left", s, g))
    # A square spectrum is no matrix: entry by entry, downhill, and none crosses zero.
    d = rng.normal(size=(4, 4)) * np.array([1e-3, 1.0, 10.0, 100.0])
    found = run("spectrum", d, g)
    assert (np.abs(found) <= np.abs(d)).all()
    assert (found * g > 0).all()
    for slot in ("left", "spectrum"):
        np.testing.assert_allclose(run(slot, s, 5 * g), run(slot, s, g))
        np.testing.assert_array_equal(run(slot, s, 0 * g), 0)


def test_probe_refits_freeze_nothing() -> None:
    """Stiff entries shrink from sigma towards their place, and never stick at the clamp."""
    params, bound = problem()
    refit = llqr.Refit(probe="fisher", probes=2, solver="relative", learning_rate=0.1, steps=50,
                       anneal=True, clip_norm=None)  # fmt: skip
    tx = llqr.scale_by_llqr(structure="kfac", damping=1e-3, divergence_reduction="unit",
                            identity_scaling=100.0, graft="global", refit=refit)  # fmt: skip
    state = tx.init(params)
    for _ in range(4):
        state = llqr.refresh(tx, state, params, bound)
        assert float(state.blocks["spectrum"]["b0"].min()) > 1e-3


def test_momentum_is_its_own() -> None:
    few = {"steps": 3, "clip_norm": None}
    none, _ = learn(*make(momentum=0.0, **few))
    sgd, _ = learn(*make(solver="sgd", **few))
    heavy, _ = learn(*make(momentum=0.9, **few))
    np.testing.assert_array_equal(flat(none), flat(sgd))
    assert np.abs(flat(heavy) - 1).sum() > 1.5 * np.abs(flat(none) - 1).sum()


@pytest.mark.parametrize("traced", [False, True])
def test_early_stop(traced: bool) -> None:
    """Off by default; with a tolerance, the refit ends once the objective stands still."""
    params, bound = problem()

    def steps(tolerance: float) -> int:
        refit = llqr.Refit(steps=200, solver="cg", tolerance=tolerance, allow_grad_inversion=True)
        tx = llqr.scale_by_llqr(damping=0.2, refit=refit)
        again = lambda state: llqr.refresh(tx, state, params, bound)  # noqa: E731
        state = (jax.jit(again) if traced else again)(tx.init(params))
        return int(state.refit.steps)

    assert steps(0.0) == 200
    assert 2 < steps(1e-2) < steps(1e-6) < 100


# --- directions --------------------------------------------------------------------------------


def test_per_example_is_the_mean_of_one_problem_each() -> None:
    """batch_solve_precond=false, in numpy: one diagonal step on the mean of the P-gradients."""
    plan, static = make(steps=1, learning_rate=1e-3, clip_norm=None, per_example=True)
    blocks, info = learn(plan, static)
    params, bound = problem()
    total, value = 0.0, 0.0
    for i in range(ROWS):
        one = OBJECTIVE.bind(jax.tree.map(lambda x, i=i: x[i : i + 1], bound.batch))
        g, a = dense_model(params, one, "ngd", 0.2)
        total = total + -g * (g + a @ -g) / ROWS
        value += (-g @ g + 0.5 * g @ a @ g) / ROWS
    np.testing.assert_allclose(flat(blocks), 1 - 1e-3 * total, rtol=1e-12)
    np.testing.assert_allclose(info.objective_before, value, rtol=1e-6)


def test_fresh_batches_take_one_batch_for_each_step() -> None:
    """multibatch_training=true, in numpy."""
    params, _ = problem()
    batches = [problem(seed)[1].batch for seed in (3, 4, 5)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    plan, static = make(
        steps=3, learning_rate=1e-3, clip_norm=None, solver="sgd", fresh_batches=True
    )
    blocks, info = learn(plan, static, OBJECTIVE.bind(stacked))
    d = np.ones(flat(params).size)
    for batch in batches:
        g, a = dense_model(params, OBJECTIVE.bind(batch), "ngd", 0.2)
        d = d - 1e-3 * (-g) * (g + a @ (-g * d))
    np.testing.assert_allclose(flat(blocks), d, rtol=1e-12)
    after = g @ (-g * d) + 0.5 * (g * d) @ a @ (g * d)  # judged on the last batch
    np.testing.assert_allclose(info.objective_after, after, rtol=1e-6)


def test_probes_have_the_mean_that_they_should() -> None:
    """Gaussian: E h h^T = I. Fisher: C, and a tenth of the damping. Minibatch: the mean is -g."""
    params, bound = problem()
    g, c = dense_model(params, bound, "ngd", 0.0)
    model = llqr.linearize(bound, params, damping=0.2)

    def draws(probe: str) -> np.ndarray:
        _, static = make(probe=probe, probes=4000)
        numbers = Numbers(1.0, 0.0, 0.0, 1)
        inputs = Inputs((), no_refit(0), params, bound, numbers)
        h, linear = jax.jit(lambda key: directions(static, inputs, model, bound, key, 4000))(
            jax.random.key(0)
        )
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, -b), h, linear)
        return np.asarray(jax.vmap(lambda t: ravel_pytree(t)[0])(h))

    h = draws("gaussian")
    np.testing.assert_allclose(h.T @ h / len(h), np.eye(g.size), atol=0.1)
    h = draws("fisher")
    expected = c + 0.02 * np.eye(g.size)
    np.testing.assert_allclose(h.T @ h / len(h), expected, atol=0.1 * np.abs(expected).max())
    h = draws("minibatch")
    np.testing.assert_allclose(h.mean(axis=0), -g, atol=0.1 * np.abs(g).max())


@pytest.mark.parametrize("probe", ["gaussian", "fisher"])
def test_probes_tend_to_the_inverse(probe: str) -> None:
    """A dense P learned on random directions is (C + lambda I)^-1, seen from everywhere."""
    _, a = dense_model(*problem(), "ngd", 1.0)
    schedule = optax.cosine_decay_schedule(0.1, 1500)
    with jax.numpy_dtype_promotion("standard"):
        plan, static = make("dense", probe=probe, probes=16, steps=1500, clip_norm=None,
                            solver=optax.adam(schedule), allow_grad_inversion=True)  # fmt: skip
        params, own = problem()
        hyper = Numbers(1.0, 0.0, 1.0, 1)
        start = trees.identity(plan, 1.0), no_refit(1)
        run = jax.jit(lambda p: run_refit(static, *start, p, own, hyper))
        blocks, info = run(params)
    found, inverse = np.asarray(blocks[0]["left"]), np.linalg.inv(a)
    assert np.linalg.norm(found - inverse) < 0.15 * np.linalg.norm(inverse)
    assert int(info.guarded) == 0


def test_probes_are_drawn_afresh_at_every_step_and_refit_from_the_seed() -> None:
    params, bound = problem()

    def run(seed: int, refits: int = 1) -> np.ndarray:
        refit = llqr.Refit(probe="gaussian", probes=2, steps=2, seed=seed)
        tx = llqr.scale_by_llqr(damping=0.2, refit=refit)
        state = tx.init(params)
        for _ in range(refits):
            state = llqr.refresh(tx, state, params, bound)
        return flat(state.blocks)

    np.testing.assert_array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))
    _, static = make(probe="gaussian", probes=1)
    model = llqr.linearize(bound, params)
    inputs = Inputs((), no_refit(0), params, bound, Numbers(1.0, 0.0, 0.0, 1))
    fixed = Linearized((), jax.random.key(0), model, inputs)
    first, second = (flat(phi_at(static, fixed, jnp.asarray(i)).directions.h) for i in (0, 1))
    assert not np.array_equal(first, second)


def test_fisher_probes_need_a_metric_that_can_be_sampled() -> None:
    with pytest.raises(ValueError, match="needs a metric from which labels can be drawn"):
        llqr.scale_by_llqr(metric="newton", refit=llqr.Refit(probe="fisher"))


def test_one_batch_for_each_step_or_an_error() -> None:
    params, bound = problem()
    tx = llqr.scale_by_llqr(refit=llqr.Refit(fresh_batches=True, steps=3))
    two = OBJECTIVE.bind(jax.tree.map(lambda x: jnp.stack([x, x]), bound.batch))
    for wrong in (two, bound):
        with pytest.raises(ValueError, match="one batch for each of the 3 inner steps"):
            llqr.refresh(tx, tx.init(params), params, wrong)


def test_a_single_row_of_classes_is_one_row() -> None:
    """The covariance of a draw is the Hessian of the mean."""
    z = jnp.array([[0.3, -1.0, 0.5, 0.1]])
    metric = llqr.metrics.resolve("ngd")
    draw = lambda key: llqr.metrics.sample(metric, key, z, None, "mean")  # noqa: E731
    c = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 20_000)))[:, 0]
    s = np.asarray(jax.nn.softmax(z[0]))
    np.testing.assert_allclose(c.T @ c / len(c), np.diag(s) - np.outer(s, s), atol=0.02)


def test_a_bfloat16_loss_does_not_reject_the_refit() -> None:
    params, bound = problem()
    rounded = llqr.Objective(forward, lambda z, b: loss(z, b).astype(jnp.bfloat16))
    with jax.numpy_dtype_promotion("standard"):
        tx = llqr.scale_by_llqr(damping=0.2, refit=llqr.Refit(steps=1))
        state = llqr.refresh(tx, tx.init(params), params, rounded.bind(bound.batch))
    assert int(state.refit.count("updated")) == 3


# --- what is preconditioned -----------------------------------------------------------------


def test_on_update_learns_on_the_update_and_descends() -> None:
    """precond_on_update: u = P (update), h is a descent step: in numpy, after one inner step."""
    params, bound = problem()
    base = optax.sgd(0.5, momentum=0.9)
    refit = llqr.Refit(steps=1, learning_rate=1e-2, clip_norm=None)
    tx = llqr.llqr(base, precondition="update", damping=0.2, refit=refit)
    grads = jax.grad(bound)(params)
    state = tx.init(params)
    _, state = tx.update(grads, state, params, refresh=False)  # the momentum is not zero any more
    state = llqr.refresh(tx, state, params, bound)
    g, a = dense_model(params, bound, "ngd", 0.2)
    h = -0.5 * (g + 0.9 * g)
    d = 1 - 1e-2 * h * (g + a @ h)
    np.testing.assert_allclose(flat(state.preconditioner.blocks), d, rtol=1e-12)
    assert g @ (d * h) < 0, "P h descends"
    after = g @ (d * h) + 0.5 * (d * h) @ a @ (d * h)
    np.testing.assert_allclose(state.preconditioner.refit.objective_after, after, rtol=1e-6)
    updates, _ = tx.update(grads, state, params, refresh=False)
    np.testing.assert_allclose(flat(updates), d * h, rtol=1e-12)


@pytest.mark.parametrize("graft", ["none", "global", "block"])
def test_graft_keeps_lengths(graft: Any) -> None:
    params, bound = problem()
    refit = llqr.Refit(steps=20, learning_rate=0.1, clip_norm=None, solver="relative")
    tx = llqr.scale_by_llqr(structure="kfac", damping=0.2, graft=graft, refit=refit)
    state = llqr.refresh(tx, tx.init(params), params, bound)
    grads = jax.grad(bound)(params)
    updates, _ = tx.update(grads, state, params, refresh=False)
    plain = product(*_plan_and_blocks(tx, state, params), grads)
    length = lambda t: float(jnp.sqrt(vdot(t, t)))  # noqa: E731
    np.testing.assert_allclose(vdot(updates, plain) / length(updates) / length(plain), 1,
                               rtol=1e-12 if graft != "block" else 0.5)  # fmt: skip
    whole = abs(length(updates) / length(grads) - 1) < 1e-12
    blocks = all(abs(length(updates[k]) / length(grads[k]) - 1) < 1e-12 for k in grads)
    assert (whole, blocks) == {
        "none": (False, False),
        "global": (True, False),
        "block": (True, True),
    }[graft]
    zero, _ = tx.update(jax.tree.map(jnp.zeros_like, grads), state, params, refresh=False)
    assert not flat(zero).any()


def _plan_and_blocks(tx: Any, state: Any, params: Any) -> Any:
    from llqr.state import visited

    plan = visited(tx, params)[0].plan
    return plan, trees.unpack(plan, state.blocks, params)


def test_unit_reduction_makes_damping_relative() -> None:
    """Scaling the loss' metric, or the number of rows, changes nothing that is learned."""
    params, bound = problem()
    twice = OBJECTIVE.bind(jax.tree.map(lambda x: jnp.concatenate([x, x]), bound.batch))
    for reduction, same in (("unit", True), ("sum", False)):
        plan, static = make("kfac", reduction=reduction, steps=5, learning_rate=1e-2)
        one, two = (learn(plan, static, b)[0] for b in (bound, twice))
        assert np.allclose(flat(one), flat(two), rtol=1e-9) == same
    model = llqr.linearize(bound, params, "renyi_half", divergence_reduction="unit")
    other = llqr.linearize(bound, params, "ngd", divergence_reduction="unit")
    np.testing.assert_allclose(flat(model.product(params)), flat(other.product(params)), rtol=1e-9)
    c = np.asarray(jax.vmap(lambda e: ravel_pytree(other.product(ravel_pytree(params)[1](e)))[0])(
        jnp.eye(flat(params).size)))  # fmt: skip
    top = np.linalg.eigvalsh(c).max()
    assert 0.99 < top < 1.5  # a few power iterations estimate it from below


def test_ema_one_installs_nothing_new_and_says_so() -> None:
    plan, static = make(ema_decay=1.0, steps=2)
    blocks, info = learn(plan, static)
    np.testing.assert_array_equal(flat(blocks), 1)
    assert int(info.count("kept")) == len(plan)
    assert int(info.guarded) == 0


def test_memories_are_left_out_of_the_average() -> None:
    averaged = []
    for decay in (0.0, 0.5):
        plan, static = make("asym_swm_kfac", ema_decay=decay, steps=40, solver="relative",
                            learning_rate=0.05)  # fmt: skip
        blocks, info = learn(plan, static)
        assert int(info.count("updated")) == len(plan)
        averaged.append(flat(blocks))
    np.testing.assert_array_equal(*averaged)


def test_forward_with_infinity_is_refused_before_the_clamp_hides_it() -> None:
    """-inf would be clamped to 1e-8."""
    plan, static = make(solver=optax.scale(-jnp.inf), steps=1, clip_norm=None)
    blocks, info = learn(plan, static)
    np.testing.assert_array_equal(flat(blocks), 1)
    assert int(info.count("nonfinite")) == len(plan)


@pytest.mark.parametrize(
    "structure",
    ["diagonal", "kfac", "psd-e-kfac", "rms_norm-e-kfac", "h-kfac", "sym_swm_kfac"],
)
def test_singular_curvature_and_zero_gradients_and_indefinite_newton(structure: str) -> None:
    """Nothing that is not finite is installed, whatever the structure."""
    _, bound = problem()
    flat_loss = llqr.Objective(forward, lambda z, b: 0.0 * loss(z, b)).bind(bound.batch)
    for metric, objective in (("newton", bound), ("gauss_newton", flat_loss), ("ngd", bound)):
        options = {"steps": 3, "learning_rate": 1e4, "clip_norm": None}
        plan, static = make(structure, metric, **options)
        blocks, info = learn(plan, static, objective, damping=0.0)
        assert np.isfinite(flat(blocks)).all()
        assert int(jnp.sum(info.status == 0)) == 0


# --- the report --------------------------------------------------------------------------------


def test_inspect_measures_every_block() -> None:
    params, bound = problem()
    tx = llqr.llqr(optax.sgd(0.1), structure="e-kfac", damping=0.2,
                   refit=llqr.Refit(steps=20, learning_rate=0.02))  # fmt: skip
    state = llqr.refresh(tx, tx.init(params), params, bound)
    report = llqr.inspect(tx, state, params, asymmetry=True)
    assert [b.leaf for b in report.blocks] == ["b0", "w0", "w1"]
    assert {b.status for b in report.blocks} == {"updated"}
    assert "updated" in str(report)
    grads = jax.grad(bound)(params)
    scaled, _ = tx.update(grads, state, params, refresh=False)
    blocks = state.preconditioner.blocks
    for b in report.blocks:
        mine = [np.asarray(tree[b.leaf]) for tree in blocks.values() if tree[b.leaf] is not None]
        everything = np.concatenate([x.ravel() for x in mine])
        np.testing.assert_allclose(b.minimum, everything.min(), rtol=1e-6)
        np.testing.assert_allclose(b.maximum, everything.max(), rtol=1e-6)
        np.testing.assert_allclose(b.norm, np.linalg.norm(everything), rtol=1e-6)
        p, g = -np.asarray(scaled[b.leaf]).ravel(), np.asarray(grads[b.leaf]).ravel()
        cosine = p @ g / np.linalg.norm(p) / np.linalg.norm(g)
        np.testing.assert_allclose(b.cosine, cosine, rtol=1e-5)
    a = np.asarray(blocks["left"]["w0"])
    frobenius, spectral = report.blocks[1].skew["left"]
    np.testing.assert_allclose(
        frobenius, np.linalg.norm(a - a.T) / np.linalg.norm(a + a.T), rtol=1e-6
    )
    exact = np.linalg.norm(a - a.T, 2) / np.linalg.norm(a, 2)
    np.testing.assert_allclose(spectral, exact, rtol=0.05)
    # The spectrum [4, 5] is not square: it has no asymmetry, and raises nothing.
    assert set(report.blocks[1].skew) == {"left", "right"}
    assert report.blocks[0].skew == {}


# --- what a slip would change ---------------------------------------------------------------


def test_fisher_probes_are_in_units_of_the_largest_eigenvalue() -> None:
    """C / top = I, so that Phi of the identity is -|h|^2 / 2, and h has a hundred entries."""
    bound = llqr.Objective(lambda w, x: 50 * w * x, lambda z, x: jnp.sum(z)).bind(jnp.ones(100))
    refit = llqr.Refit(probe="fisher", steps=1)
    tx = llqr.scale_by_llqr(metric="gaussian", divergence_reduction="unit", refit=refit)
    info = llqr.refresh(tx, tx.init(jnp.ones(100)), jnp.ones(100), bound).refit
    np.testing.assert_allclose(info.objective_before, -100 / 2, rtol=0.2)


def test_probes_teach_p_where_the_gradient_is_zero() -> None:
    """Nothing there is turned uphill."""
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    bound = llqr.Objective(
        lambda p, x: {k: x * v for k, v in p.items()}, lambda z, x: jnp.sum(z["a"])
    ).bind(jnp.ones(4))
    refit = llqr.Refit(probe="gaussian", steps=2, learning_rate=0.05)
    metric = {"a": "gaussian", "b": "gaussian"}
    tx = llqr.scale_by_llqr(metric=metric, damping=1.0, refit=refit)
    state = llqr.refresh(tx, tx.init(params), params, bound)
    assert state.refit.words == ("updated", "updated")
    assert np.all(np.asarray(state.blocks["spectrum"]["b"]) < 1)


def test_a_refit_is_judged_against_the_p_that_it_began_with() -> None:
    """Of a memory too, whose first step begins with fresh vectors already."""
    params, bound = problem()
    tx = llqr.scale_by_llqr(
        structure="low-rank-memory", damping=0.2, refit=llqr.Refit(steps=1, learning_rate=1e-3)
    )
    info = llqr.refresh(tx, tx.init(params), params, bound).refit
    model = llqr.linearize(bound, params, damping=0.2)
    plain = jax.tree.map(jnp.negative, model.gradient)
    np.testing.assert_allclose(info.objective_before, model.value(plain), rtol=1e-6)


def test_the_objective_in_the_record_is_in_units_of_the_largest_eigenvalue() -> None:
    """Before the refit and after it, of what is installed."""
    params, bound = problem()
    options = {"damping": 0.2, "divergence_reduction": "unit"}
    tx = llqr.scale_by_llqr(**options, refit=llqr.Refit(steps=3, learning_rate=0.05))
    state = llqr.refresh(tx, tx.init(params), params, bound)
    model = llqr.linearize(bound, params, **options)
    plain = jax.tree.map(jnp.negative, model.gradient)
    found = state.refit.objective_before, state.refit.objective_after
    for value, u in zip(found, (plain, llqr.precondition(tx, state, plain)), strict=True):
        np.testing.assert_allclose(value, model.value(u), rtol=1e-6)
    assert float(found[1]) < float(found[0])


def test_fresh_batches_share_the_largest_eigenvalue_of_the_first() -> None:
    """Else the objective would have another scale at each step."""
    params, first = problem()
    _, last = problem(5)
    scaled = last.batch | {"x": 3 * last.batch["x"]}
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), first.batch, scaled)
    refit = llqr.Refit(steps=2, fresh_batches=True, learning_rate=1e-6)
    tx = llqr.scale_by_llqr(damping=0.2, divergence_reduction="unit", refit=refit)
    info = llqr.refresh(tx, tx.init(params), params, OBJECTIVE.bind(stacked)).refit
    top, model = (
        llqr.linearize(b, params, damping=0.2, divergence_reduction=reduction)
        for b, reduction in ((first, "unit"), (OBJECTIVE.bind(scaled), "mean"))
    )
    model = replace(model, top_eigenvalue=top.top_eigenvalue)
    plain = jax.tree.map(jnp.negative, model.gradient)
    np.testing.assert_allclose(info.objective_before, model.value(plain), rtol=1e-6)


def test_probes_by_which_a_refit_is_judged_are_not_those_it_has_learned_on() -> None:
    """P that fits four directions alone, of fifty, is no better on four others."""
    bound = llqr.Objective(lambda w, x: jnp.sum(w)[None, None] * x, lambda z, x: jnp.sum(z)).bind(
        jnp.ones((1, 1))
    )
    refit = llqr.Refit(solver="cg", steps=20, probe="gaussian", probes=4, allow_grad_inversion=True)
    tx = llqr.scale_by_llqr(metric="gaussian", damping=1e-3, refit=refit)
    info = llqr.refresh(tx, tx.init(jnp.ones(50)), jnp.ones(50), bound).refit
    assert info.words == ("rejected",)
    assert float(info.objective_after) > 0
