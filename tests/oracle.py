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
#
# Arrays as the library stores them, by slot; a vector in the place of a side is its diagonal,
# and a side without arrays is the identity.

Slots = dict[str, np.ndarray]


def side(name: str, arrays: Slots, slot: str, d: int) -> np.ndarray:
    """Return the left or right side of a structure as a dense matrix."""
    main, s, eye = arrays.get(slot), arrays.get(f"{slot}_values"), np.eye(d)
    if name == "h-kfac":
        q = eye
        for v in arrays[f"{slot}_vectors"]:
            q = q @ (eye - 2 * np.outer(v, v) / (v @ v))
        return q @ np.diag(s) @ q.T
    if main is None:
        return eye
    if main.ndim == 1:
        return np.diag(main)
    if name.startswith("low-rank-memory"):
        out = eye
        for u, v in zip(main, arrays.get(f"{slot}_other", main), strict=True):
            out = (eye + np.outer(u, v)) @ out
        return out
    t = np.tril(main)
    if name == "sym-kfac":
        return t + t.T - np.diag(np.diag(t))
    if name == "psd-sym-kfac":
        return t @ t.T
    if name.startswith("sds-sym-kfac"):
        return t @ np.diag(s / np.abs(s).max() if name.endswith("norm-d") else s) @ t.T
    return main


def spectrum(name: str, arrays: Slots) -> np.ndarray | None:
    """Return D, the numbers between the sides, if the structure has them."""
    if "left_spectrum" in arrays:
        return np.outer(_root(name, arrays["left_spectrum"]), _root(name, arrays["right_spectrum"]))
    if "spectrum" not in arrays:
        return None
    d = _root(name, arrays["spectrum"])
    if "rms_norm" in name:
        d = d / np.sqrt(np.mean(d**2))
    if "max_norm" in name:
        d = d / np.abs(d).max()
    return arrays.get("spectrum_factor", 1.0) * d


def _root(name: str, r: np.ndarray) -> np.ndarray:
    return r**2 + 1e-12 if name.startswith("psd-") else r


def product(name: str, arrays: Slots, x: np.ndarray) -> np.ndarray:
    """Return P X for the matrix view X [m, n] (a column for a whole module)."""
    d = spectrum(name, arrays)
    if name in ("scalar", "diagonal"):
        return d * x
    a, b = (side(name, arrays, s, n) for s, n in zip(("left", "right"), x.shape, strict=True))
    y = a @ x @ b.T if d is None else a @ (d * (a.T @ x @ b)) @ b.T
    return arrays.get("sigma", 1.0) * y


def kronecker(name: str, arrays: Slots, shape: tuple[int, ...]) -> np.ndarray:
    """Return P on row-major flattened blocks of the given shape."""
    d = spectrum(name, arrays)
    if name in ("scalar", "diagonal"):
        return np.diag(np.broadcast_to(d, shape).ravel())
    a, b = (side(name, arrays, s, n) for s, n in zip(("left", "right"), shape, strict=True))
    ab = np.kron(a, b)
    return arrays.get("sigma", 1.0) * (ab if d is None else ab @ np.diag(d.ravel()) @ ab.T)


def install(name: str, arrays: Slots, learned: Slots) -> Slots:
    """Return arrays with what was learned: Sherman and Morrison, or first in, first out."""
    out = dict(arrays)
    for slot, value in learned.items():
        where, _, letter = slot.partition("_fresh_")
        u, s = learned.get(f"{where}_fresh_u"), arrays.get(where)
        if not letter:
            out[slot] = value
        elif name.startswith("low-rank-memory"):
            key = where if letter == "u" else f"{where}_other"
            out[key] = np.stack([*list(arrays[key])[1:], value])
        elif letter == "u":
            v = learned.get(f"{where}_fresh_v", u)
            out[where] = s - np.outer(s @ u, v @ s) / (1 + v @ s @ u)
    return out


def differences(f: Callable[[Slots], np.ndarray], arrays: Slots, step: float = 1e-6) -> Slots:
    """Return the gradient of a number in each array, by central differences."""
    out = {}
    for slot, a in arrays.items():
        moved = lambda e, slot=slot, a=a: f(arrays | {slot: a + e.reshape(a.shape)})  # noqa: E731
        rows = step * np.eye(a.size)
        out[slot] = np.array([(moved(e) - moved(-e)) / (2 * step) for e in rows]).reshape(a.shape)
    return out


def value_and_gradient(model: Any, u: Any) -> tuple[Any, Any]:
    """J(u) and dJ/du = g + (C + lambda I) u of a quadratic model."""
    return model.value(u), jax.tree.map(jnp.add, model.gradient, model.product(u))


def pull_back(name: str, arrays: Slots, x: np.ndarray, y: np.ndarray) -> Slots:
    """Return the gradient of <y, P X> in each array that has a closed form in the papers."""
    if name == "scalar":
        return {"spectrum": np.sum(y * x)}
    if name == "diagonal":
        return {"spectrum": y * x}
    if name == "dense":
        return {"left": np.outer(y, x)}
    if name not in ("kfac", "diag-kfac") and ("e-kfac" not in name or "swm" in name):
        return {}
    u, w = side(name, arrays, "left", x.shape[0]), side(name, arrays, "right", x.shape[1])
    y = arrays.get("sigma", 1.0) * y
    d = spectrum(name, arrays)
    if d is None:
        out = {"left": y @ w @ x.T, "right": y.T @ u @ x}
    else:
        x_hat, y_hat = u.T @ x @ w, u.T @ y @ w
        z, e, dd = d * x_hat, d * y_hat, y_hat * x_hat
        out = {"left": y @ w @ z.T + x @ w @ e.T, "right": y.T @ u @ z + x.T @ u @ e}
        slope = lambda slot: 2 * arrays[slot] if name.startswith("psd-") else 1.0  # noqa: E731
        if "left_spectrum" in arrays:
            a, g = (_root(name, arrays[f"{s}_spectrum"]) for s in ("left", "right"))
            out["left_spectrum"] = slope("left_spectrum") * (dd @ g)
            out["right_spectrum"] = slope("right_spectrum") * (a @ dd)
        elif "norm" not in name:
            out["spectrum"] = slope("spectrum") * dd
        if "spectrum_factor" in arrays:
            out["spectrum_factor"] = np.sum(dd * d) / arrays["spectrum_factor"]
    for slot in ("left", "right"):
        if arrays[slot].ndim == 1:
            out[slot] = np.diag(out[slot])
    return out
