"""Streaming from gradients alone in the loops and wrappers that take any optax optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec

import llqr

REFIT = llqr.Streaming(probe="gradient", every=2, warmup=3)


@pytest.fixture(autouse=True)
def _promotion() -> Any:
    """Wrappers of optax mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def streaming(rate: Any = 0.05, **options: Any) -> Any:
    return llqr.streaming(rate, refit=REFIT, **options)


def params() -> Any:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (4, 8)) / 2, "bias": jnp.zeros(8)},
        "b": {"kernel": jax.random.normal(keys[1], (8, 3)) / 3},
    }


def batch() -> tuple[Any, Any]:
    x = jax.random.normal(jax.random.key(1), (32, 4))
    return x, jnp.sin(2 * x[:, :3])


def loss(p: Any, data: Any) -> Any:
    x, y = data
    h = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"])
    return jnp.mean((h @ p["b"]["kernel"] - y) ** 2)


def train(tx: Any, steps: int = 60, function: Any = loss, start: Any = None) -> tuple[Any, Any]:
    """Train by a loop that knows optax alone."""
    p = params() if start is None else start
    state, data = tx.init(p), batch()

    @jax.jit
    def step(p: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(function)(p, data), state, p)
        return optax.apply_updates(p, updates), state

    for _ in range(steps):
        p, state = step(p, state)
    return p, state


def falls(p: Any, share: float = 0.5) -> bool:
    return float(loss(p, batch())) < share * float(loss(params(), batch()))


LABELS = {"a": "ours", "b": "adam"}
WRAPPED = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(10.0), streaming()),
    "masked": lambda: optax.chain(
        optax.masked(streaming(), {"a": True, "b": False}),
        optax.masked(optax.sgd(0.1), {"a": False, "b": True}),
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"ours": streaming(), "adam": optax.adam(1e-2)}, LABELS
    ),
    "partition": lambda: optax.partition({"ours": streaming(), "adam": optax.adam(1e-2)}, LABELS),
    "MultiSteps": lambda: optax.MultiSteps(streaming(), every_k_schedule=2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda learning_rate: streaming(learning_rate)
    )(learning_rate=optax.cosine_decay_schedule(0.05, 100)),
    "apply_if_finite": lambda: optax.apply_if_finite(streaming(), 3),
    "schedule_free": lambda: optax.contrib.schedule_free(streaming(), 0.05, b1=0.5),
    "a schedule and a decay": lambda: streaming(
        optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, 60), weight_decay=1e-3
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_of_optax(name: str) -> None:
    tx = WRAPPED[name]()
    p, state = train(tx)
    assert falls(p), float(loss(p, batch()))
    assert int(llqr.find(state).refit.refits) > 3


def test_masked_is_what_stands_alone() -> None:
    """The masked part goes as it would without the rest."""
    tx = optax.masked(streaming(), {"a": True, "b": False})
    grads, p = jax.grad(loss)(params(), batch()), params()
    both, _ = tx.update(grads, tx.init(p), p)
    alone = streaming()
    one, _ = alone.update({"a": grads["a"]}, alone.init({"a": p["a"]}), {"a": p["a"]})
    jax.tree.map(np.testing.assert_array_equal, both["a"], one["a"])
    np.testing.assert_array_equal(both["b"]["kernel"], grads["b"]["kernel"])


def test_multi_steps_is_the_mean_of_gradients() -> None:
    plain = streaming(structure="diagonal")
    tx = optax.MultiSteps(plain, every_k_schedule=2)
    p, data = params(), batch()
    halves = [jax.tree.map(lambda x, i=i: x[i::2], data) for i in range(2)]
    state = tx.init(p)
    for half in halves:
        updates, state = tx.update(jax.grad(loss)(p, half), state, p)
    expected, _ = plain.update(jax.grad(loss)(p, data), plain.init(p), p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), updates, expected)


def test_a_train_state_of_linen() -> None:
    data = batch()
    state = TrainState.create(apply_fn=None, params=params(), tx=streaming())

    @jax.jit
    def step(state: Any) -> Any:
        return state.apply_gradients(grads=jax.grad(loss)(state.params, data))

    for _ in range(60):
        state = step(state)
    assert falls(state.params)
    assert int(llqr.find(state.opt_state).count) == 60


def test_an_optimizer_of_nnx() -> None:
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(8, 3, rngs=nnx.Rngs(1))
    )
    optimizer, (x, y) = nnx.Optimizer(model, streaming(), wrt=nnx.Param), batch()
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)

    def mean_square(model: Any) -> Any:
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        value, grads = nnx.value_and_grad(mean_square)(model)
        optimizer.update(model, grads)
        return value

    first, *_, last = [float(step(model, optimizer)) for _ in range(60)]
    assert last < 0.3 * first


