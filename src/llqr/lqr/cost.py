"""Rollout cost of an LQR problem and its gradient by the adjoint sweep."""

from typing import Any

import jax
import jax.numpy as jnp

from llqr.lqr.problem import Control, LQRProblem, Stage, Tangent
from llqr.tree import vdot
from llqr.typing import Array, Float


def cost(problem: LQRProblem, controls: Control) -> Float[Array, ""]:
    """Return J(u): one rollout of the linearised dynamics.

    Args:
      problem: the regulator.
      controls: u, shaped like the parameters.

    Raises:
      ValueError: `controls` is not shaped like the parameters.
    """
    total, _ = _rollout(problem, problem.split(controls))
    return total


def cost_and_gradient(problem: LQRProblem, controls: Control) -> tuple[Float[Array, ""], Control]:
    """Return J(u) and dJ/du: a rollout, then the adjoint sweep.

    nu_N = c + W_N delta_N; then for i = N-1 .. 0
    dJ/du_i = (R_i + lambda) u_i + M_i delta_i + B_i^T nu_{i+1},
    nu_i = Q_i delta_i + M_i^T u_i + A_i^T nu_{i+1} + W_i delta_i.

    Args:
      problem: the regulator.
      controls: u, shaped like the parameters.

    Returns:
      J(u), and dJ/du shaped like the parameters: g + (C + lambda I) u.

    Raises:
      ValueError: `controls` is not shaped like the parameters.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> staged = llqr.lqr.stages_from_functions([("linear", lambda w, x: x @ w)])
      >>> problem = llqr.lqr.linearize(
      ...     staged, {"linear": jnp.ones((2, 1))}, jnp.eye(2),
      ...     loss=lambda z: jnp.sum(z**2) / 2, metric="gauss_newton")
      >>> value, slope = llqr.lqr.cost_and_gradient(problem, {"linear": -jnp.ones((2, 1))})
      >>> float(value), slope["linear"].tolist()
      (-1.0, [[0.0], [0.0]])

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """
    us = problem.split(controls)
    total, deltas = _rollout(problem, us)
    gradient: Control = {}
    nu: Any = problem.cotangent
    for i in reversed(range(len(problem.stages))):
        stage, following = problem.stages[i], deltas[i + 1]
        if stage.metric is not None and following is not None:
            nu = jax.tree.map(jnp.add, nu, stage.metric(following))
        nu, control = _adjoint(stage, deltas[i], us[i], nu)
        control = control | {
            name: jax.tree.map(lambda d, u: d + problem.damping * u, control[name], u)
            for name, u in stage.own(us[i]).items()
        }
        for name, slope in control.items():  # a control of several stages gets a part from each
            known = gradient.get(name)
            gradient[name] = slope if known is None else jax.tree.map(jnp.add, known, slope)
        if nu is None:
            break
    return total, {name: gradient[name] for name in problem.params}


def final_state(problem: LQRProblem, controls: Control) -> Tangent:
    """Return delta_N, the perturbation of the outputs: J u of the whole network.

    Args:
      problem: the regulator.
      controls: u, shaped like the parameters.

    Raises:
      ValueError: `controls` is not shaped like the parameters.
    """
    final = _rollout(problem, problem.split(controls))[1][-1]
    assert final is not None
    return final


def gradient(problem: LQRProblem) -> Control:
    """Return g, the gradient of the loss, by the adjoint sweep at u = 0."""
    zeros = jax.tree.map(jnp.zeros_like, problem.params)
    return cost_and_gradient(problem, zeros)[1]


def _rollout(
    problem: LQRProblem, us: list[Control]
) -> tuple[Float[Array, ""], list[Tangent | None]]:
    """Return J and delta_0 .. delta_N."""
    total = 0.0
    deltas: list[Tangent | None] = [None]
    for stage, u in zip(problem.stages, us, strict=True):
        delta = deltas[-1]
        if stage.state is None and stage.passive:
            deltas.append(None)
            continue
        own = stage.own(u)
        total = total + 0.5 * problem.damping * vdot(own, own)
        if stage.curvature is not None:
            on_state, on_control = stage.curvature(delta, u)
            total = total + 0.5 * vdot(u, on_control)
            if delta is not None:
                total = total + 0.5 * vdot(delta, on_state)
        following = stage.dynamics(delta, u)
        if stage.metric is not None:
            total = total + 0.5 * vdot(following, stage.metric(following))
        deltas.append(following)
    assert deltas[-1] is not None
    return jnp.asarray(total) + vdot(problem.cotangent, deltas[-1]), deltas


def _adjoint(
    stage: Stage, delta: Tangent | None, u: Control, nu: Tangent
) -> tuple[Tangent | None, Control]:
    """One step back: (nu_i without W_i, dJ/du_i without damping)."""
    back, control = jax.linear_transpose(stage.dynamics, stage.state, stage.control)(nu)
    if stage.curvature is not None:
        on_state, on_control = stage.curvature(delta, u)
        control = jax.tree.map(jnp.add, control, on_control)
        if delta is not None:
            back = jax.tree.map(jnp.add, back, on_state)
    return (None if stage.state is None else back), control
