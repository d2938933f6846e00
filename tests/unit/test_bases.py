"""Bases behind a streaming P: what remembers gradients is refused, whatever its state is called."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import llqr

PARAMS = {"a": {"kernel": jnp.ones((3, 2))}, "b": jnp.ones(2)}
STREAMING = llqr.Streaming()

REMEMBER = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3),
    "amsgrad": optax.amsgrad(1e-3),
    "lion": optax.lion(1e-3),
    "adabelief": optax.adabelief(1e-3),
    "adan": optax.adan(1e-3),
    "novograd": optax.novograd(1e-3),
    "adagrad": optax.adagrad(0.1),
    "sm3": optax.sm3(0.1),
    "rprop": optax.rprop(0.1),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "rmsprop": optax.rmsprop(1e-3),
    "yogi": optax.yogi(1e-3),
    "ema": optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "lbfgs": optax.lbfgs(),
    "a momentum of one leaf": optax.partition(
        {"m": optax.sgd(0.1, momentum=0.9), "p": optax.sgd(0.1)},
        {"a": {"kernel": "p"}, "b": "m"},
    ),
}

PLAIN = {
    "sgd": optax.sgd(0.1),
    "a schedule": optax.sgd(optax.linear_schedule(0.1, 0.0, 100)),
    "decay": optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.1)),
    "a mask": optax.chain(
        optax.add_decayed_weights(0.1, {"a": {"kernel": True}, "b": False}), optax.sgd(0.1)
    ),
    "clipping": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "injected": optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.0, 100)),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    "two rates": optax.partition(
        {"slow": optax.sgd(0.01), "fast": optax.sgd(0.1)}, {"a": {"kernel": "slow"}, "b": "fast"}
    ),
}


@pytest.fixture(autouse=True)
def _standard_promotion() -> Any:
    """Optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def wrapped(base: Any, **changes: Any) -> Any:
    return llqr.llqr(base, structure="e-kfac", refit=llqr.Streaming(**changes))


@pytest.mark.parametrize("name", REMEMBER)
def test_a_base_that_remembers_gradients_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"the base optimizer keeps a memory .* llqr\.streaming"):
        wrapped(REMEMBER[name]).init(PARAMS)


@pytest.mark.parametrize("name", PLAIN)
def test_a_base_that_does_not_is_taken(name: str) -> None:
    shapes = jax.eval_shape(wrapped(PLAIN[name]).init, PARAMS)
    assert jax.tree.leaves(shapes)


def test_without_momentum_of_its_own_p_may_have_one_behind_it() -> None:
    """A momentum; not second moments, nor a sign, nor one behind something that is not linear."""
    for name in ("momentum", "ema"):
        wrapped(REMEMBER[name], momentum=0.0).init(PARAMS)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    others = ("adam", "lion", "adagrad", "novograd", "rprop", "lbfgs")
    for base in (clipped, *(REMEMBER[name] for name in others)):
        with pytest.raises(ValueError, match="keeps a memory of gradients"):
            wrapped(base, momentum=0.0).init(PARAMS)


def test_the_leaf_is_named() -> None:
    with pytest.raises(ValueError, match="'0/trace/a/kernel'"):
        wrapped(REMEMBER["momentum"]).init(PARAMS)
