"""Flax NNX: split and merge, and `nnx.Optimizer`, on a network with batch norm and dropout."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import llqr
from llqr.integrations import nnx as llqr_nnx
from tests.frontends import digits


class Net(nnx.Module):
    """Convolution, batch norm, relu, dropout, linear."""

    def __init__(self) -> None:
        rngs, dtype = nnx.Rngs(0), jnp.float64
        self.conv = nnx.Conv(
            1, 4, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs, param_dtype=dtype
        )
        self.norm = nnx.BatchNorm(4, momentum=0.8, rngs=rngs, param_dtype=dtype)
        # Flax keeps running statistics in float32 whatever param_dtype says.
        self.norm.mean = nnx.BatchStat(jnp.zeros(4, dtype))
        self.norm.var = nnx.BatchStat(jnp.ones(4, dtype))
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs, param_dtype=dtype)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.reshape(x.shape[0], -1)))


def plain(params: Any, batch: Any) -> Any:
    """Evaluate the same network as a function of nested dicts, in evaluation mode."""
    x = jax.lax.conv_general_dilated(
        batch["x"],
        params["conv"]["kernel"],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = (x - batch["mean"]) / jnp.sqrt(batch["var"] + 1e-5)
    x = jax.nn.relu(x * params["norm"]["scale"] + params["norm"]["bias"])
    return x.reshape(x.shape[0], -1) @ params["head"]["kernel"] + params["head"]["bias"]


def call(model: Net, batch: Any) -> Any:
    return model(batch["x"])


def train_loss(model: Net, batch: Any) -> Any:
    return digits.cross_entropy(call(model, batch), batch)


@cache
def curvature_objective() -> llqr.Objective:
    """Return the objective in evaluation mode: one object, so that a refit compiles once."""
    model = Net()
    model.eval()
    return llqr_nnx.objective(model, call, digits.cross_entropy)


def bind(model: Net, batch: Any) -> llqr.BoundObjective:
    return llqr_nnx.bind(curvature_objective(), model, batch)


@cache
def optimizer() -> Any:
    """Return one optimizer for all tests, so that steps compile once; refits at 0, 10, ..."""
    return llqr.llqr(
        optax.sgd(0.1, momentum=0.9),
        structure="kfac",
        damping=0.1,
        refit=llqr.Refit(every=10, steps=20, learning_rate=1e-3),
    )


@nnx.jit
def step(model: Net, opt: nnx.Optimizer, batch: Any) -> Any:
    loss, grads = nnx.value_and_grad(train_loss)(model, batch)
    opt.update(model, grads, refresh=False)
    return loss


@nnx.jit
def step_with_refit(model: Net, opt: nnx.Optimizer, batch: Any, bound: Any) -> Any:
    loss, grads = nnx.value_and_grad(train_loss)(model, batch)
    opt.update(model, grads, objective=bound)
    return loss


def record(opt: nnx.Optimizer) -> llqr.RefitInfo:
    return llqr.find(nnx.as_pure(opt.opt_state)).refit


def assert_trained(losses: list[Any]) -> None:
    assert float(losses[0]) > 2.0  # ten classes: log 10 = 2.3
    assert float(losses[-1]) < 0.6


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    """Run in float64, training too: the tests share their compiled steps."""
    with jax.enable_x64(True):
        yield


def test_functional_split_and_merge_trains() -> None:
    model, tx = Net(), optimizer()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    state = tx.init(params)

    @jax.jit
    def functional_step(params: Any, rest: Any, state: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            merged = nnx.merge(graphdef, params, rest)
            value = train_loss(merged, batch)
            return value, nnx.as_pure(nnx.state(merged, nnx.Not(nnx.Param)))

        (value, new_rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, refresh=False)
        return optax.apply_updates(params, updates), new_rest, state, value

    losses = []
    for i, batch in enumerate(digits.batches(60, np.float64)):
        if i % 10 == 0:
            bound = bind(nnx.merge(graphdef, params, rest), batch)
            state = llqr.refresh(tx, state, params, bound)
            digits.assert_refit(llqr.find(state).refit, i // 10 + 1)
        params, rest, state, value = functional_step(params, rest, state, batch)
        losses.append(value)
    assert_trained(losses)


@pytest.mark.parametrize("place", ["outside jit", "inside jit"])
def test_optimizer_trains(place: str) -> None:
    model = Net()
    opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    losses = []
    for i, batch in enumerate(digits.batches(60, np.float64)):
        if place == "inside jit":
            losses.append(step_with_refit(model, opt, batch, bind(model, batch)))
        else:
            if i % 10 == 0:
                llqr_nnx.refresh(opt, model, bind(model, batch))
            losses.append(step(model, opt, batch))
        if i % 10 == 0:
            digits.assert_refit(record(opt), i // 10 + 1)
    assert int(record(opt).refits) == 6
    assert_trained(losses)


def test_refits_inside_and_outside_of_jit_agree() -> None:
    results = []
    for place in ("outside", "refresh in nnx.jit", "update in nnx.jit"):
        model = Net()
        opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
        for i, batch in enumerate(digits.batches(2, np.float64)):
            if i == 0 and place == "outside":
                llqr_nnx.refresh(opt, model, bind(model, batch))
            elif i == 0 and place == "refresh in nnx.jit":
                nnx.jit(llqr_nnx.refresh)(opt, model, bind(model, batch))
            if place == "update in nnx.jit":
                step_with_refit(model, opt, batch, bind(model, batch))
            else:
                step(model, opt, batch)
        digits.assert_refit(record(opt), 1)
        results.append(nnx.as_pure(nnx.state(model, nnx.Param)))
    digits.assert_same_step(results[1], results[0])
    digits.assert_same_step(results[2], results[0])


def test_step_equals_the_plain_function() -> None:
    """Gradient in training mode, curvature in evaluation mode, the step by both routes."""
    model, tx = Net(), optimizer()
    warm, batch = digits.batches(2, np.float64)
    nnx.jit(train_loss)(model, warm)  # statistics that are neither 0 nor 1
    bound = bind(model, batch)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    data = {**batch, "mean": model.norm.mean[...], "var": model.norm.var[...]}
    grads = nnx.as_pure(nnx.jit(nnx.grad(train_loss))(model, batch))
    updates, state = tx.update(grads, tx.init(params), params, objective=bound, refresh=True)

    grads, params = nnx.to_pure_dict(grads), nnx.to_pure_dict(params)
    bound = llqr.Objective(plain, digits.cross_entropy).bind(data)
    expected, other = tx.update(grads, tx.init(params), params, objective=bound, refresh=True)
    digits.assert_refit(llqr.find(state).refit, 1)
    digits.assert_same_step(updates, expected)
    for name in ("objective_before", "objective_after"):
        recorded, wanted = (getattr(llqr.find(s).refit, name) for s in (state, other))
        np.testing.assert_allclose(recorded, wanted, rtol=1e-6)  # stored in float32


def test_leaves_are_named_without_flax_wrappers() -> None:
    state = nnx.state(Net(), nnx.Param)
    described = llqr.describe(optimizer(), state)
    assert [row.leaf for row in described.rows] == [
        "conv/kernel",
        "head/bias",
        "head/kernel",
        "norm/bias",
        "norm/scale",
    ]
    assert described == llqr.describe(optimizer(), nnx.to_pure_dict(state))


def test_refresh_leaves_model_and_other_optimizer_state_alone() -> None:
    model = Net()
    opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    first, second = digits.batches(2, np.float64)
    step(model, opt, first)

    def snapshot() -> list[np.ndarray]:
        state = nnx.as_pure(opt.opt_state)
        model_state = nnx.as_pure(nnx.state(model))
        kept = (state.base, state.preconditioner.count, model_state, opt.step[...])
        is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
        return [np.array(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(kept)]

    before = snapshot()
    llqr_nnx.refresh(opt, model, bind(model, second))
    after = snapshot()
    assert int(record(opt).refits) == 1
    assert len(before) == len(after)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_refit_inside_the_step_moves_no_statistics_and_draws_no_mask() -> None:
    batch = digits.batches(1, np.float64)[0]
    ends = []
    for refit in (True, False):
        model = Net()
        opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
        if refit:
            step_with_refit(model, opt, batch, bind(model, batch))
        else:
            step(model, opt, batch)
        assert int(record(opt).refits) == refit
        ends.append((model.norm.mean[...], model.norm.var[...], model.drop.rngs.count[...]))
    for x, y in zip(*ends, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-13)
    assert float(jnp.abs(ends[0][0]).max()) > 0  # they did move


def test_rows_that_do_not_count_are_left_out() -> None:
    """The mask sees the batch alone, and not the model's other state beside it."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    objective = llqr_nnx.objective(
        model,
        lambda model, batch: model(batch["x"]),
        lambda z, batch: jnp.mean(z**2),
        mask=lambda batch: batch["kept"],
    )
    batch = {"x": jnp.ones((4, 3)), "kept": jnp.arange(4) < 3}
    np.testing.assert_array_equal(llqr_nnx.bind(objective, model, batch).mask(), batch["kept"])


def test_a_filter_that_is_not_the_same_everywhere_is_named() -> None:
    """Trained are the LoRA's two variables, and the objective is over the model's four."""
    model = nnx.LoRALinear(8, 3, lora_rank=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, llqr.streaming(1e-2), wrt=nnx.LoRAParam)
    x = jax.random.normal(jax.random.key(0), (16, 8), jnp.float32)
    data = {"x": x, "y": jnp.argmax(x[:, :3], -1)}

    def loss(z: Any, batch: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean()

    objective = llqr_nnx.objective(model, lambda m, b: m(b["x"]), loss)
    state = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda m: loss(m(x), data), argnums=state)(model)
    bound = llqr_nnx.bind(objective, model, data)
    for call in (
        lambda: optimizer.update(model, grads, objective=bound),
        lambda: llqr_nnx.refresh(optimizer, model, bound),
    ):
        with pytest.raises(ValueError, match=r"2 variables are trained.*wrt=.*bind\(\.\.\., wrt"):
            call()
    optimizer.update(model, grads, objective=llqr_nnx.bind(objective, model, data, nnx.LoRAParam))
