"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner, and its kin by KL divergence.

  symbol   meaning                                                          shape
  G        gradient of a leaf as a matrix: all axes but the last are rows   (m, n)
  L, R     running means of G G^T and G^T G, decay `shampoo_decay`          (m, m), (n, n)
  U, W     their eigenvectors                                               (m, m), (n, n)
  M        running mean of G, decay `b1`                                    (m, n)
  V        running mean of (U^T G W)^2, decay `b2`                          (m, n)
  l, r     with `whiten`: eigenvalues of L and R, decay `shampoo_decay`     (m,), (n,)

SOAP (Vyas et al., arXiv 2409.11321): the step is U (M' / (sqrt(V) + eps)) W^T with M' = U^T M W and
Adam's bias corrections. Every few steps (10 in the paper) one orthogonal iteration, U <- qr(L U),
follows the statistics. The first call makes the bases by `eigh` and takes no step, as in the
authors' code; like it, the columns are sorted by their Rayleigh quotients before an iteration, and
V with them. Vectors, and sides longer than `max_dim`, have the identity for a basis: a leaf with no
other gets Adam. The authors' limit is 10,000; of an embedding of 4,000 words one basis would take
minutes on a core.

KL-SOAP and KL-Shampoo (Lin et al., arXiv 2509.03378): the Kronecker product of L and R is to be the
covariance of a Gaussian that is nearest to the gradients' in the KL divergence. Then each side's
statistics are whitened by the other side (`whiten`): means of G W diag(1 / r) W^T G^T / n and of
G^T U diag(1 / l) U^T G / m. l and r are means of their diagonals in the bases of the step.
KL-SOAP has V in these bases, KL-Shampoo l r^T in the place of V (`kronecker`). Assumed, where we do
not know the paper's choice: at the first call both sides are the multiple of the identity that is
nearest to G, sqrt(mean(G^2)), and each is whitened by the other one of the step before; an only
side starts at mean(G^2).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .matrices import as_matrix, both, identities

Sides = tuple[Any, Any]
"""Something of the left side and of the right one, None where a side has no basis."""


class Leaf(NamedTuple):
    """State of a leaf."""

    mean: Any  # M, (m, n)
    square: Any  # V, (m, n); None where l r^T takes its place
    statistics: Sides  # L, R
    bases: Sides  # U, W
    eigenvalues: Sides  # l, r; None without `whiten`


class SoapState(NamedTuple):
    """Calls so far, and the leaves in the order of `jax.tree.leaves`."""

    count: Any  # (), int32
    leaves: list[Leaf]


def scale_by_soap(
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_decay: float = 0.95,
    eps: float = 1e-8,
    max_dim: int = 2048,
    *,
    whiten: bool = False,
    kronecker: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return SOAP's direction, to be multiplied by minus the learning rate.

    `update` takes a Python bool more, `refresh`: whether the bases follow in this call, so that
    each kind of step is compiled alone. The first call, and every tenth after it, should.

    Raises:
      ValueError: `kronecker` without `whiten`: the product of unwhitened sides has no scale.
    """
    if kronecker and not whiten:
        raise ValueError("kronecker=True needs whiten=True.")

    def init(params: Any) -> SoapState:
        def leaf(x: Any) -> Leaf:
            zeros = jnp.zeros_like(as_matrix(x))
            bases = identities(x, max_dim)
            values = both(jnp.diagonal, bases) if whiten else (None, None)
            square = None if kronecker and any(b is not None for b in bases) else zeros
            return Leaf(zeros, square, both(jnp.zeros_like, bases), bases, values)

        return SoapState(jnp.zeros((), jnp.int32), [leaf(x) for x in jax.tree.leaves(params)])

    def update(
        updates: Any, state: Any, params: Any = None, *, refresh: bool = True, **_: Any
    ) -> tuple[Any, SoapState]:
        count, first = state.count, state.count == 0

        def leaf(grad: Any, old: Leaf) -> tuple[Any, Leaf]:
            g, keep = as_matrix(grad), shampoo_decay
            if whiten:
                old = _isotropic(old, g, eps, first)
            t = jnp.maximum(count, 1)
            mean = b1 * old.mean + (1 - b1) * jnp.where(first, 0, g)
            rotated = rotate(old.bases, g)
            x, y, values, square = g, g, old.eigenvalues, old.square
            if whiten:
                halves = _whitened(rotated, values, eps)
                values = both(lambda v, new: keep * v + (1 - keep) * new, values, _squares(halves))
                x, y = (rotate(old.bases, half, back=True) for half in halves)
            if square is None:
                spectrum = _product(values, g.shape)
            else:
                square = b2 * square + (1 - b2) * rotated**2
                spectrum = square / (1 - b2**t)
            step = rotate(old.bases, mean / (1 - b1**t))
            step = rotate(old.bases, step / (jnp.sqrt(spectrum) + eps), back=True)
            statistics = both(lambda s, new: keep * s + (1 - keep) * new,
                              old.statistics, (x @ x.T, y.T @ y))  # fmt: skip
            bases = old.bases
            if refresh:
                bases, values, square = jax.lax.cond(
                    first, _start, _iterate, statistics, bases, values, square
                )
            step = jnp.where(first, 0, step.reshape(grad.shape))
            square = None if square is None else jnp.where(first, 0, square)
            return step, Leaf(mean, square, statistics, bases, values)

        del params
        grads, treedef = jax.tree.flatten(updates)
        done = [leaf(g, old) for g, old in zip(grads, state.leaves, strict=True)]
        return treedef.unflatten([d[0] for d in done]), SoapState(count + 1, [d[1] for d in done])

    return optax.GradientTransformationExtraArgs(init, update)


def rotate(bases: Sides, x: Any, *, back: bool = False) -> Any:
    """Return U^T x W, or U x W^T on the way back; None stands for the identity."""
    left, right = bases
    if left is not None:
        x = (left if back else left.T) @ x
    return x if right is None else x @ (right.T if back else right)


def _isotropic(old: Leaf, g: Any, eps: float, first: Any) -> Leaf:
    """At the first call, both sides at a multiple of the identity, or the only one."""
    scale = jnp.mean(g**2)
    if all(v is not None for v in old.eigenvalues):
        scale = jnp.sqrt(scale)
    scale = jnp.maximum(scale, eps)
    return old._replace(
        statistics=both(lambda s, b: jnp.where(first, scale * b, s), old.statistics, old.bases),
        eigenvalues=both(lambda v: jnp.where(first, scale, v), old.eigenvalues),
    )


def _whitened(rotated: Any, values: Sides, eps: float) -> Sides:
    """U^T G W, whitened from the right for L and from the left for R, at the scale of a mean."""
    m, n = rotated.shape
    left, right = both(lambda v: jax.lax.rsqrt(jnp.maximum(v, eps**2)), values)
    for_left = rotated if right is None else rotated * right[None, :]
    for_right = rotated if left is None else rotated * left[:, None]
    return for_left / n**0.5, for_right / m**0.5


def _squares(halves: Sides) -> Sides:
    """The diagonals of both sides' statistics."""
    return jnp.sum(halves[0] ** 2, 1), jnp.sum(halves[1] ** 2, 0)


def _product(values: Sides, shape: tuple[int, ...]) -> Any:
    """L r^T, ones where a side has none."""
    left, right = (jnp.ones(()) if v is None else v for v in values)
    return jnp.broadcast_to(left.reshape(-1, 1) * right.reshape(1, -1), shape)


def _start(statistics: Sides, bases: Sides, values: Sides, square: Any) -> tuple[Any, ...]:
    """The eigenvectors, largest eigenvalue first."""
    found = both(lambda s: tuple(x[..., ::-1] for x in jnp.linalg.eigh(s)), statistics)
    del bases
    values = both(lambda value, pair: pair[0], values, found)
    return both(lambda pair: pair[1], found), values, square


def _iterate(statistics: Sides, bases: Sides, values: Sides, square: Any) -> tuple[Any, ...]:
    """One orthogonal iteration of each basis."""
    products = both(jnp.matmul, statistics, bases)
    orders = both(lambda basis, product: jnp.argsort(-jnp.sum(basis * product, 0)), bases, products)
    if square is not None:
        for axis, order in enumerate(orders):
            square = square if order is None else jnp.take(square, order, axis)
    values = both(jnp.take, values, orders)
    return both(lambda p, o: jnp.linalg.qr(p[:, o])[0], products, orders), values, square
