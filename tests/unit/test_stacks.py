"""Blocks of many matrices: members of a stack, parts of a matrix, like matrices in a refit."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import llqr
from llqr._linalg import orthonormal
from llqr.refit import eigen, turning
from llqr.structures import block, trees
from llqr.structures import plan as plans
from llqr.structures.rules import rule_table
from llqr.structures.view import Cut
from tests.cases import product

LAYERS, WIDTH, ROWS = 3, 4, 7
AXES = (0, 1)


def stacked_params(axis: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kernel = 0.6 * rng.normal(size=(LAYERS, WIDTH, WIDTH))
    bias, out = 0.1 * rng.normal(size=(LAYERS, WIDTH)), rng.normal(size=(WIDTH, 3))
    layers = {"bias": np.moveaxis(bias, 0, axis), "kernel": np.moveaxis(kernel, 0, axis)}
    return jax.tree.map(jnp.asarray, {"layers": layers, "out": {"kernel": out}})


def unstacked(tree: Any, axis: int, by_layer: bool) -> Any:
    """The tree of the unrolled model, whose leaves come in the order of the stack's members."""
    take = lambda x, i: jnp.take(x, i, axis=axis)  # noqa: E731
    if by_layer:
        members = [jax.tree.map(lambda x, i=i: take(x, i), tree["layers"]) for i in range(LAYERS)]
        return {"layers": {str(i): member for i, member in enumerate(members)}, "out": tree["out"]}
    members = {
        name: {str(i): {name: take(x, i)} for i in range(LAYERS)}
        for name, x in tree["layers"].items()
    }
    return {"layers": members, "out": tree["out"]}


def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    return {
        "x": jnp.asarray(rng.normal(size=(ROWS, WIDTH))),
        "y": jnp.asarray(rng.integers(0, 3, ROWS)),
        "mask": jnp.arange(ROWS) != 2,
    }


def network(layers: list[tuple[Any, Any]], out: Any, x: Any) -> Any:
    for kernel, bias in layers:
        x = x + jnp.tanh(x @ kernel + bias)
    return x @ out


def loss(z: Any, batch: Any) -> Any:
    each = optax.softmax_cross_entropy_with_integer_labels(z, batch["y"])
    return jnp.sum(jnp.where(batch["mask"], each, 0.0)) / jnp.sum(batch["mask"], dtype=each.dtype)


def objectives(axis: int, by_layer: bool) -> tuple[llqr.BoundObjective, llqr.BoundObjective]:
    def of_stack(p: Any, b: Any) -> Any:
        at = lambda x, i: jnp.take(x, i, axis=axis)  # noqa: E731
        layers = [(at(p["layers"]["kernel"], i), at(p["layers"]["bias"], i)) for i in range(LAYERS)]
        return network(layers, p["out"]["kernel"], b["x"])

    def of_layers(p: Any, b: Any) -> Any:
        at = lambda name, i: (  # noqa: E731
            p["layers"][str(i)][name] if by_layer else p["layers"][name][str(i)][name]
        )
        layers = [(at("kernel", i), at("bias", i)) for i in range(LAYERS)]
        return network(layers, p["out"]["kernel"], b["x"])

    mask = lambda b: b["mask"]  # noqa: E731
    one, other = (llqr.Objective(f, loss, mask=mask) for f in (of_stack, of_layers))
    return one.bind(batch()), other.bind(batch())


def both(structure: Any, axis: int, steps: int, **options: Any) -> tuple[Any, Any, Any]:
    """Parameters after some steps, of the stacked model in the unrolled one's tree, and of that."""
    name = structure if isinstance(structure, str) else structure.name
    by_layer = llqr.STRUCTURES[name].view == "module"
    table = [*llqr.stacked(structure, "layers/", (axis,)), *rule_table(structure)]
    found = []
    params = stacked_params(axis)
    trees = params, unstacked(params, axis, by_layer)
    for tree, bound, rules in zip(
        trees, objectives(axis, by_layer), (table, structure), strict=True
    ):
        tx = llqr.llqr(optax.sgd(0.1), structure=rules, **options)
        state = tx.init(tree)

        @jax.jit
        def step(p: Any, state: Any, tx: Any = tx, bound: Any = bound) -> Any:
            updates, state = tx.update(jax.grad(bound)(p), state, p, objective=bound)
            return optax.apply_updates(p, updates), state

        for _ in range(steps):
            tree, state = step(tree, state)
        found.append((tree, llqr.find(state).refit))
    (ours, info), (theirs, expected) = found
    np.testing.assert_array_equal(info.status, expected.status)
    np.testing.assert_allclose(info.cosines, expected.cosines, atol=1e-6)
    return unstacked(ours, axis, by_layer), theirs, info


