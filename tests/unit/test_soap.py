"""The suite's SOAP, KL-SOAP and KL-Shampoo against the papers' formulas, in numpy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.suite.methods import soap

B1, B2, SHAMPOO, EPS = 0.9, 0.8, 0.7, 1e-8
FREQUENCY, MAX_DIM = 3, 8
SHAPES = [(4, 3), (2, 2, 3), (9, 3), (5,)]


def sorted_eigh(statistics):
    values, vectors = np.linalg.eigh(statistics)
    return values[::-1], vectors[:, ::-1]


def reference(grads, sides):
    """Algorithm 3 of SOAP on one matrix, with the code's first call and sorted columns."""
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
            if not sides[i] or t % FREQUENCY:
                continue
            if t == 0:
                bases[i] = sorted_eigh(stats[i])[1]
                continue
            order = np.argsort(-np.diag(bases[i].T @ stats[i] @ bases[i]))
            square = np.take(square, order, i)
            bases[i] = np.linalg.qr(stats[i] @ bases[i][:, order])[0]
    return steps


def reference_by_kl(grads, sides, kronecker):
    """The same with sides that are whitened by each other; `kronecker`: without Adam's squares.

    The statistics of a side are whitened by a dense inverse of the other one's estimate.
    """
    m, n = grads[0].shape
    mean, square, steps = np.zeros((m, n)), np.zeros((m, n)), []
    scale = np.mean(grads[0] ** 2) ** (1 / max(1, sum(sides)))
    stats = [scale * np.eye(m), scale * np.eye(n)]
    bases = [np.eye(m), np.eye(n)]
    # Of a side that has no basis: ones.
    values = [(scale if has else 1) * np.ones(d) for has, d in zip(sides, (m, n), strict=True)]
    for t, g in enumerate(grads):
        inverse = [u @ np.diag(1 / v) @ u.T for u, v in zip(bases, values, strict=True)]
        outer = [g @ inverse[1] @ g.T / n, g.T @ inverse[0] @ g / m]
        for i in (0, 1):
            stats[i] = SHAMPOO * stats[i] + (1 - SHAMPOO) * outer[i]
            if sides[i]:
                new = np.diag(bases[i].T @ outer[i] @ bases[i])
                values[i] = SHAMPOO * values[i] + (1 - SHAMPOO) * new
        step = np.zeros((m, n))
        if t:
            mean = B1 * mean + (1 - B1) * g
            rotated = bases[0].T @ (mean / (1 - B1**t)) @ bases[1]
            square = B2 * square + (1 - B2) * (bases[0].T @ g @ bases[1]) ** 2
            spectrum = np.outer(*values) if kronecker and any(sides) else square / (1 - B2**t)
            step = bases[0] @ (rotated / (np.sqrt(spectrum) + EPS)) @ bases[1].T
        steps.append(step)
        for i in (0, 1):
            if not sides[i] or t % FREQUENCY:
                continue
            if t == 0:
                values[i], bases[i] = sorted_eigh(stats[i])
                continue
            order = np.argsort(-np.diag(bases[i].T @ stats[i] @ bases[i]))
            square, values[i] = np.take(square, order, i), values[i][order]
            bases[i] = np.linalg.qr(stats[i] @ bases[i][:, order])[0]
    return steps


def steps_of(tx, grads):
    state, found = tx.init(jnp.zeros(grads[0].shape)), []
    for t, g in enumerate(grads):
        step, state = tx.update(jnp.asarray(g), state, refresh=t % FREQUENCY == 0)
        found.append(step)
    return found


def agree(found, wanted, grads, shape):
    for step, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(step, right.reshape(shape), rtol=1e-9, atol=1e-12)


def drawn(shape):
    """Ten gradients, as they are and as matrices, and which sides have bases."""
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=shape) for _ in range(10)]
    matrices = [g.reshape(-1, shape[-1]) for g in grads]
    return grads, matrices, [len(shape) > 1 and d <= MAX_DIM for d in matrices[0].shape]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps(shape):
    with jax.enable_x64(True):
        grads, matrices, sides = drawn(shape)
        found = steps_of(soap.scale_by_soap(B1, B2, SHAMPOO, EPS, MAX_DIM), grads)
        agree(found, reference(matrices, sides), grads, shape)


@pytest.mark.parametrize("kronecker", [False, True], ids=["KL-SOAP", "KL-Shampoo"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_by_kl(shape, kronecker):
    with jax.enable_x64(True):
        grads, matrices, sides = drawn(shape)
        tx = soap.scale_by_soap(B1, B2, SHAMPOO, EPS, MAX_DIM, whiten=True, kronecker=kronecker)
        wanted = reference_by_kl(matrices, sides, kronecker)
        agree(steps_of(tx, grads), wanted, grads, shape)


def test_statistics_of_kl_shampoo_are_those_of_a_kronecker_gaussian():
    """The product of both sides is the covariance that the gradients are drawn from."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        rng, (m, n) = np.random.default_rng(0), (4, 3)
        left, right = np.diag([4.0, 2.0, 1.0, 0.5]), np.diag([9.0, 1.0, 0.1])
        tx = soap.scale_by_soap(shampoo_decay=0.999, whiten=True, kronecker=True)
        state = tx.init(jnp.zeros((m, n)))
        step = jax.jit(lambda g, state: tx.update(g, state, refresh=True)[1])
        for _ in range(6000):
            g = np.sqrt(left) @ rng.normal(size=(m, n)) @ np.sqrt(right)
            state = step(jnp.asarray(g), state)
        found = np.kron(*(np.asarray(s) for s in state.leaves[0].statistics))
        np.testing.assert_allclose(np.diag(found), np.diag(np.kron(left, right)), rtol=0.15)


def test_a_product_needs_whitened_sides():
    with pytest.raises(ValueError, match="whiten"):
        soap.scale_by_soap(kronecker=True)
