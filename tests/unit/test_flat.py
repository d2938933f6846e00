"""Metrics without curvature: a refit says so, and P stays where it is."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
PARAMS = {"seen": jnp.ones((3, 2)), "unseen": jnp.ones((2, 2))}


def forward(params, x):
    return jnp.tanh(x @ params["seen"])


def quantile(z, x):
    """Linear in the outputs almost everywhere."""
    return jnp.mean(jnp.maximum(0.9 * (x[:, :2] - z), -0.1 * (x[:, :2] - z)))


FLAT = {
    "gauss_newton of a quantile loss": ("gauss_newton", quantile, {}),
    "with damping": ("gauss_newton", quantile, {"damping": 0.1}),
    "divided by its top": ("gauss_newton", quantile, {"divergence_reduction": "unit"}),
    "a divergence that is linear": (lambda z, r: jnp.sum(z, -1), quantile, {}),
}


@pytest.mark.parametrize("kind", FLAT)
def test_a_refit_without_curvature_keeps_p_and_counts_it(kind):
    metric, loss, options = FLAT[kind]
    probe = "gaussian" if kind == "with damping" else "gradient"
    refit = llqr.Refit(steps=3, learning_rate=0.1, probe=probe)
    tx = llqr.llqr(optax.sgd(0.1), structure="diagonal", metric=metric, refit=refit, **options)
    bound = llqr.Objective(forward, loss).bind(X)
    state = llqr.refresh(tx, tx.init(PARAMS), PARAMS, bound)
    np.testing.assert_array_equal(llqr.precondition(tx, state, PARAMS)["seen"], 1)
    info = llqr.find(state).refit
    assert info.words[0] == "flat"
    assert int(info.count("flat")) == int(info.guarded) >= 1


@pytest.mark.parametrize("loss", ["quadratic", "none at all"])
def test_curvature_somewhere_is_no_flat_refit(loss):
    """Nor is a gradient of zero: then nothing is learned."""
    function = {"quadratic": lambda z, x: jnp.mean(z**2), "none at all": lambda z, x: 0.0 * z[0, 0]}
    tx = llqr.llqr(optax.sgd(0.1), metric="gauss_newton", refit=llqr.Refit(steps=2))
    bound = llqr.Objective(forward, function[loss]).bind(X)
    info = llqr.find(llqr.refresh(tx, tx.init(PARAMS), PARAMS, bound)).refit
    assert int(info.count("flat")) == 0
    assert info.words[0] == ("updated" if loss == "quadratic" else "kept")


@pytest.mark.parametrize("structure", ["e-kfac", "kfac"])
def test_streaming_keeps_a_block_of_which_no_label_says_anything(structure):
    tx = llqr.scale_by_llqr(
        structure=structure, metric="bernoulli", graft="none", refit=llqr.Streaming()
    )
    bound = llqr.Objective(forward, quantile).bind(X)
    state = llqr.refresh(tx, tx.init(PARAMS), PARAMS, bound)
    assert llqr.find(state).refit.words == ("updated", "flat")
    scaled = llqr.precondition(tx, state, PARAMS)
    np.testing.assert_allclose(scaled["unseen"], 1, rtol=1e-12)
    assert float(jnp.abs(scaled["seen"] - 1).max()) > 0.01
