"""Flax Linen: batch statistics are data, the curvature sees the inference mode."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import llqr
from llqr.integrations import linen as llqr_linen
from tests.frontends import digits


class Net(nn.Module):
    """Dense, batch norm, relu, dropout, dense."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Dense(16, use_bias=False, param_dtype=jnp.float64, name="hidden")(x)
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.8, param_dtype=jnp.float64, name="norm"
        )
        x = nn.relu(norm(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10, param_dtype=jnp.float64, name="head")(x)


MODEL = Net()


traces = []


def infer(variables: Any, batch: Any) -> Any:
    traces.append(None)
    return MODEL.apply(variables, digits.flat(batch), train=False)


OBJECTIVE = llqr_linen.objective(infer, digits.cross_entropy)


def plain(params: Any, batch: Any) -> Any:
    x = digits.flat(batch) @ params["hidden"]["kernel"]
    x = (x - batch["mean"]) / jnp.sqrt(batch["var"] + 1e-5)
    x = jax.nn.relu(x * params["norm"]["scale"] + params["norm"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


TX = llqr.llqr(
    optax.sgd(0.1, momentum=0.9),
    structure="kfac",
    damping=0.1,
    refit=llqr.Refit(every=10, steps=20, learning_rate=1e-3),
)


def train_loss(params: Any, stats: Any, batch: Any, key: Any) -> tuple[Any, Any]:
    logits, moved = MODEL.apply(
        {"params": params, "batch_stats": stats},
        digits.flat(batch),
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    return digits.cross_entropy(logits, batch), moved["batch_stats"]


@jax.jit
def step(params: Any, stats: Any, state: Any, batch: Any, key: Any) -> Any:
    gradient = jax.value_and_grad(train_loss, has_aux=True)
    (loss, stats), grads = gradient(params, stats, batch, key)
    updates, state = TX.update(grads, state, params, refresh=False)
    return optax.apply_updates(params, updates), stats, state, loss


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    """Run in float64, training too: the tests share their compiled steps."""
    with jax.enable_x64(True):
        yield


def start() -> tuple[Any, Any]:
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 64)), train=False)
    to64 = lambda x: x.astype(jnp.float64)  # noqa: E731
    # Flax keeps running statistics in float32 whatever param_dtype says.
    return variables["params"], jax.tree.map(to64, variables["batch_stats"])


def test_trains_digits() -> None:
    """Statistics that move are data: the refit compiles once."""
    params, stats = start()
    counts = []
    state, losses = TX.init(params), []
    for i, batch in enumerate(digits.batches(60, np.float64)):
        if i % 10 == 0:
            bound = llqr_linen.bind(OBJECTIVE, batch, batch_stats=stats)
            state = llqr.refresh(TX, state, params, bound)
            digits.assert_refit(llqr.find(state).refit, i // 10 + 1)
            counts.append(len(traces))
        key = jax.random.fold_in(jax.random.key(1), i)
        params, stats, state, loss = step(params, stats, state, batch, key)
        losses.append(float(loss))
    assert losses[0] > 2.0
    assert losses[-1] < 0.5
    assert counts == [counts[0]] * 6


def test_step_equals_the_plain_function() -> None:
    params, stats = start()
    warm, batch = digits.batches(2, np.float64)
    key = jax.random.key(1)
    _, stats = jax.jit(train_loss)(params, stats, warm, key)  # neither 0 nor 1
    grads, _ = jax.jit(jax.grad(train_loss, has_aux=True))(params, stats, batch, key)
    routes = (
        llqr_linen.bind(OBJECTIVE, batch, batch_stats=stats),
        llqr.Objective(plain, digits.cross_entropy).bind({**batch, **stats["norm"]}),
    )
    steps = []
    for bound in routes:
        updates, state = TX.update(grads, TX.init(params), params, objective=bound, refresh=True)
        digits.assert_refit(llqr.find(state).refit, 1)
        steps.append(updates)
    digits.assert_same_step(*steps)


def test_mask_and_loss_see_the_batch() -> None:
    params, stats = start()
    batch = digits.batches(1, np.float64)[0]
    batch["mask"] = jnp.arange(digits.BATCH) < 40
    objective = llqr_linen.objective(infer, digits.cross_entropy, mask=lambda b: b["mask"])
    bound = llqr_linen.bind(objective, batch, batch_stats=stats)
    np.testing.assert_array_equal(bound.mask(), np.arange(digits.BATCH) < 40)
    logits = infer({"params": params, "batch_stats": stats}, batch)
    np.testing.assert_array_equal(bound.outputs(params), logits)
    np.testing.assert_array_equal(bound(params), digits.cross_entropy(logits, batch))
    assert llqr_linen.bind(OBJECTIVE, batch, batch_stats=stats).mask() is None


@pytest.mark.parametrize(("width", "size"), [(64, 64), (16, 64), (4, 4)])
def test_batch_statistics_are_no_examples(width: int, size: int) -> None:
    """Whatever the width: probes see a part, and chunks and micro-batches are cut."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(width)(x))
            return nn.Dense(3)(nn.relu(x))

    net, seen = Normed(), set()
    x = jax.random.normal(jax.random.key(0), (size, 8), jnp.float32)
    data = {"x": x, "y": jnp.argmax(x[:, :3], -1)}
    variables = net.init(jax.random.key(0), x)
    params, statistics = variables["params"], variables["batch_stats"]

    def run(v: Any, batch: Any) -> Any:
        seen.add(len(batch["x"]))
        return net.apply(v, batch["x"])

    def loss(z: Any, batch: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean()

    for axes in (None, lambda batch: {"x": 0, "y": 0}):
        objective = llqr_linen.objective(run, loss, batch_axes=axes)
        bound = llqr_linen.bind(objective, data, batch_stats=statistics)
        seen.clear()
        tx = llqr.streaming(1e-2)
        state = llqr.refresh(tx, tx.init(params), params, bound)
        assert set(llqr.find(state).refit.words) == {"updated"}
        assert seen == {size // 4}
        value, _ = llqr.microbatched(4)(objective)(params, bound.batch)
        np.testing.assert_allclose(value, bound(params), rtol=1e-5)
        tx = llqr.llqr(
            optax.sgd(0.1), structure="kfac", route=llqr.Route(chunk_size=max(size // 8, 1)),
            refit=llqr.Refit(every=None, steps=2),
        )  # fmt: skip
        llqr.refresh(tx, tx.init(params), params, bound)
