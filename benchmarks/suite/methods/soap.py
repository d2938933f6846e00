"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv 2409.11321).

  symbol   meaning                                                          shape
  G        gradient of a leaf as a matrix: all axes but the last are rows   (m, n)
  L, R     running means of G G^T and G^T G, decay `shampoo_decay`          (m, m), (n, n)
  U, W     their eigenvectors                                               (m, m), (n, n)
  M        running mean of G, decay `b1`                                    (m, n)
  V        running mean of (U^T G W)^2, decay `b2`                          (m, n)

The step is U (M' / (sqrt(V) + eps)) W^T with M' = U^T M W and Adam's bias corrections. Every few
steps (10 in the paper) one orthogonal iteration, U <- qr(L U), follows the statistics. The first
call makes the bases by `eigh` and takes no step, as in the authors' code; like it, the columns are
sorted by their Rayleigh quotients before an iteration, and V with them. Vectors, and sides longer
than `max_dim`, have the identity for a basis: a leaf with no other gets Adam. The authors' limit is
10,000; of an embedding of 4,000 words one basis would take minutes on a core.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Leaf(NamedTuple):
    """State of a leaf; a side without a basis has None for both of its arrays."""

    mean: Any  # M, (m, n)
    square: Any  # V, (m, n)
    statistics: tuple[Any, Any]  # L, R
    bases: tuple[Any, Any]  # U, W


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
) -> optax.GradientTransformationExtraArgs:
    """Return SOAP's direction, to be multiplied by minus the learning rate.

    `update` takes a Python bool more, `refresh`: whether the bases follow in this call, so that
    each kind of step is compiled alone. The first call, and every tenth after it, should.
    """

    def init(params: Any) -> SoapState:
        def leaf(x: Any) -> Leaf:
            zeros = jnp.zeros_like(_matrix(x))
            sizes = [d if x.ndim > 1 and d <= max_dim else 0 for d in zeros.shape]
            left, right = (jnp.zeros((d, d), x.dtype) if d else None for d in sizes)
            return Leaf(zeros, zeros, (left, right), (left, right))

        return SoapState(jnp.zeros((), jnp.int32), [leaf(x) for x in jax.tree.leaves(params)])

    def update(
        updates: Any, state: Any, params: Any = None, *, refresh: bool = True, **_: Any
    ) -> tuple[Any, SoapState]:
        count, first = state.count, state.count == 0

        def leaf(grad: Any, old: Leaf) -> tuple[Any, Leaf]:
            g, keep = _matrix(grad), shampoo_decay
            mean = b1 * old.mean + (1 - b1) * jnp.where(first, 0, g)
            square = b2 * old.square + (1 - b2) * rotate(old.bases, g) ** 2
            t = jnp.maximum(count, 1)
            step = rotate(old.bases, mean / (1 - b1**t))
            step = rotate(old.bases, step / (jnp.sqrt(square / (1 - b2**t)) + eps), back=True)
            statistics = _map(lambda s, new: keep * s + (1 - keep) * new,
                              old.statistics, (g @ g.T, g.T @ g))  # fmt: skip
            bases = old.bases
            if refresh:
                bases, square = jax.lax.cond(first, _start, _iterate, statistics, bases, square)
            step = jnp.where(first, 0, step.reshape(grad.shape))
            return step, Leaf(mean, jnp.where(first, 0, square), statistics, bases)

        del params
        grads, treedef = jax.tree.flatten(updates)
        done = [leaf(g, old) for g, old in zip(grads, state.leaves, strict=True)]
        return treedef.unflatten([d[0] for d in done]), SoapState(count + 1, [d[1] for d in done])

    return optax.GradientTransformationExtraArgs(init, update)


def rotate(bases: tuple[Any, Any], x: Any, *, back: bool = False) -> Any:
    """Return U^T x W, or U x W^T on the way back; None stands for the identity."""
    left, right = bases
    if left is not None:
        x = (left if back else left.T) @ x
    return x if right is None else x @ (right.T if back else right)


def _matrix(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)


def _map(function: Any, first: tuple[Any, Any], *rest: tuple[Any, Any]) -> tuple[Any, Any]:
    """Apply a function to both sides, None where there is none."""
    left, right = (None if s[0] is None else function(*s) for s in zip(first, *rest, strict=True))
    return left, right


def _start(statistics: Any, bases: Any, square: Any) -> tuple[Any, Any]:
    """The eigenvectors, largest eigenvalue first."""
    del bases
    return _map(lambda s: jnp.linalg.eigh(s)[1][:, ::-1], statistics), square


def _iterate(statistics: Any, bases: Any, square: Any) -> tuple[Any, Any]:
    """One orthogonal iteration of each basis."""
    products = _map(jnp.matmul, statistics, bases)
    orders = _map(lambda basis, product: jnp.argsort(-jnp.sum(basis * product, 0)), bases, products)
    for axis, order in enumerate(orders):
        square = square if order is None else jnp.take(square, order, axis)
    return _map(lambda product, o: jnp.linalg.qr(product[:, o])[0], products, orders), square
