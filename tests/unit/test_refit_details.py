"""Details of a refit that a rough comparison does not see, each against a formula."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr.refit import solvers
from llqr.refit.directions import FISHER_FLOOR, directions
from llqr.refit.record import no_refit
from llqr.refit.setup import Inputs, Numbers
from llqr.structures import STRUCTURES, trees
from llqr.structures import matrix as mx
from llqr.structures import plan as plans
from llqr.structures.rules import rule_table
from tests.oracle import flat
from tests.unit.test_refit import dense_model, problem, run_refit
from tests.unit.test_refit_options import Quadratic, learn, make


def test_every_refit_draws_other_probes() -> None:
    """The number of the refit is part of the key, not only the seed and the inner step."""
    plan, static = make(probe="gaussian", probes=2, steps=2, clip_norm=None)
    params, bound = problem()
    numbers = Numbers(1e-3, 0.0, 0.2, 2)
    first = no_refit(len(plan))
    later = first._replace(refits=jnp.asarray(1, jnp.int32))
    found = [
        flat(run_refit(static, trees.identity(plan, 1.0), info, params, bound, numbers)[0])
        for info in (first, first, later)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-8


def test_annealing_falls_linearly_to_zero() -> None:
    """Rates r, 3r/4, r/2, r/4: gradient descent on a diagonal, in numpy."""
    plan, static = make(
        solver="sgd", steps=4, anneal=True, learning_rate=0.02, clip_norm=None,
        allow_grad_inversion=True,
    )  # fmt: skip
    blocks, _ = learn(plan, static)
    params, bound = problem()
    g, a = dense_model(params, bound, "ngd", 0.2)
    d = np.ones(g.size)
    for i in range(4):
        d = d - 0.02 * (1 - i / 4) * (-g) * (g + a @ (-g * d))
    np.testing.assert_allclose(flat(blocks), d, rtol=1e-12)


def test_the_floor_of_a_fisher_probe_is_a_tenth_of_the_damping() -> None:
    """Where the outputs do not depend on the parameters, it is all that is left of h."""
    objective = llqr.Objective(
        lambda p, x: jnp.zeros((4, 3)) + 0 * jnp.sum(p), lambda z, x: jnp.sum(z)
    ).bind(jnp.zeros(4))
    params = jnp.ones((50,))
    _, static = make(probe="fisher", probes=200)
    model = llqr.linearize(objective, params, damping=0.3)
    inputs = Inputs((), no_refit(0), params, objective, Numbers(1.0, 0.0, 0.3, 1))
    static = replace(static, plan=plans.make_plan(params, rule_table("diagonal"), 100))
    (h,), (linear,) = directions(static, inputs, model, objective, jax.random.key(1), 200)
    np.testing.assert_allclose(np.mean(np.square(h)), 0.1 * 0.3, rtol=0.05)
    np.testing.assert_array_equal(linear, -h)
    assert FISHER_FLOOR == 0.1


def test_beta_of_hager_and_zhang_and_of_polak_and_ribiere() -> None:
    rng = np.random.default_rng(0)
    g, y, d = rng.normal(size=(3, 7))
    dy = d @ y
    expected = (y - 2 * d * (y @ y) / dy) @ g / dy
    np.testing.assert_allclose(solvers._hager_zhang(*map(jnp.asarray, (g, y, d))), expected)
    last = g - y
    np.testing.assert_allclose(
        solvers._polak_ribiere(*map(jnp.asarray, (g, y, d))), max(g @ y / (last @ last), 0)
    )


@pytest.mark.wrong_type
def test_cg_starts_again_where_phi_curves_down() -> None:
    """No step along such a direction, and none of it in the next one."""
    phi = Quadratic(np.diag([-1.0, 2.0]), np.array([1.0, 0.1]))
    solver = solvers.make("cg", (), momentum=0.9, clip_norm=None, clip_value=None)
    x = jnp.array([0.5, -0.3])
    state = solver.init(x, phi.value_and_gradient(x))
    state = state._replace(direction=jnp.array([1.0, 0.0]))
    moved, state, _ = solver.step(phi, x, state, 1.0)
    np.testing.assert_array_equal(moved, x)
    np.testing.assert_array_equal(state.direction, state.residual)


def test_a_searched_step_turns_where_its_direction_would_lead_uphill() -> None:
    """Where Phi curves down there is no length that would turn it: -1/2 |x|^2 from the right."""
    phi = Quadratic(-np.eye(2), np.zeros(2))
    solver = solvers.make("cg_back_pr+", (), momentum=0.9, clip_norm=None, clip_value=None)
    x = jnp.array([1.0, 0.5])
    state = solver.init(x, None)
    # The last gradient was half as long, so that beta is 2; and the last step went uphill.
    state = state._replace(gradient=-x / 2, direction=-10 * x, started=jnp.array(True))
    moved, state, before = solver.step(phi, x, state, 1.0)
    assert float(phi.value_and_gradient(moved)[0]) < float(before)
    np.testing.assert_allclose(state.direction, x)


@pytest.mark.parametrize("warm", [True, False])
def test_a_memory_is_kept_from_refit_to_refit(warm: bool) -> None:
    """First in, first out, whether or not what is learned starts from the identity."""
    plan, static = make(
        "low-rank-memory", steps=30, learning_rate=0.05, solver="relative", warm_start=warm
    )
    params, bound = problem()
    numbers = Numbers(0.05, 0.0, 0.2, 30)
    blocks, info = trees.identity(plan, 1.0), no_refit(len(plan))
    blocks, info = run_refit(static, blocks, info, params, bound, numbers)
    first = np.asarray(blocks[0]["left"])
    blocks, info = run_refit(static, blocks, info, params, bound, numbers)
    second = np.asarray(blocks[0]["left"])
    assert first[-1].any()
    assert "updated" in info.words
    np.testing.assert_array_equal(second[:-1], first[1:])


def test_fresh_vectors_know_sigma() -> None:
    """They join the inverse of an array of size sigma: their length goes with sigma^-1/2."""
    structure = STRUCTURES["sym_swm_kfac"]
    fresh = []
    for sigma in (1.0, 16.0):
        arrays = {"left": sigma * jnp.eye(5), "right": sigma * jnp.eye(3)}
        learned = mx.start(structure, arrays, (5, 3), jax.random.key(0))
        fresh.append(np.asarray(learned["left_fresh_u"]))
        moved = mx.install(structure, arrays, learned)["left"] / sigma - jnp.eye(5)
        assert 1e-4 < np.abs(moved).max() < 0.05
    np.testing.assert_allclose(fresh[1], fresh[0] / 4, rtol=1e-12)


def test_a_rejected_refit_shows_the_cosine_of_what_stays() -> None:
    """The old P is the identity, so P h lies along h."""
    uphill = optax.stateless(lambda g, _: jax.tree.map(lambda x: 0.05 * jnp.sign(x), g))
    plan, static = make(solver=uphill, steps=5, clip_norm=None)
    blocks, info = learn(plan, static)
    assert set(info.words) == {"rejected"}
    assert float(info.objective_after) > float(info.objective_before)
    np.testing.assert_allclose(info.cosines, 1.0, rtol=1e-6)
    np.testing.assert_allclose(info.cosine, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(flat(blocks), np.ones(flat(blocks).size))


def test_other_numbers_compile_nothing_again() -> None:
    """Inner steps, rates, decays and cadence are data where the loop runs in Python."""
    params, bound = problem()

    def refit(**changes: Any) -> None:
        options = llqr.Refit(**{"steps": 3, "learning_rate": 1e-3, "ema_decay": 0.5, **changes})
        tx = llqr.scale_by_llqr(structure="kfac", damping=0.2, refit=options)
        jax.block_until_ready(llqr.refresh(tx, tx.init(params), params, bound))

    from llqr import _loops

    refit()
    before = _loops.compiled._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    for changes in ({"steps": 5}, {"learning_rate": 0.1}, {"ema_decay": 0.25}, {"every": 7},
                    {"start": 2, "until": 9}):  # fmt: skip
        refit(**changes)
    assert _loops.compiled._cache_size() == before  # pyright: ignore[reportFunctionMemberAccess]
    refit(momentum=0.5)
    assert _loops.compiled._cache_size() > before  # pyright: ignore[reportFunctionMemberAccess]


def test_a_name_in_a_rule_table_keeps_its_rules_for_embeddings() -> None:
    params = {
        "embedding": jnp.zeros((40, 4)), "lm_head": {"kernel": jnp.zeros((4, 40))},
        "mlp": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)},
    }  # fmt: skip
    table = [("bias", "diagonal"), ("*", "e-kfac-gpt")]
    for structure in ("e-kfac-gpt", table):
        tx = llqr.scale_by_llqr(structure=structure)
        shapes = {
            name: {slot: a.shape for slot, a in own.items()}
            for name, own in llqr.blocks(tx, tx.init(params), params).items()
        }
        assert shapes["embedding"]["left"] == (40,)
        assert shapes["lm_head/kernel"]["right"] == (40,)
        assert shapes["mlp/kernel"]["left"] == (4, 4)


def test_blocks_are_read_and_installed() -> None:
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    tx = optax.chain(optax.clip(1.0), llqr.scale_by_llqr(structure="kfac"))
    state = tx.init(params)
    arrays = llqr.blocks(tx, state, params)
    assert {k: sorted(v) for k, v in arrays.items()} == {"b": ["spectrum"], "w": ["left", "right"]}
    new = llqr.install(tx, state, params, {"w": {"left": 2 * jnp.eye(3)}})
    found = llqr.precondition(tx, new, params)
    np.testing.assert_array_equal(found["w"], 2 * np.ones((3, 2)))
    np.testing.assert_array_equal(found["b"], np.ones(2))
    whole = llqr.install(tx, state, params, arrays)
    assert jax.tree.structure(whole) == jax.tree.structure(state)
    for blocks, message in (
        ({"v": {}}, "unknown block"),
        ({"w": {"lefd": jnp.eye(3)}}, "did you mean 'left'"),
        ({"w": {"left": jnp.eye(2)}}, "shape"),
        ({"w": {"left": jnp.full((3, 3), jnp.nan)}}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            llqr.install(tx, state, params, blocks)


def test_every_memory_has_fresh_vectors_of_its_own() -> None:
    """Two like matrices, symmetric in every way: what differs after a refit is what was drawn."""
    w = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)))
    params = {"a": w + w.T, "b": w + w.T}
    objective = llqr.Objective(lambda p, _: p["a"] + p["b"], lambda z, _: jnp.sum(z**2))
    refit = llqr.Refit(steps=2, learning_rate=0.01)
    tx = llqr.scale_by_llqr(structure="sym_swm_kfac", metric="gaussian", damping=0.1, refit=refit)
    state = llqr.refresh(tx, tx.init(params), params, objective.bind(jnp.zeros(())))
    assert llqr.find(state).refit.words == ("updated",) * 2
    sides = [side for own in llqr.blocks(tx, state, params).values() for side in own.values()]
    assert len(sides) == 4
    for one, other in itertools.combinations(sides, 2):
        assert jnp.max(jnp.abs(one - other)) > 1e-4
