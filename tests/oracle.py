"""Slow, obvious answers: dense matrices by brute force, in numpy wherever possible.

  symbol   meaning                                                      shape
  theta    the parameters, flattened in the order of `jax.tree.leaves`  [n]
  rows     the rows of an output that count (the mask applied by indexing)
  dz       Jacobian of the rows in theta                                [rows, K, n]
  C        curvature                                                    [n, n]

Nothing here calls the library: divergences are written from their formulas in probabilities
(the library works in logits), J(u) is the explicit quadratic, structures are Kronecker products.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from tests.cases import Case

RTOL = 1e-12


def close(actual: Any, expected: Any, scale: float | None = None, rtol: float = RTOL) -> None:
    """Assert that the largest error is below `rtol` times `scale`: the largest entry, by default.

    Entry by entry would ask for more than rounding allows where large terms cancel.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=0.0) if scale is None else scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * float(scale))


# --- flat views -----------------------------------------------------------------------------


def flat(tree: Any) -> np.ndarray:
    """Return all entries of a tree as one vector."""
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def _flat_functions(case: Case) -> tuple[Callable, Callable, Any]:
    theta, unravel = ravel_pytree(case.params)
    loss = lambda v: case.objective.loss(  # noqa: E731
        case.objective.forward(unravel(v), case.batch), case.batch
    )
    outputs = lambda v: case.objective.forward(unravel(v), case.batch)  # noqa: E731
    return loss, outputs, theta


@cache
def gradient(case: Case) -> np.ndarray:
    """Return g, in forward mode."""
    value, _, theta = _flat_functions(case)
    return np.asarray(jax.jit(jax.jacfwd(value))(theta))


@cache
def loss(case: Case) -> np.ndarray:
    """Return the loss."""
    value, _, theta = _flat_functions(case)
    return np.asarray(jax.jit(value)(theta))


@cache
def hessian(case: Case) -> np.ndarray:
    """Return the Hessian of the loss."""
    value, _, theta = _flat_functions(case)
    return np.asarray(jax.jit(jax.hessian(value))(theta))


def hessian_by_differences(case: Case, step: float = 1e-4) -> np.ndarray:
    """Return the Hessian of the loss from values alone: five-point differences of `jacfwd`."""
    value, _, theta = _flat_functions(case)
    g = jax.jit(jax.jacfwd(value))
    columns = []
    for e in np.eye(theta.size):
        d = lambda t, e=e: np.asarray(g(theta + t * step * e))  # noqa: E731
        columns.append((8 * (d(1) - d(-1)) - (d(2) - d(-2))) / (12 * step))
    return np.stack(columns, axis=1)


