"""The Jacobian J of a network and the curvature C of a metric, on the whole batch at once.

C = J^T Q J, with Q the Hessian of the metric's potential in the outputs; or the full Hessian, for
metrics such as newton. Symbols as in `llqr.curvature.model`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from llqr import metrics
from llqr._replicas import AxisName
from llqr.curvature import derivatives
from llqr.curvature.route import Route
from llqr.objective import BoundObjective
from llqr.operators import LinearOperator, SymmetricOperator, structure_of
from llqr.tree import Frozen, check_outputs, freeze, vdot, widen
from llqr.typing import Array, Float, Params, PyTree


class Linearization(NamedTuple):
    """What a route makes at one point."""

    outputs: PyTree
    jacobian: LinearOperator
    curvature: SymmetricOperator


def whole(
    objective: BoundObjective, params: Params, metric: PyTree, reduction: str, route: Route
) -> Linearization:
    """Linearise on the whole batch at once.

    Args:
      objective: forward function, loss and batch.
      params: the current parameters.
      metric: see `llqr.metrics`.
      reduction: "sum" or "mean" over rows.
      route: neither layerwise nor in chunks.
    """
    full = metrics.is_full(metric)
    if route.memory == "recomputed":
        outputs, jacobian = objective.outputs(params), _Recomputed(objective, params, route)
    else:
        outputs, jacobian = derivatives.linearize(objective.outputs, params)
    check_outputs(outputs)
    potential = Potential(objective, outputs, freeze(metric), reduction, route.axis_name)
    if full:
        kept = route.memory == "cached"
        second = derivatives.symmetric(jax.grad(potential.of_params), params) if kept else None
        second = _HessianRecomputed(potential, params) if second is None else second
        curvature = Hessian(second, freeze(structure_of(params)))
    elif route.memory == "cached":
        curvature = GaussNewton(jacobian, derivatives.symmetric(jax.grad(potential), outputs))
    else:
        curvature = GaussNewton(jacobian, OutputHessian(potential))
    return Linearization(outputs, jacobian, curvature)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Potential:
    """The metric's potential as a function of the outputs, its reference frozen."""

    objective: BoundObjective
    reference: PyTree
    metric: Frozen = field(metadata={"static": True})
    reduction: str = field(metadata={"static": True})
    axis_name: AxisName = field(default=None, metadata={"static": True})

    def __call__(self, outputs: PyTree) -> Float[Array, ""]:
        """Return the reduced divergence of `outputs` [..., K] from the reference."""
        metric = self.metric.tree
        if metrics.uses_loss(metric):
            return self.objective.loss(outputs)
        mask = self.objective.mask()
        return metrics.potential(
            metric, outputs, self.reference, mask, self.reduction, self.axis_name
        )

    def of_params(self, params: Params) -> Float[Array, ""]:
        """Return the same as a function of the parameters."""
        return self(self.objective.outputs(params))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Recomputed(LinearOperator):
    """J linearised again at each use."""

    objective: BoundObjective
    params: Params
    route: Route = field(metadata={"static": True})

    @property
    def in_structure(self) -> PyTree:
        return structure_of(self.params)

    def jvp(self, u: Params) -> PyTree:
        return derivatives.jvp(self._forward(), self.params, u)

    def vjp(self, w: PyTree) -> Params:
        return jax.vjp(self._forward(), self.params)[1](w)[0]

    def _forward(self) -> Callable[[Params], PyTree]:
        if self.route.checkpoint_policy == "none":
            return self.objective.outputs
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        forward = self.objective.objective.forward
        cut = getattr(forward, "rematerialized", None)
        if cut is not None:
            return lambda params: cut(policy)(params, self.objective.given)
        return jax.checkpoint(self.objective.outputs, policy=policy)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GaussNewton(SymmetricOperator):
    """C = J^T Q J, with Q on tangents of the outputs."""

    jacobian: LinearOperator
    output_hessian: Callable[[PyTree], PyTree]

    @property
    def in_structure(self) -> PyTree:
        """Of the parameters."""
        return self.jacobian.in_structure

    def product(self, u: Params) -> Params:
        """Return C u."""
        return self.jacobian.vjp(self.output_hessian(self.jacobian.jvp(u)))

    def bilinear(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.C w, from tangent sweeps alone.

        Args:
          u: like the parameters.
          w: likewise; where it is the same object, one sweep is enough.
        """
        v = self.jacobian.jvp(w)
        other = v if u is w else self.jacobian.jvp(u)
        return vdot(widen(other), widen(self.output_hessian(v)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hessian(SymmetricOperator):
    """C as one linear map."""

    apply: Callable[[Params], Params]
    like: Frozen = field(metadata={"static": True})  # of the parameters

    @property
    def in_structure(self) -> PyTree:
        """Of the parameters."""
        return self.like.tree

    def product(self, u: Params) -> Params:
        """Return C u."""
        return self.apply(u)


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
    return derivatives.symmetric_jvp(jax.grad(potential), potential.reference, v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _HessianRecomputed:
    """A full Hessian, forward over reverse, linearised again at each use."""

    potential: Potential
    params: Params

    def __call__(self, u: Params) -> Params:
        return derivatives.symmetric_jvp(jax.grad(self.potential.of_params), self.params, u)
