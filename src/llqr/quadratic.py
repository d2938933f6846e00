r"""The quadratic model of the loss under a metric: the fused route.

  symbol    meaning                                             shape
  u         control: a perturbation of the parameters           like params
  g         gradient of the loss                                like params
  J         Jacobian of the outputs in the parameters           outputs x params
  c         gradient of the loss in the outputs                 like outputs
  Q         Hessian of the metric's potential in the outputs    outputs x outputs
  C         curvature in the parameters                         params x params
  lambda    damping                                             []

    J(u) = g.u + 1/2 u.(C + lambda I) u

with C = J^T Q J, or the full Hessian for metrics such as newton. This equals the cost of
the layerwise linear-quadratic regulator for every u, not only for small ones (Layerwise
LQR, arXiv 2605.04230): no cross-layer term is dropped. A product costs one tangent sweep
and one transpose sweep of the network.

A `Route` says how they are computed: from residuals that are kept, or again each time, or
chunk by chunk, or stage by stage. All routes give the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, singledispatch
from typing import Any, Literal, Protocol, TypeAlias, get_args

import jax
import jax.numpy as jnp

from llqr import metrics
from llqr._errors import check_choice, check_integer, check_range
from llqr._tree import (
    Frozen,
    accurate_dtype,
    check_inexact,
    freeze,
    is_traced,
    norm,
    normal_like,
    vdot,
    widen,
)
from llqr._types import Array, Float, Number, Params, PyTree
from llqr.metrics import Reduction
from llqr.objective import BoundObjective, Chunks

Memory: TypeAlias = Literal["cached", "curvature_recomputed", "recomputed"]
CheckpointPolicy: TypeAlias = Literal["none", "dots_no_batch_dims"]

POWER_STEPS = 8
"""Power iterations behind divergence_reduction="unit"."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """How curvature products are computed; the numbers are the same up to rounding.

    Args:
      layerwise: stage by stage, as a linear-quadratic regulator, instead of fused; needs an
        objective whose forward comes from a staged model (`StagedModel.as_forward`).
      memory: "cached" keeps the residuals of one linearisation; "curvature_recomputed" keeps
        those of the network but linearises second derivatives again at each product;
        "recomputed" keeps nothing.
      checkpoint_policy: with "recomputed", what a transpose sweep keeps of its own forward
        sweep: "none" keeps all, "dots_no_batch_dims" only products with weights. Staged
        models are cut at their stages.
      chunk_size: examples whose activations are held at once; None: the whole batch. The
        forward function must treat examples one by one (no batch statistics), with all
        outputs example by example along their first axis, and a divergence row by row.

    Raises:
      ValueError: an unknown word, or options that exclude each other.
    """

    layerwise: bool = False
    memory: Memory = "cached"
    checkpoint_policy: CheckpointPolicy = "none"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_choice("Route: memory", self.memory, get_args(Memory))
        check_choice("Route: checkpoint_policy", self.checkpoint_policy, get_args(CheckpointPolicy))
        check_integer("Route: chunk_size", self.chunk_size, low=1)
        if self.checkpoint_policy != "none" and self.memory != "recomputed":
            raise ValueError(
                f"Route: checkpoint_policy={self.checkpoint_policy!r} needs memory='recomputed'; "
                f"with {self.memory!r} the residuals are kept anyway."
            )
        if self.chunk_size is not None and self.memory != "cached":
            raise ValueError(
                "Route: chunks keep nothing between products anyway: leave memory at 'cached' with "
                f"chunk_size, not {self.memory!r}."
            )
        if self.layerwise and self.chunk_size is not None:
            raise ValueError("Route: chunk_size needs the fused route, layerwise=False.")


class Network(Protocol):
    """The linearised forward function J."""

    def tangent(self, u: Params) -> PyTree:
        """Return J u."""
        ...

    def pull_back(self, w: PyTree) -> Params:
        """Return J^T w."""
        ...


class Curvature(Protocol):
    """The curvature C, neither scaled nor damped."""

    def product(self, u: Params) -> Params:
        """Return C u."""
        ...

    def inner(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.C w."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuadraticModel:
    """J(u) = g.u + 1/2 u.(C / scale + lambda I) u at one point, on one batch.

    Made by `linearize`. A pytree: it crosses `jax.jit`, so a loop over controls can compile
    its step once.

    Attributes:
      loss: the loss at the current parameters.
      gradient: g.
      outputs: of the forward function.
      cotangent: c.
      network: J.
      curvature: C.
      damping: lambda.
      scale: 1, or with divergence_reduction="unit" the largest eigenvalue of C.
    """

    loss: Float[Array, ""]
    gradient: Params
    outputs: PyTree
    cotangent: PyTree
    network: Network
    curvature: Curvature
    damping: Number
    scale: Number = 1.0

    def value(self, u: Params) -> Float[Array, ""]:
        """Return J(u)."""
        curved = self.inner(u, u)
        return vdot(self.gradient, u).astype(curved.dtype) + 0.5 * curved

    def value_and_gradient(self, u: Params) -> tuple[Float[Array, ""], Params]:
        """Return J(u) and dJ/du = g + (C + lambda I) u."""
        curved = self.product(u)
        value = vdot(self.gradient, u) + 0.5 * vdot(u, curved)
        return value, jax.tree.map(jnp.add, self.gradient, curved)

    def product(self, u: Params) -> Params:
        """Return (C + lambda I) u."""
        return jax.tree.map(
            lambda c, x: (c / self.scale + self.damping * x).astype(c.dtype), self.curve(u), u
        )

    def inner(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.(C + lambda I) w, from tangent sweeps alone where C = J^T Q J."""
        curved = self.curvature.inner(u, w) / self.scale
        return curved + (self.damping * vdot(u, w)).astype(curved.dtype)

    def curve(self, u: Params) -> Params:
        """Return C u, neither scaled nor damped."""
        return self.curvature.product(u)

    @property
    def loops_in_python(self) -> bool:
        """Whether its products, outside a trace, are loops over compiled chunks."""
        return isinstance(self.network, _Chunked)

    def pull_back(self, w: PyTree) -> Params:
        """Return J^T w for a cotangent of the outputs."""
        return self.network.pull_back(w)


