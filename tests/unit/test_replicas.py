"""Replicas under pmap and shard_map: they learn the P of the whole batch, all the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import llqr
from llqr.refit.directions import fisher_probe

ROUTE = llqr.Route(axis_name="d")


def forward(params: Any, batch: Any) -> Any:
    return jnp.tanh(batch["x"] @ params["w"]) + params["b"]


def loss(z: Any, batch: Any) -> Any:
    return jnp.mean((z - batch["x"][:, :3]) ** 2)


OBJECTIVE = llqr.Objective(forward, loss, mask=lambda batch: batch["kept"])
RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4, 3))), "b": jnp.asarray(RNG.normal(size=3))}
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(8, 4))),
    "kept": jnp.array([True, True, True, False, True, False, False, False]),
}
PARTS = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), BATCH)


def step(tx: Any) -> Any:
    def run(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.tree.map(jnp.ones_like, params)  # averaged by the caller: the same everywhere
        _, state = tx.update(grads, state, params, objective=OBJECTIVE.bind(batch))
        return tx.update(grads, state, params, objective=OBJECTIVE.bind(batch))

    return run


def replicated(how: str, tx: Any) -> Any:
    """Two steps on two replicas: updates and state of each, [2, ...]."""
    run, state = step(tx), tx.init(PARAMS)
    if how == "pmap":
        return jax.pmap(run, axis_name="d", in_axes=(None, None, 0))(PARAMS, state, PARTS)
    if how == "vmap":
        return jax.jit(jax.vmap(run, axis_name="d", in_axes=(None, None, 0)))(PARAMS, state, PARTS)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    followed = how == "shard_map"  # the types then prove that replicas are the same

    def one(*args: Any) -> Any:
        found = run(*args)
        return found if followed else jax.tree.map(lambda x: x[None], found)

    return jax.jit(
        jax.shard_map(
            one,
            mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P() if followed else P("d"),
            check_vma=followed,
        )
    )(PARAMS, state, BATCH)  # fmt: skip


REFIT = llqr.Refit(every=1, steps=3, learning_rate=0.05)
CASES = {
    "sum": ("pmap", {}),
    "mean": ("shard_map", {"divergence_reduction": "mean"}),
    "unit, chunks": (
        "shard_map",
        {"divergence_reduction": "unit", "route": llqr.Route(axis_name="d", chunk_size=3)},
    ),
    "chunked mean": (
        "unfollowed",
        {"divergence_reduction": "mean", "route": llqr.Route(axis_name=("d",), chunk_size=2)},
    ),
    "recomputed loss": (
        "vmap",
        {"metric": "gauss_newton", "route": llqr.Route(axis_name="d", memory="recomputed")},
    ),
    "newton, line search": (
        "shard_map",
        {
            "metric": "newton",
            "damping": 3.0,
            "refit": llqr.Refit(every=1, steps=2, solver="cg_back_pr+"),
        },
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_replicas_learn_the_p_of_the_whole_batch(kind: str) -> None:
    how, changes = CASES[kind]
    given = {"structure": "kfac", "metric": "gaussian", "damping": 0.1, "refit": REFIT} | changes
    tx = llqr.scale_by_llqr(**{"route": ROUTE} | given)
    found = replicated(how, tx)
    single = llqr.scale_by_llqr(**given | {"route": None})
    expected = step(single)(PARAMS, single.init(PARAMS), BATCH)
    for i in range(2):
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            one = x if how == "shard_map" else x[i]
            np.testing.assert_allclose(one, y, rtol=2e-5, atol=1e-6)
    assert llqr.find(expected[1]).refit.words == ("updated", "updated")


def test_exact_steps_of_replicas_are_those_of_the_whole_batch() -> None:
    options = {"metric": "gaussian", "damping": 0.5}
    updates, _ = replicated("pmap", llqr.exact(optax.sgd(1.0), **options, axis_name="d"))
    single = llqr.exact(optax.sgd(1.0), **options)
    expected, _ = step(single)(PARAMS, single.init(PARAMS), BATCH)
    for name in PARAMS:
        for i in range(2):
            np.testing.assert_allclose(updates[name][i], expected[name], rtol=1e-5)


@pytest.mark.parametrize("structure", ["e-kfac", "kfac"])
def test_streaming_replicas_stay_the_same(structure: str) -> None:
    refit = llqr.Streaming(every=1)
    tx = llqr.llqr(optax.sgd(0.1), structure=structure, metric="gaussian", refit=refit, route=ROUTE)
    updates, state = replicated("shard_map", tx)  # its types refuse what differs
    assert int(llqr.find(state).refit.refits) == 2
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_probes_of_replicas_have_the_curvature_of_the_whole_batch(reduction: Any) -> None:
    gaussian, number = llqr.metrics.resolve("gaussian"), 4000

    def probe(key: Any, batch: Any) -> Any:
        bound = OBJECTIVE.bind(batch)
        model = llqr.linearize(
            bound, PARAMS, "gaussian", divergence_reduction=reduction, route=ROUTE
        )
        return fisher_probe(gaussian, reduction, model, bound, key, "d")["b"]

    over_keys = jax.vmap(jax.vmap(probe, in_axes=(None, 0), axis_name="d"), in_axes=(0, None))
    drawn = np.asarray(jax.jit(over_keys)(jax.random.split(jax.random.key(0), number), PARTS))
    np.testing.assert_allclose(drawn[:, 0], drawn[:, 1])
    rows = 4 if reduction == "sum" else 1  # four rows count, and J of b is the identity
    np.testing.assert_allclose(np.cov(drawn[:, 0].T) / rows, np.eye(3), atol=0.1)


def test_refits_of_replicas_without_a_word_are_refused() -> None:
    tx = llqr.scale_by_llqr(metric="gaussian", refit=REFIT)
    with pytest.raises(ValueError, match=r"pmap.*axis_name='d'.*jax.jit with sharded"):
        replicated("pmap", tx)
    with pytest.raises(ValueError, match="drift apart"):
        replicated("pmap", llqr.exact(optax.sgd(1.0), damping=0.1, metric="gaussian"))
    alone = llqr.scale_by_llqr(metric="gaussian", refit=REFIT, route=llqr.Route(axis_name=()))
    updates, _ = replicated("pmap", alone)
    assert not np.allclose(updates["w"][0], updates["w"][1])


def test_an_axis_that_is_not_there_says_so() -> None:
    tx = llqr.scale_by_llqr(metric="gaussian", route=ROUTE)
    with pytest.raises(ValueError, match=r"axis_name='d'.*no such mapped axis"):
        llqr.refresh(tx, tx.init(PARAMS), PARAMS, OBJECTIVE.bind(BATCH))
    with pytest.raises(ValueError, match="needs the fused route"):
        llqr.Route(axis_name="d", layerwise=True)
    with pytest.raises(TypeError, match="name of a mapped axis"):
        llqr.Route(axis_name=3)  # pyright: ignore[reportArgumentType]


def test_blocks_of_devices_are_whole_in_each_replica() -> None:
    """Inside shard_map a device has no others, over which it could spread a stack."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
    tx = llqr.scale_by_llqr(structure="kfac", shard="blocks", refit=llqr.Refit(every=None))
    left = {"left": np.arange(9.0).reshape(3, 3)}
    state = llqr.install(tx, tx.init(params), params, {"b": left})

    def apply(params: Any, state: Any) -> Any:
        return tx.update(params, state, params)[0]

    run = jax.shard_map(apply, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    found = jax.jit(run)(params, state)
    np.testing.assert_array_equal(found["a"], params["a"])
    np.testing.assert_array_equal(found["b"], left["left"] @ params["b"])


def test_minibatch_probes_of_replicas_are_of_rows_of_their_own() -> None:
    """Of two like parts, else, the mean of two draws would be the draw of one."""
    part = jax.tree.map(lambda x: x[:4], BATCH)
    refit = llqr.Refit(every=None, steps=1, probe="minibatch", learning_rate=0.01, seed=2)
    options = {"metric": "gaussian", "divergence_reduction": "mean", "refit": refit}
    alone, both = (llqr.scale_by_llqr(**options, route=route) for route in (None, ROUTE))

    def run(part: Any, tx: Any = both) -> Any:
        state = llqr.refresh(tx, tx.init(PARAMS), PARAMS, OBJECTIVE.bind(part))
        return state.blocks["spectrum"]["b"], state.refit.count("updated")

    expected, one = run(part, alone)
    found, two = jax.pmap(run, axis_name="d")(jax.tree.map(lambda x: jnp.stack([x, x]), part))
    assert [int(one), *two.tolist()] == [2, 2, 2]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - expected).max() > 1e-4
