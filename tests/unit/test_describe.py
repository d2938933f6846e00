"""`llqr.describe`: the table, its totals and its numbers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import llqr

M, N = 5, 3


def params(dtype: Any = jnp.float32) -> dict[str, Any]:
    return {
        "norm": {"scale": jnp.ones(M, dtype)},
        "out": {"bias": jnp.zeros(N, dtype), "kernel": jnp.zeros((M, N), dtype)},
        "temperature": jnp.ones((), dtype),
    }


def describe(structure: Any, tree: Any = None, **options: Any) -> llqr.Description:
    tx = llqr.llqr(optax.sgd(0.1), structure=structure, **options)
    return llqr.describe(tx, params() if tree is None else tree)


def only(structure: str, **options: Any) -> Any:
    """Return the one row of a single kernel."""
    (row,) = describe(structure, {"kernel": jnp.zeros((M, N), jnp.float32)}, **options).rows
    return row


KFAC_TABLE = """\
leaf           shape   seen as  structure  stored  memory  multiply-adds
------------------------------------------------------------------------
norm/scale     5       5        diagonal        5    20 B              5
out/bias       3       3        diagonal        3    12 B              3
out/kernel     5x3     5x3      kfac           34   136 B            120
temperature    scalar  scalar   diagonal        1     4 B              1
------------------------------------------------------------------------
24 parameters                                  43   172 B            129"""

DENSE_TABLE = """\
leaf                shape   seen as  structure  stored   memory  multiply-adds
------------------------------------------------------------------------------
norm/scale          5       5x1      dense          25    100 B             25
out/bias (+1 more)  3       18x1     dense         324  1.3 KiB            324
temperature         scalar  1x1      dense           1      4 B              1
------------------------------------------------------------------------------
24 parameters                                      350  1.4 KiB            350"""

LIMITED_TABLE = """\
leaf           shape   seen as  structure             stored  memory  multiply-adds
-----------------------------------------------------------------------------------
norm/scale     5       5        diagonal                   5    20 B              5
out/bias       3       3        diagonal                   3    12 B              3
out/kernel     5x3     5x3      kfac (left diagonal)      14    56 B             60
temperature    scalar  scalar   diagonal                   1     4 B              1
-----------------------------------------------------------------------------------
24 parameters                                             23    92 B             69"""


@pytest.mark.parametrize(
    ("structure", "options", "table"),
    [
        ("kfac", {}, KFAC_TABLE),
        ("dense", {}, DENSE_TABLE),
        ("kfac", {"max_dim": 4}, LIMITED_TABLE),
    ],
    ids=["per leaf", "module", "max_dim"],
)
def test_table(structure: str, options: dict[str, Any], table: str) -> None:
    assert str(describe(structure, **options)) == table


SQUARES = M**2 + N**2
BOTH = M * M * N + M * N * N  # multiply-adds of A X B^T
RANK, REFLECTIONS = 8, 4

STORED = {
    "scalar": 1,
    "diagonal": M * N,
    "dense": (M * N) ** 2,
    "diag-kfac": M + N,
    "kfac": SQUARES,
    "sym-kfac": SQUARES,
    "psd-sym-kfac": SQUARES,
    "sds-sym-kfac": SQUARES + M + N,
    "sds-sym-kfac_norm-d": SQUARES + M + N,
    "h-kfac": (REFLECTIONS + 1) * (M + N),
    "e-kfac": SQUARES + M * N,
    "e-kfac-gpt": SQUARES + M * N,
    "psd-e-kfac": SQUARES + M * N,
    "rms_norm-e-kfac": SQUARES + M * N + 1,
    "max_norm-e-kfac": SQUARES + M * N + 1,
    "scaled-rms_norm-e-kfac": SQUARES + M * N + 1,
    "scaled-max_norm-e-kfac": SQUARES + M * N + 1,
    "sep-e-kfac": SQUARES + M + N,
    "psd-sep-e-kfac": SQUARES + M + N,
    "sym_swm_kfac": SQUARES,
    "asym_swm_kfac": SQUARES,
    "sym_swm_e-kfac": SQUARES + M * N,
    "sym_swm_sep-e-kfac": SQUARES + M + N,
    "low-rank-memory": RANK * M * N + 1,
    "low-rank-memory-asym": 2 * RANK * M * N + 1,
}

COST = {
    "scalar": M * N,
    "diagonal": M * N,
    "dense": (M * N) ** 2,
    "diag-kfac": 2 * M * N,
    "kfac": BOTH,
    "sym-kfac": BOTH,
    # T (T^T X), with a diagonal between or without.
    "psd-sym-kfac": 2 * BOTH,
    "sds-sym-kfac": 2 * BOTH + 2 * M * N,
    "sds-sym-kfac_norm-d": 2 * BOTH + 2 * M * N,
    # A reflection x - 2 v (v.x) is two for each entry; Q and Q^T on both sides.
    "h-kfac": 2 * (2 * REFLECTIONS * 2 + 1) * M * N,
    "e-kfac": 2 * BOTH + M * N,
    "e-kfac-gpt": 2 * BOTH + M * N,
    "psd-e-kfac": 2 * BOTH + M * N,
    "rms_norm-e-kfac": 2 * BOTH + M * N,
    "max_norm-e-kfac": 2 * BOTH + M * N,
    "scaled-rms_norm-e-kfac": 2 * BOTH + M * N,
    "scaled-max_norm-e-kfac": 2 * BOTH + M * N,
    "sep-e-kfac": 2 * BOTH + 2 * M * N,
    "psd-sep-e-kfac": 2 * BOTH + 2 * M * N,
    "sym_swm_kfac": BOTH,
    "asym_swm_kfac": BOTH,
    "sym_swm_e-kfac": 2 * BOTH + M * N,
    "sym_swm_sep-e-kfac": 2 * BOTH + 2 * M * N,
    "low-rank-memory": 2 * RANK * M * N,
    "low-rank-memory-asym": 2 * RANK * M * N,
}


def test_tables_cover_every_structure() -> None:
    assert len(STORED) == 25
    assert STORED.keys() == COST.keys() == llqr.STRUCTURES.keys()


@pytest.mark.parametrize("structure", STORED)
def test_stored_numbers_and_cost_of_a_kernel(structure: str) -> None:
    row = only(structure)
    assert row.structure == structure
    assert row.parameters == M * N
    assert row.stored == STORED[structure]
    assert row.bytes == 4 * STORED[structure]
    assert row.cost == COST[structure]


@pytest.mark.parametrize("structure", STORED)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_memory_is_the_memory_of_the_state(structure: str, dtype: Any) -> None:
    """Numbers and bytes are those of the arrays that init makes: float32 at least."""
    tree = params(dtype)
    with jax.numpy_dtype_promotion("standard"):
        described = describe(structure, tree)
        state = llqr.scale_by_llqr(structure=structure).init(tree)
    leaves = jax.tree.leaves(state.blocks)
    assert sum(row.stored for row in described.rows) == sum(x.size for x in leaves)
    assert sum(row.bytes for row in described.rows) == sum(x.nbytes for x in leaves)
    assert sum(row.parameters for row in described.rows) == 24


@pytest.mark.parametrize(
    ("max_dim", "name", "stored", "cost"),
    [
        (M, "kfac", M**2 + N**2, M * N * (M + N)),
        (M - 1, "kfac (left diagonal)", M + N**2, M * N * (1 + N)),
        (N, "kfac (left diagonal)", M + N**2, M * N * (1 + N)),
        (N - 1, "kfac (left and right diagonal)", M + N, 2 * M * N),
    ],
)
def test_max_dim(max_dim: int, name: str, stored: int, cost: int) -> None:
    row = only("kfac", max_dim=max_dim)
    assert (row.structure, row.stored, row.cost) == (name, stored, cost)


def test_max_dim_counts_the_whole_module() -> None:
    rows = {row.leaf: row for row in describe("dense", max_dim=17).rows}
    assert rows["out/bias"].structure == "dense (left diagonal)"
    assert (rows["out/bias"].stored, rows["out/bias"].cost) == (18, 18)
    assert rows["norm/scale"].structure == "dense"


def test_rows_of_a_module_hold_all_of_its_leaves() -> None:
    rows = {row.leaf: row for row in describe("scalar").rows}
    assert rows.keys() == {"norm/scale", "out/bias", "temperature"}
    module = rows["out/bias"]
    assert (module.more, module.shape, module.view) == (1, (N,), (N + M * N, 1))
    assert (module.parameters, module.stored, module.cost) == (18, 1, 18)
    assert [row.more for row in rows.values()] == [0, 1, 0]


def test_rule_table_and_views() -> None:
    tree = {
        "attention": {"query": {"kernel": jnp.zeros((6, 2, 4), jnp.float32)}},
        "conv": {"kernel": jnp.zeros((3, 3, 2, 4), jnp.float32)},
        "embed": jnp.zeros((7, 4), jnp.float32),
    }
    rules = [
        llqr.Rule(match="conv", structure="e-kfac", rows=1),
        ("embed", "diag-kfac"),
        (lambda path, shape: len(shape) == 3, "kfac"),
        ("*", "diagonal"),
    ]
    seen = {row.leaf: (row.view, row.structure) for row in describe(rules, tree).rows}
    assert seen == {
        "attention/query/kernel": ((6, 8), "kfac"),
        "conv/kernel": ((3, 24), "e-kfac"),
        "embed": ((7, 4), "diag-kfac"),
    }
    by_shape = {row.leaf: row.view for row in describe("kfac", tree).rows}
    assert by_shape["conv/kernel"] == (18, 4)


def test_totals_and_units() -> None:
    tree = {"a": jax.ShapeDtypeStruct((1000, 300), jnp.float32)}
    description = describe("kfac", tree)
    last = str(description).splitlines()[-1].split()
    stored = 1000**2 + 300**2
    mebibytes = f"{4 * stored / 2**20:.1f}"
    cost = 1000 * 300 * 1300
    assert last == ["300,000", "parameters", f"{stored:,}", mebibytes, "MiB", f"{cost:,}"]


def test_shapes_are_enough() -> None:
    shapes = jax.eval_shape(params)
    assert describe("e-kfac", shapes) == describe("e-kfac")
    huge = {"kernel": jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)}
    (row,) = describe("diagonal", huge).rows
    assert row.stored == math.prod((10**6, 10**6))


def test_no_llqr() -> None:
    with pytest.raises(ValueError, match=r"there is no llqr.llqr or llqr.scale_by_llqr"):
        llqr.describe(optax.adam(0.1), params())


def test_streaming_refits_count_what_they_follow():
    """Momentum, second moments, curvature: as many bytes as the state has, and a line."""
    tx, tree = llqr.streaming(0.1), params()
    stream = llqr.find(tx.init(tree)).stream
    described = llqr.describe(tx, jax.eval_shape(lambda: tree))
    assert described.followed == sum(x.nbytes for x in jax.tree.leaves(stream)) > 0
    last = str(described).splitlines()[-1]
    assert last.startswith("and ")
    assert last.endswith("B of momentum, second moments and curvature")
    assert describe("e-kfac").followed == 0
