"""Models whose operations want one dtype throughout: they run in it, and curvature is float32's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr

RNG = np.random.default_rng(0)
HALF = jnp.bfloat16


def recurrent(p: Any, x: Any) -> Any:
    """The carry must keep the dtype in which it begins."""
    cell = lambda h, x: (jnp.tanh(x @ p["i"] + h @ p["h"]), None)  # noqa: E731
    return jax.lax.scan(cell, jnp.zeros((x.shape[1], 3), x.dtype), x)[0]


def convolution(p: Any, x: Any) -> Any:
    """Both operands must have one dtype."""
    return jnp.tanh(jax.lax.conv_general_dilated(x, p["k"], (1,), "VALID"))[:, :, 0]


def array(*shape: int) -> Any:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


MODELS = {
    "recurrent": (recurrent, {"i": array(2, 3), "h": array(3, 3)}, array(5, 4, 2)),
    "convolution": (convolution, {"k": array(2, 3, 4)}, array(4, 3, 4)),
}


def loss(z: Any, x: Any) -> Any:
    return jnp.mean(z.astype(jnp.float32) ** 2)


def learned(model: str, dtype: Any, **options: Any) -> Any:
    """P of one refit, times ones, and what the refit did."""
    forward, params, x = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if hasattr(leaf, "astype") else leaf, MODELS[model]
    )
    axes = (lambda x: 1) if model == "recurrent" else None
    bound = llqr.Objective(forward, loss, batch_axes=axes).bind(x)
    given = {"refit": llqr.Refit(steps=5, learning_rate=0.3), "divergence_reduction": "unit"}
    tx = llqr.llqr(optax.sgd(0.1), **given | options)
    state = llqr.refresh(tx, tx.init(params), params, bound)
    ones = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), params)
    return llqr.precondition(tx, state, ones), llqr.find(state).refit


CASES = {
    "gauss_newton": ("recurrent", {"metric": "gauss_newton"}),
    "newton": ("convolution", {"metric": "newton", "damping": 1.0}),
    "chunks": ("recurrent", {"metric": "gaussian", "route": llqr.Route(chunk_size=2)}),
    "recomputed": (
        "convolution",
        {
            "metric": "gaussian",
            "route": llqr.Route(memory="recomputed", checkpoint_policy="dots_no_batch_dims"),
        },
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_refit_in_half_precision_is_near_that_in_float32(kind: str) -> None:
    model, options = CASES[kind]
    found, info = learned(model, HALF, structure="diagonal", **options)
    expected, _ = learned(model, jnp.float32, structure="diagonal", **options)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(y - 1).max()) > 0.02  # it has moved
        np.testing.assert_allclose(x, y, atol=0.1 * float(jnp.abs(y - 1).max()))
    assert set(info.words) == {"updated"}
    assert float(info.objective_after) < float(info.objective_before)


@pytest.mark.parametrize("structure", ["e-kfac", "kfac"])
def test_streaming_in_half_precision(structure: str) -> None:
    options = {"structure": structure, "metric": "gaussian", "refit": llqr.Streaming()}
    found, info = learned("recurrent", jnp.float16, **options)
    assert set(info.words) == {"updated"}
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(found))


def test_an_exact_step_in_half_precision() -> None:
    forward, params, x = MODELS["convolution"]
    half = params["k"].astype(HALF)
    tx = llqr.exact(optax.sgd(1.0), metric="gauss_newton", damping=0.1)
    steps = []
    for w, data in ((half, x.astype(HALF)), (half.astype(jnp.float32), x)):
        bound = llqr.Objective(forward, loss).bind(data)
        grads = {"k": jnp.full(w.shape, 0.1, w.dtype)}
        steps.append(tx.update(grads, tx.init({"k": w}), {"k": w}, objective=bound)[0]["k"])
    assert steps[0].dtype == HALF
    np.testing.assert_allclose(steps[0].astype(jnp.float32), steps[1], rtol=0.05, atol=0.01)
