"""The quality of approximations, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from llqr import lqr
from tests import cases, oracle

DAMPING = 0.05


def found(case, structures=("diagonal", "kfac"), metric="ngd", **options):
    return llqr.quality(
        case.bound, case.params, structures=structures, metric=metric, damping=DAMPING,
        tolerance=1e-12, **options,
    )  # fmt: skip


def dense(case, metric="ngd"):
    g = np.asarray(ravel_pytree(jax.grad(case.bound)(case.params))[0])
    c = oracle.curvature(case, metric) + DAMPING * np.eye(g.size)
    exact = -np.linalg.solve(c, g)
    return g, c, exact


def groups(params):
    """Positions of the flattened parameters by top-level entry."""
    ids = []
    for i, name in enumerate(params):
        ids += [i] * sum(leaf.size for leaf in jax.tree.leaves(params[name]))
    return np.array(ids)


@pytest.mark.parametrize("metric", ["ngd", "gauss_newton"])
def test_shares_are_those_of_the_dense_quadratic(metric):
    case = cases.MLP_TANH
    g, c, exact = dense(case, metric)
    rows = {row.name: row for row in found(case, metric=metric).rows}
    optimum = g @ exact + exact @ c @ exact / 2
    same = groups(case.params)[:, None] == groups(case.params)[None]
    steps = {"gradient": -g, "exact": exact, "block-diagonal": -np.linalg.solve(c * same, g)}
    for name, u in steps.items():
        share = (g @ u + u @ c @ u / 2) / optimum
        best = -((g @ u) ** 2) / (u @ c @ u) / 2 / optimum
        cosine = u @ exact / np.linalg.norm(u) / np.linalg.norm(exact)
        row = rows[name]
        np.testing.assert_allclose(row.share, share, rtol=1e-7)
        np.testing.assert_allclose(row.best_share, best, rtol=1e-7)
        np.testing.assert_allclose(row.whole.cosine, cosine, rtol=1e-7)
        length = np.linalg.norm(u) / np.linalg.norm(exact)
        np.testing.assert_allclose(row.whole.length, length, rtol=1e-7)
        for i, stage in enumerate(case.params):
            part = groups(case.params) == i
            a, b = u[part], exact[part]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            np.testing.assert_allclose(row.stages[stage].cosine, cosine, rtol=1e-6)


def test_a_learned_row_is_the_step_of_one_refit():
    case = cases.MLP_TANH
    row = next(r for r in found(case).rows if r.name == "kfac")
    tx = llqr.scale_by_llqr(structure="kfac", damping=DAMPING)
    state = llqr.refresh(tx, tx.init(case.params), case.params, case.bound)
    g = jax.grad(case.bound)(case.params)
    step, _ = tx.update(jax.tree.map(jnp.negative, g), state, case.params, refresh=False)
    model = llqr.linearize(case.bound, case.params, damping=DAMPING)
    _, c, exact = dense(case)
    optimum = -exact @ c @ exact / 2
    np.testing.assert_allclose(row.share, model.value(step) / optimum, rtol=1e-9)


def test_no_share_exceeds_the_optimum_and_the_table_shows_all():
    result = found(cases.MLP_TANH, structures=["diagonal", "e-kfac", [("*", "scalar")]])
    assert [row.name for row in result.rows] == [
        "gradient", "diagonal", "e-kfac", "rules 3", "block-diagonal", "exact"
    ]  # fmt: skip
    assert all(row.share <= row.best_share + 1e-9 <= 1 + 2e-9 for row in result.rows)
    lines = str(result).splitlines()
    assert lines[0].split()[:4] == ["step", "share", "of", "optimum"]
    assert lines[-1].split()[:3] == ["exact", "100.0", "%"]
    assert len(lines) == 2 + len(result.rows)


def test_a_metric_without_minimum_is_refused():
    with pytest.raises(lqr.NonConvexError, match="no minimum"):
        found(cases.MLP_TANH, metric="newton")
