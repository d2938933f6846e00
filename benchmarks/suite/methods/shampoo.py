"""Shampoo, as it is used today: running means, inverse roots now and then, Adam's lengths.

  symbol   meaning                                                          shape
  G        gradient of a leaf as a matrix: all axes but the last are rows   (m, n)
  L, R     running means of G G^T and G^T G, decay `b2`                     (m, m), (n, n)
  P, Q     (L / c + e I)^-power and (R / c + e I)^-power                    (m, m), (n, n)
  M        running mean of G, decay `b1`                                    (m, n)
  V        running mean of G^2, decay `b2`                                  (m, n)

Gupta et al., arXiv 1802.09568, algorithm 1: the step is P M Q with sums for L and R, power 1/4 and
no momentum. The rest is of Shi et al., arXiv 2309.06497, algorithm 2 and section 3: running means
with Adam's bias corrections, c = 1 - b2^t; roots by `eigh` in the calls with `refresh` alone; and
grafting: the step is as long, by Frobenius norm, as Adam's would be, M / (sqrt(V) + eps). e is
`damping` times the largest eigenvalue. Vectors, and matrices without a side of `max_dim` or less,
get Adam; a longer side has the identity for its root.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .matrices import as_matrix, both, identities


class Leaf(NamedTuple):
    """State of a leaf; a side that has no statistics has None."""

    mean: Any  # M, (m, n)
    square: Any  # V, (m, n)
    statistics: tuple[Any, Any]  # L, R
    roots: tuple[Any, Any]  # P, Q


class ShampooState(NamedTuple):
    """Calls so far, and the leaves in the order of `jax.tree.leaves`."""

    count: Any  # (), int32
    leaves: list[Leaf]


def scale_by_shampoo(
    b1: float = 0.9,
    b2: float = 0.99,
    power: float = 0.25,
    damping: float = 1e-6,
    eps: float = 1e-8,
    max_dim: int = 10_000,
) -> optax.GradientTransformationExtraArgs:
    """Return Shampoo's direction, to be multiplied by minus the learning rate.

    `update` takes a Python bool more, `refresh`: whether the roots are made anew in this call. The
    first call should.
    """

    def init(params: Any) -> ShampooState:
        def leaf(x: Any) -> Leaf:
            zeros = jnp.zeros_like(as_matrix(x))
            roots = identities(x, max_dim)
            return Leaf(zeros, zeros, both(jnp.zeros_like, roots), roots)

        return ShampooState(jnp.zeros((), jnp.int32), [leaf(x) for x in jax.tree.leaves(params)])

    def inverse_root(statistics: Any) -> Any:
        values, vectors = jnp.linalg.eigh(statistics)
        floor = damping * jnp.maximum(values[-1], eps**2)
        return (vectors * (jnp.maximum(values, 0) + floor)[None, :] ** -power) @ vectors.T

    def update(
        updates: Any, state: Any, params: Any = None, *, refresh: bool = True, **_: Any
    ) -> tuple[Any, ShampooState]:
        t = state.count + 1

        def leaf(grad: Any, old: Leaf) -> tuple[Any, Leaf]:
            g = as_matrix(grad)
            mean = b1 * old.mean + (1 - b1) * g
            square = b2 * old.square + (1 - b2) * g**2
            statistics = both(lambda s, new: b2 * s + (1 - b2) * new,
                              old.statistics, (g @ g.T, g.T @ g))  # fmt: skip
            roots = old.roots
            if refresh:
                roots = both(lambda s: inverse_root(s / (1 - b2**t)), statistics)
            adam = mean / (1 - b1**t) / (jnp.sqrt(square / (1 - b2**t)) + eps)
            left, right = roots
            step = mean if left is None else left @ mean
            step = step if right is None else step @ right
            if left is None and right is None:
                step = adam
            else:
                norm = jnp.linalg.norm(step)
                step = step * (jnp.linalg.norm(adam) / jnp.where(norm > 0, norm, 1))
            return step.reshape(grad.shape), Leaf(mean, square, statistics, roots)

        del params
        grads, treedef = jax.tree.flatten(updates)
        done = [leaf(g, old) for g, old in zip(grads, state.leaves, strict=True)]
        return treedef.unflatten([d[0] for d in done]), ShampooState(t, [d[1] for d in done])

    return optax.GradientTransformationExtraArgs(init, update)
