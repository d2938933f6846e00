"""The same maps chunk by chunk: the activations of a few examples are held at once.

Exact for every loss and mask: only the network is cut. A divergence is one number for each row, of
that row alone, so its curvature goes by chunks too; what couples examples (a loss) is taken of the
outputs of the whole batch. Symbols as in `llqr.curvature.model`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llqr import _loops, coupling, metrics
from llqr._replicas import AxisName
from llqr.curvature import derivatives
from llqr.curvature.route import Route
from llqr.curvature.whole import GaussNewton, Hessian, Linearization, OutputHessian, Potential
from llqr.objective import BoundObjective, Chunks, at_most, row, strided
from llqr.operators import LinearOperator, SymmetricOperator, structure_of
from llqr.tree import (
    Frozen,
    accurate_dtype,
    check_outputs,
    freeze,
    is_key,
    is_legacy_key,
    vdot,
    widen,
    zeros_like,
)
from llqr.typing import Array, Bool, Float, Params, PyTree


def chunked(
    objective: BoundObjective, params: Params, metric: PyTree, reduction: str, route: Route
) -> Linearization:
    """Linearise chunk by chunk.

    Args:
      objective: forward function, loss and batch.
      params: the current parameters.
      metric: a resolved metric, see `llqr.metrics`.
      reduction: "sum" or "mean" over rows.
      route: with a bound on the examples in a chunk.

    Raises:
      ValueError: an output without the examples on its first axis.
    """
    size = route.chunk_size or 1
    shapes = jax.eval_shape(_forward_chunk, objective, params)
    check_outputs(shapes)
    chunks = objective.split(size)
    for leaf in jax.tree.leaves(shapes):
        if not leaf.shape or leaf.shape[0] % chunks.examples:
            raise ValueError(
                f"chunk_size={size} needs outputs with the examples on their first axis; there are "
                f"{chunks.examples} examples and an output of shape {leaf.shape}."
            )
    check_uncoupled(objective, params, chunks)
    rows = tuple(leaf.shape[0] for leaf in jax.tree.leaves(shapes))
    jacobian = Chunked(chunks, params, rows)
    outputs = jacobian.outputs()
    curvature = _curvature(jacobian, objective, outputs, metric, reduction, route.axis_name)
    return Linearization(outputs, jacobian, curvature)


def check_uncoupled(objective: BoundObjective, params: Params, chunks: Chunks) -> None:
    """Raise ValueError where the network cannot be cut between examples, as far as that shows.

    Args:
      objective: on the whole batch.
      params: the parameters.
      chunks: of the batch.
    """
    shared = [
        is_legacy_key(leaf) or (is_key(leaf) and not jnp.ndim(leaf))
        for leaf in jax.tree.leaves(objective)
    ]
    if any(shared) and _uses(objective, params, shared):
        raise ValueError(
            "chunk_size, per_example: forward uses a random key that all examples share, and each "
            "part would draw the same numbers for other examples: another loss than that of the "
            "whole batch. Give every example a key of its own, jax.random.split(key, n), used "
            "under jax.vmap; or take the curvature without randomness (dropout off)."
        )
    shapes = jax.eval_shape(_forward_chunk, objective, params)
    part = jax.eval_shape(_forward_chunk, chunks[0], params)
    for w, c in zip(jax.tree.leaves(shapes), jax.tree.leaves(part), strict=True):
        expected = (w.shape[0] // chunks.examples * chunks.size, *w.shape[1:])
        if c.shape != expected:
            raise ValueError(
                f"chunk_size, per_example: {chunks.examples} examples have outputs of shape "
                f"{w.shape}, and a part of {chunks.size} has {c.shape} in place of {expected}: "
                "examples interact in forward (a contrastive loss, statistics of the batch), so "
                "that the network cannot be cut between them. Let forward return each example's "
                "own embedding and couple them in the loss, which sees the outputs of the whole "
                "batch; or leave the batch whole."
            )
    if (why := coupling.interaction(objective, params)) is not None:
        raise ValueError(
            f"chunk_size, per_example: the batch cannot be cut between examples: {why}. If the "
            "examples are elsewhere, Objective(batch_axes=...) says where, with None for what all "
            "of them share; else leave the batch whole."
        )


def _uses(objective: BoundObjective, params: Params, which: list[bool]) -> bool:
    """Whether the outputs' program takes some of the batch's leaves at all."""
    program = jax.make_jaxpr(lambda bound, params: bound.outputs(params))(objective, params).jaxpr
    chosen = {id(v) for v, c in zip(program.invars, which, strict=False) if c}
    return any(id(v) in chosen for equation in program.eqns for v in equation.invars)


def _curvature(
    jacobian: "Chunked",
    objective: BoundObjective,
    outputs: PyTree,
    metric: PyTree,
    reduction: str,
    axis_name: AxisName,
) -> SymmetricOperator:
    kept = None
    if not (metrics.uses_loss(metric) or metrics.is_full(metric)):
        kept = metrics.kept_rows(metric, outputs, objective.mask())
    if kept is not None:
        weights = metrics.row_weights(kept, reduction, axis_name)
        return _GaussNewton(jacobian, kept, weights, freeze(metric))
    potential = Potential(objective, outputs, freeze(metric), reduction, axis_name)
    output_hessian = OutputHessian(potential)
    if metrics.is_full(metric):
        costate = jax.grad(potential)(outputs)
        return Hessian(_Hessian(jacobian, costate, output_hessian), freeze(jacobian.in_structure))
    return GaussNewton(jacobian, output_hessian)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunked(LinearOperator):
    """J, the activations of one chunk at a time."""

    compiles: ClassVar[bool] = False

    chunks: Chunks
    params: Params
    rows: tuple[int, ...] = field(metadata={"static": True})

    @property
    def in_structure(self) -> PyTree:
        """Of the parameters."""
        return structure_of(self.params)

    def outputs(self) -> PyTree:
        """Return the outputs of the whole batch."""
        return self._concatenate(self._stacked(_forward_chunk))

    def jvp(self, u: Params) -> PyTree:
        """Return J u."""
        return self._concatenate(self._stacked(_jvp_chunk, u))

    def vjp(self, w: PyTree) -> Params:
        """Return J^T w."""
        return self.sum(_vjp_chunk, (), (w,), self.params)

    def _stacked(self, function: Any, *shared: PyTree) -> PyTree:
        """Stack function(chunk, params, *shared) over the chunks."""
        one = lambda i: function(self.chunks[i], self.params, *shared)  # noqa: E731
        python = _loops.in_python(self.params, shared)
        return _loops.stacked(one, len(self.chunks), python=python)

    def sum(
        self, function: Any, shared: tuple[PyTree, ...], rows: tuple[PyTree, ...], like: PyTree
    ) -> PyTree:
        """Sum function(chunk, params, *shared, *rows of the chunk) over the chunks.

        Args:
          function: of a chunk's objective, the parameters, `shared` and a chunk's `rows`.
          shared: trees that every chunk sees.
          rows: trees of arrays [rows, ...] that are cut as the outputs are.
          like: a tree in the shapes and dtypes of the sum.
        """
        cut = [self._cut(tree) for tree in rows]

        def one(i: Any) -> PyTree:
            own = [jax.tree.map(lambda x: row(x, i), tree) for tree in cut]
            return function(self.chunks[i], self.params, *shared, *own)

        python = _loops.in_python(self.params, shared, rows)
        return _loops.total(one, len(self.chunks), like, python=python)

    def _concatenate(self, stacked: PyTree) -> PyTree:
        """[chunks, rows of a chunk, ...] -> [rows, ...], without the filling."""
        leaves, treedef = jax.tree.flatten(stacked)

        def whole(x: Array, n: int) -> Array:
            x = jnp.swapaxes(x.reshape(len(x), self.chunks.size, -1, *x.shape[2:]), 0, 1)
            return at_most(x.reshape(-1, *x.shape[3:]), n)

        return treedef.unflatten([whole(x, n) for x, n in zip(leaves, self.rows, strict=True)])

    def _cut(self, tree: PyTree) -> PyTree:
        """[rows, ...] -> [chunks, rows of a chunk, ...]; the filling gets zeros or False."""
        count = len(self.chunks)

        def cut(x: Array) -> Array:
            x = strided(x.reshape(self.chunks.examples, -1, *x.shape[1:]), count)
            return x.reshape(count, -1, *x.shape[3:])

        return jax.tree.map(cut, tree)


@jax.jit
def _forward_chunk(chunk: BoundObjective, params: Params) -> PyTree:
    return chunk.outputs(params)


@jax.jit
def _jvp_chunk(chunk: BoundObjective, params: Params, u: Params) -> PyTree:
    return derivatives.jvp(chunk.outputs, params, u)


@jax.jit
def _vjp_chunk(chunk: BoundObjective, params: Params, w: PyTree) -> Params:
    return jax.vjp(chunk.outputs, params)[1](w)[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _GaussNewton(SymmetricOperator):
    """C = J^T Q J with the Q of each chunk: a product holds the outputs of one chunk alone.

    Attributes:
      jacobian: J.
      kept: for each output, which of its rows count: [rows, ...]; None without a metric.
      weights: of the rows of each output.
      metric: a divergence of each row.
    """

    jacobian: Chunked
    kept: tuple[Bool[Array, "..."] | None, ...]
    weights: tuple[Float[Array, ""] | None, ...]
    metric: Frozen = field(metadata={"static": True})

    @property
    def in_structure(self) -> PyTree:
        return self.jacobian.in_structure

    def product(self, u: Params) -> Params:
        function = partial(_gauss_newton_chunk, self.metric)
        return self.jacobian.sum(function, (self.weights, u), (self.kept,), self.jacobian.params)

    def bilinear(self, u: Params, w: Params) -> Float[Array, ""]:
        pair = (u,) if u is w else (u, w)
        function = partial(_bilinear_chunk, self.metric)
        outputs = jax.eval_shape(_forward_chunk, self.jacobian.chunks[0], self.jacobian.params)
        first = jax.tree.leaves(self.jacobian.params)[0]
        zero = zeros_like(jnp.sum(first)).astype(accurate_dtype(outputs))
        return self.jacobian.sum(function, (self.weights, pair), (self.kept,), zero)


def _q_chunk(
    metric: Frozen, outputs: PyTree, v: PyTree, weights: tuple[Float[Array, ""] | None, ...],
    kept: tuple[Bool[Array, "..."] | None, ...],
) -> PyTree:  # fmt: skip
    """Q v of one chunk, whose outputs are their own reference."""
    treedef = jax.tree.structure(outputs)
    mask = treedef.unflatten(kept)
    pull = jax.grad(lambda z: metrics.potential(metric.tree, z, outputs, mask, "sum"))
    q = jax.tree.leaves(derivatives.symmetric_jvp(pull, outputs, v))
    return treedef.unflatten([_weighted(x, w) for x, w in zip(q, weights, strict=True)])


def _weighted(x: Float[Array, "*shape"], weight: Float[Array, ""] | None) -> Float[Array, "*shape"]:
    if weight is None:
        return x
    wide = accurate_dtype(x)  # 1 / rows underflows in float16
    return (weight.astype(wide) * x.astype(wide)).astype(x.dtype)


@partial(jax.jit, static_argnums=0)
def _gauss_newton_chunk(
    metric: Frozen, chunk: BoundObjective, params: Params,
    weights: tuple[Float[Array, ""] | None, ...], u: Params,
    kept: tuple[Bool[Array, "..."] | None, ...],
) -> Params:  # fmt: skip
    outputs, jacobian = derivatives.linearize(chunk.outputs, params)
    q = _q_chunk(metric, outputs, jacobian.jvp(u), weights, kept)
    return jacobian.vjp(q)


@partial(jax.jit, static_argnums=0)
def _bilinear_chunk(
    metric: Frozen, chunk: BoundObjective, params: Params,
    weights: tuple[Float[Array, ""] | None, ...], pair: tuple[Params, ...],
    kept: tuple[Bool[Array, "..."] | None, ...],
) -> Float[Array, ""]:  # fmt: skip
    outputs, jacobian = derivatives.linearize(chunk.outputs, params)
    tangents = [jacobian.jvp(u) for u in pair]
    # In float32 at least: chunks are summed, and half-precision sums stop growing.
    q = _q_chunk(metric, outputs, tangents[-1], weights, kept)
    return vdot(widen(tangents[0]), widen(q))


@jax.jit
def _hessian_chunk(
    chunk: BoundObjective, params: Params, u: Params, p: PyTree, q: PyTree
) -> Params:
    pull = lambda theta: jax.vjp(chunk.outputs, theta)[1](p)[0]  # noqa: E731
    second = derivatives.symmetric_jvp(pull, params, u)
    return jax.tree.map(jnp.add, second, _vjp_chunk(chunk, params, q))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Hessian:
    """A full Hessian: J^T Q J + second derivatives of the network against p."""

    jacobian: Chunked
    costate: PyTree
    output_hessian: Callable[[PyTree], PyTree]

    def __call__(self, u: Params) -> Params:
        q = self.output_hessian(self.jacobian.jvp(u))
        return self.jacobian.sum(_hessian_chunk, (u,), (self.costate, q), self.jacobian.params)
