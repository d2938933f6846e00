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
by row has an S from the eigenvectors of Q. Where rounding hides the curvature of a row along its
gradient (a saturated softmax on the wrong class), a small one is put in its place: the gradient of
the model stays that of the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from llqr import coupling
from llqr._linalg import eigh_of_each, exactly
from llqr.curvature import derivatives
from llqr.objective import BoundObjective
from llqr.operators import LinearOperator
from llqr.tree import all_finite, axis_devices, norm, replicate, shard_like
from llqr.typing import Array, Bool, Float, Int, Params, PyTree

CURVED = 1e3
"""A block of Q counts as convex down to minus this many roundings of its largest eigenvalue."""


class Residuals(NamedTuple):
    """What is squared, at one point."""

    r: Float[Array, " m"]
    roots: tuple[Float[Array, "rows K K"], ...]  # S of each output
    finite: Bool[Array, ""]  # whether c, Q and r are
    rest: Bool[Array, ""]  # whether an output has a gradient and no curvature: a linear loss
    convex: Bool[Array, ""]
    separable: Bool[Array, ""]  # whether Q has no entries between rows

    def whitened(self, outputs: PyTree) -> Float[Array, " m"]:
        """Return S^T x, for x like the outputs."""
        pairs = zip(self.roots, jax.tree.leaves(outputs), strict=True)
        return jnp.concatenate([_whitened(s, x) for s, x in pairs])

    def coloured(self, v: Float[Array, " m"], like: PyTree) -> PyTree:
        """Return S v, like the outputs: what a pull-back takes."""
        leaves, treedef = jax.tree.flatten(like)
        found, at = [], 0
        for s, x in zip(self.roots, leaves, strict=True):
            own = v[at : at + x.size].reshape(*s.shape[:2])
            own = jnp.einsum("rkj,rj->rk", s, own).reshape(x.shape).astype(x.dtype)
            found.append(shard_like(own, x))
            at += x.size
        return treedef.unflatten(found)


def _whitened(s: Array, x: Array) -> Array:
    """S^T x of one output, flat, in the dtype of the roots."""
    return jnp.einsum("rkj,rk->rj", s, _rows(x).astype(s.dtype)).ravel()


def _rows(x: Array) -> Float[Array, "rows K"]:
    """An output by rows: its last axis is K, and an array of one axis has K = 1.

    Over explicit mesh axes every device has all of them: they are few beside the rows of R.
    """
    return replicate(x).reshape(-1, x.shape[-1] if x.ndim > 1 else 1)


def residuals(
    outputs: PyTree, cotangent: PyTree, product: Callable[[PyTree], PyTree], dtype: Any
) -> Residuals:
    """Return residuals and roots.

    Args:
      outputs: z.
      cotangent: c.
      product: v -> Q v, for v like the outputs.
      dtype: in which they are computed: that of the flattened parameters.
    """
    leaves, treedef = jax.tree.flatten(outputs)
    roots, rs, flags, rest = [], [], [], []
    signs = [
        shard_like(jnp.sign(jax.random.normal(key, x.shape)).astype(x.dtype), x)
        for key, x in zip(jax.random.split(jax.random.key(0), len(leaves)), leaves, strict=True)
    ]
    seen = jax.tree.leaves(product(treedef.unflatten(signs)))
    slopes = [_rows(c).astype(dtype) for c in jax.tree.leaves(cotangent)]
    apart, finite = [], [all_finite((slopes, seen))]
    for i, (z, c) in enumerate(zip(leaves, slopes, strict=True)):
        width = c.shape[1]

        def column(e: Array, i: int = i, z: Array = z) -> Array:
            v = [jnp.zeros_like(x) for x in leaves]
            one = jnp.broadcast_to(e if z.ndim > 1 else e[0], z.shape).astype(z.dtype)
            v[i] = shard_like(one, z)
            return _rows(jax.tree.leaves(product(treedef.unflatten(v)))[i]).astype(dtype)

        blocks = jnp.moveaxis(jax.vmap(column)(jnp.eye(width, dtype=dtype)), 0, -1)
        finite.append(all_finite(blocks))
        # A factorisation of what is not finite might never end.
        blocks = jnp.where(finite[-1], blocks, 0.0)
        q, vectors = eigh_of_each((blocks + jnp.swapaxes(blocks, 1, 2)) / 2)
        eps, most = jnp.finfo(dtype).eps, jnp.max(jnp.abs(q), initial=0.0)
        flags.append(jnp.all(q >= -CURVED * eps * most))
        own = jnp.einsum("rkj,rk->rj", vectors, c)
        straight = (q <= width * eps * most) & (jnp.abs(own) > jnp.sqrt(eps) * norm(c))
        q = jnp.where(straight, jnp.sqrt(eps) * most, q)
        reached = q > width * eps * most
        root = jnp.sqrt(jnp.where(reached, q, 0.0))
        rs.append(jnp.where(reached, own / jnp.where(reached, root, 1.0), 0.0))
        roots.append(vectors * root[:, None, :])
        rest.append((most == 0) & jnp.any(c != 0))
        sign = _rows(signs[i]).astype(dtype)
        mine = jnp.einsum("rkj,rj->rk", blocks, sign)
        off = norm(_rows(seen[i]).astype(dtype) - mine)
        apart.append(off <= jnp.sqrt(eps) * norm(mine))
    r = jnp.concatenate([x.ravel() for x in rs])
    every = lambda x: jnp.all(jnp.stack(x))  # noqa: E731
    anywhere = jnp.any(jnp.stack(rest))
    whole = every([*finite, all_finite(r)])
    return Residuals(r, tuple(roots), whole, anywhere, every(flags), every(apart))


