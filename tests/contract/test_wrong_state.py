"""States and gradients that do not belong together: both sides and the leaf are named."""

from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
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


def streaming(**options: Any) -> Any:
    return llqr.streaming(0.1, **options)


WIDE = {"w": jnp.ones((8, 6)), "b": jnp.ones(6)}
OTHERS: dict[str, tuple[Any, Any, str]] = {
    "kfac for e-kfac": (
        {"structure": "e-kfac"}, {"structure": "kfac"},
        "structure 'e-kfac' is given to.*'kfac'.*'spectrum': there is an array",
    ),
    "e-kfac for kfac": (
        {"structure": "kfac"}, {"structure": "e-kfac"},
        "structure 'kfac' is given to.*'e-kfac'.*'spectrum': there is no array",
    ),
    "a limit": ({}, {"max_dim": 7}, r"'e-kfac' is given to.*left diagonal.*shape is \(8, 8\), not"),
    "no limit": ({"max_dim": 7}, {}, r"'w', slot 'left': the shape is \(8,\), not \(8, 8\)"),
    "parts": ({}, {"block_size": 4}, r"'e-kfac' is given to.*not \(2, 2, 4, 4\)"),
    "no parts": ({"block_size": 4}, {}, "'e-kfac' with block_size=4 is given to"),
    "weights": ({}, {"refit": llqr.Streaming(signal_decay=None)}, "signal_decay=0.95"),
    "another probe": (
        {"refit": llqr.Streaming(signal_decay=None)},
        {"refit": llqr.Streaming(probe="gradient")},
        "another `probe`|signal_decay",
    ),
    "vectors alone": (
        {"structure": "e-kfac"}, {"structure": "kfac"},
        "structures are e-kfac or diagonal, and this one's are kfac",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_a_streaming_state_of_other_options_is_refused_in_words(kind: str) -> None:
    was, now, message = OTHERS[kind]
    params = {"b": WIDE["b"]} if kind == "vectors alone" else WIDE
    state, tx = streaming(**was).init(params), streaming(**now)
    with pytest.raises(ValueError, match=message):
        tx.update(params, state, params, refresh=False)


def as_lists(tree: Any) -> Any:
    """As a library gives back what had tuples: lists, and dicts by name for named ones."""
    if isinstance(tree, dict):
        return {key: as_lists(value) for key, value in tree.items()}
    if hasattr(tree, "_asdict"):
        return {key: as_lists(value) for key, value in tree._asdict().items()}
    return [as_lists(x) for x in tree] if isinstance(tree, tuple | list) else tree


RESTORED = {
    "flax": flax.serialization.to_state_dict,
    "lists": as_lists,
    "msgpack": lambda state: flax.serialization.msgpack_restore(
        flax.serialization.msgpack_serialize(flax.serialization.to_state_dict(state))
    ),
    "as it was": lambda state: state,
    "tuples in the place of named ones": lambda state: tuple(state),
    "keys in another order": lambda state: dict(
        reversed(flax.serialization.to_state_dict(state).items())
    ),
}


@pytest.mark.parametrize("way", RESTORED)
@pytest.mark.parametrize("params", [PARAMS, {"l": [jnp.ones((3, 2)), jnp.ones(2)]}])
def test_what_was_restored_goes_back_by_name(way: str, params: Any) -> None:
    for tx in (
        streaming(), streaming(structure="kfac"), KFAC,
        optax.chain(optax.clip(1.0), llqr.llqr(optax.sgd(0.1, momentum=0.9))),
    ):  # fmt: skip
        _, state = tx.update(params, tx.init(params), params, refresh=False)
        found = llqr.restore(tx, params, RESTORED[way](state))
        assert jax.tree.structure(found) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, found, state)


def test_what_orbax_restores_without_a_target_goes_back(tmp_path: Path) -> None:
    for i, tx in enumerate((streaming(), streaming(structure="kfac"))):
        _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, refresh=False)
        with ocp.StandardCheckpointer() as keeper:
            keeper.save(tmp_path / str(i), state)
        with ocp.StandardCheckpointer() as keeper:
            tree = keeper.restore(tmp_path / str(i))
        assert isinstance(tree, dict)
        found = llqr.restore(tx, PARAMS, tree)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, found, state)


def test_what_cannot_be_told_is_not_restored() -> None:
    tx = streaming()
    tree = flax.serialization.to_state_dict(tx.init(PARAMS))
    missing = {k: v for k, v in tree.items() if k != "base"} | {"basis": tree["preconditioner"]}
    with pytest.raises(ValueError, match=r"entry 'basis'.*did you mean 'base'"):
        llqr.restore(tx, PARAMS, missing)
    inner = tree["preconditioner"]
    with pytest.raises(ValueError, match=r"state/preconditioner: 'count' is missing"):
        llqr.restore(tx, PARAMS, tree | {"preconditioner": {"blocks": inner["blocks"]}})
    with pytest.raises(ValueError, match=r"state/preconditioner/count: the shape is \(2,\)"):
        llqr.restore(tx, PARAMS, tree | {"preconditioner": inner | {"count": jnp.zeros(2)}})
    slots = list(inner["blocks"].values())
    with pytest.raises(ValueError, match="dict with left, right, spectrum, not a list"):
        llqr.restore(tx, PARAMS, tree | {"preconditioner": inner | {"blocks": slots}})
    with pytest.raises(ValueError, match="an array, not a str"):
        llqr.restore(tx, PARAMS, tree | {"preconditioner": inner | {"count": "7"}})
