r"""A convex loss as half a sum of squares around a point, and the Jacobian of what is squared.

  symbol   meaning                                                            shape
  z, c     outputs, and gradient of the loss there                            [rows, K]
  J        Jacobian of the outputs in the parameters                          [rows K, n]
  Q        Hessian of the loss (or of a metric) in the outputs, row by row    [K, K] a row
  S        its root, Q = S S^T                                                [K, K] a row
  r        residuals, S r = c                                                 [rows K] = [m]
  R        Jacobian of the residuals, S^T J                                   [m, n]

The model of the loss along a step d is then 1/2 |r + R d|^2, its gradient R^T r, its curvature
R^T R = J^T Q J. Squares have S = sqrt(weight); every other loss that is convex in the outputs row
by row has an S from the eigenvectors of Q.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from llqr import coupling
from llqr.objective import BoundObjective
from llqr.tree import norm
from llqr.typing import Array, Bool, Float, Params, PyTree

CURVED = 1e3
"""A block of Q counts as convex down to minus this many roundings of its largest eigenvalue."""


class Residuals(NamedTuple):
    """What is squared, at one point."""

    r: Float[Array, " m"]
    roots: tuple[Float[Array, "rows K K"], ...]  # S of each output
    rest: Bool[Array, ""]  # whether c has a part that no S reaches: a loss that is linear there
    convex: Bool[Array, ""]
    separable: Bool[Array, ""]  # whether Q has no entries between rows

    def whitened(self, outputs: PyTree) -> Float[Array, " m"]:
        """Return S^T x, for x like the outputs."""
        found = [
            jnp.einsum("rkj,rk->rj", s, _rows(x)).ravel()
            for s, x in zip(self.roots, jax.tree.leaves(outputs), strict=True)
        ]
        return jnp.concatenate(found)

    def coloured(self, v: Float[Array, " m"], like: PyTree) -> PyTree:
        """Return S v, like the outputs: what a pull-back takes."""
        leaves, treedef = jax.tree.flatten(like)
        found, at = [], 0
        for s, x in zip(self.roots, leaves, strict=True):
            own = v[at : at + x.size].reshape(_rows(x).shape)
            found.append(jnp.einsum("rkj,rj->rk", s, own).reshape(x.shape).astype(x.dtype))
            at += x.size
        return treedef.unflatten(found)


def _rows(x: Array) -> Float[Array, "rows K"]:
    """An output by rows: its last axis is K, and an array of one axis has K = 1."""
    return x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)


def residuals(outputs: PyTree, cotangent: PyTree, product: Callable[[PyTree], PyTree]) -> Residuals:
    """Return residuals and roots.

    Args:
      outputs: z.
      cotangent: c.
      product: v -> Q v, for v like the outputs.
    """
    leaves, treedef = jax.tree.flatten(outputs)
    roots, rs, flags, rest = [], [], [], []
    signs = [
        jnp.sign(jax.random.normal(key, x.shape)).astype(x.dtype)
        for key, x in zip(jax.random.split(jax.random.key(0), len(leaves)), leaves, strict=True)
    ]
    seen = jax.tree.leaves(product(treedef.unflatten(signs)))
    apart = []
    for i, (z, c) in enumerate(zip(leaves, jax.tree.leaves(cotangent), strict=True)):
        width = _rows(z).shape[1]

        def column(e: Array, i: int = i, z: Array = z) -> Array:
            v = [jnp.zeros_like(x) for x in leaves]
            v[i] = jnp.broadcast_to(e if z.ndim > 1 else e[0], z.shape).astype(z.dtype)
            return _rows(jax.tree.leaves(product(treedef.unflatten(v)))[i])

        blocks = jnp.moveaxis(jax.vmap(column)(jnp.eye(width, dtype=z.dtype)), 0, -1)
        q, vectors = jnp.linalg.eigh((blocks + jnp.swapaxes(blocks, 1, 2)) / 2)
        tiny = jnp.finfo(q.dtype).eps * jnp.max(jnp.abs(q), initial=0.0)
        flags.append(jnp.all(q >= -CURVED * tiny))
        reached = q > width * tiny
        root = jnp.sqrt(jnp.where(reached, q, 0.0))
        own = jnp.einsum("rkj,rk->rj", vectors, _rows(c))
        rs.append(jnp.where(reached, own / jnp.where(reached, root, 1.0), 0.0))
        roots.append(vectors * root[:, None, :])
        lost = norm(jnp.where(reached, 0.0, own))
        rest.append(lost > jnp.sqrt(jnp.finfo(q.dtype).eps) * norm(c))
        mine = jnp.einsum("rkj,rj->rk", blocks, _rows(signs[i]))
        off = norm(_rows(seen[i]) - mine)
        apart.append(off <= jnp.sqrt(jnp.finfo(q.dtype).eps) * norm(mine))
    r = jnp.concatenate([x.ravel() for x in rs])
    every = lambda x: jnp.all(jnp.stack(x))  # noqa: E731
    return Residuals(r, tuple(roots), ~every([~x for x in rest]), every(flags), every(apart))


def jacobian(objective: BoundObjective, params: Params, found: Residuals) -> Float[Array, "m n"]:
    """Return R, the parameters flattened.

    Where examples do not meet in the model (`llqr.coupling`), by a pull-back of each example's own
    outputs, at the cost of a few gradients; otherwise by a pull-back of the whole for each output.

    Args:
      objective: on a batch.
      params: the parameters.
      found: roots at this point.
    """
    by_leaf = _own_rows(objective, params)
    if by_leaf is None:
        outputs, pull = jax.vjp(objective.outputs, params)
        flat, unravel = ravel_pytree(outputs)
        basis = jnp.eye(flat.size, dtype=flat.dtype)
        whole = jax.vmap(lambda e: ravel_pytree(pull(unravel(e))[0])[0])(basis)
        ends = [x.size for x in jax.tree.leaves(outputs)]
        starts = [sum(ends[:i]) for i in range(len(ends))]
        by_leaf = [whole[a : a + n] for a, n in zip(starts, ends, strict=True)]
    rows = []
    for s, own in zip(found.roots, by_leaf, strict=True):
        own = own.reshape(*s.shape[:2], -1)
        rows.append(jnp.einsum("rkj,rkn->rjn", s, own).reshape(s.shape[0] * s.shape[2], -1))
    return jnp.concatenate(rows)


def _own_rows(objective: BoundObjective, params: Params) -> list[Array] | None:
    """Jacobians of each output, [rows K, n], example by example; None where they meet."""
    counts = objective.examples()
    if len(counts) != 1 or coupling.interaction(objective, params) is not None:
        return None
    (examples,) = counts
    shapes = jax.tree.leaves(jax.eval_shape(objective.outputs, params))
    if any(not x.shape or x.shape[0] % examples for x in shapes):
        return None
    chunks = objective.split(1)
    one = jax.tree.leaves(jax.eval_shape(lambda p: chunks[0].outputs(p), params))
    if any(
        a.shape != (b.shape[0] // examples, *b.shape[1:]) for a, b in zip(one, shapes, strict=True)
    ):
        return None

    def flat(p: Params, i: Array) -> list[Array]:
        return [x.ravel() for x in jax.tree.leaves(chunks[i].outputs(p))]

    def own(i: Array) -> list[Array]:
        found = jax.jacrev(flat)(params, i)
        return [
            jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(tree)], 1)
            for tree in found
        ]

    each = jax.vmap(own)(jnp.arange(examples))
    return [x.reshape(math.prod(x.shape[:2]), -1) for x in each]


def acceleration(objective: BoundObjective, params: Params, d: Params, found: Residuals) -> Any:
    """Return S^T d2/dt2 z(theta + t d): how the residuals curve along a step.

    Args:
      objective: on a batch.
      params: theta.
      d: the step.
      found: roots at theta.
    """
    along = lambda p: jax.jvp(objective.outputs, (p,), (d,))[1]  # noqa: E731
    return found.whitened(jax.jvp(along, (params,), (d,))[1])
