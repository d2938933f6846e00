"""The layerwise route of a refit: curvature products as rollouts of the regulator."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from llqr import quadratic
from llqr._tree import vdot
from llqr._types import Array, Float, Number, Params, PyTree
from llqr.lqr.cost import cost_and_gradient, gradient
from llqr.lqr.linearization import linearize
from llqr.lqr.problem import LQRProblem
from llqr.lqr.stages import StagedForward
from llqr.objective import BoundObjective
from llqr.quadratic import QuadraticModel
from llqr.route import Route


@quadratic.layerwise_model.register
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
    staged = forward.bound(objective.batch)
    if route.checkpoint_policy != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        staged = staged.rematerialized(policy)
    problem = linearize(
        staged,
        params,
        forward.inputs(objective.batch),
        loss=objective.loss,
        metric=metric,
        divergence_reduction=reduction,  # pyright: ignore[reportArgumentType]
        mask=objective.mask(),
        memory=route.memory,
    )
    outputs = objective.outputs(params)
    cotangent = jax.tree.unflatten(jax.tree.structure(outputs), problem.cotangent)
    network = _Network(problem)
    level = replace(problem, cotangent=jax.tree.map(jnp.zeros_like, problem.cotangent))
    g = network.pull_back(cotangent)
    return QuadraticModel(problem.loss, g, outputs, cotangent, network, _Curvature(level), damping)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Network:
    """J^T by the adjoint sweep."""

    problem: LQRProblem

    def tangent(self, u: Params) -> PyTree:
        raise NotImplementedError("the layerwise route takes products of C as a whole")

    def pull_back(self, w: PyTree) -> Params:
        return gradient(replace(self.problem, cotangent=tuple(jax.tree.leaves(w))))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Curvature:
    """C: rollout and adjoint sweep of the regulator without its linear term."""

    problem: LQRProblem

    def product(self, u: Params) -> Params:
        return cost_and_gradient(self.problem, u)[1]

    def inner(self, u: Params, w: Params) -> Float[Array, ""]:
        return vdot(u, self.product(w))
