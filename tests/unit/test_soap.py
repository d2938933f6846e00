"""The study's SOAP against the paper's formulas, one matrix at a time in numpy."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks" / "suite" / "methods"
B1, B2, SHAMPOO, EPS = 0.9, 0.8, 0.7, 1e-8


@pytest.fixture(scope="module")
def soap():
    spec = importlib.util.spec_from_file_location("soap", HERE / "soap.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["soap"] = module
    spec.loader.exec_module(module)
    return module


def reference(grads, frequency, sides):
    """Algorithm 3 of the paper on one matrix, with the code's first call and sorted columns."""
    m, n = grads[0].shape
    mean, square, steps = np.zeros((m, n)), np.zeros((m, n)), []
    stats, bases = [np.zeros((m, m)), np.zeros((n, n))], [np.eye(m), np.eye(n)]
    for t, g in enumerate(grads):
        step = np.zeros((m, n))
        if t:
            mean = B1 * mean + (1 - B1) * g
            square = B2 * square + (1 - B2) * (bases[0].T @ g @ bases[1]) ** 2
            rotated = bases[0].T @ (mean / (1 - B1**t)) @ bases[1]
            step = bases[0] @ (rotated / (np.sqrt(square / (1 - B2**t)) + EPS)) @ bases[1].T
        steps.append(step)
        for i, outer in enumerate((g @ g.T, g.T @ g)):
            stats[i] = SHAMPOO * stats[i] + (1 - SHAMPOO) * outer
            if not sides[i] or t % frequency:
                continue
            if t == 0:
                bases[i] = np.linalg.eigh(stats[i])[1][:, ::-1]
                continue
            order = np.argsort(-np.diag(bases[i].T @ stats[i] @ bases[i]))
            square = np.take(square, order, i)
            bases[i] = np.linalg.qr(stats[i] @ bases[i][:, order])[0]
    return steps


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3), (9, 3), (5,)], ids=str)
def test_steps(soap, shape):
    with jax.enable_x64(True):
        rng, frequency = np.random.default_rng(0), 3
        grads = [rng.normal(size=shape) for _ in range(10)]
        tx = soap.scale_by_soap(B1, B2, SHAMPOO, EPS, max_dim=8)
        state = tx.init(jnp.zeros(shape))
        found = []
        for t, g in enumerate(grads):
            step, state = tx.update(jnp.asarray(g), state, refresh=t % frequency == 0)
            found.append(step)
        matrices = [g.reshape(-1, shape[-1]) for g in grads]
        sides = [len(shape) > 1 and size <= 8 for size in matrices[0].shape]
        for step, wanted in zip(found, reference(matrices, frequency, sides), strict=True):
            np.testing.assert_allclose(step, wanted.reshape(shape), rtol=1e-9, atol=1e-12)
