r"""Divergences: the metric in which a step is measured.

A metric is a *potential on outputs*: a function of the outputs z and of their frozen
value r at the current parameters, one number for each row, reduced over rows. Its
curvature at z = r is pulled back to the parameters.

  symbol   meaning                                                     shape
  z, r     outputs, and outputs at the current parameters              [..., K]
  a, b     log-softmax of r, of z                                      [..., K]
  s        softmax of r                                                [..., K]
  J        Jacobian of the outputs in the parameters                   [rows K, n]
  F        diag(s) - s s^T, the Fisher matrix of one row's logits      [K, K]
  p        sigmoid of r                                                [..., K]

  name           potential of one row                     curvature C (reduction "sum")
  ngd            -sum s b                                 sum_rows J^T F J
  reverse_kl     sum exp(b) (b - a)                       sum_rows J^T F J
  renyi          log sum exp(p a - (p-1) b) / (p-1)       p sum_rows J^T F J    (order p)
  bernoulli      sum log(1 + e^z) - p z                   sum_rows J^T diag(p (1 - p)) J
  gaussian       |z - r|^2 / 2                            sum_rows J^T J
  gauss_newton   the loss itself                          J^T (d2 loss/dz2) J
  newton         the loss itself                          Hessian of the loss, indefinite
  renyi_zero     -sum b                                   its full Hessian, indefinite
  renyi_2        log sum w exp(a - b),  w = a / sum a     its full Hessian, indefinite

The categorical metrics (ngd, reverse_kl and the Renyi family) take the last axis as classes, and
refuse outputs of one column or one axis: one logit for each row is `bernoulli`'s, which takes every
entry of the outputs as a binary prediction of its own.

`gauss_newton` is positive only where the loss is convex in the outputs; elsewhere (a contrastive
loss on embeddings) it is indefinite, like `newton`: use some damping. A refit that ends where
this shows has the status "indefinite".

`newton` and `gauss_newton` take the loss with its own reduction (usually a mean); the
divergences are reduced over rows by `divergence_reduction`: "sum" (the papers' runs), "mean",
or "unit" (a mean, then C divided by its largest eigenvalue: `llqr.linearize`). A sum against
a mean gradient makes the step 1/rows as long: with "mean" and "unit", damping and the refit's
learning rate keep their meaning when the refit batch grows.
`renyi_zero` and `renyi_2` are kept because the papers' code offers them; they are not
metrics at the current point: their gradient does not vanish there.

Sources: Layerwise LQR (arXiv 2605.04230); rows reduced one by one, unlike there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from llqr import _replicas
from llqr._replicas import AxisName
from llqr.errors import unknown
from llqr.tree import accurate_dtype, shard_like, spread, widen
from llqr.typing import Array, Bool, Float, PRNGKeyArray, PyTree

Divergence: TypeAlias = Callable[
    [Float[Array, "*rows classes"], Float[Array, "*rows classes"]], Float[Array, "*rows"]
]
"""(outputs [..., K], reference [..., K]) -> one value for each row [...]."""

Sampler: TypeAlias = Callable[
    [PRNGKeyArray, Float[Array, "*rows classes"]], Float[Array, "*rows classes"]
]
"""(key, outputs [..., K]) -> a random cotangent of each row, [..., K]."""

Reduction: TypeAlias = Literal["sum", "mean", "unit"]


@dataclass(frozen=True)
class Metric:
    """One metric: whose curvature, and how much of it.

    Args:
      divergence: value of each row, from that row alone, for given outputs and their frozen
        reference; applied to every output array. None stands for the objective's loss.
      full: True takes the whole Hessian in the parameters; False the generalised
        Gauss-Newton part J^T Q J, equal to it when the potential's gradient vanishes.
      sample: draws cotangents whose covariance is the Hessian of one row's divergence, for
        probes from the Fisher distribution; None: there is no such draw.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> poisson = llqr.Metric(lambda z, r: jnp.sum(jnp.exp(z) - jnp.exp(r) * z, axis=-1))
      >>> objective = llqr.Objective(
      ...     forward=lambda w, x: x @ w, loss=lambda z, x: jnp.sum(z))
      >>> model = llqr.linearize(objective.bind(jnp.eye(2)), jnp.zeros((2, 1)), poisson)
      >>> model.product(jnp.ones((2, 1))).tolist()  # C = X^T diag(exp(z)) X
      [[1.0], [1.0]]
    """

    divergence: Divergence | None
    full: bool = False
    sample: Sampler | None = None


MetricLike: TypeAlias = str | Metric | Divergence | dict | tuple | list | None
"""A name, a Metric, a divergence function, or a tree of them in the shape of the outputs."""


def _check_classes(z: Array) -> None:
    """Raise ValueError for outputs whose last axis cannot be classes."""
    if z.ndim < 2 or z.shape[-1] < 2:
        raise ValueError(
            f"outputs of shape {z.shape} under a categorical metric (ngd, reverse_kl, renyi, ...): "
            "its last axis holds the classes, two or more, and the axes before it the rows. "
            "One logit for each row: metric='bernoulli'. One value for each row: "
            "metric='gaussian', or 'gauss_newton'."
        )


def _ngd(
    z: Float[Array, "*rows classes"], r: Float[Array, "*rows classes"]
) -> Float[Array, "*rows"]:
    _check_classes(z)
    return -jnp.sum(jax.nn.softmax(r) * jax.nn.log_softmax(z), axis=-1)


def _reverse_kl(
    z: Float[Array, "*rows classes"], r: Float[Array, "*rows classes"]
) -> Float[Array, "*rows"]:
    _check_classes(z)
    b = jax.nn.log_softmax(z)
    return jnp.sum(jnp.exp(b) * (b - jax.nn.log_softmax(r)), axis=-1)


def _renyi(
    z: Float[Array, "*rows classes"], r: Float[Array, "*rows classes"], *, order: float
) -> Float[Array, "*rows"]:
    _check_classes(z)
    a, b = jax.nn.log_softmax(r), jax.nn.log_softmax(z)
    if order == 1.0:  # the limit: Kullback-Leibler
        return jnp.sum(jnp.exp(a) * (a - b), axis=-1)
    return jax.nn.logsumexp(order * a - (order - 1.0) * b, axis=-1) / (order - 1.0)


def _renyi_zero(
    z: Float[Array, "*rows classes"], r: Float[Array, "*rows classes"]
) -> Float[Array, "*rows"]:
    _check_classes(z)
    del r
    return -jnp.sum(jax.nn.log_softmax(z), axis=-1)


def _renyi_2(
    z: Float[Array, "*rows classes"], r: Float[Array, "*rows classes"]
) -> Float[Array, "*rows"]:
    _check_classes(z)
    a, b = jax.nn.log_softmax(r), jax.nn.log_softmax(z)
    weights = a / jnp.sum(a, axis=-1, keepdims=True)
    return jnp.log(jnp.sum(weights * jnp.exp(a - b), axis=-1))


def _gaussian(z: Float[Array, "*shape"], r: Float[Array, "*shape"]) -> Float[Array, "..."]:
    return 0.5 * jnp.sum((z - r) ** 2, axis=-1) if z.ndim > 1 else 0.5 * (z - r) ** 2


def _bernoulli(z: Float[Array, "*shape"], r: Float[Array, "*shape"]) -> Float[Array, "..."]:
    entries = jax.nn.softplus(z) - jax.nn.sigmoid(r) * z
    return jnp.sum(entries, axis=-1) if z.ndim > 1 else entries


def _sample_class(
    key: PRNGKeyArray, z: Float[Array, "*rows classes"], *, weight: float = 1.0
) -> Float[Array, "*rows classes"]:
    """The gradient of -log p(y) in the logits for y drawn from the model itself."""
    _check_classes(z)
    # `jax.random.categorical`, the largest entry compared in place of an argmax, which is slow on a
    # CPU. In float32 two largest ones are as rare as one row in millions.
    wide = z.astype(accurate_dtype(z))
    noisy = wide + jax.random.gumbel(key, z.shape, wide.dtype)
    drawn = (noisy == jnp.max(noisy, axis=-1, keepdims=True)).astype(z.dtype)
    return math.sqrt(weight) * (jax.nn.softmax(z) - drawn)


def _sample_label(key: PRNGKeyArray, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The gradient of -log p(y) in one logit for y in {0, 1} drawn from the model itself."""
    p = jax.nn.sigmoid(z)
    return p - jax.random.bernoulli(key, p).astype(z.dtype)


