"""One interface for all that is linear: every operator keeps it, on every route."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from llqr.curvature import FunctionOperator, Route
from tests import cases, staged
from tests.oracle import flat

ROUTES = {
    "whole": Route(),
    "recomputed": Route(memory="recomputed"),
    "curvature recomputed": Route(memory="curvature_recomputed"),
    "chunks of 4": Route(chunk_size=4),
    "layerwise": Route(layerwise=True),
}


def _staged() -> tuple[Any, llqr.BoundObjective]:
    case = staged.STAGED[0]
    params, inputs, loss = case.build()
    objective = llqr.Objective(case.model.as_forward(), lambda z, _: loss(z))
    return params, objective.bind(inputs)


def _model(route: str, metric: str) -> tuple[llqr.QuadraticModel, Any]:
    if route == "layerwise":
        params, bound = _staged()
        return llqr.linearize(bound, params, metric, damping=0.3, route=ROUTES[route]), params
    case = cases.MLP_TANH
    made = llqr.linearize(case.bound, case.params, metric, damping=0.3, route=ROUTES[route])
    return made, case.params


@pytest.mark.parametrize("metric", ["ngd", "newton"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_operator_keeps_the_interface(route: str, metric: str) -> None:
    model, params = _model(route, metric)
    u = jax.tree.map(jnp.sin, params)
    w = jax.tree.map(jnp.cos, params)
    jacobian = np.asarray(model.jacobian.as_matrix())
    np.testing.assert_allclose(flat(model.jacobian.jvp(u)), jacobian @ flat(u), atol=1e-10)
    cotangent = jax.tree.map(jnp.cos, model.jacobian.jvp(w))
    np.testing.assert_allclose(
        flat(model.jacobian.vjp(cotangent)), jacobian.T @ flat(cotangent), atol=1e-10
    )
    for operator in (model.curvature, model):
        dense = np.asarray(operator.as_matrix())
        np.testing.assert_allclose(dense, dense.T, atol=1e-10)
        np.testing.assert_allclose(flat(operator.product(u)), dense @ flat(u), atol=1e-10)
        np.testing.assert_allclose(flat(operator.jvp(u)), dense @ flat(u), atol=1e-10)
        np.testing.assert_allclose(flat(operator.vjp(u)), dense @ flat(u), atol=1e-10)
        np.testing.assert_allclose(
            operator.bilinear(u, w), flat(u) @ dense @ flat(w), rtol=1e-9, atol=1e-10
        )
        assert operator.in_structure == operator.out_structure == jax.tree.map(jax.typeof, params)
    dense = np.asarray(model.curvature.as_matrix())
    np.testing.assert_allclose(model.as_matrix(), dense + 0.3 * np.eye(len(dense)), atol=1e-10)


def test_the_jacobian_is_that_of_the_outputs() -> None:
    """On every route; layerwise too, by the rollout of the regulator."""
    for route in ROUTES:
        model, params = _model(route, "ngd")
        bound = _staged()[1] if route == "layerwise" else cases.MLP_TANH.bound
        unravel = ravel_pytree(params)[1]
        expected = jax.jacobian(lambda x, b=bound, f=unravel: ravel_pytree(b.outputs(f(x)))[0])(
            jnp.asarray(flat(params))
        )
        np.testing.assert_allclose(model.jacobian.as_matrix(), expected, atol=1e-10)


def test_a_linear_function_is_an_operator() -> None:
    a = np.arange(6.0).reshape(2, 3)
    operator = FunctionOperator.at(lambda t: {"y": jnp.asarray(a) @ t["x"]}, {"x": jnp.zeros(3)})
    np.testing.assert_array_equal(operator.as_matrix(), a)
    np.testing.assert_array_equal(operator.vjp({"y": jnp.ones(2)})["x"], a.sum(axis=0))


@pytest.mark.parametrize("structure", ["kfac", "e-kfac", "diagonal", "sym_swm_kfac", "dense"])
def test_a_preconditioner_is_an_operator(structure: str) -> None:
    """Of any structure, symmetric or not, and with sigma: as the dense matrices of its blocks."""
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
    tx = llqr.scale_by_llqr(structure=structure, identity_scaling=4.0)
    rng, state = np.random.default_rng(0), tx.init(params)
    draw = lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape))  # noqa: E731
    before = llqr.preconditioner(tx, state, params).as_matrix()
    np.testing.assert_allclose(before, np.eye(8), atol=1e-12)  # whatever sigma is
    state = state._replace(blocks=jax.tree.map(draw, state.blocks))
    p = llqr.preconditioner(tx, state, params)
    assert p.in_structure == jax.tree.map(jax.typeof, params)
    assert hash(jax.tree.structure(p)) == hash(jax.tree.structure(p))
    dense = np.asarray(p.as_matrix())
    v = jax.tree.map(lambda x: draw(0 * x), params)
    np.testing.assert_allclose(flat(p.product(v)), dense @ flat(v), atol=1e-12)
    np.testing.assert_allclose(flat(llqr.precondition(tx, state, v)), dense @ flat(v), atol=1e-12)
    np.testing.assert_allclose(flat(p.vjp(v)), dense.T @ flat(v), atol=1e-12)
    np.testing.assert_allclose(flat(jax.jit(lambda p, v: p.jvp(v))(p, v)), dense @ flat(v))
