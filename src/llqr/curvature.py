"""The Jacobian J of a network and the curvature C of a metric, as linear maps.

C = J^T Q J, with Q the Hessian of the metric's potential in the outputs; or the full Hessian, for
metrics such as newton. Symbols as in `llqr.quadratic`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import jax

from llqr import metrics
from llqr._tree import Frozen, freeze, vdot
from llqr._types import Array, Float, Params, PyTree
from llqr.objective import BoundObjective
from llqr.route import Route


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


class Linearization(NamedTuple):
    """What a route makes at one point."""

    outputs: PyTree
    network: Network
    curvature: Curvature


def whole(
    objective: BoundObjective, params: Params, metric: PyTree, reduction: str, route: Route
) -> Linearization:
    """Linearise on the whole batch at once.

    Args:
      objective: forward function, loss and batch.
      params: the current parameters.
      metric: see `llqr.metrics`.
      reduction: over rows.
      route: neither layerwise nor in chunks.
    """
    full = metrics.is_full(metric)
    if route.memory == "recomputed":
        outputs, network = objective.outputs(params), _Recomputed(objective, params, route)
    else:
        outputs, tangent = jax.linearize(objective.outputs, params)
        network = _Cached(tangent, params)
    potential = Potential(objective, outputs, freeze(metric), reduction)
    if full and route.memory == "cached":
        curvature = Hessian(jax.linearize(jax.grad(potential.of_params), params)[1])
    elif full:
        curvature = Hessian(_HessianRecomputed(potential, params))
    elif route.memory == "cached":
        curvature = GaussNewton(network, jax.linearize(jax.grad(potential), outputs)[1])
    else:
        curvature = GaussNewton(network, OutputHessian(potential))
    return Linearization(outputs, network, curvature)


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
class GaussNewton:
    """C = J^T Q J, with Q on tangents of the outputs."""

    network: Network
    output_hessian: Callable[[PyTree], PyTree]

    def product(self, u: Params) -> Params:
        """Return C u."""
        return self.network.pull_back(self.output_hessian(self.network.tangent(u)))

    def inner(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.C w."""
        v = self.network.tangent(w)
        other = v if u is w else self.network.tangent(u)
        return vdot(other, self.output_hessian(v))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hessian:
    """C as one linear map."""

    apply: Callable[[Params], Params]

    def product(self, u: Params) -> Params:
        """Return C u."""
        return self.apply(u)

    def inner(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.C w."""
        return vdot(u, self.apply(w))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputHessian:
    """Q, linearised again at each use."""

    potential: Potential

    def __call__(self, v: PyTree) -> PyTree:
        """Return Q v."""
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
