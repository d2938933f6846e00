r"""The layerwise linear-quadratic regulator of a staged model.

  symbol     meaning                                                     shape
  x_i        state before stage i; x_0 the inputs, x_N the outputs       pytree
  theta_i    parameters of stage i                                       pytree
  delta_i    perturbation of x_i (inexact leaves only), delta_0 = 0      tuple of arrays
  u_i        control: perturbation of theta_i                            like theta_i
  A_i, B_i   d f_i / d x_i, d f_i / d theta_i
  p_i        costate: p_N = gradient of the metric's potential, p_i = A_i^T p_{i+1}
  R_i Q_i M_i  second derivatives of H_i = <p_{i+1}, f_i(theta, x)>; M_i: state -> control
  W_i        Hessian of a metric's potential in x_i (at x_N: the terminal cost)
  c          gradient of the loss in x_N
  lambda     damping

    delta_{i+1} = A_i delta_i + B_i u_i
    J(u) = sum_i 1/2 <u_i, (R_i + lambda) u_i> + <u_i, M_i delta_i> + 1/2 <delta_i, Q_i delta_i>
           + sum_i 1/2 <delta_{i+1}, W_{i+1} delta_{i+1}> + <c, delta_N>

(Layerwise LQR, arXiv 2605.04230.) For metrics whose potential has no gradient at the current
point, all costates vanish and with them R, Q and M: only the W are left, and J is the
Gauss-Newton quadratic. For newton, p_N = c.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from llqr.operators import FunctionOperator
from llqr.typing import Array, Float, Number, PyTree

Tangent: TypeAlias = tuple[Float[Array, "..."], ...]
"""Perturbation of a state: one array for each inexact leaf, in flattening order."""

Control: TypeAlias = dict[str, PyTree]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stage:
    """One stage of the regulator at the current point.

    Attributes:
      name: of the stage.
      control: theta_i, by member; an empty dict for a passive stage.
      shared: names in `control` that are controls of earlier stages: this stage reads the same
        parameters.
      state: inexact leaves of x_i, or None while no control has acted yet (delta_i = 0).
      output: inexact leaves of x_{i+1}.
      dynamics: (delta_i or None, u_i) -> delta_{i+1}.
      curvature: (delta_i or None, u_i) -> (Q delta + M^T u or None, M delta + R u), without
        damping; None where it is zero.
      metric: delta_{i+1} -> W_{i+1} delta_{i+1}; None where no metric is placed.
      costate: p_{i+1}; None where all costates vanish.
    """

    name: str = field(metadata={"static": True})
    shared: frozenset[str] = field(metadata={"static": True})
    control: Control
    state: Tangent | None
    output: Tangent
    dynamics: Callable[[Tangent | None, Control], Tangent]
    curvature: Callable[[Tangent | None, Control], tuple[Any, Control]] | None
    metric: Callable[[Tangent], Tangent] | None
    costate: Tangent | None

    def own(self, control: Control) -> Control:
        """The part of a control, by member, that no earlier stage has."""
        return {name: value for name, value in control.items() if name not in self.shared}

    @property
    def passive(self) -> bool:
        """Whether the stage has no parameters."""
        return not self.control

    @property
    def A(self) -> FunctionOperator:
        """The map delta_i -> delta_{i+1}; the first stage with a control has none."""
        self._needs_state("A")
        return FunctionOperator.at(lambda d: self.dynamics(d, _zeros(self.control)), self.state)

    @property
    def B(self) -> FunctionOperator:
        """The map u_i -> delta_{i+1}."""
        return FunctionOperator.at(lambda u: self.dynamics(_zeros(self.state), u), self.control)

    @property
    def R(self) -> FunctionOperator:
        """The map u_i -> control, without damping."""
        return FunctionOperator.at(lambda u: self._curved(_zeros(self.state), u)[1], self.control)

    @property
    def Q(self) -> FunctionOperator:
        """The map delta_i -> state cotangent, without the metric's W_i."""
        self._needs_state("Q")
        return FunctionOperator.at(lambda d: self._curved(d, _zeros(self.control))[0], self.state)

    @property
    def M(self) -> FunctionOperator:
        """The map delta_i -> control."""
        self._needs_state("M")
        return FunctionOperator.at(lambda d: self._curved(d, _zeros(self.control))[1], self.state)

    @property
    def W(self) -> FunctionOperator:
        """The map delta_{i+1} -> cotangent: the metric placed on this stage's output."""
        metric = self.metric
        return FunctionOperator.at(_zeros if metric is None else metric, self.output)

    def _curved(self, delta: Any, u: Control) -> tuple[Any, Control]:
        if self.curvature is None:
            return _zeros(self.state), _zeros(self.control)
        return self.curvature(delta, u)

    def _needs_state(self, what: str) -> None:
        if self.state is None:
            raise ValueError(f"stage {self.name!r} has no {what}: no control acts before it.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LQRProblem:
    """A finite-horizon linear-quadratic regulator; made by `llqr.lqr.linearize`.

    Attributes:
      stages: in order.
      cotangent: c on the inexact leaves of x_N.
      damping: lambda, on every control.
      loss: at the current point.
    """

    stages: tuple[Stage, ...]
    cotangent: Tangent
    damping: Number
    loss: Float[Array, ""]

    @property
    def params(self) -> Control:
        """The current parameters, theta."""
        return {name: value for stage in self.stages for name, value in stage.control.items()}

    def split(self, controls: Control) -> list[Control]:
        """Return the control of each stage.

        Args:
          controls: shaped like the parameters.

        Raises:
          ValueError: `controls` is not shaped like the parameters.
        """
        want = jax.tree.map(jnp.shape, self.params)
        have = jax.tree.map(jnp.shape, dict(controls))
        if want != have:
            raise ValueError(f"controls must be shaped like the parameters, {want}; got {have}.")
        return [{name: controls[name] for name in stage.control} for stage in self.stages]


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)