def test_inside_a_scan_and_with_micro_batches() -> None:
    tx, data = streaming(structure="diagonal"), batch()

    def step(carry: Any, _: Any) -> Any:
        p, state = carry
        value, grads = llqr.microbatched(4)(loss)(p, data)
        updates, state = tx.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 60))
    (p, _), values = run((params(), tx.init(params())))
    assert falls(p)
    q, _ = train(streaming(structure="diagonal"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), p, q)
    assert values[-1] < values[0]


def test_replicas_that_average_gradients_themselves() -> None:
    """pmap and shard_map: each replica has the mean gradient, and the same P.

    Diagonal, as rounding turns bases where second moments have not full rank.
    """
    tx, devices = streaming(structure="diagonal"), jax.devices()[:2]
    x, y = batch()
    halves = (x.reshape(2, 16, 4), y.reshape(2, 16, 3))

    def step(p: Any, state: Any, data: Any) -> Any:
        grads = jax.lax.pmean(jax.grad(loss)(p, data), "i")
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    expected, _ = train(tx, 10)
    run = jax.pmap(step, "i", devices=devices)
    p, state = (
        jax.tree.map(lambda x: jnp.stack([x] * 2), t) for t in (params(), tx.init(params()))
    )
    for _ in range(10):
        p, state = run(p, state, halves)
    for side in range(2):
        found = jax.tree.map(lambda x, side=side: x[side], p)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, expected)

    mesh = jax.sharding.Mesh(np.array(devices), ("i",))
    spec = PartitionSpec()
    mapped = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(spec, spec, PartitionSpec("i")), out_specs=(spec, spec)
        )
    )
    p, state = params(), tx.init(params())
    for _ in range(10):
        p, state = jax.block_until_ready(mapped(p, state, (x, y)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), p, expected)


def contrastive(p: Any, data: Any) -> Any:
    x, _ = data
    noise = 0.1 * jnp.roll(x, 1, axis=1)
    left, right = (jnp.tanh(v @ p["a"]["kernel"]) @ p["b"]["kernel"] for v in (x, x + noise))
    pairs = optax.softmax_cross_entropy_with_integer_labels(left @ right.T, jnp.arange(len(x)))
    return jnp.mean(pairs)


def policy_gradient(p: Any, data: Any) -> Any:
    """REINFORCE with fixed actions and advantages: no likelihood of anything."""
    x, _ = data
    scores = jax.nn.log_softmax(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"])
    advantage = jnp.sign(x[:, 0])
    actions = (x[:, 1] > 0).astype(jnp.int32)
    return -jnp.mean(jnp.take_along_axis(scores, actions[:, None], 1)[:, 0] * advantage)


@pytest.mark.parametrize("function", [contrastive, policy_gradient])
def test_losses_that_are_no_function_of_outputs(function: Any) -> None:
    p, _ = train(streaming(), 40, function)
    before, after = (float(function(q, batch())) for q in (params(), p))
    assert after < before - 0.05 * abs(before)


def test_two_players() -> None:
    """Adversarial: each has an optimizer of its own, and gradients of opposite signs."""
    tx = streaming(0.02)
    players = (params(), params())
    states = tuple(map(tx.init, players))

    def value(p: Any, q: Any) -> Any:
        return loss(p, batch()) - 0.1 * sum(jnp.sum(x**2) for x in jax.tree.leaves(q))

    @jax.jit
    def step(players: Any, states: Any) -> Any:
        down, up = jax.grad(value, (0, 1))(*players)
        found = [
            tx.update(g, s, p)
            for g, s, p in zip((down, jax.tree.map(jnp.negative, up)), states, players, strict=True)
        ]
        moved = [optax.apply_updates(p, u) for p, (u, _) in zip(players, found, strict=True)]
        return tuple(moved), tuple(s for _, s in found)

    for _ in range(80):
        players, states = step(players, states)
    assert falls(players[0])
    assert sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(players[1])) < 1.0


def test_complex_leaves_are_pairs() -> None:
    target = jnp.array([[1 + 2j, -1j], [0.5, 2 - 1j]])
    start = {"w": jnp.zeros((2, 2), complex)}

    def distance(p: Any, _: Any) -> Any:
        return jnp.sum(jnp.abs(p["w"] - target) ** 2)

    with pytest.raises(TypeError, match=r"'w'.*pair of real.*split_real_and_imaginary"):
        streaming().init(start)
    tx = optax.contrib.split_real_and_imaginary(streaming(0.1))
    p, state = start, tx.init(start)
    for _ in range(120):
        grads = jax.tree.map(jnp.conj, jax.grad(distance)(p, None))
        updates, state = tx.update(grads, state, p)
        p = optax.apply_updates(p, updates)
    assert float(distance(p, None)) < 0.1
