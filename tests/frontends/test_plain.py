"""Plain functions and pytrees: the front end that every other one is compared to."""

from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llqr
from tests.frontends import digits

HIDDEN = 16


def mlp_params(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    layers = {
        "hidden": {"kernel": rng.normal(size=(64, HIDDEN)) / 8, "bias": np.zeros(HIDDEN)},
        "head": {"kernel": rng.normal(size=(HIDDEN, 10)) / 4, "bias": np.zeros(10)},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), layers)


def mlp(params: Any, batch: Any) -> Any:
    x = jnp.tanh(digits.flat(batch) @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


OBJECTIVE = llqr.Objective(mlp, digits.cross_entropy)


def train(tx: Any, steps: int, every: int) -> tuple[float, float, list[Any]]:
    """Train in jit, refit outside; return the first loss, the last and the refits' records."""

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(OBJECTIVE)(params, batch)
        updates, state = tx.update(grads, state, params, refresh=False)
        return optax.apply_updates(params, updates), state, loss

    params = mlp_params()
    state = tx.init(params)
    losses, records = [], []
    for i, batch in enumerate(digits.batches(steps)):
        if i % every == 0:
            state = llqr.refresh(tx, state, params, OBJECTIVE.bind(batch))
            records.append(llqr.find(state).refit)
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return losses[0], losses[-1], records


def test_trains_digits() -> None:
    refit = llqr.Refit(steps=20, learning_rate=3e-3)
    tx = llqr.llqr(optax.sgd(0.2, momentum=0.9), structure="e-kfac", damping=0.1, refit=refit)
    first, last, records = train(tx, steps=60, every=15)
    assert first > 2.0  # ten classes: log 10 = 2.3
    assert last < 0.25
    for number, record in enumerate(records, start=1):
        digits.assert_refit(record, number)


def test_refit_inside_the_compiled_step_follows_the_schedule() -> None:
    refit = llqr.Refit(every=15, steps=20, learning_rate=3e-3)
    tx = llqr.llqr(optax.sgd(0.2, momentum=0.9), structure="kfac", damping=0.1, refit=refit)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(OBJECTIVE)(params, batch)
        updates, state = tx.update(grads, state, params, objective=OBJECTIVE.bind(batch))
        return optax.apply_updates(params, updates), state, loss

    params = mlp_params()
    state = tx.init(params)
    for i, batch in enumerate(digits.batches(60)):
        params, state, loss = step(params, state, batch)
        if i % 15 == 0:
            digits.assert_refit(llqr.find(state).refit, i // 15 + 1)
    assert int(llqr.find(state).refit.refits) == 4
    assert float(loss) < 0.25


EXACT = llqr.scale_by_llqr(
    structure="kfac", damping=0.1, refit=llqr.Refit(steps=10, learning_rate=1e-3)
)
"""For the float64 comparisons: one object, so that its refit compiles once."""

Layer = namedtuple("Layer", "kernel bias")


def test_any_pytree_gives_the_same_step() -> None:
    """A list of named tuples instead of dicts: other paths and another order, one model."""

    def to_list(params: Any) -> Any:
        return [Layer(**params["hidden"]), Layer(**params["head"])]

    def forward(layers: Any, batch: Any) -> Any:
        x = digits.flat(batch)
        for i, layer in enumerate(layers):
            x = x @ layer.kernel + layer.bias
            x = jnp.tanh(x) if i == 0 else x
        return x

    with jax.enable_x64(True):
        params, batch = mlp_params(np.float64), digits.batches(1, np.float64)[0]
        steps = []
        for objective, start in (
            (OBJECTIVE, params),
            (llqr.Objective(forward, digits.cross_entropy), to_list(params)),
        ):
            grads = jax.grad(objective)(start, batch)
            updates, state = EXACT.update(
                grads, EXACT.init(start), start, objective=objective.bind(batch), refresh=True
            )
            digits.assert_refit(llqr.find(state).refit, 1)
            steps.append(updates)
        digits.assert_same_step(steps[1], to_list(steps[0]))


def test_refit_objective_is_the_quadratic_model_of_the_step() -> None:
    """The recorded Phi before and after are J(-g) and J(-P g), computed here from scratch."""
    with jax.enable_x64(True):
        params, batch = mlp_params(np.float64), digits.batches(1, np.float64)[0]
        bound = OBJECTIVE.bind(batch)
        grads = jax.grad(bound)(params)
        step, state = EXACT.update(grads, EXACT.init(params), params, objective=bound, refresh=True)

        def quadratic(u: Any) -> float:
            logits, v = jax.jvp(bound.outputs, (params,), (u,))
            s = jax.nn.softmax(logits)
            curvature = jnp.sum(s * v**2) - jnp.sum(jnp.sum(s * v, axis=1) ** 2)
            slope = optax.tree.vdot(grads, u)
            return float(slope + 0.5 * curvature + 0.05 * optax.tree.vdot(u, u))

        for recorded, direction in (
            (state.refit.objective_before, grads),
            (state.refit.objective_after, step),
        ):
            expected = quadratic(jax.tree.map(jnp.negative, direction))
            np.testing.assert_allclose(float(recorded), expected, rtol=1e-6)  # stored in float32
