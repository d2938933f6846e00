"""Every structure on every kind of leaf, against numpy: `oracle` has the formulas."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llqr
from llqr.structures import matrix as mx
from llqr.structures import plan as plans
from llqr.structures import trees
from llqr.structures.rules import row_axes, rule_table, slots
from tests import oracle
from tests.cases import product
from tests.oracle import close

LEAVES = {  # matrix views of one shape: every new shape is a compilation
    "dense/kernel": (6, 4),
    "conv/kernel": (2, 1, 3, 4),
    "attention/query/kernel": (6, 2, 2),
    "attention/out/kernel": (2, 3, 4),
    "attention/query/bias": (2, 2),
    "tokens/embedding": (6, 4),
    "lm_head/kernel": (6, 4),
    "dense/bias": (4,),
    "norm/scale": (4,),
    "cls": (1, 1, 6),
    "temperature": (),
}
MATRICES = {name for name in LEAVES if name.endswith(("kernel", "embedding"))}

# What a refit learns (with fresh vectors), then what it does not: memories and constants.
SLOTS = {
    "scalar": ("spectrum", ""),
    "diagonal": ("spectrum", ""),
    "dense": ("left", ""),
    "diag-kfac": ("left right", ""),
    "kfac": ("left right", ""),
    "sym-kfac": ("left right", ""),
    "psd-sym-kfac": ("left right", ""),
    "sds-sym-kfac": ("left left_values right right_values", ""),
    "sds-sym-kfac_norm-d": ("left left_values right right_values", ""),
    "h-kfac": ("left_vectors left_values right_vectors right_values", ""),
    "e-kfac": ("left right spectrum", ""),
    "e-kfac-gpt": ("left right spectrum", ""),
    "psd-e-kfac": ("left right spectrum", ""),
    "rms_norm-e-kfac": ("left right spectrum", "sigma"),
    "max_norm-e-kfac": ("left right spectrum", "sigma"),
    "scaled-rms_norm-e-kfac": ("left right spectrum spectrum_factor", ""),
    "scaled-max_norm-e-kfac": ("left right spectrum spectrum_factor", ""),
    "sep-e-kfac": ("left right left_spectrum right_spectrum", ""),
    "psd-sep-e-kfac": ("left right left_spectrum right_spectrum", ""),
    "sym_swm_kfac": ("left_fresh_u right_fresh_u", "left right"),
    "asym_swm_kfac": ("left_fresh_u left_fresh_v right_fresh_u right_fresh_v", "left right"),
    "sym_swm_e-kfac": ("left_fresh_u right_fresh_u spectrum", "left right"),
    "sym_swm_sep-e-kfac": (
        "left_fresh_u right_fresh_u left_spectrum right_spectrum", "left right",
    ),
    "low-rank-memory": ("left_fresh_u", "left sigma"),
    "low-rank-memory-asym": ("left_fresh_u left_fresh_v", "left left_other sigma"),
}  # fmt: skip
NAMES = tuple(SLOTS)
MODULE = {"scalar", "dense", "low-rank-memory", "low-rank-memory-asym"}
LOW_RANK = {"low-rank-memory", "low-rank-memory-asym"}
MEMORY = LOW_RANK | {"sym_swm_kfac", "asym_swm_kfac", "sym_swm_e-kfac", "sym_swm_sep-e-kfac"}
NOT_SYMMETRIC = LOW_RANK | {"dense", "kfac", "asym_swm_kfac"}
DEFINITE = {"psd-sym-kfac", "psd-e-kfac", "psd-sep-e-kfac"}
LINEAR = {"scalar", "diagonal", "dense"}
NO_SQUARE = LOW_RANK | {"scalar", "diagonal", "diag-kfac", "h-kfac"}
CLOSED_FORMS = {name for name, (learned, _) in SLOTS.items() if "fresh" not in learned} - {
    "sym-kfac", "psd-sym-kfac", "sds-sym-kfac", "sds-sym-kfac_norm-d", "h-kfac",
}  # fmt: skip

# Beside the names, what their rule tables and `max_dim` make of them.
VARIANTS = {name: llqr.STRUCTURES[name] for name in NAMES} | {
    "gpt embedding": replace(llqr.STRUCTURES["e-kfac-gpt"], left="diagonal"),
    "gpt head": replace(llqr.STRUCTURES["e-kfac-gpt"], right="diagonal"),
    "sep left diagonal": replace(llqr.STRUCTURES["sep-e-kfac"], left="diagonal"),
    "swm right diagonal": replace(llqr.STRUCTURES["sym_swm_e-kfac"], right="diagonal"),
    "swm vector": replace(llqr.STRUCTURES["asym_swm_kfac"], right="identity", view="vector"),
    "low rank 2": replace(llqr.STRUCTURES["low-rank-memory-asym"], rank=2),
}


def shape_of(structure):
    return (4, 3) if structure.view == "leaf" else (6, 1)


def normals(shapes, seed):
    """Random arrays, not too long: denominators of Sherman and Morrison stay away from zero."""
    rng = np.random.default_rng(seed)
    return {slot: 0.6 * rng.normal(size=shape) for slot, shape in shapes.items()}


def random(structure, seed=0, shape=None):
    """Numpy arrays for every slot, constants and both triangles included."""
    shape = shape_of(structure) if shape is None else shape
    return normals(mx.array_shapes(structure, shape), seed)


def fresh(structure, arrays, seed=0):
    """Numpy arrays of the shapes that `start` gives."""
    started = jax.eval_shape(
        lambda a: mx.start(structure, a, shape_of(structure), jax.random.key(0)), arrays
    )
    return normals({slot: a.shape for slot, a in started.items()}, seed + 100)


def legal(structure, seed=0):
    """Library arrays after so many refits that memories are full; what is learned is random."""
    arrays = mx.init(structure, shape_of(structure), 1.3, jnp.float64)
    for i in range(structure.rank + 1 if structure.has_memory else 1):
        arrays = mx.install(structure, arrays, jaxed(fresh(structure, arrays, 50 * seed + i)))
    return arrays


def jaxed(arrays):
    return {slot: jnp.asarray(a) for slot, a in arrays.items()}


def numpied(arrays):
    return {slot: np.asarray(a) for slot, a in arrays.items()}


def matrix_of(structure, arrays):
    return np.asarray(mx.as_matrix(structure, jaxed(arrays), shape_of(structure)))


def tree(dtype="float64"):
    """The leaves above as one nested tree of normals."""
    rng = np.random.default_rng(1)
    out: dict = {}
    for name, shape in LEAVES.items():
        node = out
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(rng.normal(size=shape)).astype(dtype)
    return out


def plan_of(structure, max_dim=10_000, params=None):
    params = tree() if params is None else params
    return plans.make_plan(params, rule_table(structure), max_dim)


def random_arrays(plan):
    return tuple(
        {slot: a.astype(block.dtype) for slot, a in jaxed(arrays).items()}
        for i, block in enumerate(plan)
        for arrays in [random(block.structure, i, block.shape)]
    )


def expected_product(block, arrays, xs):
    """The numpy product of a block, one flat vector."""
    flat = np.concatenate([np.ravel(np.asarray(x, "float64")) for x in xs])
    arrays = {slot: np.asarray(a, "float64") for slot, a in arrays.items()}
    name = block.structure.name.partition(" (")[0]
    shape = (-1,) if block.structure.elementwise and name == "scalar" else block.shape
    return oracle.product(name, arrays, flat.reshape(shape)).ravel()


def test_the_tables_here_cover_every_structure():
    assert len(NAMES) == 25
    assert set(NAMES) == set(llqr.STRUCTURES)
    assert {name for name, s in llqr.STRUCTURES.items() if s.view == "module"} == MODULE
    assert all(s.name == name for name, s in llqr.STRUCTURES.items())


@pytest.mark.parametrize("name", NAMES)
def test_slots(name):
    structure = llqr.STRUCTURES[name]
    learned, fixed = (set(words.split()) for words in SLOTS[name])
    arrays = random(structure)
    kept = {slot for slot in learned if "fresh" not in slot}
    assert set(structure.slots) == set(arrays) == kept | fixed
    assert set(structure.learned) == kept
    assert set(fresh(structure, arrays)) == learned
    assert structure.has_memory == (name in MEMORY)
    assert structure.holds_sigma == ("sigma" not in fixed)


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_identity_at_init(name, scale):
    plan, x = plan_of(name), tree()
    arrays = trees.identity(plan, scale)
    out = product(plan, arrays, x)
    jax.tree.map(lambda a, b: close(a, scale * np.asarray(b)), out, x)
    structure = llqr.STRUCTURES[name]
    made = mx.init(structure, shape_of(structure), scale, jnp.float64)
    close(matrix_of(structure, made), scale * np.eye(np.prod(shape_of(structure))))


class TestProduct:
    @pytest.mark.parametrize("seed", [0, 1])
    @pytest.mark.parametrize("which", VARIANTS)
    def test_equals_numpy(self, which, seed):
        structure = VARIANTS[which]
        arrays, shape = random(structure, seed), shape_of(structure)
        x = np.random.default_rng(seed).normal(size=shape)
        expected = oracle.product(structure.name, arrays, x)
        close(mx.product(structure, jaxed(arrays), jnp.asarray(x)), expected)
        dense = oracle.kronecker(structure.name, arrays, shape)
        close(matrix_of(structure, arrays), dense)
        close(dense @ x.ravel(), expected.ravel())

    @pytest.mark.parametrize("which", VARIANTS)
    def test_gradient(self, which):
        structure = VARIANTS[which]
        name, shape = structure.name, shape_of(structure)
        arrays = random(structure, 2)
        learned = {s: arrays.get(s, a) for s, a in fresh(structure, arrays, 2).items()}
        rng = np.random.default_rng(3)
        x, y = rng.normal(size=shape), rng.normal(size=shape)

        def inner(learned):
            out = mx.product(structure, mx.install(structure, jaxed(arrays), learned), x)
            return jnp.vdot(jnp.asarray(y), out)

        found = jax.grad(inner)(jaxed(learned))
        by_differences = oracle.differences(
            lambda v: np.vdot(y, oracle.product(name, oracle.install(name, arrays, v), x)), learned
        )
        closed = oracle.pull_back(name, arrays, x, y)
        without = {"spectrum"} if "norm" in name and name in CLOSED_FORMS else set()
        assert closed.keys() == (learned.keys() - without if name in CLOSED_FORMS else set())
        assert found.keys() == learned.keys()
        for slot, gradient in found.items():
            close(gradient, by_differences[slot], rtol=1e-7)
            if slot in closed:
                close(gradient, closed[slot])

    @pytest.mark.parametrize("name", NAMES)
    def test_is_linear_in_what_is_learned_only_where_it_says_so(self, name):
        structure = llqr.STRUCTURES[name]
        arrays = random(structure)
        x = jnp.asarray(np.random.default_rng(4).normal(size=shape_of(structure)))
        a, b = (fresh(structure, arrays, seed) for seed in (0, 1))
        p_a, p_b, p_both = (
            mx.product(structure, mx.install(structure, jaxed(arrays), jaxed(v)), x)
            for v in (a, b, {slot: 2 * a[slot] - b[slot] for slot in a})
        )
        error = float(jnp.max(jnp.abs(p_both - (2 * p_a - p_b))))
        assert structure.linear == (name in LINEAR)
        assert (error < 1e-12) == structure.linear


@pytest.mark.parametrize("name", NAMES)
def test_symmetric_and_definite_are_what_the_name_promises(name):
    structure = llqr.STRUCTURES[name]
    assert structure.symmetric == (name not in NOT_SYMMETRIC)
    assert structure.definite == (name in DEFINITE)
    skew, lowest = 0.0, np.inf
    for seed in range(4):
        arrays = mx.project(structure, legal(structure, seed), allow_inversion=True)
        p = matrix_of(structure, arrays)
        skew = max(skew, np.abs(p - p.T).max() / np.abs(p).max())
        lowest = min(lowest, np.linalg.eigvalsh(p + p.T).min() / 2)
    assert (skew < 1e-12) == structure.symmetric
    # Sherman and Morrison's update of a definite matrix is definite, but not of every matrix.
    assert (lowest >= -1e-12) == (structure.definite or name == "sym_swm_kfac")


def test_a_learned_factor_can_make_a_positive_spectrum_negative():
    structure = llqr.Structure(
        name="x", spectrum="full", positive=True, normalize="rms", scaled=True
    )
    assert not structure.definite
    assert replace(structure, scaled=False).definite


class TestProject:
    @pytest.mark.parametrize("allow_inversion", [False, True])
    @pytest.mark.parametrize("length", [1.0, 1e-30, 0.0])
    @pytest.mark.parametrize("name", NAMES)
    def test_keeps_the_matrix_and_is_idempotent(self, name, length, allow_inversion):
        structure = llqr.STRUCTURES[name]
        arrays = legal(structure)
        arrays |= {slot: length * arrays[slot] for slot in structure.learned}
        once = mx.project(structure, arrays, allow_inversion=allow_inversion)
        twice = mx.project(structure, once, allow_inversion=allow_inversion)
        assert arrays.keys() == once.keys() == twice.keys()
        for slot, a in once.items():
            close(twice[slot], a, rtol=1e-15)
        before, after = matrix_of(structure, arrays), matrix_of(structure, once)
        if name in ("scalar", "diagonal") and not allow_inversion:
            before = np.diag(np.maximum(np.diag(before), 1e-8))
        close(after, before)

    @pytest.mark.parametrize("name", ["scalar", "diagonal"])
    def test_clamps(self, name):
        structure = llqr.STRUCTURES[name]
        arrays = {"spectrum": jnp.array([-1.0, 0.0, 1e-9, 2.0])}
        once = mx.project(structure, arrays, allow_inversion=False)
        np.testing.assert_array_equal(once["spectrum"], [1e-8, 1e-8, 1e-8, 2.0])
        free = mx.project(structure, arrays, allow_inversion=True)
        np.testing.assert_array_equal(free["spectrum"], arrays["spectrum"])

    @pytest.mark.parametrize("name", NAMES)
    def test_standard_form(self, name):
        structure = llqr.STRUCTURES[name]
        arrays = jaxed(random(structure))
        out = mx.project(structure, arrays, allow_inversion=True)
        lower = "sym-kfac" in name
        changed = {"left", "right"} if lower else set()
        if name.endswith("norm-d"):
            changed |= {"left_values", "right_values"}
        if "_norm-e-kfac" in name:
            changed |= {"spectrum"}
        for slot in arrays:
            assert (slot in changed) != np.array_equal(out[slot], arrays[slot]), slot
        if lower:
            for slot in ("left", "right"):
                np.testing.assert_array_equal(out[slot], np.tril(arrays[slot]))
        if name.endswith("norm-d"):
            assert max(np.abs(out["left_values"])) == max(np.abs(out["right_values"])) == 1
        if "rms_norm" in name:
            close(np.mean(out["spectrum"] ** 2), 1.0)
        if "max_norm" in name:
            assert np.abs(out["spectrum"]).max() == 1


@pytest.mark.parametrize("name", sorted(n for n in NAMES if "norm" in n))
def test_gradient_is_finite_where_a_norm_is_zero(name):
    structure = llqr.STRUCTURES[name]
    zero = jax.tree.map(jnp.zeros_like, jaxed(random(structure)))
    gradient = jax.grad(lambda a: jnp.sum(mx.product(structure, a, jnp.ones((4, 3)))))(zero)
    assert all(np.isfinite(g).all() for g in gradient.values())


class TestMemory:
    @pytest.mark.parametrize("which", VARIANTS)
    def test_install_is_numpy_and_leaves_constants(self, which):
        structure = VARIANTS[which]
        arrays = random(structure)
        learned = fresh(structure, arrays)
        out = mx.install(structure, jaxed(arrays), jaxed(learned))
        expected = oracle.install(structure.name, arrays, learned)
        assert out.keys() == arrays.keys() == expected.keys()
        for slot, a in out.items():
            close(a, expected[slot])
            assert np.array_equal(a, arrays[slot]) == (slot == "sigma"), slot

    @pytest.mark.parametrize("which", ["sym_swm_kfac", "asym_swm_kfac", "sym_swm_e-kfac"])
    def test_rank_one_is_the_inverse_after_an_update(self, which):
        structure = llqr.STRUCTURES[which]
        arrays = legal(structure)
        learned = fresh(structure, arrays)
        out = mx.install(structure, arrays, jaxed(learned))
        for side in ("left", "right"):
            u = learned[f"{side}_fresh_u"]
            changed = np.linalg.inv(arrays[side]) + np.outer(u, learned.get(f"{side}_fresh_v", u))
            close(out[side], np.linalg.inv(changed), rtol=1e-9)

    @pytest.mark.parametrize("name", sorted(LOW_RANK))
    def test_first_in_first_out(self, name):
        structure = replace(llqr.STRUCTURES[name], rank=3)
        arrays = mx.init(structure, (6, 1), 0.5, jnp.float64)
        zero = np.zeros(6)
        vectors: dict = {slot: [zero] * 3 for slot in structure.slots if slot != "sigma"}
        for seed in range(5):
            learned = fresh(structure, arrays, seed)
            arrays = mx.install(structure, arrays, jaxed(learned))
            for slot, letter in zip(vectors, "uv", strict=False):
                vectors[slot].append(learned[f"left_fresh_{letter}"])
                np.testing.assert_array_equal(arrays[slot], vectors[slot][-3:])
        p = 0.5 * np.eye(6)
        for u, v in list(zip(vectors["left"], list(vectors.values())[-1], strict=True))[-3:]:
            p = (np.eye(6) + np.outer(u, v)) @ p
        close(matrix_of(structure, arrays), p)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize(("over", "bounded"), [(0.0, 1e-8), (-1e-9, -1e-8), (1e-9, 1e-8)])
    @pytest.mark.parametrize("name", ["sym_swm_kfac", "asym_swm_kfac"])
    def test_a_vanishing_denominator_keeps_its_sign(self, name, over, bounded, dtype):
        """1 + v^T A u = over, with A = diag(over - 1, 1, 1) and u = v = e_0."""
        if dtype == "float32" and over:
            return  # float32 has no number so near to -1
        structure = llqr.STRUCTURES[name]
        arrays = {"left": jnp.diag(jnp.array([over - 1, 1.0, 1.0], dtype))}
        arrays["right"] = arrays["left"]
        e = jnp.array([1.0, 0.0, 0.0], dtype)
        learned = dict.fromkeys(SLOTS[name][0].split(), e)
        out = mx.install(structure, arrays, learned)
        expected = np.diag([over - 1 - (over - 1) ** 2 / bounded, 1.0, 1.0])
        for side in ("left", "right"):
            assert out[side].dtype == dtype
            close(out[side], expected, rtol=1e-6)
        total = lambda v: jnp.sum(mx.install(structure, arrays, v)["left"])  # noqa: E731
        assert all(np.isfinite(g).all() for g in jax.grad(total)(learned).values())

    @pytest.mark.parametrize("name", sorted(MEMORY))
    @pytest.mark.parametrize("scale", [1.0, 100.0])
    def test_fresh_vectors_change_p_by_a_little_whatever_sigma(self, name, scale):
        structure = llqr.STRUCTURES[name]
        shape = (400, 1) if structure.view == "module" else (20, 20)
        arrays = mx.init(structure, shape, scale, jnp.float64)
        one, two = (mx.start(structure, arrays, shape, jax.random.key(s)) for s in (0, 1))
        for slot in (slot for slot in one if "_fresh_" in slot):
            assert not np.array_equal(one[slot], two[slot])
        if name.startswith("asym") or name.endswith("asym"):
            assert not np.array_equal(one["left_fresh_u"], one["left_fresh_v"])
        before, after = (mx.as_matrix(structure, a, shape) for a in
                         (arrays, mx.install(structure, arrays, one)))  # fmt: skip
        assert 0 < np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)


class TestLeaves:
    @pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
    @pytest.mark.parametrize("name", NAMES)
    def test_multiply_on_every_leaf(self, name, dtype):
        params = tree(dtype)
        plan = plan_of(name, params=params)
        arrays = random_arrays(plan)
        assert sorted(leaf for block in plan for leaf in block.names) == sorted(LEAVES)
        out = jax.tree.leaves(product(plan, arrays, params))
        xs = jax.tree.leaves(params)
        assert [(y.shape, y.dtype) for y in out] == [(x.shape, x.dtype) for x in xs]
        rtol = 1e-12 if dtype == "float64" else 2**-8
        for block, values in zip(plan, arrays, strict=True):
            wanted = "float64" if dtype == "float64" else "float32"
            assert {a.dtype.name for a in (*values.values(), *block.init(1.0).values())} == {wanted}
            ys = [np.ravel(np.asarray(out[i], "float64")) for i in block.leaves]
            expected = expected_product(block, values, [xs[i] for i in block.leaves])
            close(np.concatenate(ys), expected, rtol=rtol)
            matrix = block.as_matrix(values)
            assert matrix.dtype == wanted
            flat = np.concatenate([np.ravel(np.asarray(xs[i], "float64")) for i in block.leaves])
            close(
                np.asarray(matrix, "float64") @ flat,
                expected,
                rtol=1e-12 if dtype == "float64" else 1e-5,
            )

    @pytest.mark.parametrize("name", NAMES)
    def test_which_structure_a_leaf_has(self, name):
        kinds = {leaf: block.structure for block in plan_of(name) for leaf in block.names}
        chosen = llqr.STRUCTURES[name]
        for leaf, kind in kinds.items():
            if name in MODULE or leaf in MATRICES:
                # Sides over a vocabulary would hold its square.
                sides = {"tokens/embedding": "left", "lm_head/kernel": "right"}
                change = {sides[leaf]: "diagonal"} if name == "e-kfac-gpt" and leaf in sides else {}
                assert kind == replace(chosen, **change)
            elif name in ("sym_swm_kfac", "asym_swm_kfac"):
                assert kind == replace(chosen, right="identity", view="vector")
            else:
                assert kind == llqr.STRUCTURES["diagonal"]

    def test_only_the_head_and_embeddings_of_a_gpt_are_special(self):
        leaves = (
            "embedding",
            "wte/embedding",
            "embedding/kernel",
            "lm_head/kernel",
            "my_lm_head/kernel",
        )
        plan = plan_of("e-kfac-gpt", params=dict.fromkeys(leaves, jnp.ones((3, 2))))
        kinds = {b.names[0]: (b.structure.left, b.structure.right) for b in plan}
        plain, head, embedding = ("dense", "dense"), ("dense", "diagonal"), ("diagonal", "dense")
        expected = (embedding, embedding, plain, head, plain)
        assert kinds == dict(zip(leaves, expected, strict=True))

    @pytest.mark.parametrize("name", NAMES)
    def test_arrays_survive_the_trees_of_the_state(self, name):
        params = tree()
        table = rule_table(name)
        plan = plan_of(name)
        arrays = random_arrays(plan)
        packed = trees.pack(plan, arrays, params, slots(table))
        none = lambda v: v is None  # noqa: E731
        for slot_tree in packed.values():
            assert jax.tree.structure(slot_tree, is_leaf=none) == jax.tree.structure(params)
        back = trees.unpack(plan, packed, params)
        jax.tree.map(np.testing.assert_array_equal, back, arrays)

    def test_a_module_keeps_its_arrays_at_its_first_leaf(self):
        params = {
            "a": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},
            "b": {"kernel": jnp.ones(4)},
        }
        plan = plan_of("dense", params=params)
        assert [block.names for block in plan] == [("a/bias", "a/kernel"), ("b/kernel",)]
        packed = trees.pack(plan, trees.identity(plan, 1.0), params, ("left",))
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
    def test_matrix_view(self, name, shape, view):
        assert (
            math.prod(shape[: (k := row_axes(name, shape))]),
            math.prod(shape[k:]),
        ) == view

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_low_precision_leaves_have_float32_arrays(self, dtype):
        (block,) = plan_of("kfac", params={"kernel": jnp.ones((3, 2), dtype)})
        assert {a.dtype.name for a in block.init(1.0).values()} == {"float32"}


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
        assert conv.shape == (2, 12)
        too_many = llqr.Rule(match="conv", structure="kfac", rows=5)
        with pytest.raises(ValueError, match=r"'conv/kernel': rows=5 does not fit"):
            plan_of([too_many, ("*", "diagonal")])

    @pytest.mark.parametrize("table", [[], [("dense", "kfac")]])
    def test_a_catch_all_is_required(self, table):
        with pytest.raises(ValueError, match="the last rule must be a catch-all"):
            rule_table(table)

    @pytest.mark.parametrize("table", ["e-kfca", [("a", "e-kfca"), ("*", "diagonal")]])
    def test_an_unknown_structure_names_the_nearest(self, table):
        with pytest.raises(ValueError, match=r"unknown structure 'e-kfca': did you mean 'e-kfac'"):
            rule_table(table)


class TestMaxDim:
    @pytest.mark.parametrize("max_dim", [6, 5, 3])
    @pytest.mark.parametrize("name", NAMES)
    def test_a_long_square_side_becomes_diagonal(self, name, max_dim):
        params = {"kernel": jnp.asarray(np.random.default_rng(5).normal(size=(6, 4)))}
        (block,) = plan_of(name, max_dim, params)
        chosen = llqr.STRUCTURES[name]
        lengths = {"left": 24} if name in MODULE else {"left": 6, "right": 4}
        long = [s for s, d in lengths.items() if d > max_dim and name not in NO_SQUARE]
        note = f"{name} ({' and '.join(long)} diagonal)" if long else name
        assert block.structure == replace(chosen, name=note, **dict.fromkeys(long, "diagonal"))
        shapes = mx.array_shapes(block.structure, block.shape)
        assert all(shapes[side] == (lengths[side],) for side in long)
        made, (arrays,) = block.init(3.0), random_arrays([block])
        once, out = (product((block,), [own], params)["kernel"] for own in (made, arrays))
        close(once, 3 * np.asarray(params["kernel"]))
        close(np.ravel(out), expected_product(block, arrays, [params["kernel"]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left": "dens"}, r"unknown side 'dens': did you mean 'dense'"),
        ({"right": "rank_on"}, r"unknown side 'rank_on': did you mean 'rank_one"),
        ({"spectrum": "ful"}, r"unknown spectrum 'ful': did you mean 'full'"),
        ({"left": "dense", "view": "modul"}, r"unknown view 'modul': did you mean 'module'"),
        ({"spectrum": "full", "normalize": "rm"}, r"unknown normalize 'rm': did you mean 'rms'"),
        ({}, r"structure 'x' needs a side or a spectrum"),
        ({"right": "dense", "view": "module"}, r"right side must be 'identity', not dense"),
        ({"right": "diagonal", "view": "vector"}, r"right side must be 'identity', not diagonal"),
        ({"left": "dense", "positive": True}, r"has no spectrum that could be positive"),
        ({"left": "dense", "normalize": "rms"}, r"can normalise a full spectrum only"),
        ({"spectrum": "separable", "normalize": "max"}, r"can normalise a full spectrum only"),
        ({"spectrum": "scalar", "normalize": "max"}, r"can normalise a full spectrum only"),
        ({"spectrum": "full", "scaled": True}, r"only with a normalised spectrum"),
        ({"left": "low_rank", "rank": 0}, r"needs a rank >= 1, not 0"),
        ({"left": "low_rank", "rank": 1.5}, r"needs a rank >= 1, not 1.5"),
    ],
)
@pytest.mark.wrong_type
def test_bad_structures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        llqr.Structure(name="x", **options)
