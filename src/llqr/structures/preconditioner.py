"""P as a linear operator on trees like the parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

from llqr.operators import LinearOperator, structure_of
from llqr.structures import trees
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan
from llqr.tree import Frozen, freeze
from llqr.typing import Params, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Preconditioner(LinearOperator):
    """P, of which sigma P is stored.

    Attributes:
      arrays: of each block.
      plan: the blocks.
      like: types of the parameters, flattened by `freeze`.
      sigma: > 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from llqr.structures import make_plan, rule_table
      >>> params = {"w": jnp.ones((2, 1))}
      >>> plan = make_plan(params, rule_table("kfac"), max_dim=100)
      >>> p = Preconditioner.on(plan, trees.identity(plan, 4.0), params)
      >>> p.product(params)["w"].tolist(), p.as_matrix().tolist()
      ([[4.0], [4.0]], [[4.0, 0.0], [0.0, 4.0]])
    """

    arrays: tuple[Arrays, ...]
    plan: Plan = field(metadata={"static": True})
    like: Frozen = field(metadata={"static": True})
    sigma: float = field(default=1.0, metadata={"static": True})

    @classmethod
    def on(
        cls, plan: Plan, arrays: Sequence[Arrays], at: PyTree, sigma: float = 1.0
    ) -> "Preconditioner":
        """Return P on trees like one.

        Args:
          plan: the blocks.
          arrays: of each block.
          at: the parameters, or a vector like them.
          sigma: > 0.
        """
        return cls(tuple(arrays), plan, freeze(structure_of(at)), sigma)

    @property
    def in_structure(self) -> PyTree:
        """Of the parameters."""
        return self.like.tree

    def product(self, v: Params) -> Params:
        """Return P v; leaves keep their dtypes.

        Args:
          v: like the parameters.
        """
        found = trees.product(self.plan, self.arrays, trees.gather(self.plan, v))
        stored = trees.scatter(self.plan, found, v)
        if self.sigma == 1:
            return stored
        return jax.tree.map(lambda u: (u / self.sigma).astype(u.dtype), stored)

    def jvp(self, u: Params) -> Params:
        """Return P u."""
        return self.product(u)
