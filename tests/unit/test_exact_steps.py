"""Exact steps against dense solves, in an optax optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from llqr import lqr
from tests import cases, oracle

STAGED = lqr.stages_from_functions(
    [
        ("hidden", lambda p, x: jnp.tanh(x @ p["w"] + p["b"])),
        ("scale", lambda _, x: 1.5 * x),
        ("logits", lambda p, x: x @ p["w"]),
    ]
)


def loss(outputs, batch):
    targets = jax.nn.one_hot(batch["y"], 3, dtype=outputs.dtype)
    return optax.softmax_cross_entropy(outputs, targets).mean()


OBJECTIVE = llqr.Objective(STAGED.as_forward(inputs=lambda batch: batch["x"]), loss)


def problem():
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        "hidden": {"w": jax.random.normal(keys[0], (4, 5)), "b": jax.random.normal(keys[1], (5,))},
        "logits": {"w": jax.random.normal(keys[2], (5, 3))},
    }
    batch = {"x": jax.random.normal(keys[3], (6, 4)), "y": jnp.arange(6) % 3}
    return params, OBJECTIVE.bind(batch)


def dense_step(params, bound, metric, damping, rhs):
    """(C + damping)^-1 rhs with C column by column from the fused product."""
    product = llqr.linearize(bound, params, metric, damping=damping).product
    flat, unravel = ravel_pytree(params)
    matrix = np.stack([ravel_pytree(product(unravel(e)))[0] for e in np.eye(flat.size)])
    return np.linalg.solve(matrix, ravel_pytree(rhs)[0])


@pytest.mark.parametrize("solver", ["cg", "riccati"])
@pytest.mark.parametrize(("metric", "damping"), [("ngd", 0.1), ("newton", 5.0), ("renyi", 0.3)])
@pytest.mark.parametrize("jitted", [False, True])
def test_step_is_the_damped_dense_solve(solver, metric, damping, jitted):
    params, bound = problem()
    tx = llqr.exact(optax.sgd(0.5), metric=metric, damping=damping, solver=solver, tolerance=1e-13)
    grads = jax.grad(bound)(params)
    update = lambda g, s, p, o: tx.update(g, s, p, objective=o)  # noqa: E731
    update = jax.jit(update) if jitted else update
    updates, state = update(grads, tx.init(params), params, bound)
    expected = -0.5 * dense_step(params, bound, metric, damping, grads)
    np.testing.assert_allclose(ravel_pytree(updates)[0], expected, rtol=1e-10, atol=1e-12)
    assert (int(state.steps) > 0) == (solver == "cg")


@pytest.mark.parametrize("solver", ["cg", "riccati"])
def test_the_incoming_gradient_is_solved_for(solver):
    """Not the objective's own: weight decay in front of it counts."""
    params, bound = problem()
    tx = optax.chain(
        optax.add_decayed_weights(0.3),
        llqr.exact(optax.sgd(1.0), damping=0.1, solver=solver, tolerance=1e-13),
    )
    grads = jax.grad(bound)(params)
    updates, _ = tx.update(grads, tx.init(params), params, objective=bound)
    rhs = jax.tree.map(lambda g, p: g + 0.3 * p, grads, params)
    expected = -dense_step(params, bound, "ngd", 0.1, rhs)
    np.testing.assert_allclose(ravel_pytree(updates)[0], expected, rtol=1e-9, atol=1e-11)


def test_any_model_with_cg():
    case = cases.MLP_TANH
    tx = llqr.exact(optax.sgd(1.0), metric="gauss_newton", damping=0.2, tolerance=1e-13)
    grads = jax.grad(case.bound)(case.params)
    updates, _ = tx.update(grads, tx.init(case.params), case.params, objective=case.bound)
    c = oracle.curvature(case, "gauss_newton")
    g = ravel_pytree(grads)[0]
    expected = -np.linalg.solve(c + 0.2 * np.eye(g.size), g)
    np.testing.assert_allclose(ravel_pytree(updates)[0], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", ["cg", "riccati"])
def test_no_minimum(solver):
    params, bound = problem()
    tx = llqr.exact(optax.sgd(1.0), metric="newton", solver=solver)
    grads = jax.grad(bound)(params)
    with pytest.raises(lqr.NonConvexError, match="no minimum"):
        tx.update(grads, tx.init(params), params, objective=bound)
    updates, _ = jax.jit(lambda g, s, p, o: tx.update(g, s, p, objective=o))(
        grads, tx.init(params), params, bound
    )
    assert np.isnan(ravel_pytree(updates)[0]).all()


def test_newton_converges_quadratically():
    """On a convex problem, five full Newton steps reach the minimum to rounding."""
    x = jax.random.normal(jax.random.key(0), (20, 3))
    y = (jnp.arange(20) % 2).astype(float)
    objective = llqr.Objective(
        lambda w, batch: batch["x"] @ w,
        lambda z, batch: jnp.mean(optax.sigmoid_binary_cross_entropy(z, batch["y"])),
    ).bind({"x": x, "y": y})
    tx, w = llqr.exact(optax.sgd(1.0), metric="newton", tolerance=1e-14), jnp.zeros(3)
    state = tx.init(w)
    for _ in range(5):
        updates, state = tx.update(jax.grad(objective)(w), state, w, objective=objective)
        w = w + updates
    assert np.linalg.norm(jax.grad(objective)(w)) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "ricatti"}, r"unknown solver 'ricatti': did you mean 'riccati'\?"),
        ({"metric": "ngdd"}, "unknown divergence 'ngdd'"),
        ({"damping": -1.0}, r"damping must lie in \[0, inf\)"),
        ({"divergence_reduction": "avg"}, "unknown divergence_reduction 'avg'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        llqr.exact(optax.sgd(1.0), **options)


def test_missing_pieces():
    params, bound = problem()
    grads = jax.grad(bound)(params)
    tx = llqr.exact(optax.sgd(1.0))
    with pytest.raises(ValueError, match="needs params and objective"):
        tx.update(grads, tx.init(params), params)
    plain = llqr.Objective(lambda p, b: STAGED(p, b["x"]), loss).bind(bound.batch)
    tx = llqr.exact(optax.sgd(1.0), solver="riccati")
    with pytest.raises(ValueError, match=r"needs the stages of the model.*solver='cg'"):
        tx.update(grads, tx.init(params), params, objective=plain)
    small = llqr.exact(optax.sgd(1.0), solver="riccati", max_size=10, damping=0.1)
    with pytest.raises(ValueError, match=r"'hidden' has a .* stops at max_size=10"):
        small.update(grads, small.init(params), params, objective=bound)


def test_a_bound_on_the_steps_is_kept_and_no_error():
    """One step of conjugate gradients is steepest descent of the length that is best."""
    params, bound = problem()
    tx = llqr.exact(optax.sgd(1.0), damping=0.1, max_steps=1)
    grads = jax.grad(bound)(params)
    updates, state = tx.update(grads, tx.init(params), params, objective=bound)
    g = ravel_pytree(grads)[0]
    curved = ravel_pytree(llqr.linearize(bound, params, damping=0.1).product(grads))[0]
    expected = -(g @ g) / (g @ curved) * g
    np.testing.assert_allclose(ravel_pytree(updates)[0], expected, rtol=1e-10)
    assert int(state.steps) == 1
    assert float(state.residual) > 1e-3