def close(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


QUICK = ("dense", "diagonal", "e-kfac", "kfac")
REFIT = llqr.Refit(every=2, steps=3, learning_rate=0.05, clip_norm=0.1)


@pytest.mark.parametrize(
    ("structure", "axis"),
    [
        pytest.param(name, AXES[i % 2], marks=[] if name in QUICK else [pytest.mark.slow])
        for i, name in enumerate(sorted(llqr.STRUCTURES))
    ],
)
def test_a_stack_is_its_members(structure: str, axis: int) -> None:
    ours, theirs, info = both(
        structure, axis, 3, refit=REFIT, damping=0.1, graft="block",
        route=llqr.Route(chunk_size=3 if structure == "e-kfac" else None),
    )  # fmt: skip
    close(ours, theirs)
    assert int(info.count("updated")) > 0


@pytest.mark.parametrize("solver", ["cg_zoom_hz", "relative", "sgd"])
def test_with_other_solvers(solver: str) -> None:
    refit = llqr.Refit(every=2, steps=2, learning_rate=0.05, solver=solver)
    close(*both("kfac", 1, 2, refit=refit, damping=0.1)[:2])


@pytest.mark.parametrize(("structure", "axis"), [("e-kfac", 0), ("kfac", 1), ("diagonal", 1)])
def test_streaming(structure: str, axis: int) -> None:
    refit = llqr.Streaming(every=2, warmup=2)
    # kfac's probes have normal numbers in them, drawn leaf by leaf, by the root of the damping.
    options = {"divergence_reduction": "sum", "damping": 1e-28} if structure == "kfac" else {}
    ours, theirs, info = both(structure, axis, 5, refit=refit, **options)
    close(ours, theirs)
    assert int(info.count("updated")) == len(info.status)


# --- axes ----------------------------------------------------------------------------------------


def test_any_axes_are_rows_and_columns() -> None:
    """Fused query, key and value [d, 3, heads, head]: three matrices d x (heads head)."""
    x = {"qkv": jnp.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)}
    table = [llqr.Rule(match="qkv", structure="kfac", rows=(0,), columns=(-2, -1)), ("*", "kfac")]
    plan = plans.make_plan(x, rule_table(table), 100)
    (block,) = plan
    assert (block.shape, block.labels) == ((2, 20), [f"qkv[{i}]" for i in range(3)])
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.normal(size=(3, n, n)))  # noqa: E731
    arrays = [{"left": draw(2), "right": draw(20)}]
    found = product(plan, arrays, x)["qkv"]
    for i in range(3):
        matrix = np.asarray(x["qkv"])[:, i].reshape(2, 20)
        left, right = (np.asarray(arrays[0][side])[i] for side in ("left", "right"))
        expected = left @ matrix @ right.T
        np.testing.assert_allclose(found[:, i].reshape(2, 20), expected, rtol=1e-12)
    packed = trees.pack(plan, arrays, x, ("left", "right"))
    assert packed["left"]["qkv"].shape == (3, 2, 2)
    for own, again in zip(arrays, trees.unpack(plan, packed, x), strict=True):
        jax.tree.map(np.testing.assert_array_equal, own, again)


def test_rows_after_columns() -> None:
    """A kernel [out, in], as Equinox and PyTorch write it, seen with its inputs as rows."""
    x = {"w": jnp.arange(6.0).reshape(2, 3)}
    rule = llqr.Rule(match="*", structure="kfac", rows=(1,), columns=(0,))
    plan = plans.make_plan(x, rule_table([rule]), 100)
    left = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    found = product(plan, [{"left": left, "right": jnp.eye(2)}], x)["w"]
    np.testing.assert_array_equal(found, x["w"] * jnp.array([1.0, 2.0, 3.0]))


