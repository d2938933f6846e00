"""Linear operators between pytrees of arrays: one interface for all that is linear here.

  operator            domain -> range                   methods
  LinearOperator      any                               jvp, vjp, as_matrix
  SymmetricOperator   params -> params                  product, bilinear, as_matrix

A Jacobian is a `LinearOperator`; the curvature of a metric, the quadratic model's C + lambda I
and the Hessian of a refit's objective are `SymmetricOperator`s. All are pytrees, so that they
cross `jax.jit`, and none forms a matrix, except where a test asks for it (`as_matrix`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from llqr import _replicas
from llqr._replicas import AxisName
from llqr.tree import vdot
from llqr.typing import Array, Float, Params, PyTree


class LinearOperator(ABC):
    """A linear map L between two vector spaces of pytrees."""

    compiles: ClassVar[bool] = True
    """Whether a product may be one compiled piece of a loop in Python: not where it is itself
    a loop over chunks, nor where its parts cannot cross `jit`."""

    domain: PyTree
    """A point of the domain; its structure, shapes and dtypes are what is meant."""

    @abstractmethod
    def jvp(self, u: PyTree) -> PyTree:
        """Return L u, for u like `domain`."""

    def vjp(self, w: PyTree) -> PyTree:
        """Return L^T w, for w like the range."""
        return jax.linear_transpose(self.jvp, self.domain)(w)[0]

    def as_matrix(self) -> Float[Array, "range domain"]:
        """Return the dense matrix on flattened trees: for tests and small problems."""
        flat, unravel = ravel_pytree(self.domain)
        basis = jnp.eye(flat.size, dtype=flat.dtype)
        return jax.vmap(lambda e: ravel_pytree(self.jvp(unravel(e)))[0])(basis).T


class SymmetricOperator(LinearOperator):
    """A symmetric linear map C on one space."""

    @abstractmethod
    def product(self, u: Params) -> Params:
        """Return C u."""

    def bilinear(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.C w.

        Args:
          u: like `domain`.
          w: likewise.
        """
        return vdot(u, self.product(w))

    def jvp(self, u: Params) -> Params:
        """Return C u."""
        return self.product(u)

    def vjp(self, w: Params) -> Params:
        """Return C^T w, which is C w."""
        return self.product(w)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReplicatedJacobian(LinearOperator):
    """J of each replica's own part of the batch; its transpose is averaged over the replicas.

    Attributes:
      local: J at a replica's own copy of the parameters.
      domain: the parameters, the same everywhere.
      axis_name: of the replicas.
    """

    local: LinearOperator
    domain: Params
    axis_name: AxisName = field(metadata={"static": True})

    def jvp(self, u: Params) -> PyTree:
        """Return J u, of this replica's rows."""
        return self.local.jvp(_replicas.own(u, self.axis_name))

    def vjp(self, w: PyTree) -> Params:
        """Return the mean of the replicas' J^T w, w their own."""
        return _replicas.mean(self.local.vjp(w), self.axis_name)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReplicatedCurvature(SymmetricOperator):
    """C of the whole batch, of which each replica has a part.

    Attributes:
      local: C of a replica's own part.
      domain: the parameters, the same everywhere.
      axis_name: of the replicas.
      adds: whether the parts add up to the whole; else it is their mean.
    """

    local: SymmetricOperator
    domain: Params
    axis_name: AxisName = field(metadata={"static": True})
    adds: bool = field(metadata={"static": True})

    def product(self, u: Params) -> Params:
        """Return C u."""
        return self._over(self.local.product(_replicas.own(u, self.axis_name)))

    def bilinear(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.C w."""
        mine = _replicas.own(u, self.axis_name)
        other = mine if u is w else _replicas.own(w, self.axis_name)
        return self._over(self.local.bilinear(mine, other))

    def _over(self, tree: PyTree) -> PyTree:
        combine = _replicas.total if self.adds else _replicas.mean
        return combine(tree, self.axis_name)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FunctionOperator(LinearOperator):
    """A linear function as an operator.

    Attributes:
      apply: the map.
      domain: a point of its domain.

    Example:
      >>> import jax.numpy as jnp
      >>> total = FunctionOperator(lambda x: x[:1] + 2 * x[1:], jnp.zeros(2))
      >>> total.as_matrix().tolist(), total.vjp(jnp.array([3.0])).tolist()
      ([[1.0, 2.0]], [3.0, 6.0])
    """

    apply: Callable[[PyTree], PyTree]
    domain: PyTree

    def jvp(self, u: PyTree) -> PyTree:
        """Return the image of u."""
        return self.apply(u)
