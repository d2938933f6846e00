"""Layers that are scanned over, as each framework keeps them, against the same layers unrolled.

The oracle is the unrolled model: a list of layers, each leaf a matrix of its own. What P does must
be the same, so that both trainings are, step by step.
"""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import llqr
import llqr.integrations.equinox as llqr_eqx
import llqr.integrations.linen as llqr_linen
import llqr.integrations.nnx as llqr_nnx

LAYERS, WIDTH, CLASSES, STEPS = 3, 6, 4, 12
REFIT = llqr.Streaming(every=3, warmup=4, probe_share=1.0)


def batch() -> Any:
    x = jax.random.normal(jax.random.key(7), (24, WIDTH), jnp.float32)
    return {"x": x, "y": (x[:, 0] * x[:, 1] > 0) + 2 * (x[:, 2] > 0)}


def cross_entropy(logits: Any, batch: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def train(objective: Any, params: Any, tx: Any, bind: Any = None) -> list[float]:
    data, losses = batch(), []
    bound = (bind or objective.bind)(data)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(bound)(params)
        updates, state = tx.update(grads, state, params, objective=bound)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses


def unrolled(layers: Any, head: Any) -> list[float]:
    """The oracle: h <- h + tanh(h W + b) for each layer of a list, in plain JAX."""

    def forward(params: Any, batch: Any) -> Any:
        h = batch["x"]
        for layer in params["unrolled"]:
            h = h + jnp.tanh(h @ layer["kernel"] + layer["bias"])
        return h @ params["head"]

    params = {"unrolled": layers, "head": head}
    tx = llqr.streaming(0.02, structure="e-kfac", refit=REFIT)
    return train(llqr.Objective(forward, cross_entropy), params, tx)


def layers_of(kernel: Any, bias: Any, axis: int = 0) -> list[Any]:
    return [
        {"kernel": jnp.take(kernel, i, axis), "bias": jnp.take(bias, i, axis)}
        for i in range(LAYERS)
    ]


def alike(found: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    assert found[-1] < 0.9 * found[0]


class LinenLayer(nn.Module):
    names: bool

    @nn.compact
    def __call__(self, h: Any, _: Any) -> Any:
        init = nn.initializers.lecun_normal()
        if self.names:
            init = nn.with_partitioning(init, ("embed", "mlp"))
        return h + jnp.tanh(nn.Dense(WIDTH, kernel_init=init)(h)), None


class LinenNet(nn.Module):
    names: bool
    axis: int = 0

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layers = nn.scan(
            nn.remat(LinenLayer), variable_axes={"params": self.axis}, split_rngs={"params": True},
            length=LAYERS, metadata_params={nn.PARTITION_NAME: "layers"},
        )  # fmt: skip
        h, _ = layers(self.names, name="decoder")(x, None)
        return nn.Dense(CLASSES, use_bias=False, name="head")(h)


@pytest.mark.parametrize("axis", [0, 1], ids=["first", "MaxText"])
@pytest.mark.parametrize("names", [False, True])
def test_linen(names: bool, axis: int) -> None:
    net = LinenNet(names, axis)
    boxed = net.init(jax.random.key(0), batch()["x"])["params"]
    params = nn.unbox(boxed)
    objective = llqr_linen.objective(lambda v, b: net.apply(v, b["x"]), cross_entropy)
    if axis == 1 and not names:  # neither a name nor the first axis: a rule says it
        structure: Any = [
            *llqr.stacked("e-kfac", match="decoder/", stack=(1,)),
            *llqr.structures.rule_table("e-kfac"),
        ]
    else:
        structure = llqr_linen.rules(boxed, "auto")
        if names and axis == 1:  # the bias has no names of axes
            structure = [*llqr.stacked("e-kfac", match="bias", stack=(1,)), *structure]
    tx = llqr.streaming(0.02, structure=structure, refit=REFIT)
    found = train(objective, params, tx, lambda data: llqr_linen.bind(objective, data))
    layer = params["decoder"]["Dense_0"]
    alike(
        found, unrolled(layers_of(layer["kernel"], layer["bias"], axis), params["head"]["kernel"])
    )


class NNXLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, h: Any) -> Any:
        return h + jnp.tanh(self.dense(h))


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> NNXLayer:
            return NNXLayer(rngs)

        self.layers = make(rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(h: Any, layer: NNXLayer) -> Any:
            return layer(h)

        return self.head(run(x, self.layers))


@pytest.mark.parametrize("by", ["names and shapes", "rules of the model"])
def test_nnx(by: str) -> None:
    model = NNXNet(nnx.Rngs(0))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    objective = llqr_nnx.objective(model, lambda m, b: m(b["x"]), cross_entropy)
    structure: Any = "auto" if by.startswith("names") else llqr_nnx.rules(model)
    tx = llqr.streaming(0.02, structure=structure, refit=REFIT)
    found = train(objective, params, tx, lambda data: llqr_nnx.bind(objective, model, data))
    layer = params["layers"]["dense"]
    alike(found, unrolled(layers_of(layer["kernel"], layer["bias"]), params["head"]["kernel"]))


class EqxNet(eqx.Module):
    layers: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        keys, own = jax.random.split(jax.random.fold_in(key, 0), LAYERS), jax.random.fold_in(key, 1)
        self.layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(WIDTH, WIDTH, key=k))(keys)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, use_bias=False, key=own)

    def __call__(self, x: Any) -> Any:
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        h, _ = jax.lax.scan(
            lambda h, layer: (h + jnp.tanh(eqx.combine(layer, static)(h)), None), x, arrays
        )
        return self.head(h)


@pytest.mark.parametrize("by", ["names and shapes", "rules of the model"])
def test_equinox(by: str) -> None:
    model = EqxNet(jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    objective = llqr_eqx.objective(model, lambda m, b: jax.vmap(m)(b["x"]), cross_entropy)
    rules = llqr_eqx.rules("e-kfac", None if by.startswith("names") else model)
    tx = llqr.streaming(0.02, structure=rules, refit=REFIT)
    rows = {row.leaf: row for row in llqr.describe(tx, params).rows}
    assert rows["layers/weight"].stack == (LAYERS,)
    assert rows["layers/weight"].view == (WIDTH, WIDTH)
    found = train(objective, params, tx)
    kernel = jnp.swapaxes(model.layers.weight, 1, 2)
    alike(found, unrolled(layers_of(kernel, model.layers.bias), model.head.weight.T))


def test_an_embedding_is_known_by_its_module() -> None:
    """Whatever the name of its field: by Equinox's and NNX's types."""
    model = {"table": eqx.nn.Embedding(300, 4, key=jax.random.key(0))}
    table = llqr_eqx.rules("auto", model)
    (row,) = llqr.describe(llqr.streaming(0.1, structure=table), model).rows
    assert row.stored == 300 + 4 * 4 + 300 * 4

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.table = nnx.Embed(300, 4, rngs=nnx.Rngs(0))

    net = Net()
    params = nnx.as_pure(nnx.state(net, nnx.Param))
    tx = llqr.streaming(0.1, structure=llqr_nnx.rules(net))
    (row,) = llqr.describe(tx, params).rows
    assert row.stored == 300 + 4 * 4 + 300 * 4