def test_axes_whose_order_is_not_its_own_inverse() -> None:
    """Rows, columns and then the stack [3, 3, 3]: each member is multiplied by its own P."""
    rule = llqr.Rule(match="*", structure="kfac", rows=(0,), columns=(1,))
    tx = llqr.scale_by_llqr(structure=[rule], refit=llqr.Refit(every=None))
    x = {"w": jnp.arange(27.0).reshape(3, 3, 3)}
    left = np.arange(9.0).reshape(3, 3)
    state = llqr.install(tx, tx.init(x), x, {"w[1]": {"left": left}})
    found = llqr.precondition(tx, state, x)["w"]
    expected = np.asarray(x["w"]).copy()
    expected[:, :, 1] = left @ expected[:, :, 1]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rows": (2,), "columns": (0,)}, r"'w': there is no axis 2 in the shape \(2, 3\)"),
        ({"rows": (0,), "columns": (-2,)}, r"'w': rows=\(0,\) and columns=\(0,\) name an axis"),
        ({"columns": (0,)}, r"columns=\(0,\) needs axes of rows"),
        ({"stack": (0,), "rows": (1,)}, r"give it, or axes of rows and columns"),
        ({"stack": (5,)}, r"there is no axis 5"),
    ],
)
def test_axes_that_are_not_there(rule: dict[str, Any], message: str) -> None:
    def init() -> Any:
        table = [llqr.Rule(match="*", structure="kfac", **rule)]
        return llqr.llqr(optax.sgd(0.1), structure=table).init({"w": jnp.ones((2, 3))})

    with pytest.raises(ValueError, match=message):
        init()


def test_one_module_has_one_stack() -> None:
    rules = llqr.stacked("dense", "layers/")
    tx = llqr.llqr(optax.sgd(0.1), structure=[*rules, ("*", "dense")])
    with pytest.raises(ValueError, match=r"must have the same stack; there are .*\(2,\).*\(3,\)"):
        tx.init({"layers": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}})