class Linear(NamedTuple):
    """R as a map, the parameters flattened."""

    along: Callable[[Float[Array, " n"]], Float[Array, " m"]]  # d -> R d
    back: Callable[[Float[Array, " m"]], Float[Array, " n"]]  # v -> R^T v


def as_map(jacobian: LinearOperator, outputs: PyTree, params: Params, found: Residuals) -> Linear:
    """Return R by tangent and cotangent sweeps of the whole model.

    Args:
      jacobian: J.
      outputs: z.
      params: the parameters.
      found: roots at this point.
    """
    _, unravel = ravel_pytree(params)
    return Linear(
        lambda d: found.whitened(jacobian.jvp(unravel(d))),
        lambda v: ravel_pytree(jacobian.vjp(found.coloured(v, outputs)))[0],
    )


@dataclass(frozen=True)
class Rows:
    """R in blocks of rows: those of one example, or single ones where examples meet.

    Attributes:
      data: of the blocks, on its first axes; `of` takes that of one.
      of: data -> places in r, and the rows of R there: [q], [q, n].
      residuals: m.
      ordered: whether the blocks one after the other are R.
    """

    data: PyTree
    of: Callable[[PyTree], tuple[Int[Array, " q"], Float[Array, "q n"]]]
    residuals: int
    ordered: bool

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(jax.tree.leaves(self.data)[0])

    def matrix(self) -> Float[Array, "m n"]:
        """Return R."""
        places, rows = jax.vmap(self.of)(self.data)
        rows = rows.reshape(self.residuals, -1)
        return rows if self.ordered else jnp.zeros_like(rows).at[places.ravel()].set(rows)

    def chunks(self, size: int) -> "Chunked":
        """Return R in chunks of at most `size` blocks, of which one is made at a time."""
        many = -(-self.count // size)
        return Chunked(self, many, -(-self.count // many))


@dataclass(frozen=True)
class Chunked:
    """R in chunks of blocks of rows."""

    rows: Rows
    many: int
    size: int

    def __getitem__(self, i: Int[Array, ""]) -> tuple[Array, Array]:
        """Return places and rows of chunk i; rows that fill up the last chunk are 0, nowhere."""
        at = i * self.size + jnp.arange(self.size)
        data = jax.tree.map(lambda x: x[jnp.minimum(at, self.rows.count - 1)], self.rows.data)
        places, rows = jax.vmap(self.rows.of)(data)
        real = (at < self.rows.count)[:, None]
        places = jnp.where(real, places, self.rows.residuals)
        rows = jnp.where(real[..., None], rows, 0.0)
        return places.ravel(), rows.reshape(places.size, -1)

    def inner(self, like: Array) -> Float[Array, "n n"]:
        """Return R^T R.

        Args:
          like: of the parameters, flat.
        """

        def add(total: Array, i: Array) -> tuple[Array, None]:
            _, rows = self[i]
            return total + exactly("mn,mk->nk", rows, rows), None

        zeros = jnp.zeros((like.size, like.size), like.dtype)
        return jax.lax.scan(add, zeros, jnp.arange(self.many))[0]

    def outer(self, like: Array) -> Float[Array, "m m"]:
        """Return R R^T, with two chunks at a time: each is made once for every pair it is in.

        Args:
          like: of the parameters, flat.
        """
        m = self.rows.residuals

        def first(total: Array, i: Array) -> tuple[Array, None]:
            places, rows = self[i]

            def second(j: Array, total: Array) -> Array:
                others, columns = self[j]
                block = exactly("mn,kn->mk", rows, columns)
                total = total.at[places[:, None], others[None]].set(block, mode="drop")
                return total.at[others[:, None], places[None]].set(block.T, mode="drop")

            return jax.lax.fori_loop(i, self.many, second, total), None

        return jax.lax.scan(first, jnp.zeros((m, m), like.dtype), jnp.arange(self.many))[0]


def rows(objective: BoundObjective, params: Params, model: Linear, found: Residuals) -> Rows:
    """Return R, the parameters flattened, in blocks that can be made one by one.

    Where examples do not meet in the model (`llqr.coupling`), by a pull-back of each example's own
    outputs, at the cost of a few gradients; otherwise by a pull-back of the whole for each
    residual.

    Args:
      objective: on a batch.
      params: the parameters.
      model: R as a map, at this point.
      found: roots at this point.
    """
    own = _own_rows(objective, params, found)
    if own is not None:
        return own
    m = found.r.size

    def one(place: Array) -> tuple[Array, Array]:
        return place[None], model.back(jnp.zeros_like(found.r).at[place].set(1.0))[None]

    return Rows(jnp.arange(m), one, m, ordered=True)


def _own_rows(objective: BoundObjective, params: Params, found: Residuals) -> Rows | None:
    """Rows example by example; None where examples meet."""
    counts = objective.examples()
    if len(counts) != 1 or coupling.interaction(objective, params) is not None:
        return None
    (examples,) = counts
    shapes = jax.tree.leaves(jax.eval_shape(objective.outputs, params))
    if any(not x.shape or x.shape[0] % examples for x in shapes):
        return None
    chunks = objective.split(1)
    try:
        one = jax.tree.leaves(jax.eval_shape(lambda p: chunks[0].outputs(p), params))
    except Exception:  # a model that names the size of its batch
        if objective.is_told:
            raise
        return None
    if any(
        a.shape != (b.shape[0] // examples, *b.shape[1:]) for a, b in zip(one, shapes, strict=True)
    ):
        return None
    starts = [sum(x.size for x in shapes[:i]) for i in range(len(shapes))]
    places = jnp.concatenate(
        [
            start + jnp.arange(x.size).reshape(examples, -1)
            for start, x in zip(starts, shapes, strict=True)
        ],
        1,
    )
    roots = [s.reshape(examples, -1, *s.shape[1:]) for s in found.roots]
    data = {i: chunks.leaves[i] for i, axis in enumerate(chunks.axes) if axis is not None}

    def of(block: Any) -> tuple[Array, Array]:
        data, roots, places = block
        leaves = [data.get(i, shared) for i, shared in enumerate(chunks.leaves)]
        bound = replace(objective, batch=chunks.treedef.unflatten(leaves))

        def whitened(p: Params) -> Array:
            pairs = zip(roots, jax.tree.leaves(bound.outputs(p)), strict=True)
            return jnp.concatenate([_whitened(s, x) for s, x in pairs])

        tree = jax.jacrev(whitened)(params)
        dtype = found.r.dtype
        flat = [x.reshape(x.shape[0], -1).astype(dtype) for x in jax.tree.leaves(tree)]
        return places, jnp.concatenate(flat, 1)

    # Over explicit mesh axes, what is mapped lies like the examples.
    split = list(data.values())
    roots, places = jax.tree.map(lambda x: _like_first(x, split), (roots, places))
    return Rows((data, roots, places), of, found.r.size, len(shapes) == 1)


def _like_first(x: Array, data: list[Array]) -> Array:
    """An array whose first axis lies like that of the data, over explicit mesh axes."""
    if not any(axis_devices(leaf) for leaf in data):
        return x
    first = next(jax.typeof(leaf).sharding.spec[0] for leaf in data if axis_devices(leaf))
    return jax.sharding.reshard(x, PartitionSpec(first, *[None] * (x.ndim - 1)))


def acceleration(
    objective: BoundObjective, params: Params, d: Params, found: Residuals
) -> Float[Array, " m"]:
    """Return S^T d2/dt2 z(theta + t d): how the residuals curve along a step.

    Args:
      objective: on a batch.
      params: theta.
      d: the step.
      found: roots at theta.

    Raises:
      TypeError: a function of the model's has no second derivative along a direction
        (`jax.custom_vjp`).
    """
    along = lambda p: jax.jvp(objective.outputs, (p,), (d,))[1]  # noqa: E731
    return found.whitened(jax.jvp(along, (params,), (d,))[1])


def curves(objective: BoundObjective, params: Params) -> bool:
    """Whether a model has second derivatives along a direction: not through `jax.custom_vjp`.

    Args:
      objective: on a batch.
      params: the parameters.
    """

    def twice(p: Params) -> PyTree:
        return jax.jvp(lambda q: jax.jvp(objective.outputs, (q,), (p,))[1], (p,), (p,))[1]

    try:
        jax.eval_shape(twice, params)
    except NotImplementedError:  # of what `linearize` makes of a custom_vjp
        return False
    except TypeError as error:
        if not derivatives.lacks_rule(error):
            raise
        return False
    return True