def _sample_normal(key: PRNGKeyArray, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.random.normal(key, z.shape, z.dtype)


@lru_cache  # one object for each order: metrics are static values
def renyi(order: float) -> Metric:
    """Return the Renyi divergence of the given order between categorical outputs.

    Its curvature at the current point is `order` times the Fisher matrix.

    Args:
      order: any positive finite number; 1 is Kullback-Leibler.

    Raises:
      ValueError: for other orders. At 0 the divergence is constant, so that there is no
        curvature; below it is concave; at infinity it has a kink at the current point.

    Example:
      >>> import jax.numpy as jnp
      >>> divergence = renyi(2.0).divergence
      >>> divergence(jnp.zeros((3, 4)), jnp.zeros((3, 4))).tolist()
      [0.0, 0.0, 0.0]
    """
    if not (order > 0 and math.isfinite(order)):
        raise ValueError(
            f"renyi: order must be a positive finite number, got {order!r}: at 0 the divergence "
            "is constant, below 0 concave, and at infinity it has a kink at the current point."
        )
    sample = partial(_sample_class, weight=float(order))
    return Metric(partial(_renyi, order=float(order)), sample=sample)


METRICS: dict[str, Metric] = {
    "ngd": Metric(_ngd, sample=_sample_class),
    "newton": Metric(None, full=True),
    "gauss_newton": Metric(None),
    "reverse_kl": Metric(_reverse_kl, sample=_sample_class),
    "renyi": renyi(0.5),
    "stable_renyi": renyi(0.5),
    "renyi_half": renyi(0.5),
    "renyi_zero": Metric(_renyi_zero, full=True),
    "renyi_2": Metric(_renyi_2, full=True),
    "bernoulli": Metric(_bernoulli, sample=_sample_label),
    "gaussian": Metric(_gaussian, sample=_sample_normal),
}


def resolve(metric: MetricLike, order: float = 0.5) -> PyTree:
    """Turn names and functions into `Metric`s.

    Args:
      metric: a name of the table above; a `Metric`; a function (outputs, reference) ->
        value of each row; or a dict, tuple or list of these in the shape of the outputs,
        None for an output without a metric.
      order: the order used by "renyi" and "stable_renyi".

    Returns:
      A `Metric`, or a tree of them and None.

    Raises:
      ValueError: unknown name (the nearest is named), or a divergence that is undefined.
      TypeError: neither a name, a Metric nor a function; or a metric of the whole loss
        given for a single output.

    Example:
      >>> resolve({"logits": "ngd", "features": None})["logits"] is METRICS["ngd"]
      True
    """
    if isinstance(metric, str):
        if metric == "renyi_inf":
            raise ValueError(
                "renyi_inf is undefined: log max(e^a / e^b) has a kink where all ratios tie, "
                "which is at the current point. Use 'renyi' with a large order."
            )
        if metric in ("renyi", "stable_renyi"):
            return renyi(order)
        if metric not in METRICS:
            raise ValueError(unknown("divergence", metric, METRICS))
        return METRICS[metric]
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, dict | tuple | list):
        return _resolve_tree(metric, order)
    if callable(metric):
        return Metric(metric)
    raise TypeError(
        f"metric must be a name, a Metric, a function (outputs, reference) -> rows, or a tree of "
        f"them in the shape of the outputs; got {metric!r}."
    )


