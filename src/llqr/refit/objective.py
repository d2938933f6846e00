r"""The objective Phi of a refit: the quadratic model of the step that P gives, as a function of P.

  symbol     meaning                                              shape
  P          structured inverse preconditioner, sigma included    params x params
  h          direction that P is learned on (`directions`)        like params
  l          linear term of the objective                         like params
  C          curvature of the metric                              params x params

    Phi(P) = l.u + 1/2 u.(C + lambda I) u,   u = P h,   averaged over the directions

The published method (Layerwise LQR, arXiv 2605.04230) has l = g and one fixed direction,
h = -g or -g / |g|: Phi is then the quadratic model of the step itself. A probe has l = -h,
with h drawn afresh at every inner step; from N(0, I), the minimiser over all matrices of the
mean of Phi is (C + lambda I)^-1, and over a structure its best approximation seen from every
direction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llqr.curvature.model import QuadraticModel
from llqr.refit.directions import Directions, each
from llqr.refit.learner import Blocks, Seen
from llqr.structures import trees
from llqr.structures.plan import Plan
from llqr.tree import vdot
from llqr.typing import Array, Bool, Float, Params

BENT = 1e-3
"""From which on Phi curves down along P h: curvature below minus this share of the slope."""


@dataclass(frozen=True)
class Phi:
    """Phi on given directions.

    A refit moves what it *learns* (`trees.start`): the arrays of P themselves, or fresh vectors
    that are folded into them. `value` takes arrays; all else takes what is learned.

    All but products with C happens where P acts, on the matrices of blocks (`trees.gather`): of
    leaves there may be hundreds.

    Attributes:
      plan: the blocks of P.
      blocks: arrays into which what is learned is installed.
      model: C + lambda I of the batch, or a stack of those of its examples.
      directions: h and l, of each block.
      batched: whether they have a leading axis.
    """

    plan: Plan
    blocks: Blocks
    model: QuadraticModel
    directions: Directions
    batched: bool

    def value(self, blocks: Blocks) -> Float[Array, ""]:
        """Return Phi of P with these arrays, of all slots."""
        return self.value_and_bend(blocks)[0]

    def value_and_bend(
        self, blocks: Blocks
    ) -> tuple[Float[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
        """Return Phi, whether C, without damping, is zero along P h, and whether Phi curves down.

        Phi does if u.(C + lambda I) u < 0 by more than rounding: a share of its slope l.u.
        """

        def one(model: QuadraticModel, h: Seen, linear: Seen) -> tuple[Array, ...]:
            u = trees.product(self.plan, blocks, h)
            leaves, squared = self._tree(model, u), vdot(u, u)
            bare, slope = model.curvature.bilinear(leaves, leaves), vdot(linear, u)
            bent = bare / model.top_eigenvalue
            bent = bent + (model.damping * squared).astype(bent.dtype)
            return slope + 0.5 * bent, bare, squared, bent, slope

        found = each(self.model, self.batched, one, *self.directions)
        value, bare, squared, bent, slope = found
        flat = jnp.all(bare == 0) & jnp.any(squared > 0)
        down = jnp.mean(bent) < -BENT * jnp.abs(jnp.mean(slope))
        return jnp.mean(value), flat, down

    def value_and_gradient(self, learned: Blocks) -> tuple[Float[Array, ""], Blocks]:
        """Return Phi and its gradient in what is learned: one product with C."""

        def one(model: QuadraticModel, u: Seen, linear: Seen) -> tuple[Array, Seen]:
            curved = self._product(model, u)
            return _phi(linear, u, vdot(u, curved)), jax.tree.map(jnp.add, linear, curved)

        controls, vjp = self._vjp(learned)
        value, cotangent = self._each(one, controls)
        return self._mean(value), _pull(vjp, self._share(cotangent))

    def product(self, direction: Blocks) -> Blocks:
        """Return the Hessian of Phi times a direction, where P is linear in what is learned."""
        controls, vjp = self._vjp(direction)
        curved = self._each(lambda model, u, _: self._product(model, u), controls)
        return _pull(vjp, self._share(curved))

    def along(
        self, learned: Blocks, direction: Blocks, t: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """Return Phi, its slope and u'.(C + lambda) u' along a line: tangent sweeps alone.

        Args:
          learned: where the line starts.
          direction: d, like `learned`.
          t: position: at learned + t d.
        """

        def controls(t: Array) -> Seen:
            moved = jax.tree.map(lambda b, d: b + t * d, learned, direction)
            return _controls(self.plan, self.batched, self.blocks, moved, self.directions.h)

        def one(model: QuadraticModel, pair: Any, linear: Seen) -> tuple[Array, Array, Array]:
            (u, du), (tu, tdu) = pair, [self._tree(model, x) for x in pair]
            value = _phi(linear, u, model.bilinear(tu, tu))
            slope = vdot(linear, du) + model.bilinear(tu, tdu)
            return value, slope, model.bilinear(tdu, tdu)

        pair = jax.jvp(controls, (t,), (jnp.ones_like(t),))
        value, slope, curved = self._each(one, pair)
        return self._mean(value), self._mean(slope), self._mean(curved)

    def _tree(self, model: QuadraticModel, u: Seen) -> Params:
        return trees.scatter(self.plan, u, model.gradient)

    def _product(self, model: QuadraticModel, u: Seen) -> Seen:
        """(C / top + lambda I) u."""
        curved = trees.gather(self.plan, model.curvature.product(self._tree(model, u)))
        return [
            (c / model.top_eigenvalue + model.damping * x).astype(c.dtype)
            for c, x in zip(curved, u, strict=True)
        ]

    def _vjp(self, learned: Blocks) -> tuple[Seen, Any]:
        return _controls_vjp(self.plan, self.batched, self.blocks, learned, self.directions.h)

    def _each(self, function: Callable[..., Any], controls: Any) -> Any:
        return each(self.model, self.batched, function, controls, self.directions.linear)

    def _mean(self, x: Array) -> Array:
        return jnp.mean(x) if self.batched else x

    def _share(self, cotangent: Seen) -> Seen:
        """The part of each direction in the gradient of the mean."""
        if not self.batched:
            return cotangent
        return [(c / c.shape[0]).astype(c.dtype) for c in cotangent]


def _phi(linear: Seen, u: Seen, curved: Float[Array, ""]) -> Float[Array, ""]:
    """l.u + 1/2 u.(C + lambda I) u, of which the second is given."""
    return vdot(linear, u) + 0.5 * curved


def _controls(plan: Plan, batched: bool, blocks: Blocks, learned: Blocks, h: Seen) -> Seen:
    arrays = trees.install(plan, blocks, learned)
    multiply = partial(trees.product, plan, arrays)
    return jax.vmap(multiply)(h) if batched else multiply(h)


@partial(jax.jit, static_argnames=("plan", "batched"))
def _controls_vjp(
    plan: Plan, batched: bool, blocks: Blocks, learned: Blocks, h: Seen
) -> tuple[Seen, Any]:
    """Return u = P h, and its pull-back to what is learned, for `_pull`."""
    return jax.vjp(lambda x: _controls(plan, batched, blocks, x, h), learned)


@jax.jit
def _pull(vjp: Any, cotangent: Seen) -> Blocks:
    return vjp(cotangent)[0]
