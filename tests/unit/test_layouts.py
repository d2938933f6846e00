"""What names and shapes say of leaves: embeddings and stacks, and how it is said."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr.errors import LayoutWarning
from llqr.structures.layouts import embedding_like, stacks


def shapes(**leaves: Any) -> Any:
    """A tree of arrays of these shapes; paths with "/" in them."""
    tree: dict[str, Any] = {}
    for path, shape in leaves.items():
        *parents, name = path.split("__")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


@pytest.mark.parametrize(
    "path",
    ["embedding", "tokens/embedding", "embeddings", "embed/embeddings", "wte", "wpe", "tok_emb",
     "tok_embeddings", "word_embedding", "model/embed_tokens/weight", "wte/weight", "embed/weight",
     "shared_embedding", "token_embedder/embedding", "transformer/tok_emb/weight",
     "embed_3/embedding", "embed/w", "vocab/weight"],
)  # fmt: skip
def test_embeddings_of_all_frameworks_are_known(path: str) -> None:
    assert embedding_like(path, (2000, 16))


@pytest.mark.parametrize(
    "path",
    ["dense/kernel", "patch_embed/weight", "patch_embedding/kernel", "embed/kernel", "embed/bias",
     "time_embed/weight", "embed_proj/weight", "member", "remember/weight", "lm_head/kernel"],
)  # fmt: skip
def test_projections_are_no_embeddings(path: str) -> None:
    assert not embedding_like(path, (64, 16))


def test_a_table_of_other_rank_is_no_embedding() -> None:
    assert not embedding_like("pos_embedding", (1, 16, 8))
    assert not embedding_like("embed/weight", (3, 3, 4, 8))


STACKED = [
    shapes(layers__kernel=(6, 8, 4)),
    shapes(layers=(6, 8, 4)),
    shapes(h__attn__kernel=(6, 8, 12), h__mlp__kernel=(6, 8, 4)),
    shapes(layers__mlp__kernel=(6, 8, 4), layers__norm__scale=(6, 8)),
    shapes(ScanBlock_0__Dense_0__kernel=(6, 8, 4), ScanBlock_0__Dense_0__bias=(6, 4)),
    shapes(experts__wi=(6, 8, 4), experts__wo=(6, 4, 8)),
    shapes(net__weight=(6, 8, 4), net__bias=(6, 4)),  # eqx.filter_vmap, whatever its name
    shapes(blocks__attn__query__kernel=(6, 8, 2, 4), blocks__attn__query__bias=(6, 2, 4)),
    shapes(layers__conv__kernel=(6, 3, 3, 8, 8), layers__conv__bias=(6, 8)),
]


@pytest.mark.parametrize("params", STACKED)
def test_stacks_are_found(params: Any) -> None:
    tree = {"stem": params, "head": {"kernel": jax.ShapeDtypeStruct((8, 3), jnp.float32)}}
    tx = llqr.streaming(0.1, structure="auto")
    for row in llqr.describe(tx, tree).rows:
        assert row.stack == ((6,) if row.leaf.startswith("stem") else ()), row
    with pytest.warns(LayoutWarning, match=r"looks? like a stack of 6.*one matrix"):
        llqr.streaming(0.1, structure="e-kfac").init(_zeros(tree))


def test_the_second_axis_of_a_stack_and_a_stack_in_a_stack() -> None:
    names = ["layers/mlp/wi/kernel", "layers/mlp/wo/kernel", "layers/norm/scale"]
    found = stacks(names, [(8, 6, 16), (16, 6, 8), (8, 6)])
    assert [stack.axes for stack in found.values()] == [(1,), (1,), (1,)]
    names = ["layers/experts/wi", "layers/experts/wo", "layers/norm/scale"]
    found = stacks(names, [(6, 4, 8, 16), (6, 4, 16, 8), (6, 8)])
    assert [found[i].axes for i in range(3)] == [(0, 1), (0, 1), (0,)]


PLAIN = [
    shapes(conv1__kernel=(3, 3, 1, 8), conv1__bias=(8,), conv2__kernel=(3, 3, 8, 8)),
    shapes(blocks__conv1__kernel=(3, 3, 8, 8), blocks__conv2__kernel=(3, 3, 8, 8)),
    shapes(attention__query__kernel=(8, 2, 4), attention__out__kernel=(2, 4, 8)),
    shapes(layers__query__kernel=(8, 2, 4), layers__key__kernel=(8, 2, 4)),
    shapes(layers__0__w=(8, 2, 4), layers__1__w=(8, 2, 4)),
    shapes(layers_0__query__kernel=(8, 2, 4), layers_0__query__bias=(2, 4)),
    shapes(dense__kernel=(8, 4), dense__bias=(4,)),
    shapes(layers__kernel=(8, 4)),
    shapes(a__kernel=(8, 3, 8), a__bias=(8, 3), head__kernel=(8, 4)),
]  # fmt: skip


@pytest.mark.parametrize("params", PLAIN)
def test_what_is_no_stack_is_left_alone(params: Any) -> None:
    for structure in ("auto", "e-kfac"):
        tx = llqr.streaming(0.1, structure=structure)
        assert all(row.stack == () for row in llqr.describe(tx, params).rows)
        tx.init(_zeros(params))  # warnings are errors here
    assert str(llqr.describe(llqr.streaming(0.1), params)) == str(
        llqr.describe(llqr.streaming(0.1, structure="e-kfac"), params)
    )


def test_what_is_found_is_said_once_with_the_rule_to_write() -> None:
    params = _zeros(shapes(layers__kernel=(6, 8, 4), layers__bias=(6, 4), out=(4, 2)))
    for tx in (llqr.streaming(0.1), optax.chain(optax.clip(1.0), llqr.streaming(0.1))):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            state = tx.init(params)
            llqr.describe(tx, params)
            llqr.inspect(tx, state, params)
        (only,) = said
        assert only.category is LayoutWarning
        assert "is taken for a stack of 6" in str(only.message)
        assert "llqr.stacked" in str(only.message)
        assert "note: leaf 'layers/kernel' (6, 8, 4), is taken" in str(llqr.describe(tx, params))
    word = r"(^|/)layers(/|$)"
    rest = llqr.structures.rule_table("e-kfac")
    meant = [
        "auto", "diagonal", [*llqr.stacked("e-kfac", match=word), *rest],
        [llqr.Rule(match=word, structure="e-kfac", rows=(0, 1), columns=(2,)), *rest],
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for structure in meant:
            llqr.scale_by_llqr(structure=structure, refit=llqr.Streaming()).init(
                {"layers": {"kernel": params["layers"]["kernel"]}, "out": params["out"]}
            )


def test_vocabularies_are_one_definition() -> None:
    """A rule, or a name: the side is diagonal, entries are not weighed, steps not orthogonal."""
    params = {"wte": jnp.zeros((300, 4)), "table": jnp.zeros((300, 4)), "small": jnp.zeros((9, 4))}
    rules = [
        llqr.Rule(match="table", structure="e-kfac-gpt", seldom=True), ("*", "e-kfac-gpt"),
    ]  # fmt: skip
    rows = {
        row.leaf: row for row in llqr.describe(llqr.streaming(0.1, structure=rules), params).rows
    }
    assert rows["wte"].stored == rows["table"].stored == 300 + 4 * 4 + 300 * 4
    assert rows["small"].stored == 9 * 9 + 4 * 4 + 9 * 4
    head = {"lm_head": {"kernel": jnp.zeros((4, 300))}}
    (row,) = llqr.describe(llqr.streaming(0.1, structure="e-kfac-gpt"), head).rows
    assert row.stored == 4 * 4 + 300 + 300 * 4
    head = {"lm_head": {"weight": jnp.zeros((300, 4))}}
    (row,) = llqr.describe(llqr.streaming(0.1, structure="e-kfac-gpt"), head).rows
    assert row.stored == 4 * 4 + 300 + 300 * 4


def test_auto_keeps_a_small_vocabulary_dense() -> None:
    for size, stored in ((256, 256**2), (257, 257)):
        (row,) = llqr.describe(llqr.streaming(0.1), {"wte": jnp.zeros((size, 4))}).rows
        assert row.stored == stored + 4 * 4 + size * 4


def test_a_structure_for_vocabularies_says_that_it_found_none() -> None:
    tx = llqr.streaming(0.1, structure="e-kfac-gpt")
    with pytest.warns(
        LayoutWarning, match=r"no leaf has the name of an emb.*'a', with 2000.*seldom"
    ):
        tx.init({"a": jnp.zeros((2000, 2))})
    tx.init({"a": jnp.zeros((300, 2))})


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


CONTAINERS = ["layers", "blocks", "experts", "ScanBlock_0", "scan_layers", "net", "body", "encoder"]
MODULES = ["mlp", "attention", "norm", "conv", "proj"]


def _drawn(rng: Any) -> tuple[Any, set[str]]:
    """A model of modules, some of them stacked; and the paths of leaves that are."""
    tree: dict[str, Any] = {}
    truth: set[str] = set()
    for container in rng.choice(CONTAINERS, size=2, replace=False):
        count = int(rng.integers(2, 9)) if rng.integers(2) else 0
        lead = (count,) if count else ()
        width, members = int(rng.integers(10, 20)), {}
        for module in ["dense", *rng.choice(MODULES, size=int(rng.integers(3)), replace=False)]:
            out, leaves = int(rng.integers(20, 30)), {}
            if module == "norm":
                leaves["scale"] = (width,)
            elif module == "conv":
                leaves |= {"kernel": (3, 3, width, out), "bias": (out,)}
            else:
                leaves |= {"kernel": (width, out), "bias": (out,)}
            members[module] = {name: (*lead, *shape) for name, shape in leaves.items()}
            if count:
                truth |= {f"{container}/{module}/{name}" for name in leaves}
        tree[container] = members
    tree["head"] = {"kernel": (31, 5), "bias": (5,)}
    shaped = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )
    return shaped, truth


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_taken_for_something_else_in_silence(seed: int) -> None:
    """By default what is stacked is found and said; by another structure, it is doubted."""
    tree, truth = _drawn(np.random.default_rng(seed))
    found = llqr.describe(llqr.streaming(0.1, block_size=None), tree)
    assert {row.leaf for row in found.rows if row.stack} == truth
    kernels = any(leaf.endswith("kernel") for leaf in truth)
    assert bool(found.doubts) == kernels
    plain = llqr.describe(llqr.streaming(0.1, structure="e-kfac", block_size=None), tree)
    assert not any(row.stack for row in plain.rows)
    assert bool(plain.doubts) == kernels
    assert len(found.doubts) <= 2
