"""Refits with sharded batches and parameters: the numbers of one device, on both kinds of axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import llqr

P = PartitionSpec
RNG = np.random.default_rng(0)
W = {"w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)}
X = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)


def forward(p: Any, x: Any) -> Any:
    w = p["w"]
    if jax.typeof(w).sharding.spec != P(None, None):  # each step gathers its parameters
        w = jax.sharding.reshard(w, P(None, None))
    return jnp.tanh(x @ w)


OBJECTIVE = llqr.Objective(forward, lambda z, x: jnp.mean((z - 1) ** 2))
REFIT = {"steps": 2, "learning_rate": 0.1}
CASES: dict[str, Any] = {
    "gaussian": {"refit": llqr.Refit(probe="gaussian", probes=2, **REFIT)},
    "fisher, unit": {
        "refit": llqr.Refit(probe="fisher", **REFIT),
        "divergence_reduction": "unit",
        "damping": 0.1,
    },
    "minibatch": {"refit": llqr.Refit(probe="minibatch", **REFIT)},
    "streaming sides": {"refit": llqr.Streaming(), "structure": "kfac"},
    "chunks": {"refit": llqr.Refit(**REFIT), "route": llqr.Route(chunk_size=4)},
    "uneven chunks of a loss": {
        "refit": llqr.Refit(**REFIT),
        "route": llqr.Route(chunk_size=3),
        "metric": "gauss_newton",
    },
}


def learned(options: Any, sharding: Any = None) -> Any:
    """P times ones after one refit."""
    tx = llqr.scale_by_llqr(**{"metric": "gaussian", "structure": "diagonal"} | options)
    w, x = W, X
    if sharding is not None:
        w, x = (jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), tree) for tree in (W, X))

    @jax.jit
    def refit(w: Any, state: Any, x: Any) -> Any:
        state = llqr.refresh(tx, state, w, OBJECTIVE.bind(x))
        return llqr.precondition(tx, state, jax.tree.map(jnp.ones_like, w))

    return np.asarray(refit(w, tx.init(w), x)["w"])


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_numbers_are_those_of_one_device(axis: Any, kind: str) -> None:
    expected = learned(CASES[kind])
    mesh = jax.make_mesh((2,), ("d",), axis_types=(axis,))
    with jax.set_mesh(mesh):
        found = learned(CASES[kind], NamedSharding(mesh, P("d", None)))
    assert np.abs(expected - 1).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_every_device_computes_its_share_of_every_chunk(axis: Any) -> None:
    x, w = jnp.ones((64, 64)), {"w": jnp.ones((64, 64)) / 64}

    def product(w: Any, x: Any) -> Any:
        route = llqr.Route(chunk_size=16)
        return llqr.linearize(OBJECTIVE.bind(x), w, "gaussian", route=route).product(w)

    def flops(w: Any, x: Any) -> float:
        return jax.jit(product).lower(w, x).compile().cost_analysis()["flops"]

    one, mesh = flops(w, x), jax.make_mesh((2,), ("d",), axis_types=(axis,))
    with jax.set_mesh(mesh):
        everywhere = jax.device_put(w, NamedSharding(mesh, P(None, None)))
        each = flops(everywhere, jax.device_put(x, NamedSharding(mesh, P("d", None))))
    assert each < 0.6 * one