def _resolve_tree(metric: PyTree, order: float) -> PyTree:
    def one(leaf: MetricLike) -> Metric | None:
        if leaf is None:
            return None
        found = resolve(leaf, order)
        if found.divergence is None or found.full:
            raise TypeError(
                f"metric {leaf!r} belongs to the whole model, not to one output; give one output "
                "a divergence such as 'ngd' or 'gaussian'."
            )
        return found

    leaves, treedef = jax.tree.flatten(metric, is_leaf=lambda x: x is None)
    return treedef.unflatten([one(leaf) for leaf in leaves])


def is_full(metric: PyTree) -> bool:
    """Whether a resolved metric takes the whole Hessian."""
    return isinstance(metric, Metric) and metric.full


def uses_loss(metric: PyTree) -> bool:
    """Whether a resolved metric is the loss itself."""
    return isinstance(metric, Metric) and metric.divergence is None


def over_rows(reduction: Reduction) -> Literal["sum", "mean"]:
    """How rows are reduced: "unit" is a mean, whose curvature is then scaled."""
    return "mean" if reduction == "unit" else reduction


def potential(
    metric: PyTree,
    outputs: PyTree,
    reference: PyTree,
    mask: PyTree | None,
    reduction: str,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Return the reduced divergence of `outputs` from the frozen `reference`.

    Args:
      metric: a resolved metric with a divergence, or a tree of them that is a prefix of
        the outputs.
      outputs: output arrays [..., K].
      reference: the same at the current parameters.
      mask: bool arrays [...] (a prefix of the outputs), or None. Rows that are False add
        nothing, whatever they hold, and are not counted.
      reduction: "sum" or "mean" over the rows that count.
      axis_name: of replicas: a mean is then over the mean number of their rows, so that the
        mean of the replicas' potentials is that of the whole batch.

    Raises:
      ValueError: a metric or a mask that does not fit the outputs, or rows of another shape
        than their mask's.
    """
    total = 0.0
    for m, z, r, k in zip(
        _spread(metric, outputs),
        jax.tree.leaves(outputs),
        jax.tree.leaves(reference),
        _spread(mask, outputs),
        strict=True,
    ):
        if m is not None:
            total = total + _reduce(m.divergence, z, r, k, reduction, axis_name)
    return jnp.asarray(total)


def kept_rows(
    metric: PyTree, outputs: PyTree, mask: PyTree | None
) -> tuple[Bool[Array, "..."] | None, ...] | None:
    """Return which rows of each output count; None for an output without a metric.

    None for all where the first axis of a divergence is not that of its outputs, so that
    its rows cannot be cut where they are.

    Args:
      metric: a resolved metric with a divergence, or a tree of them.
      outputs: output arrays [..., K].
      mask: as in `potential`.

    Returns:
      For each output bool [...], the shape of its divergence.

    Raises:
      ValueError: a metric or a mask that does not fit the outputs.
    """
    found = []
    for m, z, k in zip(
        _spread(metric, outputs), jax.tree.leaves(outputs), _spread(mask, outputs), strict=True
    ):
        if m is None:
            found.append(None)
            continue
        shape = jax.eval_shape(m.divergence, z, z).shape
        if shape[:1] != z.shape[:1]:
            return None
        found.append(jnp.ones(shape, bool) if k is None else k)
    return tuple(found)


def row_weights(
    kept: tuple[Bool[Array, "..."] | None, ...], reduction: str, axis_name: AxisName = None
) -> tuple[Float[Array, ""] | None, ...]:
    """Return what the rows of each output weigh in the potential.

    Args:
      kept: from `kept_rows`.
      reduction: "sum" or "mean".
      axis_name: of replicas; see `potential`.

    Returns:
      For each output 1 / (rows that count); None for 1, and for an output without a metric.
    """
    if reduction == "sum":
        return (None,) * len(kept)
    return tuple(None if k is None else 1 / _count(k, axis_name) for k in kept)


SAMPLED = "ngd, reverse_kl, renyi, bernoulli or gaussian"
"""Metrics from which labels can be drawn, in words: of `METRICS`, those for which `can_sample`."""


def can_sample(metric: PyTree) -> bool:
    """Whether `sample` can draw from a resolved metric."""
    leaves = jax.tree.leaves(metric)
    return not is_full(metric) and all(m.sample is not None for m in leaves)


def sample(
    metric: PyTree,
    key: PRNGKeyArray,
    outputs: PyTree,
    mask: PyTree | None,
    reduction: str,
    axis_name: AxisName = None,
) -> PyTree:
    """Return a random cotangent of the outputs whose covariance is the Hessian of `potential`.

    Pulled back to the parameters, it is a draw from the normal-like distribution with the
    curvature C as covariance: the gradient for labels drawn from the model itself.

    Args:
      metric: a resolved metric for which `can_sample` is true.
      key: random key.
      outputs: output arrays [..., K].
      mask: as in `potential`.
      reduction: "sum" or "mean".
      axis_name: of replicas: each draws for itself, and the mean of what they pull back has the
        curvature of the whole batch.

    Returns:
      An array [..., K] for each output; zeros for one without a metric.

    Raises:
      ValueError: a metric or a mask that does not fit the outputs.
    """
    leaves, treedef = jax.tree.flatten(outputs)
    drawn, key, replicas = [], _replicas.own_key(key, axis_name), _replicas.count(axis_name)
    for i, (m, z, k) in enumerate(
        zip(_spread(metric, outputs), leaves, _spread(mask, outputs), strict=True)
    ):
        if m is None:
            drawn.append(jnp.zeros_like(z))
            continue
        c = m.sample(jax.random.fold_in(key, i), z)
        rows = math.prod(jax.eval_shape(m.divergence, z, z).shape)
        if k is not None:
            c = jnp.where(k.reshape(k.shape + (1,) * (c.ndim - k.ndim)), c, 0.0)
            rows = _count(k, axis_name).astype(c.dtype)
        c = c / jnp.sqrt(rows).astype(c.dtype) if reduction == "mean" else c
        c = c * (math.sqrt(replicas) if reduction == "mean" else replicas)
        drawn.append(shard_like(c, z))  # draws do not follow explicit mesh axes
    return treedef.unflatten(drawn)


def _spread(prefix: PyTree, outputs: PyTree) -> list[Any]:
    """The leaves of a prefix tree, one for each output; None is a leaf."""
    try:
        return spread(prefix, outputs)
    except ValueError as error:
        raise ValueError(
            f"the metric (or mask) {prefix!r} does not fit the outputs, "
            f"{jax.tree.structure(outputs)}: give one for each output, or one for all."
        ) from error


def _reduce(
    divergence: Divergence,
    z: Array,
    r: Array,
    mask: Array | None,
    reduction: str,
    axis_name: AxisName,
) -> Float[Array, ""]:
    z, r = widen(z), widen(r)
    if mask is None:
        rows = divergence(z, r)
        return jnp.mean(rows) if reduction == "mean" else jnp.sum(rows)
    # Masked rows are replaced before the divergence as well as after it: a NaN there would
    # otherwise reach the derivative of the rows that count.
    wide = mask.reshape(mask.shape + (1,) * (z.ndim - mask.ndim))
    rows = divergence(jnp.where(wide, z, 0.0), jnp.where(wide, r, 0.0))
    if rows.shape != mask.shape:
        raise ValueError(
            f"the mask has shape {mask.shape}, but the divergence gives rows of shape {rows.shape} "
            f"for outputs of shape {z.shape}; they must agree."
        )
    total = jnp.sum(jnp.where(mask, rows, 0.0))
    if reduction == "sum":
        return total
    return total / _count(mask, axis_name).astype(total.dtype)


def _count(mask: Bool[Array, "..."], axis_name: AxisName) -> Array:
    """How many rows count, at least one; over replicas, in the mean."""
    rows = jnp.sum(mask)
    if axis_name:
        rows = _replicas.mean(rows.astype(jnp.float32), axis_name)
        return jnp.where(rows > 0, rows, 1)
    return jnp.maximum(rows, 1)
