"""The exact solution of an LQR problem: dense Riccati recursion, and conjugate gradients.

Reference code: it trades speed for being easy to check, and nothing that learns P imports it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from llqr._linalg import solve as solve_quadratic
from llqr.errors import NonConvexError
from llqr.lqr.cost import cost_and_gradient
from llqr.lqr.problem import Control, LQRProblem, Stage
from llqr.typing import Array, Float, Number

MAX_SIZE = 4096
"""Largest state or control, flattened, that the recursion accepts by default."""


class Feedback(NamedTuple):
    """The optimal law of one stage: u_i = -(gain delta_i + offset)."""

    gain: Float[Array, "control state"] | None  # K_i = S_i^-1 G_i; None where delta_i = 0
    offset: Float[Array, " control"]  # k_i = S_i^-1 B_i^T v_{i+1}


@dataclass(frozen=True)
class Solution:
    """What the Riccati recursion finds.

    Attributes:
      controls: the minimiser u of J, shaped like the parameters: the step to *add*.
      feedback: by stage with a control.
      values: V_i [state, state] and v_i [state], i = 1 .. N: J from stage i on is
        1/2 d.V_i d + v_i.d + constant; None while no control has acted.
      objective: J(u).
    """

    controls: Control
    feedback: dict[str, Feedback]
    values: list[tuple[Float[Array, "_ _"], Float[Array, " _"]] | None]
    objective: Float[Array, ""]


def solve(
    problem: LQRProblem, *, gradient: Control | None = None, max_size: int = MAX_SIZE
) -> Control:
    """Return the controls that minimise J: -(C + lambda I)^-1 g; see `riccati`.

    Args:
      problem: the regulator.
      gradient: in place of g, shaped like the parameters.
      max_size: bound on the number of entries of any state (batch included) or control.

    Raises:
      ValueError: a state or control is larger than `max_size`, or stages share parameters.
      NonConvexError: J has no minimum. Inside `jit` the controls are NaN instead.
    """
    return riccati(problem, gradient=gradient, max_size=max_size).controls


def riccati(
    problem: LQRProblem, *, gradient: Control | None = None, max_size: int = MAX_SIZE
) -> Solution:
    """Solve by the Riccati recursion.

    V_N = W_N, v_N = c, and for i = N-1 .. 0

      S_i = R_i + lambda I + B_i^T V_{i+1} B_i        G_i = B_i^T V_{i+1} A_i + M_i
      v_i = A_i^T v_{i+1} - G_i^T S_i^-1 B_i^T v_{i+1}
      V_i = W_i + Q_i + A_i^T V_{i+1} A_i - G_i^T S_i^-1 G_i

    then forward, u_i = -S_i^-1 (G_i delta_i + B_i^T v_{i+1}).

    Args:
      problem: the regulator.
      gradient: a linear term on the controls, shaped like the parameters, in place of the
        loss's: the result is -(C + lambda I)^-1 of it. It adds to B_i^T v_{i+1} above.
      max_size: bound on the number of entries of any state (batch included) or control.

    Raises:
      ValueError: a size above the bound, or parameters that several stages share; the message
        says which, and what to do instead.
      NonConvexError: some S_i is not positive definite; names the stage and the eigenvalue.
        Inside `jit`, where nothing can be raised, the controls are NaN instead.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> staged = llqr.lqr.stages_from_functions([("linear", lambda w, x: x @ w)])
      >>> problem = llqr.lqr.linearize(
      ...     staged, {"linear": jnp.ones((2, 1))}, jnp.eye(2),
      ...     loss=lambda z: jnp.sum(z**2) / 2, metric="gauss_newton", damping=3.0)
      >>> solution = riccati(problem)
      >>> solution.controls["linear"].tolist(), float(solution.objective)
      ([[-0.25], [-0.25]], -0.25)

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """
    _check(problem, max_size)
    v = ravel_pytree(problem.cotangent)[0]
    linear = [None] * len(problem.stages)
    if gradient is not None:
        v, linear = jnp.zeros_like(v), problem.split(gradient)
    V = jnp.zeros((v.size, v.size), v.dtype)
    laws: dict[str, Feedback] = {}
    values: list[tuple[Array, Array] | None] = []
    constant = jnp.zeros((), v.dtype)
    for stage, r in zip(reversed(problem.stages), reversed(linear), strict=True):
        if stage.metric is not None:
            V = V + stage.W.as_matrix()
        values.insert(0, (V, v))
        if stage.state is None and stage.passive:
            values[0] = None
            break
        V, v, law, gained = _backward(stage, V, v, r, problem.damping)
        constant = constant + gained
        if law is not None:
            laws[stage.name] = law
        if stage.state is None:
            break
    values = [None] * (len(problem.stages) - len(values)) + values
    return Solution(_forward(problem, laws), laws, values, constant)


def _backward(
    stage: Stage,
    V: Float[Array, "next next"],
    v: Float[Array, " next"],
    r: Control | None,
    damping: Number,
) -> tuple[Float[Array, "state state"], Float[Array, " state"], Feedback | None, Float[Array, ""]]:
    """One step of the recursion: (V_i without W_i, v_i, law, change of the constant)."""
    zero = jnp.zeros((), v.dtype)
    if stage.passive:
        A, Q = stage.A.as_matrix(), stage.Q.as_matrix()
        return Q + A.T @ V @ A, A.T @ v, None, zero
    B = stage.B.as_matrix()
    S = stage.R.as_matrix() + damping * jnp.eye(B.shape[1]) + B.T @ V @ B
    factor = _cholesky(stage.name, S)
    b = B.T @ v if r is None else B.T @ v + ravel_pytree(r)[0]
    offset = jax.scipy.linalg.cho_solve(factor, b)
    gained = -0.5 * b @ offset
    if stage.state is None:
        return V, v, Feedback(None, offset), gained
    A = stage.A.as_matrix()
    G = B.T @ V @ A + stage.M.as_matrix()
    gain = jax.scipy.linalg.cho_solve(factor, G)
    V = stage.Q.as_matrix() + A.T @ V @ A - G.T @ gain
    return 0.5 * (V + V.T), A.T @ v - G.T @ offset, Feedback(gain, offset), gained


def _forward(problem: LQRProblem, laws: dict[str, Feedback]) -> Control:
    controls: Control = {}
    delta = None
    for stage in problem.stages:
        if stage.name in laws:
            law = laws[stage.name]
            u = (
                -law.offset
                if law.gain is None
                else -(law.gain @ ravel_pytree(delta)[0] + law.offset)
            )
            control = ravel_pytree(stage.control)[1](u)
        else:
            control = {}
        controls |= control
        if stage.state is not None or control:
            delta = stage.dynamics(delta, control)
    return {name: controls[name] for name in problem.params}


def solve_cg(
    problem: LQRProblem, *, tolerance: float = 1e-10, max_steps: int | None = None
) -> Control:
    """Return the same controls by conjugate gradients on layerwise products: no matrices.

    Args:
      problem: the regulator.
      tolerance: relative residual at which to stop.
      max_steps: bound on the number of steps; None: ten times the number of parameters.

    Raises:
      NonConvexError: a direction of non-positive curvature was met.
      ValueError: it did not converge. Inside `jit` the controls are NaN in both cases.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> staged = llqr.lqr.stages_from_functions([("linear", lambda w, x: x @ w)])
      >>> problem = llqr.lqr.linearize(
      ...     staged, {"linear": jnp.ones((2, 1))}, jnp.eye(2),
      ...     loss=lambda z: jnp.sum(z**2) / 2, metric="gauss_newton", damping=1.0)
      >>> llqr.lqr.solve_cg(problem)["linear"].tolist()
      [[-0.5], [-0.5]]
    """
    zeros = jax.tree.map(jnp.zeros_like, problem.params)
    _, g = cost_and_gradient(problem, zeros)

    def product(u: Control) -> Control:
        return jax.tree.map(jnp.subtract, cost_and_gradient(problem, u)[1], g)

    solution, _ = solve_quadratic(product, g, tolerance=tolerance, max_steps=max_steps)
    return jax.tree.map(jnp.negative, solution)


def _check(problem: LQRProblem, limit: int) -> None:
    for stage in problem.stages:
        if stage.shared:
            raise ValueError(
                f"stage {stage.name!r} shares the parameters of {sorted(stage.shared)}: the "
                "Riccati recursion needs controls that act at one stage each. Use "
                "llqr.lqr.solve_cg."
            )
        for kind, tree in (("state", stage.output), ("control", stage.control)):
            size = sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree))
            if size > limit:
                what = "batch x features" if kind == "state" else "parameters"
                raise ValueError(
                    f"stage {stage.name!r} has a {kind} of {size:,} entries ({what}). The Riccati "
                    f"recursion stores its square and stops at max_size={limit:,}: use fewer "
                    "examples, llqr.lqr.solve_cg, which needs no matrices, or raise max_size."
                )


def _cholesky(
    name: str, S: Float[Array, "control control"]
) -> tuple[Float[Array, "control control"], bool]:
    factor = jax.scipy.linalg.cho_factor(S, lower=True)
    if not isinstance(S, Tracer) and not jnp.all(jnp.isfinite(factor[0])):
        lowest = jnp.linalg.eigvalsh(S)[0]
        raise NonConvexError(
            f"stage {name!r}: R + damping + B^T V B has the eigenvalue {lowest:.3g}, so that the "
            "step has no minimum. Use a larger damping, or a positive semi-definite metric "
            "(ngd, or gauss_newton of a loss that is convex in the outputs) with some damping."
        )
    return factor
