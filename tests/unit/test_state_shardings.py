"""Where the arrays of an optimizer lie: bytes per device, errors, and the numbers of one device."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import llqr

P = PartitionSpec
WHOLE = ("scalar", "dense", "low-rank-memory", "low-rank-memory-asym")
"""A number each, or blocks of a module, which lie like its first leaf: here that is a bias."""


def shapes(mesh: Any) -> Any:
    """Parameters of which matrices are spread over four devices."""
    like = {
        "w": ((64, 32), P("d")), "k": ((3, 3, 16, 32), P(None, None, None, "d")), "b": ((4,), P()),
    }  # fmt: skip
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in like.items()
    }


@pytest.mark.parametrize("refit", [llqr.Refit(), llqr.Streaming()], ids=["published", "streaming"])
@pytest.mark.parametrize("name", llqr.STRUCTURES)
def test_every_structure_is_spread(name: str, refit: Any) -> None:
    params = shapes(AbstractMesh((4,), ("d",)))
    try:
        tx = llqr.scale_by_llqr(structure=name, refit=refit, metric="gaussian")
    except ValueError:
        pytest.skip("a structure that does not stream")
    found, state = llqr.state_shardings(tx, params), jax.eval_shape(tx.init, params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    arrays, onto = ((s.blocks, s.stream) for s in (state, found))
    pairs = list(zip(jax.tree.leaves(arrays), jax.tree.leaves(onto), strict=True))
    total = sum(x.size for x, _ in pairs)
    held = sum(math.prod(s.shard_shape(x.shape)) for x, s in pairs)
    assert held <= total if name in WHOLE else held < 0.27 * total


def test_what_belongs_to_a_parameter_lies_like_it() -> None:
    params = shapes(AbstractMesh((4,), ("d",)))
    tx = llqr.llqr(optax.adam(0.1), structure="e-kfac", metric="gaussian")
    found = llqr.state_shardings(tx, params)
    for name, like in params.items():
        assert found.base[0].mu[name] == found.base[0].nu[name] == like.sharding
    blocks = found.preconditioner.blocks
    assert blocks["spectrum"]["w"] == params["w"].sharding
    assert blocks["spectrum"]["k"].spec == P(None, "d"), "by the axis of its length"
    assert blocks["left"]["w"].spec == blocks["right"]["w"].spec == P("d", None)
    assert blocks["left"]["b"] is None
    assert found.preconditioner.count.spec == P()


def test_a_parameter_that_is_not_on_the_mesh_is_named() -> None:
    params = shapes(AbstractMesh((4,), ("d",)))
    tx = llqr.scale_by_llqr(metric="gaussian")
    with pytest.raises(ValueError, match="parameter 'b' has the sharding None"):
        llqr.state_shardings(tx, params | {"b": jax.ShapeDtypeStruct((4,), jnp.float32)})
    other = shapes(AbstractMesh((2,), ("d",)))
    with pytest.raises(ValueError, match="must be on one mesh, and are not: 'b' on"):
        llqr.state_shardings(tx, params | {"w": other["w"]})


@pytest.mark.parametrize("structure", ["kfac", "e-kfac"])
def test_a_compiled_step_keeps_the_shardings_and_the_numbers(structure: str) -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.linspace(-1, 1, 32).reshape(8, 4), "b": jnp.ones(4)}
    x = jnp.sin(jnp.arange(48.0)).reshape(6, 8)
    objective = llqr.Objective(
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), lambda z, x: jnp.mean((z - 1) ** 2)
    )
    refit = llqr.Refit(steps=2, learning_rate=0.1)
    tx = llqr.llqr(
        optax.sgd(0.1, momentum=0.9), structure=structure, metric="gaussian", refit=refit
    )

    def step(params: Any, state: Any, x: Any, onto: Any = None) -> Any:
        grads = jax.grad(objective)(params, x)
        updates, state = tx.update(grads, state, params, objective=objective.bind(x))
        state = state if onto is None else jax.lax.with_sharding_constraint(state, onto)
        return optax.apply_updates(params, updates), state

    expected = jax.jit(step)(params, tx.init(params), x)
    where = {"w": NamedSharding(mesh, P("d", None)), "b": NamedSharding(mesh, P())}
    spread, batch = jax.device_put(params, where), jax.device_put(x, NamedSharding(mesh, P("d")))
    onto = llqr.state_shardings(tx, spread)
    state = jax.jit(tx.init, out_shardings=onto)(spread)
    found = jax.jit(lambda *given: step(*given, onto=onto))(spread, state, batch)
    for array, where in zip(jax.tree.leaves(found[1]), jax.tree.leaves(onto), strict=True):
        assert array.sharding.is_equivalent_to(where, array.ndim)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_like_matrices_are_spread_over_devices_together() -> None:
    """As many devices as divide them; what has no like lies like its parameter."""
    mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    rows, odd = NamedSharding(mesh, P("fsdp", None)), NamedSharding(mesh, P())
    like = {f"{i}": ((8, 8), rows) for i in range(12)} | {
        "head": ((8, 4), rows), "b": ((4,), odd),
    }  # fmt: skip
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        for name, (shape, where) in like.items()
    }
    tx = llqr.llqr(
        optax.adam(0.1), structure="e-kfac", refit=llqr.Refit(), metric="gaussian", shard="blocks"
    )
    state = jax.eval_shape(tx.init, params)
    found = llqr.state_shardings(tx, params)
    blocks, onto = state.preconditioner.blocks, found.preconditioner.blocks
    for slot in ("left", "right", "spectrum"):
        assert blocks[slot]["0"].shape == (12, 8, 8)
        assert onto[slot]["0"].spec == P(("fsdp",)), "12 are divided by 4, and not by 8"
        assert blocks[slot]["1"] is onto[slot]["1"] is None
    assert onto["left"]["head"].spec == P("fsdp", None)
    assert onto["spectrum"]["b"].spec == P()
    assert found.base[0].mu["1"] == rows
    streaming = llqr.llqr(
        optax.sgd(0.1), structure="e-kfac", refit=llqr.Streaming(), metric="gaussian",
        shard="blocks",
    )  # fmt: skip
    stream = llqr.state_shardings(streaming, params).preconditioner.stream
    assert stream.statistics["left"]["0"].spec == P(("fsdp",))
    assert stream.statistics["momentum"]["0"].spec == P(("fsdp",))
    assert stream.statistics["momentum"]["1"] is None


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)])
def test_a_stack_is_spread_along_the_axis_of_most_devices(sizes: tuple[int, int]) -> None:
    mesh = AbstractMesh(sizes, ("data", "fsdp"))
    alone = NamedSharding(mesh, P())
    params = {
        f"{i}": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=alone) for i in range(4)
    }  # fmt: skip
    tx = llqr.scale_by_llqr(structure="kfac", metric="gaussian", shard="blocks")
    found = llqr.state_shardings(tx, params).blocks["left"]["0"]
    assert found.spec == P(("fsdp",) if sizes[1] == 4 else ("data",))


def test_without_sharding_every_device_holds_all_of_p() -> None:
    params = shapes(AbstractMesh((4,), ("d",)))
    tx = llqr.llqr(optax.adam(0.1), structure="e-kfac", metric="gaussian", shard=None)
    found = llqr.state_shardings(tx, params)
    assert {s.spec for s in jax.tree.leaves(found.preconditioner.blocks)} == {P()}
    assert found.base[0].mu["w"] == params["w"].sharding


@pytest.mark.parametrize("refit", [llqr.Refit(steps=2), llqr.Streaming()], ids=["", "streaming"])
def test_how_p_is_arranged_does_not_show(refit: Any) -> None:
    """On one device: the same arrays, statuses, rows and updates, in the order of the leaves."""
    keys = iter(jax.random.split(jax.random.key(0), 9))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    params = {"a": draw(4, 4), "b": draw(4, 3), "c": draw(4, 4), "d": draw(3), "e": draw(4, 3)}
    x, grads = draw(6, 4), jax.tree.map(jnp.ones_like, params)
    objective = llqr.Objective(
        lambda p, x: jnp.tanh(x @ p["a"] @ p["b"]) + jnp.tanh(x @ p["c"] @ p["e"] + p["d"]),
        lambda z, x: jnp.mean((z - 1) ** 2),
    ).bind(x)

    def run(shard: Any) -> Any:
        tx = llqr.scale_by_llqr(
            structure="e-kfac", metric="gaussian", block_size=2, refit=refit, shard=shard
        )
        state = tx.init(params)
        updates, state = tx.update(grads, state, params, objective=objective)
        report = llqr.inspect(tx, state, params)
        half = {"c[0:1]": {"left": jnp.full((2, 2), 0.5)}}
        installed = llqr.install(tx, state, params, half)
        return (
            [(r.leaf, r.status) for r in report.blocks], str(llqr.describe(tx, params)),
            llqr.blocks(tx, state, params), updates, llqr.precondition(tx, installed, params),
        )  # fmt: skip

    (rows, table, *arrays), (ours, described, *found) = run("params"), run("blocks")
    assert rows == ours
    assert table == described
    assert jax.tree.structure(arrays) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(found), strict=True):
        assert jnp.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_shard_is_one_of_its_words() -> None:
    with pytest.raises(ValueError, match=r"shard.*'rows'"):
        llqr.llqr(optax.sgd(0.1), shard="rows")  # pyright: ignore[reportArgumentType]


REFITS = {
    "published": (llqr.llqr, {"refit": llqr.Refit(every=None, steps=2), "structure": "kfac"}),
    "streaming": (llqr.llqr, {"refit": llqr.Streaming(), "structure": "e-kfac"}),
    "streaming kfac": (llqr.llqr, {"refit": llqr.Streaming(), "structure": "kfac"}),
    "gradients": (llqr.llqr, {"refit": llqr.Streaming(probe="gradient"), "structure": "e-kfac"}),
}


@pytest.mark.parametrize("shard", ["params", "blocks"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("refit", REFITS)
def test_a_refit_from_outside_leaves_p_where_it_lies(refit: str, kind: Any, shard: Any) -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,), devices=jax.devices()[:2])
    spread = NamedSharding(mesh, P("d", None))
    make, options = REFITS[refit]
    tx = make(optax.sgd(0.1), metric="gaussian", shard=shard, damping=0.1, **options)
    objective = llqr.Objective(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], lambda z, _: jnp.mean((z - 1) ** 2)
    )
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(jnp.eye(8) * scale, spread)
            for name, scale in (("a", 0.5), ("b", 2.0))
        }
        x = jax.device_put(jnp.cos(jnp.arange(64.0).reshape(8, 8)), NamedSharding(mesh, P()))
        onto = llqr.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=onto)(params)
        after = jax.block_until_ready(llqr.refresh(tx, state, params, objective.bind(x)))
    assert int(llqr.find(after).refit.refits) == 1
    lies = zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    for was, now in lies:
        assert now.sharding.is_equivalent_to(was.sharding, was.ndim), (was.sharding, now.sharding)
    blocks = jax.tree.leaves(llqr.find(after).blocks)
    assert all(len(b.sharding.device_set) == 2 for b in blocks)
    assert sum(b.sharding.shard_shape(b.shape)[0] < b.shape[0] for b in blocks) > 0
