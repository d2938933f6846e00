"""Linear maps J of functions, also of those that have no forward-mode rule.

A `jax.custom_vjp` (fused kernels, default adjoints of ODE solvers) has a transpose J^T alone. Where
one is met, J u is the transpose of w -> J^T w: the same numbers, for two sweeps more.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from llqr.operators import FunctionOperator, LinearOperator, structure_of
from llqr.tree import Frozen, freeze
from llqr.typing import PyTree


def linearize(function: Callable[[PyTree], PyTree], at: PyTree) -> tuple[PyTree, LinearOperator]:
    """Return the function's value and its Jacobian.

    Args:
      function: of one tree.
      at: the point.
    """
    try:
        value, tangent = _linearize(function, at)
    except TypeError as error:
        if not lacks_rule(error):
            raise
        value, pull = jax.vjp(function, at)
        return value, TransposeOperator(pull, value, freeze(structure_of(at)))
    return value, FunctionOperator.at(tangent, at)


def jvp(function: Callable[[PyTree], PyTree], at: PyTree, u: PyTree) -> PyTree:
    """Return J u, keeping nothing.

    Args:
      function: of one tree.
      at: the point.
      u: like the point.
    """
    try:
        return _jvp(function, at, u)
    except TypeError as error:
        if not lacks_rule(error):
            raise
    return linearize(function, at)[1].jvp(u)


def symmetric(gradient: Callable[[PyTree], PyTree], at: PyTree) -> Callable[[PyTree], PyTree]:
    """Return v -> Q v, with Q the symmetric Jacobian of a gradient: a pytree.

    Args:
      gradient: of some scalar function.
      at: the point.
    """
    try:
        return _linearize(gradient, at)[1]
    except TypeError as error:
        if not lacks_rule(error):
            raise
    return _Symmetric(_explained(lambda: jax.vjp(gradient, at)[1]))


def symmetric_jvp(gradient: Callable[[PyTree], PyTree], at: PyTree, v: PyTree) -> PyTree:
    """Return Q v, keeping nothing.

    Args:
      gradient: of some scalar function.
      at: the point.
      v: like the point.
    """
    try:
        return _jvp(gradient, at, v)
    except TypeError as error:
        if not lacks_rule(error):
            raise
    return _explained(lambda: jax.vjp(gradient, at)[1](v)[0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransposeOperator(LinearOperator):
    """J of which only the transpose is known.

    Attributes:
      pull: w -> (J^T w,).
      outputs: a point of what J gives.
      like: types of what J acts on, flattened by `freeze`.
    """

    pull: Callable[[PyTree], tuple[PyTree]]
    outputs: PyTree
    like: Frozen = field(metadata={"static": True})

    @property
    def in_structure(self) -> PyTree:
        """Of what J acts on."""
        return self.like.tree

    def jvp(self, u: PyTree) -> PyTree:
        """Return J u: the transpose of J^T, which is linear in w, so that w = 0 will do."""
        zeros = jax.tree.map(jnp.zeros_like, self.outputs)
        return _explained(lambda: jax.vjp(lambda w: self.pull(w)[0], zeros)[1](u)[0])

    def vjp(self, w: PyTree) -> PyTree:
        """Return J^T w."""
        return self.pull(w)[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Symmetric:
    """Q v by the transpose."""

    pull: Callable[[PyTree], tuple[PyTree]]

    def __call__(self, v: PyTree) -> PyTree:
        return self.pull(v)[0]


def _linearize(
    function: Callable[[PyTree], PyTree], at: PyTree
) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    value, tangent = jax.linearize(function, at)
    return value, checked(tangent, at)


def _jvp(function: Callable[[PyTree], PyTree], at: PyTree, u: PyTree) -> PyTree:
    take = lambda at, u: jax.jvp(function, (at,), (u,))[1]  # noqa: E731
    program, shapes = jax.make_jaxpr(take, return_shape=True)(at, u)
    _check(program)
    found = jaxpr_as_fun(program)(*jax.tree.leaves((at, u)))
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def checked(tangent: Callable[..., PyTree], *at: PyTree) -> Callable[..., PyTree]:
    """Return the tangent of `jax.linearize` if every function in it has a forward-mode rule.

    Args:
      tangent: a linear function.
      *at: points of its arguments.

    Raises:
      TypeError: there is a `jax.custom_vjp`. JAX itself raises no sooner than it compiles it.
    """
    _check(jax.make_jaxpr(tangent)(*at))
    return tangent


def _check(program: Any) -> None:
    if _contains("custom_lin", program.jaxpr):
        raise TypeError("a custom_vjp has no forward-mode rule")


def _contains(primitive: str, jaxpr: Any) -> bool:
    """Whether a program or one inside it uses a primitive."""
    for equation in jaxpr.eqns:
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(equation.params.values()))]
        if equation.primitive.name == primitive or any(
            _contains(primitive, x) for x in inner if hasattr(x, "eqns")
        ):
            return True
    return False


def lacks_rule(error: TypeError) -> bool:
    """Whether an error is that of a function with a backward pass alone (`jax.custom_vjp`)."""
    return "custom_vjp" in str(error)


def _explained(transpose: Callable[[], Any]) -> Any:
    try:
        return transpose()
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(NO_RULE.format(error=str(error).splitlines()[0])) from error


NO_RULE = (
    "forward (or the loss) uses a jax.custom_vjp, which has no forward-mode rule, and its backward "
    "pass cannot be differentiated in its place ({error}). Curvature needs one of the two: define "
    "the function with jax.custom_jvp, or give the refit an objective without it (plain JAX in "
    "place of a fused kernel; diffrax.ForwardMode() or diffrax.DirectAdjoint() as an ODE solver's "
    "adjoint). Streaming refits with structure 'e-kfac' or 'diagonal' need no forward mode."
)