def linearize(
    objective: BoundObjective,
    params: Params,
    metric: metrics.MetricLike = "ngd",
    *,
    damping: Number = 0.0,
    divergence_reduction: Reduction = "sum",
    route: Route | None = None,
) -> QuadraticModel:
    """Return the quadratic model of a bound objective at `params`.

    Args:
      objective: forward function, loss and batch.
      params: the current parameters; floating-point leaves only.
      metric: see `llqr.metrics`.
      damping: lambda >= 0, added to the curvature of every parameter.
      divergence_reduction: "sum" or "mean" over rows (no effect on newton and gauss_newton,
        which take the loss as it is), or "unit": C is divided by an estimate of its largest
        eigenvalue, so that damping is relative to it.
      route: how products are computed.

    Raises:
      TypeError: a parameter that is not floating-point.
      ValueError: unknown metric, a value out of range, a mask that does not fit the rows, or
        a route that the objective does not allow.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda params, x: x @ params, loss=lambda z, x: jnp.mean(z**2))
      >>> model = llqr.linearize(objective.bind(jnp.eye(2)), jnp.ones((2, 1)), "gauss_newton")
      >>> model.product(jnp.ones((2, 1))).tolist()
      [[1.0], [1.0]]
    """
    check_inexact(params)
    check_range("damping", damping, low=0)
    check_choice("divergence_reduction", divergence_reduction, get_args(Reduction))
    metric = metrics.resolve(metric)
    route = Route() if route is None else route
    rows = metrics.over_rows(divergence_reduction)
    if route.layerwise:
        forward = objective.objective.forward
        model = layerwise_model(forward, objective, params, metric, damping, rows, route)
    elif route.chunk_size is not None:
        model = _chunked(objective, params, metric, damping, rows, route.chunk_size)
    else:
        model = _whole(objective, params, metric, damping, rows, route)
    if divergence_reduction == "unit":
        v = power_start(model)
        for _ in range(POWER_STEPS):
            v = power_step(model, v)
        model = with_unit_scale(model, v)
    return model