@cache
def _rows(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each output: z [rows, K] and dz [rows, K, n] of the rows that count."""
    _, outputs, theta = _flat_functions(case)
    values, jacobians = jax.jit(lambda v: (outputs(v), jax.jacfwd(outputs)(v)))(theta)
    masks = None if case.objective.mask is None else case.objective.mask(case.batch)
    zs, dzs = jax.tree.leaves(values), jax.tree.leaves(jacobians)
    ms = jax.tree.leaves(masks) or [None] * len(zs)
    result = []
    for z, dz, m in zip(zs, dzs, ms, strict=True):
        z, dz = np.asarray(z), np.asarray(dz)
        if z.ndim == 1:  # one number for each row
            z, dz = z[:, None], dz[:, None, :]
        k = z.shape[-1]
        keep = slice(None) if m is None else np.asarray(m).ravel()
        result.append((z.reshape(-1, k)[keep], dz.reshape(-1, k, theta.size)[keep]))
    return result


# --- curvature ------------------------------------------------------------------------------


def softmax(z: np.ndarray) -> np.ndarray:
    """Return the probabilities of each row."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def fisher(z: np.ndarray, dz: np.ndarray) -> np.ndarray:
    """Return sum over rows of sum_k s_k (dlogp_k)(dlogp_k)^T."""
    total = np.zeros((dz.shape[-1],) * 2)
    for row, jacobian in zip(z, dz, strict=True):
        s = softmax(row)
        dlogp = jacobian - s @ jacobian  # of log p_k = z_k - logsumexp(z)
        for k in range(len(s)):
            total += s[k] * np.outer(dlogp[k], dlogp[k])
    return total


def divergence(name: str, z: Any, r: Any) -> Any:
    """Return one row's divergence, written in probabilities q = softmax(z), s = softmax(r)."""
    if name == "gaussian":
        return 0.5 * jnp.dot(z - r, z - r)
    q, s = jnp.exp(z) / jnp.sum(jnp.exp(z)), jnp.exp(r) / jnp.sum(jnp.exp(r))
    if name == "ngd":
        return -jnp.dot(s, jnp.log(q))
    if name == "reverse_kl":
        return jnp.dot(q, jnp.log(q / s))
    if name == "renyi_zero":
        return -jnp.log(jnp.prod(q))
    if name == "renyi_2":
        return jnp.log(jnp.dot(jnp.log(s), s / q) / jnp.sum(jnp.log(s)))
    order = float(name.removeprefix("renyi(").removesuffix(")"))
    if order == 1.0:
        return jnp.dot(s, jnp.log(s / q))
    return jnp.log(jnp.dot(s**order, q ** (1.0 - order))) / (order - 1.0)


def _output_metric(name: Any, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
    """Return sum over rows of dz^T Q dz, Q the Hessian of a divergence in the row's outputs."""
    total = np.zeros((dz.shape[-1],) * 2)
    row_divergence = name if callable(name) else lambda a, b: divergence(name, a, b)
    q_of = jax.jit(jax.hessian(row_divergence))
    for row, jacobian in zip(z, dz, strict=True):
        total += jacobian.T @ np.asarray(q_of(row, row)) @ jacobian
    return total


def _loss_metric(case: Case) -> np.ndarray:
    """Return J^T (d2 loss / dz2) J over all outputs at once, masked ones included."""
    _, outputs, theta = _flat_functions(case)
    z, unravel = ravel_pytree(jax.jit(outputs)(theta))
    q = jax.jit(jax.hessian(lambda v: case.objective.loss(unravel(v), case.batch)))(z)
    j = jax.jit(jax.jacfwd(lambda v: ravel_pytree(outputs(v))[0]))(theta)
    return np.asarray(j.T @ q @ j)


def _full_divergence(case: Case, name: str) -> np.ndarray:
    """Return the whole Hessian in theta of a divergence summed over rows."""
    _, outputs, theta = _flat_functions(case)
    [(frozen, _)] = _rows(case)
    mask = None if case.objective.mask is None else np.asarray(case.objective.mask(case.batch))

    def total(v: Any) -> Any:
        z = outputs(v)
        z = z.reshape(-1, z.shape[-1]) if mask is None else z[np.nonzero(mask)]
        return jnp.sum(jax.vmap(lambda a, b: divergence(name, a, b))(z, jnp.asarray(frozen)))

    return np.asarray(jax.jit(jax.hessian(total))(theta))


def curvature(case: Case, name: Any, reduction: str = "sum") -> np.ndarray:
    """Return the dense C, without damping, for a metric's name or a tree of them."""
    keys = sorted(name) if isinstance(name, dict) else None
    names = tuple(name[k] for k in keys) if keys else name
    return _curvature(case, names, reduction)


@cache
def _curvature(case: Case, name: Any, reduction: str) -> np.ndarray:
    if name == "newton":
        return hessian(case)
    if name == "gauss_newton":
        return _loss_metric(case)
    if name in ("renyi_zero", "renyi_2"):
        total = _full_divergence(case, name)
        return total / (len(_rows(case)[0][0]) if reduction == "mean" else 1)
    names = name if isinstance(name, tuple) else (name,)
    n = flat(case.params).size
    total = np.zeros((n, n))
    for one, (z, dz) in zip(names, _rows(case), strict=True):
        if one is not None:
            total += _output_metric(one, z, dz) / (len(z) if reduction == "mean" else 1)
    return total


def fisher_sum(case: Case) -> np.ndarray:
    """Return the Fisher matrix of the first output, summed over its rows."""
    return fisher(*_rows(case)[0])


# --- structures: P as Kronecker products, and the closed forms of its pull-back ---------------


def product(name: str, arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return P X for the matrix view X [m, n] (a column for joint blocks)."""
    if name in ("scalar", "diagonal"):
        return arrays["spectrum"] * x
    if name == "dense":
        return arrays["left"] @ x
    if name == "diag-kfac":
        return np.diag(arrays["left"]) @ x @ np.diag(arrays["right"])
    u, w = arrays["left"], arrays["right"]
    if name == "kfac":
        return u @ x @ w.T
    return u @ (_spectrum(name, arrays) * (u.T @ x @ w)) @ w.T


def pull_back(
    name: str, arrays: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the gradient of <y, P X> in each array: the table of closed forms."""
    if name == "scalar":
        return {"spectrum": np.sum(y * x)}
    if name == "diagonal":
        return {"spectrum": y * x}
    if name == "dense":
        return {"left": np.outer(y, x)}
    u, w = arrays["left"], arrays["right"]
    if name == "diag-kfac":
        u, w = np.diag(u), np.diag(w)
        return {"left": np.diag(y @ w @ x.T), "right": np.diag(y.T @ u @ x)}
    if name == "kfac":
        return {"left": y @ w @ x.T, "right": y.T @ u @ x}
    d = _spectrum(name, arrays)
    x_hat, y_hat = u.T @ x @ w, u.T @ y @ w
    z, e = d * x_hat, d * y_hat
    sides = {"left": y @ w @ z.T + x @ w @ e.T, "right": y.T @ u @ z + x.T @ u @ e}
    if name == "e-kfac":
        return {**sides, "spectrum": y_hat * x_hat}
    a, g, dd = arrays["left_spectrum"], arrays["right_spectrum"], y_hat * x_hat
    return {**sides, "left_spectrum": dd @ g, "right_spectrum": a @ dd}


def _spectrum(name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    if name == "e-kfac":
        return arrays["spectrum"]
    return np.outer(arrays["left_spectrum"], arrays["right_spectrum"])
