"""What a batch may hold, and batches that cannot be cut between examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)))
W = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))}
CHUNKS = llqr.Route(chunk_size=4)


def mean_square(z: Any, b: Any) -> Any:
    return jnp.mean(z**2)


def dropped(p: Any, b: Any) -> Any:
    kept = jax.random.bernoulli(b["key"], 0.5, b["x"].shape)
    return jnp.where(kept, b["x"], 0.0) @ p["w"]


def dropped_each(p: Any, b: Any) -> Any:
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(b["key"])
    return jnp.where(kept, b["x"], 0.0) @ p["w"]


COUPLED = {
    "contrastive": lambda p, b: (b["x"] @ p["w"]) @ (b["x"] @ p["w"]).T,
    "a key for all": dropped,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["contrastive", "a key for all"])
@pytest.mark.parametrize("per_example", [False, True])
def test_examples_that_interact_are_not_cut(kind: str, per_example: bool) -> None:
    bound = llqr.Objective(COUPLED[kind], mean_square).bind({"x": X, "key": jax.random.key(0)})
    refit = llqr.Refit(steps=1, per_example=per_example)
    tx = llqr.scale_by_llqr(metric="gaussian", refit=refit, route=None if per_example else CHUNKS)
    with pytest.raises(ValueError, match=r"examples interact|random key that all examples share"):
        llqr.refresh(tx, tx.init(W), W, bound)


def test_keys_that_are_not_shared_or_not_used_are_no_fault() -> None:
    one, each = jax.random.key(0), jax.random.split(jax.random.key(0), 8)
    for forward, key in ((dropped_each, each), (lambda p, b: b["x"] @ p["w"], one)):
        bound = llqr.Objective(forward, mean_square).bind({"x": X, "key": key})
        found = llqr.linearize(bound, W, "gaussian", route=CHUNKS)
        expected = llqr.linearize(bound, W, "gaussian")
        np.testing.assert_allclose(found.outputs, expected.outputs, rtol=1e-5)
        np.testing.assert_allclose(found.product(W)["w"], expected.product(W)["w"], rtol=1e-5)


@pytest.mark.parametrize("traced", [False, True])
def test_strings_and_python_bools_in_a_batch_are_options(traced: bool) -> None:
    def forward(p: Any, b: Any) -> Any:
        z = b["x"] @ p["w"]
        return jnp.tanh(z) if b["squash"] and b["task"] == "a" else z

    def model(x: Any) -> Any:
        bound = llqr.Objective(forward, mean_square).bind({"x": x, "squash": True, "task": "a"})
        return llqr.linearize(bound, W, "gaussian", route=CHUNKS).outputs

    np.testing.assert_allclose(
        (jax.jit(model) if traced else model)(X), jnp.tanh(X @ W["w"]), rtol=1e-5
    )
    bound = llqr.Objective(forward, mean_square).bind({"x": X, "squash": False, "task": "a"})
    tx = llqr.llqr(optax.sgd(0.1), metric="gaussian", refit=llqr.Refit(steps=1))
    assert llqr.find(llqr.refresh(tx, tx.init(W), W, bound)).refit.words == ("updated",)
    np.testing.assert_allclose(bound(W), jnp.mean((X @ W["w"]) ** 2), rtol=1e-5)


@pytest.mark.parametrize("route", [llqr.Route(), CHUNKS, llqr.Route(memory="recomputed")])
def test_an_output_that_is_no_float_is_named(route: llqr.Route) -> None:
    def forward(p: Any, b: Any) -> Any:
        z = b["x"] @ p["w"]
        return {"logits": z, "class": jnp.argmax(z, axis=-1)}

    bound = llqr.Objective(forward, lambda z, b: jnp.mean(z["logits"])).bind({"x": X})
    metric = {"logits": "ngd", "class": None}
    with pytest.raises(TypeError, match=r"output 'class'.*has dtype int.*floating-point"):
        llqr.linearize(bound, W, metric, route=route)


@pytest.mark.parametrize(("share", "examples"), [(0.25, 3), (0.35, 4), (0.01, 1), (0.8, 5)])
def test_a_part_of_a_batch_is_rounded_up(share: float, examples: int) -> None:
    """Of 10, to 3, 4, 1 and 8, of which two chunks would leave 2 over, and hold 5 each."""
    bound = llqr.Objective(lambda w, x: w * x, lambda z, x: jnp.mean(z)).bind(jnp.arange(10.0))
    assert len(bound.part(share, 0).batch) == examples
