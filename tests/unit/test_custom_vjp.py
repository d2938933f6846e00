"""Functions that have a backward pass alone: the same curvature, or a message that says why not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr


@jax.custom_vjp
def kernel(x: Any) -> Any:
    return jnp.tanh(x)


kernel.defvjp(lambda x: (jnp.tanh(x),) * 2, lambda y, g: (g * (1 - y * y),))


@jax.custom_vjp
def squares(z: Any) -> Any:
    return jnp.mean(z**2)


squares.defvjp(lambda z: (jnp.mean(z**2), z), lambda z, g: (g * 2 * z / z.size,))


@jax.custom_vjp
def opaque(x: Any) -> Any:
    return jnp.tanh(x)


def _backward(y: Any, g: Any) -> Any:
    """A loop that JAX cannot differentiate backwards, as in adjoints of ODE solvers."""
    return (
        jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, c[1] * (1 - y * y)), (0, g))[1],
    )


opaque.defvjp(lambda x: (jnp.tanh(x),) * 2, _backward)

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
W = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))}


def objective(function: Any, loss: Any = squares) -> Any:
    return llqr.Objective(lambda p, x: function(x @ p["w"]), lambda z, x: loss(z)).bind(X)


PLAIN = objective(jnp.tanh, lambda z: jnp.mean(z**2))
ROUTES = (
    llqr.Route(),
    llqr.Route(memory="curvature_recomputed"),
    llqr.Route(memory="recomputed"),
    llqr.Route(chunk_size=4),
)


@pytest.mark.parametrize("metric", ["gauss_newton", "newton", "gaussian"])
@pytest.mark.parametrize("route", ROUTES, ids=["cached", "curvature", "recomputed", "chunks"])
def test_curvature_without_a_forward_rule_is_that_of_the_plain_function(
    metric: str, route: llqr.Route
) -> None:
    @jax.jit
    def matrices(w: Any) -> Any:
        model = llqr.linearize(objective(kernel), w, metric, route=route)
        return model.as_matrix(), model.bilinear(w, w), model.gradient

    expected = llqr.linearize(PLAIN, W, metric)
    matrix, curved, gradient = matrices(W)
    np.testing.assert_allclose(matrix, expected.as_matrix(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(curved, expected.bilinear(W, W), rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], expected.gradient["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("streams", [False, True])
def test_refits_without_a_forward_rule(streams: bool) -> None:
    refit = llqr.Streaming() if streams else llqr.Refit(steps=3, learning_rate=0.1)
    tx = llqr.llqr(optax.sgd(0.1), structure="e-kfac", metric="gaussian", refit=refit)
    states = [llqr.refresh(tx, tx.init(W), W, bound) for bound in (objective(kernel), PLAIN)]
    found, expected = (llqr.precondition(tx, state, W)["w"] for state in states)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert llqr.find(states[0]).refit.words == ("updated",)


def test_what_can_be_differentiated_in_no_way_is_explained() -> None:
    tx = llqr.llqr(optax.sgd(0.1), metric="gauss_newton", refit=llqr.Refit(steps=1))
    with pytest.raises(ValueError, match=r"custom_vjp.*no forward-mode rule.*custom_jvp.*diffrax"):
        llqr.refresh(tx, tx.init(W), W, objective(opaque))
    streaming = llqr.llqr(
        optax.sgd(0.1), structure="e-kfac", metric="gaussian", refit=llqr.Streaming()
    )
    state = llqr.refresh(streaming, streaming.init(W), W, objective(opaque))
    assert llqr.find(state).refit.words == ("updated",)


def test_stage_by_stage_needs_a_forward_rule_and_says_so() -> None:
    staged = llqr.stages.stages_from_functions([("w", lambda w, x: kernel(x @ w))])
    bound = llqr.Objective(staged.as_forward(), lambda z, x: jnp.mean(z**2)).bind(X)
    with pytest.raises(ValueError, match=r"custom_vjp.*layerwise=False"):
        llqr.linearize(bound, W, "gaussian", route=llqr.Route(layerwise=True)).product(W)