@singledispatch
def layerwise_model(
    forward: Any, objective: BoundObjective, params: Params, metric: PyTree,
    damping: Number, reduction: str, route: Route,
) -> QuadraticModel:  # fmt: skip
    """Return the model by the layerwise route; `llqr.lqr` knows how, for staged models."""
    raise ValueError(
        "the layerwise route needs the stages of the model: make the objective with "
        "forward=staged.as_forward(), staged being an llqr.lqr.StagedModel; or use the fused "
        f"route. Got the forward function {forward!r}."
    )


# --- the largest eigenvalue -------------------------------------------------------------------


def power_start(model: QuadraticModel) -> Params:
    """Return the first vector of the power iteration: a fixed normal draw."""
    return normal_like(model.gradient, jax.random.key(0))


def power_step(model: QuadraticModel, v: Params) -> Params:
    """Return C v / |v|: its length tends to the largest absolute eigenvalue of C."""
    return model.curve(_unit(v))


def with_unit_scale(model: QuadraticModel, v: Params) -> QuadraticModel:
    """Return the model with C divided by |v|, the estimate after power iterations."""
    length = norm(v)
    usable = jnp.isfinite(length) & (length > 0)  # C = 0 stays 0
    return replace(model, scale=jnp.where(usable, length, 1.0))


def _unit(v: Params) -> Params:
    length = norm(v)
    length = jnp.where(length > 0, length, 1.0)
    return jax.tree.map(lambda x: (x / length).astype(x.dtype), v)


# --- whole batches ------------------------------------------------------------------------------


def _whole(
    objective: BoundObjective, params: Params, metric: PyTree, damping: Number,
    reduction: str, route: Route,
) -> QuadraticModel:  # fmt: skip
    full = metrics.is_full(metric)
    if route.memory == "recomputed":
        outputs, network = objective.outputs(params), _Recomputed(objective, params, route)
    else:
        outputs, tangent = jax.linearize(objective.outputs, params)
        network = _Cached(tangent, params)
    potential = Potential(objective, outputs, freeze(metric), reduction)
    if full and route.memory == "cached":
        curvature = _Hessian(jax.linearize(jax.grad(potential.of_params), params)[1])
    elif full:
        curvature = _Hessian(_HessianRecomputed(potential, params))
    elif route.memory == "cached":
        curvature = _GaussNewton(network, jax.linearize(jax.grad(potential), outputs)[1])
    else:
        curvature = _GaussNewton(network, _OutputHessian(potential))
    return _model(objective, outputs, network, curvature, damping)


