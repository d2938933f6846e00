"""The layerwise route of a refit: curvature products as rollouts of the regulator."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llqr.curvature.model import QuadraticModel, layerwise_model
from llqr.curvature.route import Route
from llqr.lqr.cost import cost_and_gradient, final_state, gradient
from llqr.lqr.linearization import linearize
from llqr.lqr.problem import LQRProblem
from llqr.objective import BoundObjective
from llqr.operators import LinearOperator, SymmetricOperator, structure_of
from llqr.stages import StagedForward
from llqr.typing import Number, Params, PyTree


@layerwise_model.register
def _(
    forward: StagedForward, objective: BoundObjective, params: Params, metric: PyTree,
    damping: Number, reduction: str, route: Route,
) -> QuadraticModel:  # fmt: skip
    """Return the quadratic model whose products are those of the regulator."""
    if forward.watch:
        raise ValueError(
            f"the layerwise route places metrics by stage: make the forward function without "
            f"watch={forward.watch}."
        )
    staged = forward.bound(objective.given)
    if route.checkpoint_policy != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        staged = staged.rematerialized(policy)
    problem = linearize(
        staged,
        params,
        forward.inputs(objective.given),
        loss=objective.loss,
        metric=metric,
        divergence_reduction=reduction,  # pyright: ignore[reportArgumentType]
        mask=objective.mask(),
        memory=route.memory,
    )
    outputs = objective.outputs(params)
    cotangent = jax.tree.unflatten(jax.tree.structure(outputs), problem.cotangent)
    jacobian = _Jacobian(problem, jax.tree.structure(outputs))
    curvature = _Curvature(_without_cotangent(problem))
    slope = jacobian.vjp(cotangent)
    return QuadraticModel(problem.loss, slope, outputs, cotangent, jacobian, curvature, damping)


def _without_cotangent(problem: LQRProblem) -> LQRProblem:
    """The regulator without its linear term."""
    return replace(problem, cotangent=jax.tree.map(jnp.zeros_like, problem.cotangent))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Jacobian(LinearOperator):
    """J by the rollout, J^T by the adjoint sweep."""

    compiles: ClassVar[bool] = False

    problem: LQRProblem
    outputs: Any = field(metadata={"static": True})  # their tree structure

    @property
    def in_structure(self) -> PyTree:
        return structure_of(self.problem.params)

    def jvp(self, u: Params) -> PyTree:
        return jax.tree.unflatten(self.outputs, final_state(self.problem, u))

    def vjp(self, w: PyTree) -> Params:
        return gradient(replace(self.problem, cotangent=tuple(jax.tree.leaves(w))))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Curvature(SymmetricOperator):
    """C: rollout and adjoint sweep of the regulator without its linear term."""

    compiles: ClassVar[bool] = False

    problem: LQRProblem

    @property
    def in_structure(self) -> PyTree:
        return structure_of(self.problem.params)

    def product(self, u: Params) -> Params:
        return cost_and_gradient(self.problem, u)[1]
