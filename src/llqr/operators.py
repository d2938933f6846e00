"""Linear operators between pytrees of arrays: one interface for all that is linear here.

  operator            maps                              methods
  LinearOperator      in_structure -> out_structure     jvp, vjp, as_matrix
  SymmetricOperator   params -> params                  product, bilinear, as_matrix

A Jacobian and the preconditioner P are `LinearOperator`s; the curvature of a metric and the
quadratic model's C + lambda I are `SymmetricOperator`s. Most cross `jax.jit` as pytrees (see
`compiles`); what they map between is static, as in lineax: trees of types, not of arrays. None
forms a matrix, except in the Riccati recursion and where a test asks for it (`as_matrix`).
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
from llqr.tree import Frozen, freeze, vdot
from llqr.typing import Array, Float, Params, PyTree


class LinearOperator(ABC):
    """A linear map L between two vector spaces of pytrees."""

    compiles: ClassVar[bool] = True
    """Whether a product may be one compiled piece of a loop in Python: not where it is itself
    a loop over chunks, nor where its parts cannot cross `jit`."""

    @property
    @abstractmethod
    def in_structure(self) -> PyTree:
        """Of what L acts on: a tree of types, with shapes and dtypes; static."""

    @property
    def out_structure(self) -> PyTree:
        """Of what L gives: a tree of types, static."""
        return jax.eval_shape(self.jvp, self.in_structure)

    @abstractmethod
    def jvp(self, u: PyTree) -> PyTree:
        """Return L u, for u of `in_structure`."""

    def vjp(self, w: PyTree) -> PyTree:
        """Return L^T w, for w of `out_structure`."""
        return jax.linear_transpose(self.jvp, self.in_structure)(w)[0]

    def as_matrix(self) -> Float[Array, "out in"]:
        """Return the dense matrix on flattened trees: for tests and small problems."""
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.in_structure)
        flat, unravel = ravel_pytree(zeros)
        basis = jnp.eye(flat.size, dtype=flat.dtype)
        return jax.vmap(lambda e: ravel_pytree(self.jvp(unravel(e)))[0])(basis).T


def structure_of(tree: PyTree) -> PyTree:
    """Return the types of a tree's arrays: shapes and dtypes, and on a mesh how they lie."""
    return jax.tree.map(jax.typeof, tree)


class SymmetricOperator(LinearOperator):
    """A symmetric linear map C on one space."""

    @property
    def out_structure(self) -> PyTree:
        """That of what C acts on."""
        return self.in_structure

    @abstractmethod
    def product(self, u: Params) -> Params:
        """Return C u."""

    def bilinear(self, u: Params, w: Params) -> Float[Array, ""]:
        """Return u.C w.

        Args:
          u: of `in_structure`.
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
      axis_name: of the replicas.
    """

    local: LinearOperator
    axis_name: AxisName = field(metadata={"static": True})

    @property
    def in_structure(self) -> PyTree:
        """Of the parameters."""
        return self.local.in_structure

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
      axis_name: of the replicas.
      adds: whether the parts add up to the whole; else it is their mean.
    """

    local: SymmetricOperator
    axis_name: AxisName = field(metadata={"static": True})
    adds: bool = field(metadata={"static": True})

    @property
    def in_structure(self) -> PyTree:
        """Of the parameters."""
        return self.local.in_structure

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
      like: types of what it acts on, flattened by `freeze`.

    Example:
      >>> import jax.numpy as jnp
      >>> total = FunctionOperator.at(lambda x: x[:1] + 2 * x[1:], jnp.zeros(2))
      >>> total.as_matrix().tolist(), total.vjp(jnp.array([3.0])).tolist()
      ([[1.0, 2.0]], [3.0, 6.0])
    """

    apply: Callable[[PyTree], PyTree]
    like: Frozen = field(metadata={"static": True})

    @classmethod
    def at(cls, apply: Callable[[PyTree], PyTree], point: PyTree) -> "FunctionOperator":
        """Return the operator of a linear function on trees like `point`."""
        return cls(apply, freeze(structure_of(point)))

    @property
    def in_structure(self) -> PyTree:
        """Of what it acts on."""
        return self.like.tree

    def jvp(self, u: PyTree) -> PyTree:
        """Return the image of u."""
        return self.apply(u)