def test_members_are_read_and_installed_by_name() -> None:
    tx = llqr.llqr(optax.sgd(0.1), structure=[*llqr.stacked("diagonal", "w"), ("*", "diagonal")])
    params = {"w": jnp.ones((2, 3))}
    state = tx.init(params)
    assert list(llqr.blocks(tx, state, params)) == ["w[0]", "w[1]"]
    state = llqr.install(tx, state, params, {"w[1]": {"spectrum": jnp.full(3, 0.5)}})
    found: Any = llqr.precondition(tx, state, params)
    np.testing.assert_array_equal(found["w"], [[1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
    assert [block.leaf for block in llqr.inspect(tx, state, params).blocks] == ["w[0]", "w[1]"]


# --- parts ---------------------------------------------------------------------------------------


def train(params: Any, bound: Any, steps: int, **options: Any) -> tuple[Any, Any]:
    tx = llqr.llqr(optax.sgd(0.1), **options)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.grad(bound)(params), state, params, objective=bound)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.filterwarnings("ignore::llqr.errors.LayoutWarning")
@pytest.mark.parametrize(
    "refit", [REFIT, llqr.Streaming(every=2, warmup=1)], ids=["refit", "streaming"]
)
def test_a_block_size_that_cuts_nothing_changes_no_bit(refit: Any) -> None:
    bound, params = objectives(0, False)[0], stacked_params(0)
    options = {"structure": "e-kfac", "refit": refit, "damping": 0.1}
    whole, _ = train(params, bound, 3, **options)
    cut, _ = train(params, bound, 3, block_size=LAYERS * WIDTH, **options)
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def linear(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """Inputs that are correlated within blocks of these sizes only: C is block diagonal."""
    rng = np.random.default_rng(2)
    n, at, x = sum(sizes), 0, []
    basis = np.linalg.qr(rng.normal(size=(4 * n, n)))[0]
    for size in sizes:
        x.append(basis[:, at : at + size] @ rng.normal(size=(size, size)))
        at += size
    data = {"x": jnp.asarray(np.concatenate(x, 1)), "y": jnp.asarray(rng.normal(size=(4 * n, 2)))}
    objective = llqr.Objective(
        lambda p, b: b["x"] @ p["w"], lambda z, b: jnp.sum((z - b["y"]) ** 2) / 2
    )
    return {"w": jnp.zeros((n, 2))}, objective.bind(data)


@pytest.mark.parametrize("sizes", [(3, 3), (4, 4, 2)], ids=["even", "filled up"])
def test_cut_where_the_curvature_is(sizes: tuple[int, ...]) -> None:
    """With C block diagonal in the blocks, each learns the exact inverse of its own."""
    params, bound = linear(sizes)
    left = llqr.Structure(name="left", left="dense")
    refit = llqr.Refit(steps=60, solver="cg", probe="gaussian", probes=40, learning_rate=1.0)
    tx = llqr.llqr(
        optax.sgd(1.0), structure=left, metric="gauss_newton", refit=refit, block_size=sizes[0]
    )
    state = llqr.refresh(tx, tx.init(params), params, bound)
    assert llqr.find(state).blocks["left"]["w"].shape == (len(sizes), 1, sizes[0], sizes[0])
    updates, _ = tx.update(jax.grad(bound)(params), state, params, refresh=False)
    x, y = (np.asarray(bound.batch[name]) for name in ("x", "y"))
    np.testing.assert_allclose(updates["w"], np.linalg.lstsq(x, y)[0], rtol=1e-6, atol=1e-8)


def test_parts_multiply_as_a_block_matrix() -> None:
    x = {"w": jnp.asarray(np.random.default_rng(3).normal(size=(5, 7)))}
    plan = plans.make_plan(x, rule_table("kfac"), 100, block_size=3)
    (block,) = plan
    assert block.labels == [f"w[{i}:{j}]" for i in range(2) for j in range(3)]
    eyes = jnp.broadcast_to(jnp.eye(3), (6, 3, 3))
    arrays = [{"left": jnp.arange(1.0, 7)[:, None, None] * eyes, "right": eyes}]
    factors = np.kron(np.arange(1.0, 7).reshape(2, 3), np.ones((3, 3)))[:5, :7]
    found: Any = product(plan, arrays, x)
    np.testing.assert_allclose(found["w"], factors * x["w"], rtol=1e-15)


@pytest.mark.filterwarnings("ignore::llqr.errors.LayoutWarning")
def test_parts_stream_and_share_their_scale() -> None:
    bound, params = objectives(0, False)[0], stacked_params(0)
    params, state = train(params, bound, 6, structure="e-kfac", block_size=3,
                          refit=llqr.Streaming(every=2, warmup=2))  # fmt: skip
    ours = llqr.find(state)
    assert set(ours.refit.words) == {"updated"}
    spectrum, c = ours.blocks["spectrum"]["out"]["kernel"], ours.stream.statistics["spectrum"]
    c = c["out"]["kernel"]
    np.testing.assert_allclose(spectrum, 1 / (c / jnp.max(c) + 1e-4), rtol=1e-6)


def test_parts_of_two_matrices_share_a_scale_with_those_of_their_own() -> None:
    """Of one size and of other numbers: they are told apart where like matrices run together."""
    rng = np.random.default_rng(12)
    params = {"a": jnp.asarray(rng.normal(size=(4, 4))), "b": jnp.asarray(rng.normal(size=(4, 8)))}
    x = jnp.asarray(rng.normal(size=(5, 4)) * np.array([1.0, 2.0, 4.0, 8.0]))
    objective = llqr.Objective(
        lambda p, x: {"a": x @ p["a"], "b": jnp.tanh(x @ p["b"])},
        lambda z, x: sum(jnp.mean(own**2) for own in z.values()),
    )
    metric = {"a": "gaussian", "b": "gaussian"}
    refit = llqr.Streaming()
    options = {"structure": "e-kfac", "block_size": 2, "metric": metric, "refit": refit}
    _, state = train(params, objective.bind(x), 1, **options)
    ours = llqr.find(state)
    for name in params:
        c = ours.stream.statistics["spectrum"][name]
        d = ours.blocks["spectrum"][name]
        np.testing.assert_allclose(d, 1 / (c / jnp.max(c) + 1e-4), rtol=1e-6)


@pytest.mark.parametrize(
    ("whole", "lengths"),
    [
        ((5, 4), [(3, 2), (3, 2), (2, 2), (2, 2)]),
        ((4, 5), [(2, 3), (2, 2), (2, 3), (2, 2)]),
        ((4, 4), [(2, 2)] * 4),
    ],
    ids=["rows", "columns", "neither"],
)
def test_a_cut_is_filled_up_where_one_of_its_sides_does_not_fit(
    whole: tuple[int, int], lengths: list[tuple[int, int]]
) -> None:
    cut = Cut(whole, lengths[0])
    assert cut.lengths() == lengths
    assert cut.fills == (whole != (4, 4))
    x = 1 + jnp.arange(20.0)[: whole[0] * whole[1]].reshape(1, *whole)
    parts = cut.open(x)
    assert [(int((p.any(1)).sum()), int(p.any(0).sum())) for p in parts] == lengths
    np.testing.assert_array_equal(cut.close(parts), x)


@pytest.mark.parametrize("shape", [(5, 4), (4, 5)], ids=["rows", "columns"])
def test_nothing_lies_behind_the_ends_of_parts(shape: tuple[int, int]) -> None:
    """Where a matrix was filled up with zeros, P x is zero too, and no length sees it."""
    x = {"w": jnp.asarray(np.random.default_rng(4).normal(size=shape))}
    (block,) = plans.make_plan(x, rule_table("kfac"), 100, block_size=3)
    rows, columns = block.shape
    arrays = {"left": jnp.ones((4, rows, rows)), "right": jnp.ones((4, columns, columns))}
    found = block.product(arrays, block.gather([x["w"]]))
    inside = np.ones((4, rows, columns), bool)
    if shape == (5, 4):
        inside[2:, 2] = False  # the lower parts have two rows
    else:
        inside[1::2, :, 2] = False  # those on the right two columns
    np.testing.assert_array_equal(found != 0, inside)


def test_a_description_counts_stacks_and_parts() -> None:
    tx = llqr.llqr(optax.sgd(0.1), structure="kfac", block_size=4, max_dim=10)
    rows = {
        row.leaf: row
        for row in llqr.describe(tx, {"a": jnp.ones((8, 6)), "b": jnp.ones((12, 3))}).rows
    }
    assert (rows["a"].stack, rows["a"].view, rows["a"].stored) == ((2, 2), (4, 3), 4 * 25)
    assert (rows["b"].stack, rows["b"].view) == ((), (12, 3))  # its long side is diagonal


def gpt2_small() -> Any:
    d, layers = 768, {}
    for i in range(12):
        kernels = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
        layers[f"h{i}"] = {
            name: {"kernel": shape, "bias": shape[-1:]} for name, shape in kernels.items()
        } | {"ln": {"scale": (2, d), "bias": (2, d)}}
    shapes = layers | {"wte": {"embedding": (50257, d)}, "wpe": {"embedding": (1024, d)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)


@pytest.mark.parametrize(("structure", "most"), [("kfac", 2.1), ("e-kfac", 3.1)])
def test_blocks_bound_the_memory(structure: str, most: float) -> None:
    """In units of the parameters' bytes; without blocks it is 2.6 and 3.6."""
    params = gpt2_small()
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    options = {"structure": structure, "max_dim": 60_000}  # the vocabulary in blocks too
    state = jax.eval_shape(llqr.scale_by_llqr(block_size=1024, **options).init, params)
    assert size(state) / size(params) <= most


# --- like matrices -------------------------------------------------------------------------------


def deep(layers: int) -> tuple[Any, llqr.Objective]:
    """Parameters, and a network whose own program grows by sines and sums with each layer."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    params = {f"{i}": {"kernel": draw(4, 4), "bias": draw(4)} for i in range(layers)}

    def forward(p: Any, x: Any) -> Any:
        kernel, bias = (
            sum(jnp.sin((i + 1) * own[name]) for i, own in enumerate(p.values()))
            for name in ("kernel", "bias")
        )
        return jnp.tanh(x @ kernel + bias)

    return params, llqr.Objective(forward, lambda z, x: jnp.mean((z - x) ** 2))


METHODS = {
    "published": {"refit": REFIT, "damping": 0.1},
    "probe": {"refit": llqr.Refit(probe="fisher", solver="relative", steps=2), "damping": 0.1},
    "streaming": {"refit": llqr.Streaming()},
}


def count(jaxpr: Any, names: tuple[str, ...]) -> int:
    inside = sum(count(j, names) for e in jaxpr.eqns for j in jaxprs_in_params(e.params))
    return inside + sum(e.primitive.name in names for e in jaxpr.eqns)


@pytest.mark.parametrize("method", METHODS)
def test_a_refit_has_one_program_for_all_layers(method: str) -> None:
    """Products, factorisations and roots, which only P has here, are as many at any depth.

    Of streaming refits the loops, where bases turn: what a matrix does alone is traced once, but
    stands there for each.
    """
    names = {"streaming": ("scan", "while")}.get(method, ("dot_general", "qr", "sqrt", "is_finite"))
    counts = []
    for layers in (2, 6):
        params, objective = deep(layers)
        tx = llqr.llqr(optax.sgd(0.1), structure="e-kfac", metric="gaussian", **METHODS[method])
        state = tx.init(params)
        refit = jax.jit(lambda s, p, x, tx=tx, o=objective: llqr.refresh(tx, s, p, o.bind(x)))
        jaxpr = refit.trace(state, params, jnp.ones((3, 4))).jaxpr.jaxpr
        counts.append(count(jaxpr, names))
    assert counts[0] == counts[1] > (1 if method == "streaming" else 20)


def test_what_like_matrices_do_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step and in a refit, at any depth."""
    seen: list[int] = []
    original = eigen.step
    monkeypatch.setattr(eigen, "step", lambda *args: (seen.append(1), original(*args))[1])
    calls = []
    for layers in (3, 6):
        params, _ = deep(layers)
        tx = llqr.streaming(0.1, metric="gaussian")
        seen.clear()
        jax.jit(lambda s, p, tx=tx: tx.update(p, s, p, refresh=False)).trace(
            tx.init(params), params
        )
        calls.append(len(seen))
    assert calls[0] == calls[1] > 0


@pytest.mark.parametrize("probe", ["fisher", "gradient"])
def test_steps_call_nothing_of_lapack(probe: Any) -> None:
    """Neither kind, nor many at once: it is slow on accelerators, and in XLA's way on CPUs."""
    params, objective = deep(3)
    tx = llqr.streaming(0.1, metric="gaussian", refit=llqr.Streaming(probe=probe))

    def step(state: Any, x: Any, due: bool) -> Any:
        bound = objective.bind(x)
        return tx.update(jax.grad(bound)(params), state, params, objective=bound, refresh=due)

    for due in (True, False):
        run = partial(step, due=due)
        seeds = jax.vmap(run, (None, 0))
        for f, x in ((run, jnp.ones((3, 4))), (seeds, jnp.ones((2, 3, 4)))):
            text = jax.jit(f).lower(tx.init(params), x).as_text()
            assert "dot_general" in text
            assert "custom_call" not in text


@pytest.mark.parametrize("probe", ["fisher", "gradient"])
@pytest.mark.parametrize("due", [True, False])
def test_a_step_writes_into_every_buffer_that_it_is_given(probe: Any, due: bool) -> None:
    """Donated parameters and state: all of their bytes are those of the results.

    But for the record, which a refit writes anew and does not read.
    """
    params, objective = deep(2)
    tx = llqr.streaming(0.1, metric="gaussian", refit=llqr.Streaming(probe=probe))

    def step(params: Any, state: Any, x: Any) -> Any:
        bound = objective.bind(x)
        grads = jax.grad(bound)(params)
        updates, state = tx.update(grads, state, params, objective=bound, refresh=due)
        return optax.apply_updates(params, updates), state

    given = params, tx.init(params)
    done = jax.jit(step, donate_argnums=(0, 1)).lower(*given, jnp.ones((3, 4))).compile()
    size, record = (
        sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (given, llqr.find(given[1]).refit)
    )
    reused = done.memory_analysis().alias_size_in_bytes  # pyright: ignore
    assert size - due * record <= reused <= size


def test_a_basis_has_the_values_and_derivatives_of_a_qr_factorisation() -> None:
    x, dx = jnp.asarray(np.random.default_rng(9).normal(size=(2, 3, 21, 21)))

    def expected(x: Any) -> Any:
        q, r = jnp.linalg.qr(x)
        return q * jnp.sign(jnp.diagonal(r))

    close(jax.jvp(jax.vmap(orthonormal), (x,), (dx,)), jax.jvp(jax.vmap(expected), (x,), (dx,)))
    back = jax.vjp(jax.vmap(orthonormal), x)[1](dx)[0]
    slope = jax.jvp(jax.vmap(orthonormal), (x,), (dx,))[1]
    np.testing.assert_allclose(jnp.sum(back * dx), jnp.sum(slope * dx), rtol=1e-10)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 40, 1030])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_basis_is_orthonormal_where_columns_are_nearly_alike(size: int, dtype: Any) -> None:
    """One direction is in all of them, a thousand times as long as what is their own."""
    rng = np.random.default_rng(size)
    x = rng.normal(size=(size, size)) + 1000 * rng.normal(size=(size, 1))
    q = np.asarray(orthonormal(jnp.asarray(x, dtype)), np.float64)
    atol = 20 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(q.T @ q, np.eye(size), rtol=0, atol=atol)


def test_sides_of_one_length_turn_together_as_each_alone() -> None:
    """In a stack, both sides of a matrix; wide ones at some refits."""
    rng = np.random.default_rng(3)
    shapes = {"a": (6, 6), "b": (3, 6, 4), "c": (6, 9), "d": (9,)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    rules = [llqr.Rule(match="b", structure="e-kfac", stack=(0,)), ("*", "e-kfac")]
    plan = plans.make_plan(params, rule_table(rules), 1000, None)
    options = llqr.Streaming(wide=6)

    def random(block: Any) -> dict[str, Any]:
        shapes = {slot: block.shapes[slot] for slot in block.bases}
        return {slot: jnp.asarray(rng.normal(size=shape)) for slot, shape in shapes.items()}

    arrays = [{slot: jnp.linalg.qr(x)[0] for slot, x in random(block).items()} for block in plan]
    moments = [{slot: x @ x.mT for slot, x in random(block).items()} for block in plan]
    for number, turns in ((4, True), (5, False)):
        found = turning.turned(options, jnp.asarray(number), plan, arrays, moments)
        for new, old, s in zip(found, arrays, moments, strict=True):
            assert new.keys() == old.keys()
            for slot in new:
                if turns or old[slot].shape[-1] <= 6:
                    x = s[slot] @ old[slot]
                    most = np.max(np.sum(old[slot] * x, axis=-2), axis=-1)[..., None, None]
                    q, r = np.linalg.qr(x / most + np.sqrt(np.finfo(float).eps) * old[slot])
                    signs = np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
                    np.testing.assert_allclose(new[slot], q * signs, rtol=0, atol=1e-10)
                else:
                    np.testing.assert_array_equal(new[slot], old[slot])
    stays = [jnp.ones(block.count if block.batched else (), bool) for block in plan]
    found = turning.turned(options, jnp.asarray(4), plan, arrays, moments, stays)
    jax.tree.map(np.testing.assert_array_equal, found, arrays)


def test_empty_sides_have_nothing_to_turn() -> None:
    params = {"a": jnp.zeros((3, 0, 4)), "b": jnp.zeros((4, 0)), "c": jnp.ones((4, 2))}
    tx = llqr.streaming(0.1, refit=llqr.Streaming(probe="gradient"))
    updates, _ = tx.update(params, tx.init(params), params, refresh=True)
    assert [x.shape for x in updates.values()] == [x.shape for x in params.values()]
    assert np.isfinite(updates["c"]).all()


def test_a_basis_stays_where_nothing_was_seen() -> None:
    """Not where rounding leads it: of a moment of two directions of twelve, or of none."""
    rng = np.random.default_rng(4)
    plan = plans.make_plan({"a": jnp.zeros((12, 5))}, rule_table("e-kfac"), 1000, None)
    v = jnp.asarray(np.linalg.qr(rng.normal(size=(12, 12)))[0], jnp.float32)
    s = 3 * jnp.outer(v[:, 0], v[:, 0]) + jnp.outer(v[:, 1], v[:, 1])
    for moment, atol in ((s, 1e-2), (jnp.zeros_like(s), 1e-6)):
        arrays, moments = [{"left": v}], [{"left": moment}]
        for number in range(1, 20):
            arrays = turning.turned(llqr.Streaming(), jnp.asarray(number), plan, arrays, moments)
        np.testing.assert_allclose(arrays[0]["left"], v, rtol=0, atol=atol)


def test_a_streaming_step_can_be_differentiated() -> None:
    """By its learning rate, as hyperparameters are learned."""
    params, objective = deep(2)
    bound = objective.bind(jnp.asarray(np.random.default_rng(10).normal(size=(3, 4))))

    def after(rate: Any) -> Any:
        tx = llqr.streaming(rate, metric="gaussian")
        p, state = params, tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(bound)(p), state, p, objective=bound)
            p = jax.tree.map(jnp.add, p, updates)
        return bound(p)

    slope = (after(0.1 + 1e-5) - after(0.1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(after)(0.1), slope, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_empty_stacks_and_sides(method: str) -> None:
    params = {"a": jnp.ones((0, 3, 2)), "b": jnp.ones((3, 2)), "c": jnp.ones((0, 3, 2))}
    objective = llqr.Objective(lambda p, x: x @ p["b"], lambda z, x: jnp.mean((z - 1) ** 2))
    table = [*llqr.stacked("e-kfac", "a|c"), *rule_table("e-kfac")]
    options = {"structure": table, "metric": "gaussian", **METHODS[method]}
    moved, state = train(params, objective.bind(jnp.ones((4, 3))), 2, **options)
    assert not jnp.array_equal(moved["b"], params["b"])
    assert llqr.find(state).refit.status.shape == (1,)


@pytest.mark.parametrize("method", METHODS)
def test_more_matrices_than_run_at_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, objective = deep(5)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(7, 4)))
    found = []
    for most in (block.AT_ONCE, 2 * 16):  # two kernels at a time
        monkeypatch.setattr(block, "AT_ONCE", most)
        options = {"structure": "e-kfac", "metric": "gaussian", **METHODS[method]}
        found.append(train(params, objective.bind(x), 2, **options))
        jax.clear_caches()
    (ours, state), (theirs, expected) = found
    close(ours, theirs)
    close(llqr.find(state).blocks, llqr.find(expected).blocks)


@pytest.mark.parametrize("method", ["published", "streaming"])
def test_the_record_has_the_order_of_the_leaves(method: str) -> None:
    params, objective = deep(3)
    bound = objective.bind(jnp.asarray(np.random.default_rng(7).normal(size=(7, 4))))
    tx = llqr.llqr(optax.sgd(0.1), structure="kfac", metric="gaussian", **METHODS[method])
    state = tx.init(params)
    gradient = jax.grad(bound)(params)
    _, state = tx.update(gradient, state, params, objective=bound)
    ours = llqr.find(state)
    # Of kfac there are no bases: the momentum lies as the parameters do.
    h = gradient if method == "published" else ours.stream.statistics["momentum"]
    pairs = zip(*map(jax.tree.leaves, (h, llqr.precondition(tx, state, h))), strict=True)
    expected = [np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]
    assert len(set(np.round(expected, 6))) == len(expected)
    np.testing.assert_allclose(ours.refit.cosines, expected, rtol=1e-6)


def test_a_solver_of_ones_own_sees_every_matrix() -> None:
    """Its step depends on the length of each array."""
    own = optax.chain(optax.scale_by_trust_ratio(), optax.scale(-0.01))
    refit = llqr.Refit(every=2, steps=2, solver=own, clip_norm=None)
    with jax.numpy_dtype_promotion("standard"):
        close(*both("kfac", 0, 2, refit=refit, damping=0.1)[:2])


OF_ONE_MATRIX = {
    "clipped": {"clip_norm": 0.05},
    "relative": {"solver": "relative"},
    "own": {"solver": optax.chain(optax.scale_by_trust_ratio(), optax.scale(-0.01))},
}


@pytest.mark.parametrize("name", OF_ONE_MATRIX)
def test_steps_depend_on_one_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are those of a matrix's arrays, whether or not like matrices run together."""
    params, objective = deep(3)
    bound = objective.bind(jnp.asarray(np.random.default_rng(11).normal(size=(7, 4))))
    refit = llqr.Refit(
        **{"steps": 3, "learning_rate": 0.05, "clip_norm": None} | OF_ONE_MATRIX[name]
    )
    options = {"structure": "kfac", "metric": "gaussian", "damping": 0.1, "refit": refit}
    with jax.numpy_dtype_promotion("standard"):
        _, together = train(params, bound, 1, **options)
        monkeypatch.setattr(plans, "merge", lambda plan: plan)
        _, apart = train(params, bound, 1, **options)
    close(llqr.find(together).blocks, llqr.find(apart).blocks)


@pytest.mark.parametrize("structure", ["kfac", "dense", "sym_swm_e-kfac"])
def test_arrays_come_apart_as_they_were_put_together(structure: str) -> None:
    params = deep(3)[0] | {"odd": jnp.ones((2, 5))}
    plan = plans.make_plan(params, rule_table(structure), 100)
    rng = np.random.default_rng(8)
    arrays = [
        {slot: jnp.asarray(rng.normal(size=x.shape)) for slot, x in own.items()}
        for own in trees.identity(plan, 1.0)
    ]
    merged = plans.merge(plan)
    assert len(merged) < len(plan)
    together = trees.merged(plan, arrays)
    back = trees.separated(plan, together), trees.per_matrix(merged, together)
    for found in back:
        jax.tree.map(np.testing.assert_array_equal, list(found), arrays)
    again = trees.from_matrices(merged, arrays)
    jax.tree.map(np.testing.assert_array_equal, again, list(together))
    close(product(merged, together, params), product(plan, arrays, params))