def _model(
    objective: BoundObjective, outputs: PyTree, network: Network, curvature: Curvature,
    damping: Number,
) -> QuadraticModel:  # fmt: skip
    """Add what every fused route takes from the outputs: loss, cotangent and gradient."""
    loss, cotangent = jax.value_and_grad(objective.loss)(outputs)
    gradient = network.pull_back(cotangent)
    return QuadraticModel(loss, gradient, outputs, cotangent, network, curvature, damping)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Potential:
    """The metric's potential as a function of the outputs, its reference frozen."""

    objective: BoundObjective
    reference: PyTree
    metric: Frozen = field(metadata={"static": True})
    reduction: str = field(metadata={"static": True})

    def __call__(self, outputs: PyTree) -> Float[Array, ""]:
        """Return the reduced divergence of `outputs` from the reference."""
        metric = self.metric.tree
        if metrics.uses_loss(metric):
            return self.objective.loss(outputs)
        mask = self.objective.mask()
        return metrics.potential(metric, outputs, self.reference, mask, self.reduction)

    def of_params(self, params: Params) -> Float[Array, ""]:
        """Return the same as a function of the parameters."""
        return self(self.objective.outputs(params))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Cached:
    """J from the residuals of one linearisation."""

    apply: Callable[[Params], PyTree]
    params: Params

    def tangent(self, u: Params) -> PyTree:
        return self.apply(u)

    def pull_back(self, w: PyTree) -> Params:
        return jax.linear_transpose(self.apply, self.params)(w)[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Recomputed:
    """J linearised again at each use."""

    objective: BoundObjective
    params: Params
    route: Route = field(metadata={"static": True})

    def tangent(self, u: Params) -> PyTree:
        return jax.jvp(self._forward(), (self.params,), (u,))[1]

    def pull_back(self, w: PyTree) -> Params:
        return jax.vjp(self._forward(), self.params)[1](w)[0]

    def _forward(self) -> Callable[[Params], PyTree]:
        if self.route.checkpoint_policy == "none":
            return self.objective.outputs
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        forward = self.objective.objective.forward
        cut = getattr(forward, "rematerialized", None)
        if cut is not None:
            return lambda params: cut(policy)(params, self.objective.batch)
        return jax.checkpoint(self.objective.outputs, policy=policy)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _GaussNewton:
    """C = J^T Q J, with Q on tangents of the outputs."""

    network: Network
    output_hessian: Callable[[PyTree], PyTree]

    def product(self, u: Params) -> Params:
        return self.network.pull_back(self.output_hessian(self.network.tangent(u)))

    def inner(self, u: Params, w: Params) -> Float[Array, ""]:
        v = self.network.tangent(w)
        other = v if u is w else self.network.tangent(u)
        return vdot(other, self.output_hessian(v))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Hessian:
    """C as one linear map."""

    apply: Callable[[Params], Params]

    def product(self, u: Params) -> Params:
        return self.apply(u)

    def inner(self, u: Params, w: Params) -> Float[Array, ""]:
        return vdot(u, self.apply(w))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _OutputHessian:
    """Q, linearised again at each use."""

    potential: Potential

    def __call__(self, v: PyTree) -> PyTree:
        return _output_hessian(self.potential, v)


@jax.jit
def _output_hessian(potential: Potential, v: PyTree) -> PyTree:
    return jax.jvp(jax.grad(potential), (potential.reference,), (v,))[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _HessianRecomputed:
    """A full Hessian, forward over reverse, linearised again at each use."""

    potential: Potential
    params: Params

    def __call__(self, u: Params) -> Params:
        return jax.jvp(jax.grad(self.potential.of_params), (self.params,), (u,))[1]


# --- chunks of a batch ----------------------------------------------------------------------------


def _chunked(
    objective: BoundObjective, params: Params, metric: PyTree, damping: Number,
    reduction: str, size: int,
) -> QuadraticModel:  # fmt: skip
    """The network chunk by chunk; the loss on the outputs of the whole batch.

    Exact for every loss and mask. A divergence is one number for each row, of that row alone, so
    its curvature goes by chunks too; what couples examples (a loss) is taken of all outputs.
    """
    shapes = jax.eval_shape(objective.outputs, params)
    chunks = objective.split(size)
    for leaf in jax.tree.leaves(shapes):
        if not leaf.shape or leaf.shape[0] % chunks.examples:
            raise ValueError(
                f"chunk_size={size} needs outputs with the examples on their first axis; there are "
                f"{chunks.examples} examples and an output of shape {leaf.shape}."
            )
    rows = tuple(leaf.shape[0] for leaf in jax.tree.leaves(shapes))
    network = _Chunked(chunks, params, rows)
    outputs = network.outputs()
    curvature = _chunked_curvature(network, objective, outputs, metric, reduction)
    return _model(objective, outputs, network, curvature, damping)


def _chunked_curvature(
    network: "_Chunked", objective: BoundObjective, outputs: PyTree, metric: PyTree, reduction: str
) -> Curvature:
    kept = None
    if not (metrics.uses_loss(metric) or metrics.is_full(metric)):
        kept = metrics.kept_rows(metric, outputs, objective.mask())
    if kept is not None:
        weights = metrics.row_weights(kept, reduction)
        return _GaussNewtonByChunks(network, kept, weights, freeze(metric))
    potential = Potential(objective, outputs, freeze(metric), reduction)
    output_hessian = _OutputHessian(potential)
    if metrics.is_full(metric):
        return _Hessian(_ChunkedHessian(network, jax.grad(potential)(outputs), output_hessian))
    return _GaussNewton(network, output_hessian)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Chunked:
    """J, the activations of one chunk at a time.

    A loop over chunks is a `lax.scan` inside a trace, and runs in Python over one compiled
    chunk outside: on CPU, XLA runs convolution gradients inside a compiled loop 30 to 50
    times slower.
    """

    chunks: Chunks
    params: Params
    rows: tuple[int, ...] = field(metadata={"static": True})

    def outputs(self) -> PyTree:
        return self._concatenate(self._map(_forward_chunk, ()))

    def tangent(self, u: Params) -> PyTree:
        return self._concatenate(self._map(_tangent_chunk, (u,)))

    def pull_back(self, w: PyTree) -> Params:
        return self.sum(_pull_back_chunk, (), (w,), self.params)

    def _map(self, function: Any, shared: tuple[PyTree, ...]) -> PyTree:
        """Stack function(chunk, params, *shared) over the chunks."""
        if is_traced((self.params, shared)):
            one = lambda i: function(self.chunks[i], self.params, *shared)  # noqa: E731
            return jax.lax.map(one, jnp.arange(len(self.chunks)))
        found = [function(self.chunks[i], self.params, *shared) for i in range(len(self.chunks))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    def sum(
        self, function: Any, shared: tuple[PyTree, ...], rows: tuple[PyTree, ...], like: PyTree
    ) -> PyTree:
        """Sum function(chunk, params, *shared, *rows of the chunk) over the chunks."""
        cut = [self._cut(tree) for tree in rows]

        def one(i: Any) -> PyTree:
            own = [jax.tree.map(lambda x: x[i], tree) for tree in cut]
            return function(self.chunks[i], self.params, *shared, *own)

        if is_traced((self.params, shared, rows)):
            zeros = jax.tree.map(jnp.zeros_like, like)
            add = lambda total, i: (jax.tree.map(jnp.add, total, one(i)), None)  # noqa: E731
            return jax.lax.scan(add, zeros, jnp.arange(len(self.chunks)))[0]
        total = one(0)
        for i in range(1, len(self.chunks)):
            total = jax.tree.map(jnp.add, total, one(i))
        return total

    def _concatenate(self, stacked: PyTree) -> PyTree:
        """[chunks, rows of a chunk, ...] -> [rows, ...], without the filling."""
        leaves, treedef = jax.tree.flatten(stacked)
        return treedef.unflatten(
            [x.reshape(-1, *x.shape[2:])[:n] for x, n in zip(leaves, self.rows, strict=True)]
        )

    def _cut(self, tree: PyTree) -> PyTree:
        """[rows, ...] -> [chunks, rows of a chunk, ...]; the filling gets zeros or False."""
        count = len(self.chunks)

        def cut(x: Array) -> Array:
            per_chunk = x.shape[0] // self.chunks.examples * self.chunks.size
            filling = [(0, count * per_chunk - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
            return jnp.pad(x, filling).reshape(count, per_chunk, *x.shape[1:])

        return jax.tree.map(cut, tree)


@jax.jit
def _forward_chunk(chunk: BoundObjective, params: Params) -> PyTree:
    return chunk.outputs(params)


@jax.jit
def _tangent_chunk(chunk: BoundObjective, params: Params, u: Params) -> PyTree:
    return jax.jvp(chunk.outputs, (params,), (u,))[1]


@jax.jit
def _pull_back_chunk(chunk: BoundObjective, params: Params, w: PyTree) -> Params:
    return jax.vjp(chunk.outputs, params)[1](w)[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _GaussNewtonByChunks:
    """C = J^T Q J with the Q of each chunk: a product holds the outputs of one chunk alone.

    Attributes:
      network: J.
      kept: for each output, which of its rows count: [rows, ...]; None without a metric.
      weights: of the rows of each output.
      metric: a divergence of each row.
    """

    network: _Chunked
    kept: tuple[Array | None, ...]
    weights: tuple[Array | None, ...]
    metric: Frozen = field(metadata={"static": True})

    def product(self, u: Params) -> Params:
        function = partial(_gauss_newton_chunk, self.metric)
        return self.network.sum(function, (self.weights, u), (self.kept,), self.network.params)

    def inner(self, u: Params, w: Params) -> Float[Array, ""]:
        pair = (u,) if u is w else (u, w)
        function = partial(_inner_chunk, self.metric)
        network = self.network
        outputs = jax.eval_shape(_forward_chunk, network.chunks[0], network.params)
        zero = jnp.zeros((), accurate_dtype(outputs))
        return network.sum(function, (self.weights, pair), (self.kept,), zero)


def _q_chunk(
    metric: Frozen, outputs: PyTree, v: PyTree, weights: tuple[Array | None, ...],
    kept: tuple[Array | None, ...],
) -> PyTree:  # fmt: skip
    """Q v of one chunk, whose outputs are their own reference."""
    treedef = jax.tree.structure(outputs)
    mask = treedef.unflatten(kept)
    pull = jax.grad(lambda z: metrics.potential(metric.tree, z, outputs, mask, "sum"))
    q = jax.tree.leaves(jax.jvp(pull, (outputs,), (v,))[1])
    return treedef.unflatten([_weighted(x, w) for x, w in zip(q, weights, strict=True)])


def _weighted(x: Array, weight: Array | None) -> Array:
    if weight is None:
        return x
    wide = accurate_dtype(x)  # 1 / rows underflows in float16
    return (weight.astype(wide) * x.astype(wide)).astype(x.dtype)


@partial(jax.jit, static_argnums=0)
def _gauss_newton_chunk(
    metric: Frozen, chunk: BoundObjective, params: Params, weights: tuple[Array | None, ...],
    u: Params, kept: tuple[Array | None, ...],
) -> Params:  # fmt: skip
    outputs, tangent = jax.linearize(chunk.outputs, params)
    q = _q_chunk(metric, outputs, tangent(u), weights, kept)
    return jax.linear_transpose(tangent, params)(q)[0]


@partial(jax.jit, static_argnums=0)
def _inner_chunk(
    metric: Frozen, chunk: BoundObjective, params: Params, weights: tuple[Array | None, ...],
    pair: tuple[Params, ...], kept: tuple[Array | None, ...],
) -> Float[Array, ""]:  # fmt: skip
    outputs, tangent = jax.linearize(chunk.outputs, params)
    tangents = [tangent(u) for u in pair]
    # In float32 at least: chunks are summed, and half-precision sums stop growing.
    q = _q_chunk(metric, outputs, tangents[-1], weights, kept)
    return vdot(widen(tangents[0]), widen(q))


@jax.jit
def _hessian_chunk(
    chunk: BoundObjective, params: Params, u: Params, p: PyTree, q: PyTree
) -> Params:
    pull = lambda theta: jax.vjp(chunk.outputs, theta)[1](p)[0]  # noqa: E731
    _, second = jax.jvp(pull, (params,), (u,))
    return jax.tree.map(jnp.add, second, _pull_back_chunk(chunk, params, q))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _ChunkedHessian:
    """A full Hessian: J^T Q J + second derivatives of the network against p."""

    network: _Chunked
    costate: PyTree
    output_hessian: Callable[[PyTree], PyTree]

    def __call__(self, u: Params) -> Params:
        q = self.output_hessian(self.network.tangent(u))
        return self.network.sum(_hessian_chunk, (u,), (self.costate, q), self.network.params)
