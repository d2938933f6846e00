"""States and gradients that do not belong together: both sides and the leaf are named."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import llqr

PARAMS = {"a": {"w": jnp.ones((3, 2))}, "b": jnp.ones(2)}
KFAC = llqr.llqr(optax.sgd(0.1), structure="kfac")


def of(**options: Any) -> Any:
    return llqr.llqr(optax.sgd(0.1), **options).init(PARAMS)


def state_of(params: Any) -> Any:
    return KFAC.init(params)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "another optimizer": (
        optax.adam(0.1).init(PARAMS),
        TypeError,
        r"llqr: .*ChainState.*got a tuple.*ScaleByAdamState",
    ),
    "the inner state": (KFAC.init(PARAMS).preconditioner, TypeError, "ChainState.*got a LLQRState"),
    "a list": (
        list(KFAC.init(PARAMS)),
        TypeError,
        r"got a list.*llqr\.restore\(tx, params, state\)",
    ),
    "a dict": (KFAC.init(PARAMS)._asdict(), TypeError, r"got a dict, with \['base', 'precond"),
    "a list inside": (
        KFAC.init(PARAMS)._replace(preconditioner=list(KFAC.init(PARAMS).preconditioner)),
        TypeError,
        "scale_by_llqr: .*LLQRState",
    ),
    "another structure": (
        of(structure="diagonal"),
        ValueError,
        "structure 'diagonal' is given to.*'diagonal', 'kfac'",
    ),
    "another limit": (
        of(structure="kfac", max_dim=2),
        ValueError,
        r"'a/w', slot 'left': the shape is \(3,\)",
    ),
    "streaming": (
        of(structure="e-kfac", refit=llqr.Streaming()),
        ValueError,
        r"llqr.Refit\(.*llqr.Streaming\(",
    ),
    "another shape": (
        state_of({"a": {"w": jnp.ones((3, 4))}, "b": jnp.ones(2)}),
        ValueError,
        "'a/w', slot 'right'",
    ),
    "other leaves": (
        state_of({"a": {"v": jnp.ones((3, 2))}, "b": jnp.ones(2)}),
        ValueError,
        "other leaves",
    ),
    "other containers": (
        state_of({"a": [jnp.ones((3, 2))], "b": jnp.ones(2)}),
        ValueError,
        "other leaves or containers",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_state_that_is_not_of_this_optimizer(kind: str) -> None:
    state, error, message = WRONG[kind]
    with pytest.raises(error, match=message):
        KFAC.update(PARAMS, state, PARAMS, refresh=False)


def test_from_outside_too() -> None:
    state = of(structure="diagonal")
    for call in (llqr.precondition, llqr.blocks, llqr.inspect):
        with pytest.raises(ValueError, match="structure 'diagonal' is given to"):
            call(KFAC, state, PARAMS)


GRADIENTS: dict[str, tuple[Any, type[Exception], str]] = {
    "a leaf is missing": ({"a": PARAMS["a"]}, ValueError, "updates lack the leaf 'b'"),
    "a leaf too many": (PARAMS | {"c": jnp.ones(1)}, ValueError, "updates have a leaf 'c'"),
    "another shape": (
        PARAMS | {"b": jnp.ones(3)},
        ValueError,
        r"'b' has the shape \(3,\) in the updates and \(2,\)",
    ),
    "a function": (PARAMS | {"b": jax.nn.relu}, TypeError, "'b' is no array but a"),
    "integers": (PARAMS | {"b": jnp.ones(2, int)}, TypeError, "'b' has dtype int"),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_a_wrong_tree(kind: str) -> None:
    grads, error, message = GRADIENTS[kind]
    with pytest.raises(error, match=message):
        KFAC.update(grads, KFAC.init(PARAMS), PARAMS, refresh=False)


def test_a_module_that_was_not_filtered() -> None:
    model = {"w": jnp.ones((3, 2)), "activation": jax.nn.relu, "name": "mlp"}
    with pytest.raises(TypeError, match=r"'activation' is no array but a .*eqx.filter"):
        KFAC.init(model)
    bound = llqr.Objective(lambda p, x: x @ p["w"], lambda z, x: jnp.mean(z**2)).bind(jnp.eye(3))
    with pytest.raises(TypeError, match="'activation' is no array"):
        llqr.linearize(bound, model, "gaussian")
