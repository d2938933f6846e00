"""The quadratic model against dense matrices: every case, metric, reduction and damping."""

from typing import Any

import numpy as np
import pytest

import llqr
from tests import cases, oracle
from tests.cases import Case

RTOL = 1e-12
PSD = ("gauss_newton", "ngd", "reverse_kl", "renyi(0.3)", "renyi(2)")
runs = pytest.mark.parametrize(("case", "name"), cases.RUNS, ids=cases.label)


def close(actual: Any, expected: Any, scale: float | None = None, rtol: float = RTOL) -> None:
    """Compare by the largest error relative to the largest entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    scale = np.abs(expected).max() if scale is None else scale
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * scale)


@runs
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_model_is_the_explicit_quadratic(case: Case, name: Any, reduction: str) -> None:
    g, c = oracle.gradient(case), oracle.curvature(case, name, reduction)
    for damping in (0.0, 0.3):
        model = llqr.linearize(
            case.bound,
            case.params,
            cases.metric(name),
            damping=damping,
            divergence_reduction=reduction,
        )
        close(model.loss, case.bound(case.params))
        close(oracle.flat(model.gradient), g)
        for seed, scale in ((0, 1.0), (1, 30.0)):  # the identity holds for large controls too
            control = case.control(seed, scale)
            u = oracle.flat(control)
            cu = c @ u + damping * u
            j = g @ u + 0.5 * u @ cu
            size = np.abs(u).max() * np.abs(c).max() * np.sqrt(u.size)
            close(oracle.flat(model.product(control)), cu, size)
            close(model.value(control), j, abs(g @ u) + 0.5 * np.abs(u) @ np.abs(cu))
            value, slope = model.value_and_gradient(control)
            close(value, j, abs(g @ u) + 0.5 * np.abs(u) @ np.abs(cu))
            close(oracle.flat(slope), g + cu, size)
