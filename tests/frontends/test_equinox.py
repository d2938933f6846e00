"""Equinox: parameters are the arrays of the model; weights are (out, in, ...)."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr.integrations import equinox as llqr_equinox
from tests.frontends import digits


class ConvNet(eqx.Module):
    """Convolution, relu, dropout, linear."""

    conv: eqx.nn.Conv2d
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(0))
        self.conv = eqx.nn.Conv2d(1, 4, 3, stride=2, padding=1, key=keys[0])
        self.drop = eqx.nn.Dropout(0.2)
        self.head = eqx.nn.Linear(64, 10, key=keys[1])

    def __call__(self, x: Any, key: Any = None) -> Any:
        return self.head(self.drop(jax.nn.relu(self.conv(x)).ravel(), key=key))


def call_mlp(model: Any, batch: Any) -> Any:
    return jax.vmap(model)(digits.flat(batch))


def call_conv(model: Any, batch: Any) -> Any:
    return jax.vmap(model)(jnp.moveaxis(batch["x"], -1, 1))


@cache
def mlp() -> tuple[Any, llqr.Objective]:
    model = eqx.nn.MLP(64, 10, 16, depth=2, activation=jnp.tanh, key=jax.random.key(0))
    return model, llqr_equinox.objective(model, call_mlp, digits.cross_entropy)


@cache
def convnet() -> tuple[Any, llqr.Objective]:
    model = ConvNet()
    frozen = eqx.nn.inference_mode(model)
    return model, llqr_equinox.objective(frozen, call_conv, digits.cross_entropy)


TX = llqr.llqr(
    optax.sgd(0.1, momentum=0.9),
    structure=llqr_equinox.rules("kfac"),
    damping=0.1,
    refit=llqr.Refit(every=10, steps=20, learning_rate=1e-3),
)


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    """Run in float64, training too: the tests share their compiled steps."""
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("build", [mlp, convnet])
def test_trains_digits(build: Any) -> None:
    """Dropout on in the gradient, off in the curvature."""
    model, objective = build()

    @eqx.filter_jit
    def step(model: Any, state: Any, batch: Any, key: Any) -> Any:
        def loss(model: Any) -> Any:
            keys = jax.random.split(key, digits.BATCH)
            x = digits.flat(batch) if build is mlp else jnp.moveaxis(batch["x"], -1, 1)
            return digits.cross_entropy(jax.vmap(lambda x, k: model(x, key=k))(x, keys), batch)

        value, grads = eqx.filter_value_and_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = TX.update(grads, state, params, refresh=False)
        return eqx.apply_updates(model, updates), state, value

    state, losses = TX.init(eqx.filter(model, eqx.is_inexact_array)), []
    for i, batch in enumerate(digits.batches(60, np.float64)):
        if i % 10 == 0:
            params = eqx.filter(model, eqx.is_inexact_array)
            state = llqr.refresh(TX, state, params, objective.bind(batch))
            digits.assert_refit(llqr.find(state).refit, i // 10 + 1)
        key = jax.random.fold_in(jax.random.key(1), i)
        model, state, value = step(model, state, batch, key)
        losses.append(float(value))
    assert losses[0] > 2.0
    assert losses[-1] < 0.6


def plain_mlp(params: Any, batch: Any) -> Any:
    x = digits.flat(batch)
    for i in range(3):
        x = x @ params[f"w{i}"].T + params[f"b{i}"]
        x = jnp.tanh(x) if i < 2 else x
    return x


def plain_conv(params: Any, batch: Any) -> Any:
    x = jnp.moveaxis(batch["x"], -1, 1)
    x = jax.lax.conv_general_dilated(x, params["w0"], (2, 2), [(1, 1), (1, 1)])
    x = jax.nn.relu(x + params["b0"]).reshape(x.shape[0], -1)
    return x @ params["w1"].T + params["b1"]


@pytest.mark.parametrize(
    ("build", "layers", "plain"),
    [
        (mlp, lambda m: m.layers, plain_mlp),
        (convnet, lambda m: (m.conv, m.head), plain_conv),
    ],
    ids=["mlp", "conv"],
)
def test_step_equals_the_plain_function(build: Any, layers: Any, plain: Any) -> None:
    """The rule table by hand: weights as matrices with their first axis as rows."""
    model, objective = build()
    batch = digits.batches(1, np.float64)[0]
    params = eqx.filter(model, eqx.is_inexact_array)
    bound = objective.bind(batch)
    updates, state = TX.update(
        jax.jit(jax.grad(bound))(params), TX.init(params), params, objective=bound, refresh=True
    )
    digits.assert_refit(llqr.find(state).refit, 1)

    def as_dict(model: Any) -> dict[str, Any]:
        named = {f"w{i}": layer.weight for i, layer in enumerate(layers(model))}
        return named | {f"b{i}": layer.bias for i, layer in enumerate(layers(model))}

    tx = llqr.llqr(
        optax.sgd(0.1, momentum=0.9),
        structure=[
            llqr.Rule(match="w", structure="kfac", rows=1),
            llqr.Rule(match="*", structure="diagonal"),
        ],
        damping=0.1,
        refit=llqr.Refit(every=10, steps=20, learning_rate=1e-3),
    )
    params = as_dict(params)
    bound = llqr.Objective(plain, digits.cross_entropy).bind(batch)
    expected, _ = tx.update(
        jax.jit(jax.grad(bound))(params), tx.init(params), params, objective=bound, refresh=True
    )
    digits.assert_same_step(as_dict(updates), expected)


def test_rules_see_weights_as_out_by_in() -> None:
    params = eqx.filter(convnet()[0], eqx.is_inexact_array)
    seen = {row.leaf: (row.view, row.structure) for row in llqr.describe(TX, params).rows}
    assert seen == {
        "conv/weight": ((4, 9), "kfac"),
        "conv/bias": ((4, 1, 1), "diagonal"),
        "head/weight": ((10, 64), "kfac"),
        "head/bias": ((10,), "diagonal"),
    }


def test_rows_that_do_not_count_are_left_out() -> None:
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    kept = jnp.arange(4) < 3
    bound = llqr_equinox.objective(
        model,
        lambda model, batch: jax.vmap(model)(batch),
        lambda z, batch: jnp.mean(z**2),
        mask=lambda batch: kept,
    ).bind(jnp.ones((4, 3)))
    np.testing.assert_array_equal(bound.mask(), kept)
