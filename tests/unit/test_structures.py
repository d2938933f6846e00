"""Every structure on every kind of leaf: identity, matrix, gradients, rules, storage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llqr
from llqr.structures import matrix as mx
from llqr.structures import plan as plans

LEAVES = {
    "dense/kernel": (5, 4),
    "conv/kernel": (2, 2, 3, 4),
    "attention/query/kernel": (6, 2, 3),
    "attention/out/kernel": (2, 3, 6),
    "attention/query/bias": (2, 3),
    "embedding": (7, 3),
    "dense/bias": (4,),
    "norm/scale": (3,),
    "cls": (1, 1, 6),
    "temperature": (),
}
NAMES = sorted(llqr.STRUCTURES)


def tree():
    """The leaves above as one nested tree of normals."""
    keys = jax.random.split(jax.random.key(1), len(LEAVES))
    out: dict = {}
    for (name, shape), key in zip(LEAVES.items(), keys, strict=True):
        node = out
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.random.normal(key, shape)
    return out


def plan_of(structure, max_dim=10_000, params=None):
    return plans.make_plan(
        tree() if params is None else params, plans.rule_table(structure), max_dim
    )


def random_arrays(plan, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), plans.identity(plan, 1.0))


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_identity_at_init(name, scale):
    plan, x = plan_of(name), tree()
    out = plans.multiply(plan, plans.identity(plan, scale), x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, scale * b, rtol=1e-13, atol=1e-15), out, x
    )


@pytest.mark.parametrize("name", NAMES)
def test_product_is_the_matrix_on_flattened_leaves(name):
    plan, x = plan_of(name), jax.tree.leaves(tree())
    for block, arrays in zip(plan, random_arrays(plan), strict=True):
        xs = [x[i] for i in block.leaves]
        flat = np.concatenate([np.ravel(v) for v in xs])
        out = np.concatenate([np.ravel(v) for v in block.multiply(arrays, xs)])
        np.testing.assert_allclose(block.as_matrix(arrays) @ flat, out, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_product_is_linear(name):
    plan, x = plan_of(name), tree()
    arrays = random_arrays(plan)
    y = jax.tree.map(lambda v: jnp.cos(3 * v), x)
    left = plans.multiply(plan, arrays, jax.tree.map(lambda a, b: 2 * a - b, x, y))
    px, py = plans.multiply(plan, arrays, x), plans.multiply(plan, arrays, y)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a, 2 * b - c, rtol=1e-11, atol=1e-12),
        left, px, py,
    )  # fmt: skip


# The closed forms of the papers: (arrays, X, cotangent of Y) -> cotangents of the arrays.


def kfac(a, x, c):
    return {"left": c @ a["right"] @ x.T, "right": c.T @ a["left"] @ x}


def diag_kfac(a, x, c):
    full = kfac({"left": np.diag(a["left"]), "right": np.diag(a["right"])}, x, c)
    return {slot: np.diag(value) for slot, value in full.items()}


def eigen(a, x, c, d):
    u, w = a["left"], a["right"]
    xh, ch = u.T @ x @ w, u.T @ c @ w
    z, e = d * xh, d * ch
    sides = {
        "left": c @ w @ z.T + x @ w @ e.T,
        "right": c.T @ u @ z + x.T @ u @ e,
    }
    return sides, ch * xh


def e_kfac(a, x, c):
    sides, spectrum = eigen(a, x, c, a["spectrum"])
    return {**sides, "spectrum": spectrum}


def sep_e_kfac(a, x, c):
    left, right = a["left_spectrum"], a["right_spectrum"]
    sides, spectrum = eigen(a, x, c, np.outer(left, right))
    return {**sides, "left_spectrum": spectrum @ right, "right_spectrum": spectrum.T @ left}


PULL_BACKS = {
    "dense": lambda a, x, c: {"left": c @ x.T},
    "diagonal": lambda a, x, c: {"spectrum": c * x},
    "scalar": lambda a, x, c: {"spectrum": np.sum(c * x)},
    "diag-kfac": diag_kfac,
    "kfac": kfac,
    "e-kfac": e_kfac,
    "sep-e-kfac": sep_e_kfac,
}


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_closed_form(name):
    structure = llqr.STRUCTURES[name]
    shape = (12, 1) if structure.joint else (4, 3)
    rng = np.random.default_rng(2)
    arrays = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape)), mx.init(structure, shape, 1.0, jnp.float64)
    )
    x, cotangent = rng.normal(size=shape), rng.normal(size=shape)
    _, pull_back = jax.vjp(lambda a: mx.multiply(structure, a, jnp.asarray(x)), arrays)
    found = pull_back(jnp.asarray(cotangent))[0]
    expected = PULL_BACKS[name](jax.tree.map(np.asarray, arrays), x, cotangent)
    assert found.keys() == expected.keys()
    for slot in found:
        np.testing.assert_allclose(found[slot], expected[slot], rtol=1e-12, err_msg=slot)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_survive_the_trees_of_the_state(name):
    params = tree()
    table = plans.rule_table(name)
    plan = plan_of(name)
    arrays = random_arrays(plan)
    packed = plans.pack(plan, arrays, params, plans.slots(table))
    none = lambda v: v is None  # noqa: E731
    for slot_tree in packed.values():
        assert jax.tree.structure(slot_tree, is_leaf=none) == jax.tree.structure(params)
    back = plans.unpack(plan, packed, params)
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


def test_a_joint_block_keeps_its_arrays_at_its_first_leaf():
    params = {"a": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones(4)}}
    plan = plan_of("dense", params=params)
    assert [block.names for block in plan] == [("a/bias", "a/kernel"), ("b/kernel",)]
    packed = plans.pack(plan, plans.identity(plan, 1.0), params, ("left",))
    assert packed["left"]["a"]["bias"].shape == (8, 8)
    assert packed["left"]["a"]["kernel"] is None
    assert packed["left"]["b"]["kernel"].shape == (4, 4)


@pytest.mark.parametrize(
    ("name", "shape", "view"),
    [
        ("dense/kernel", (5, 4), (5, 4)),
        ("conv/kernel", (3, 3, 16, 32), (144, 32)),
        ("attention/query/kernel", (64, 4, 16), (64, 64)),
        ("attention/out/kernel", (4, 16, 64), (64, 64)),
        ("pos_embedding", (1, 65, 192), (65, 192)),
        ("embedding", (1000, 64), (1000, 64)),
        ("key_conv/kernel", (3, 3, 8, 4), (72, 4)),
        ("bias", (7,), (1, 7)),
    ],
)
def test_matrix_view(name, shape, view):
    assert plans.matrix_view(name, shape) == view


def test_vectors_are_diagonal_whatever_their_rank():
    kinds = {block.names[0]: block.structure.name for block in plan_of("e-kfac")}
    assert {name for name, kind in kinds.items() if kind == "e-kfac"} == {
        "dense/kernel",
        "conv/kernel",
        "attention/query/kernel",
        "attention/out/kernel",
        "embedding",
    }
    assert {kinds[name] for name in ("attention/query/bias", "cls", "temperature")} == {"diagonal"}


class TestRules:
    def test_the_first_match_decides(self):
        table = [
            (r"query", "kfac"),
            (lambda path, shape: len(shape) == 4, "sep-e-kfac"),
            llqr.Rule(match=r"^dense/kernel$", structure="diag-kfac"),
            (r"dense", "scalar"),
            ("*", "diagonal"),
        ]
        kinds = {block.names[0]: block.structure.name for block in plan_of(table)}
        assert kinds["attention/query/kernel"] == "kfac"
        assert kinds["attention/query/bias"] == "kfac"
        assert kinds["conv/kernel"] == "sep-e-kfac"
        assert kinds["dense/kernel"] == "diag-kfac"
        assert kinds["dense/bias"] == "scalar"
        assert kinds["cls"] == "diagonal"

    def test_rows_choose_the_matrix_view(self):
        rule = llqr.Rule(match="conv", structure="kfac", rows=1)
        plan = plan_of([rule, ("*", "diagonal")])
        (conv,) = [block for block in plan if block.names == ("conv/kernel",)]
        assert conv.shape == (2, 24)
        too_many = llqr.Rule(match="conv", structure="kfac", rows=5)
        with pytest.raises(ValueError, match=r"'conv/kernel': rows=5 does not fit"):
            plan_of([too_many, ("*", "diagonal")])

    @pytest.mark.parametrize("table", [[], [("dense", "kfac")]])
    def test_a_catch_all_is_required(self, table):
        with pytest.raises(ValueError, match="the last rule must be a catch-all"):
            plans.rule_table(table)

    @pytest.mark.parametrize("table", ["e-kfca", [("a", "e-kfca"), ("*", "diagonal")]])
    def test_an_unknown_structure_names_the_nearest(self, table):
        with pytest.raises(ValueError, match=r"unknown structure 'e-kfca': did you mean 'e-kfac'"):
            plans.rule_table(table)


class TestMaxDim:
    @pytest.mark.parametrize("name", ["kfac", "e-kfac", "sep-e-kfac"])
    def test_a_long_side_becomes_diagonal(self, name):
        params = {"kernel": jnp.ones((9, 4))}
        (block,) = plan_of(name, max_dim=5, params=params)
        shapes = mx.array_shapes(block.structure, block.shape)
        assert shapes["left"] == (9,)
        assert shapes["right"] == (4, 4)
        assert block.structure.name == f"{name} (left diagonal)"
        assert (block.structure.left, block.structure.right) == ("diagonal", "dense")

    def test_the_limit_itself_stays_dense(self):
        (block,) = plan_of("kfac", max_dim=9, params={"kernel": jnp.ones((9, 4))})
        assert block.structure == llqr.STRUCTURES["kfac"]


def test_bad_structures_are_refused():
    with pytest.raises(ValueError, match=r"unknown side 'dens': did you mean 'dense'"):
        llqr.Structure(name="x", left="dens")
    with pytest.raises(ValueError, match=r"unknown spectrum 'ful': did you mean 'full'"):
        llqr.Structure(name="x", spectrum="ful")
    with pytest.raises(ValueError, match="right side must be 'identity'"):
        llqr.Structure(name="x", right="dense", joint=True)


@pytest.mark.parametrize("name", ["diagonal", "scalar"])
def test_projection_clamps_and_is_idempotent(name):
    structure = llqr.STRUCTURES[name]
    arrays = {"spectrum": jnp.array([-1.0, 0.0, 1e-9, 2.0])}
    once = mx.project(structure, arrays, allow_inversion=False)
    np.testing.assert_array_equal(once["spectrum"], [1e-8, 1e-8, 1e-8, 2.0])
    twice = mx.project(structure, once, allow_inversion=False)
    np.testing.assert_array_equal(once["spectrum"], twice["spectrum"])
    free = mx.project(structure, arrays, allow_inversion=True)
    np.testing.assert_array_equal(free["spectrum"], arrays["spectrum"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_leaves_have_float32_arrays(dtype):
    params = {"kernel": jnp.ones((3, 2), dtype)}
    (block,) = plan_of("kfac", params=params)
    arrays = block.init(1.0)
    assert {a.dtype.name for a in arrays.values()} == {"float32"}
    assert block.multiply(arrays, [params["kernel"]])[0].dtype == dtype
