"""Curvature of the models of images on both routes, and refits of every structure."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from llqr_experiments import models
from tests.experiments import models_oracle
from tests.experiments.model_cases import BATCH, CASES, Case


def objective(network, batch):
    forward = network.model.as_forward(lambda b: b["x"], context=lambda b: b["statistics"])
    loss = lambda z, b: -jnp.mean(z[jnp.arange(BATCH), b["y"]])  # noqa: E731
    return llqr.Objective(forward, loss).bind({**batch, "statistics": network.statistics})


FAST = {("resnet-18", "ngd"), ("mlp", "ngd"), ("mlp", "newton")}


@pytest.mark.parametrize(
    ("case", "metric"),
    [
        pytest.param(c, m, marks=() if (c.name, m) in FAST else pytest.mark.slow, id=f"{c}-{m}")
        for c in CASES
        for m in ("ngd", "newton")
    ],
)
def test_layerwise_is_fused(case, metric):
    """Products, gradients and J(u) of the two routes, to rounding."""
    with jax.enable_x64(True):
        network = models.network(case.make())
        params, rng = network.params, np.random.default_rng(2)
        u = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
        bound = objective(network, case.batch())

        @partial(jax.jit, static_argnames="layerwise")
        def numbers(params, u, bound, layerwise):
            route = llqr.Route(layerwise=layerwise)
            model = llqr.linearize(bound, params, metric, damping=0.1, route=route)
            return model.product(u), model.gradient, model.value(u)

        fused, layerwise = (numbers(params, u, bound, which) for which in (False, True))
        for expected, found in zip(fused, layerwise, strict=True):
            expected, found = ravel_pytree(expected)[0], ravel_pytree(found)[0]
            assert np.linalg.norm(found - expected) <= 1e-10 * np.linalg.norm(expected)
            assert np.linalg.norm(expected) > 0


# --- structures ---------------------------------------------------------------------------------

TINY = {
    "vit-ti-16": Case("vit-ti-16", models_oracle.vit, options={"width": 4}),
    "resnet-18": Case("resnet-18", models_oracle.resnet18, 0.99, {"width": 2}),
}
QUICK = {("vit-ti-16", "scalar")}


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        pytest.param(n, s, marks=() if (n, s) in QUICK else pytest.mark.slow)
        for n in TINY
        for s in llqr.STRUCTURES
    ],
)
def test_every_structure_refits(name, structure):
    """One refit lowers its objective, every leaf included, and what comes out is finite.

    Structures that can only lengthen a step start from one that is too short. Fresh vectors
    start small, and need a larger rate to matter after five steps.
    """
    scale = 0.01 if structure.startswith("low-rank") else 1.0
    rate = (
        0.1 if structure in ("low-rank-memory", "low-rank-memory-asym", "asym_swm_kfac") else 0.01
    )
    case = TINY[name]
    network = models.network(case.make())
    params, bound = network.params, objective(network, case.batch())
    tx = llqr.scale_by_llqr(
        structure=structure, damping=0.1, divergence_reduction="mean", identity_scaling=scale,
        refit=llqr.Refit(steps=5, normalize_gradient=True, learning_rate=rate),
    )  # fmt: skip

    @jax.jit
    def refit(params, bound):
        state = llqr.refresh(tx, tx.init(params), params, bound)
        return state, tx.update(params, state, params, refresh=False)[0]

    state, updates = refit(params, bound)
    jax.clear_caches()  # a program holds thousands of memory mappings, of 65,000 for a process
    info = state.refit
    gain = info.objective_before - info.objective_after
    assert gain > 3e-5 * abs(info.objective_before)  # a hundred times the rounding
    assert not int(info.guarded)
    for leaf in jax.tree.leaves((state.blocks, updates)):
        assert np.all(np.isfinite(leaf))
    if name == "vit-ti-16":
        for stage in ("layers_2", "layers_3"):  # the class token and the positions
            (before,), (after,) = params[stage].values(), updates[stage].values()
            assert np.any(before != after)
