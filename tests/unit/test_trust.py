"""Exact steps in a trust region: roots, factorisations, the geodesic term, the whole path."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from llqr import residuals

ROWS = 7


def params() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a": jax.random.normal(keys[0], (3, 5)), "b": jnp.zeros(5),
        "c": jax.random.normal(keys[1], (5, 3)) / 2,
    }  # fmt: skip


def batch() -> Any:
    x = jax.random.normal(jax.random.key(1), (ROWS, 3))
    return {
        "x": x,
        "y": jnp.sin(2 * x),
        "label": jnp.arange(ROWS) % 3,
        "w": 1.0 + jnp.arange(ROWS, dtype=float),
    }


def forward(p: Any, b: Any) -> Any:
    return jnp.tanh(b["x"] @ p["a"] + p["b"]) @ p["c"]


def coupled(p: Any, b: Any) -> Any:
    z = forward(p, b)
    return z - 0.1 * z.mean(0)


def two_outputs(p: Any, b: Any) -> Any:
    return {"one": forward(p, b)[:, 0], "more": (b["x"] @ p["a"])[:, None, :2]}


LOSSES = {
    "squares": lambda z, b: jnp.mean((z - b["y"]) ** 2),
    "weighted squares": lambda z, b: jnp.sum(b["w"][:, None] * (z - b["y"]) ** 2),
    "cross-entropy": lambda z, b: jnp.mean(
        -jnp.take_along_axis(jax.nn.log_softmax(z), b["label"][:, None], 1)
    ),
    "bernoulli": lambda z, b: jnp.mean(jnp.logaddexp(0.0, z) - z * (b["y"] > 0).astype(float)),
    "poisson": lambda z, b: jnp.mean(jnp.exp(z) - z * b["label"][:, None].astype(float)),
    "log cosh": lambda z, b: jnp.mean(jnp.log(jnp.cosh(z - b["y"]))),
}
MODELS = {"apart": forward, "coupled": coupled}


def matrix_of(bound: Any, quadratic: Any, found: Any) -> Any:
    whole = residuals.as_map(quadratic.jacobian, quadratic.outputs, params(), found)
    return residuals.rows(bound, params(), whole, found).matrix()


def parts(model: Any, loss: Any, metric: str = "gauss_newton") -> Any:
    bound = llqr.Objective(model, loss).bind(batch())
    quadratic = llqr.linearize(bound, params(), metric)
    curvature: Any = quadratic.curvature
    found = residuals.residuals(quadratic.outputs, quadratic.cotangent, curvature.output_hessian)
    return bound, quadratic, found, matrix_of(bound, quadratic, found)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_residuals_are_a_root_of_the_model(loss: str, model: str) -> None:
    """R^T R is the curvature and R^T r the gradient, by rows of their own or not."""
    _, quadratic, found, matrix = parts(MODELS[model], LOSSES[loss])
    assert found.convex
    assert found.separable
    assert not found.rest
    np.testing.assert_allclose(matrix.T @ matrix, quadratic.as_matrix(), atol=1e-11)
    gradient = ravel_pytree(quadratic.gradient)[0]
    np.testing.assert_allclose(matrix.T @ found.r, gradient, atol=1e-11)


@pytest.mark.parametrize("metric", ["ngd", "gaussian", "bernoulli", "renyi"])
def test_other_metrics_have_roots_too(metric: str) -> None:
    _, quadratic, _, matrix = parts(forward, LOSSES["cross-entropy"], metric)
    np.testing.assert_allclose(matrix.T @ matrix, quadratic.as_matrix(), atol=1e-11)


def test_outputs_of_several_shapes() -> None:
    def loss(z: Any, b: Any) -> Any:
        return jnp.mean((z["one"] - b["w"]) ** 2) + jnp.sum(z["more"] ** 2)

    _, quadratic, found, matrix = parts(two_outputs, loss)
    np.testing.assert_allclose(matrix.T @ matrix, quadratic.as_matrix(), atol=1e-10)
    np.testing.assert_allclose(matrix.T @ found.r, ravel_pytree(quadratic.gradient)[0], atol=1e-10)


def step_of(tx: Any, state: Any, p: Any, bound: Any) -> tuple[Any, Any]:
    updates, state = tx.update(p, state, p, objective=bound)
    return ravel_pytree(updates)[0], state


@pytest.mark.parametrize("loss", ["squares", "cross-entropy"])
def test_all_solvers_give_the_dense_step(loss: str) -> None:
    """At the lambda that was tried first, without the geodesic term."""
    bound, quadratic, _, _ = parts(forward, LOSSES[loss])
    top = np.linalg.eigvalsh(quadratic.as_matrix())[-1]
    lam = top
    dense = quadratic.as_matrix() + lam * np.eye(len(quadratic.as_matrix()))
    expected = -np.linalg.solve(dense, ravel_pytree(quadratic.gradient)[0])
    grads = jax.grad(bound)(params())
    for solver in ("dual", "primal", "auto"):
        tx = llqr.exact(damping=llqr.Trust(start=1.0, geodesic=False), solver=solver)
        found, state = step_of(tx, tx.init(params()), params(), bound)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        assert float(state.trust.top) == pytest.approx(top)
        assert int(state.trust.tries) == 1
    cg = llqr.exact(
        optax.sgd(1.0), metric="gauss_newton", damping=lam, solver="cg", tolerance=1e-13
    )
    updates, _ = cg.update(grads, cg.init(params()), params(), objective=bound)
    np.testing.assert_allclose(ravel_pytree(updates)[0], expected, atol=1e-9)


def numpy_path(steps: int, options: llqr.Trust) -> Any:
    """The method for squares, written out: J by differences of nothing, a by differences of r."""
    flat, unravel = ravel_pytree(params())
    data = batch()

    def residual(theta: Any) -> Any:
        z = forward(unravel(jnp.asarray(theta)), data)
        return np.asarray((z - data["y"]).ravel() * np.sqrt(2 / z.size))

    slope = jax.jacobian(
        lambda t: (forward(unravel(t), data) - data["y"]).ravel() * np.sqrt(2 / (3 * ROWS))
    )
    theta, lam, growth, path = np.asarray(flat), 0.0, 2.0, []
    for _ in range(steps):
        r, jac = residual(theta), np.asarray(slope(jnp.asarray(theta)))
        w, u = np.linalg.eigh(jac @ jac.T)
        w = np.maximum(w, 0)
        floor = 50 * np.finfo(float).eps * w[-1]
        lam = lam if lam > 0 else options.start * w[-1]
        for _ in range(options.tries):
            lam = max(lam, floor)
            solve = lambda v, lam=lam, u=u, w=w, jac=jac: jac.T @ (u @ (u.T @ v / (w + lam)))  # noqa: E731
            d = -solve(r)
            predicted = 0.5 * (r @ r - (r + jac @ d) @ (r + jac @ d))
            step = d
            if options.geodesic:
                h = 1e-3
                a = (residual(theta + h * d) - 2 * r + residual(theta - h * d)) / h**2
                b = -0.5 * solve(a)
                step = d + b if np.linalg.norm(b) < 0.75 * np.linalg.norm(d) else d
            after = residual(theta + step)
            rho = 0.5 * (r @ r - after @ after) / predicted
            if rho > 1e-4:
                theta, growth = theta + step, 2.0
                lam *= max(0.2, 1 - (2 * rho - 1) ** 3)
                break
            lam, growth = lam * growth, 2 * growth
        path.append((theta, max(lam, floor)))
    return path


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (llqr.Trust(geodesic=False), 1e-9),
        (llqr.Trust(geodesic=False, start=1e-9, tries=20), 1e-7),  # steps are refused at first
        (llqr.Trust(), 1e-4),  # a is taken by differences
    ],
)
def test_the_whole_path_is_the_numpy_loop(options: llqr.Trust, tolerance: float) -> None:
    tx, p = llqr.exact(damping=options), params()
    bound = llqr.Objective(forward, LOSSES["squares"]).bind(batch())
    state, traced = tx.init(p), []

    @jax.jit
    def step(p: Any, state: Any) -> Any:
        traced.append(None)
        updates, state = tx.update(p, state, p, objective=bound)
        return optax.apply_updates(p, updates), state

    losses = [float(bound(p))]
    for theta, lam in numpy_path(6, options):
        p, state = step(p, state)
        np.testing.assert_allclose(ravel_pytree(p)[0], theta, atol=tolerance)
        np.testing.assert_allclose(state.trust.damping, lam, rtol=1e3 * tolerance)
        losses.append(float(bound(p)))
    assert len(traced) == 1
    assert losses == sorted(losses, reverse=True), "a step that raises the loss is never taken"
    assert losses[-1] < 0.05 * losses[0]


def test_a_scan_of_steps_is_as_many_calls() -> None:
    tx, p = llqr.exact(damping=llqr.Trust()), params()
    bound = llqr.Objective(forward, LOSSES["squares"]).bind(batch())

    def step(carry: Any, _: Any) -> Any:
        p, state = carry
        updates, state = tx.update(p, state, p, objective=bound)
        return (optax.apply_updates(p, updates), state), None

    carry = (p, tx.init(p))
    (scanned, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 8))(carry)
    once = jax.jit(step)
    for _ in range(8):
        carry, _ = once(carry, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), scanned, carry[0])


REFUSED = {
    "not convex in the outputs": lambda z, b: jnp.mean(jnp.cos(z)),
    "couples rows": lambda z, b: jnp.sum(jnp.mean(z, 0) ** 2),
    "is linear along": lambda z, b: jnp.mean(z),
    "not finite": lambda z, b: jnp.mean((z - jnp.nan) ** 2),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_residuals_is_refused_in_words_and_counted_in_jit(why: str) -> None:
    tx, p = llqr.exact(damping=llqr.Trust()), params()
    bound = llqr.Objective(forward, REFUSED[why]).bind(batch())
    state = tx.init(p)
    with pytest.raises(ValueError, match=why):
        tx.update(p, state, p, objective=bound)
    updates, state = jax.jit(lambda s: tx.update(p, s, p, objective=bound))(state)
    assert not np.any(ravel_pytree(updates)[0])
    assert int(state.trust.refused) == 1


def test_options_that_do_not_go_together() -> None:
    trust = llqr.Trust()
    for options, why in (
        ({"solver": "dual", "damping": 0.1}, r"goes with damping=llqr\.Trust"),
        ({"metric": "newton", "damping": trust}, "positive metric"),
        ({"axis_name": "d", "damping": trust}, "the whole batch"),
    ):
        with pytest.raises(ValueError, match=why):
            llqr.exact(**options)
    with pytest.raises(ValueError, match="tries must be >= 1"):
        llqr.Trust(tries=0)
    with pytest.raises(ValueError, match="start must lie in"):
        llqr.Trust(start=0.0)
