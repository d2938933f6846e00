"""Steps on a sphere: a matrix keeps the Frobenius norm R that it starts with ("hyperball").

  w <- R normalize(w - rate R normalize(u)),   normalize(x) = x / |x|

for the direction u of any optimizer, so that the rate is the length of a step by that of the
matrix. MuonH and AdamH are this behind Muon's and Adam's directions.

Written from the description of the method on the optimizer track of modded-nanogpt and in Wen et
al., "Fantastic pretraining optimizers II", 2025. Assumed, where we know no text: vectors and
embeddings take plain steps of the same rate, and so do the head, unless asked for, whose norm is
the scale of the logits, and a matrix that starts at zero, which has no sphere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .matrices import heads, mask


class HyperballState(NamedTuple):
    """Norms at the start, in the order of `jax.tree.leaves`."""

    radius: list[Any]  # () for each leaf


def hyperball(rate: Any, *, head: bool = False) -> optax.GradientTransformation:
    """Return the last link of a chain, in place of `optax.scale_by_learning_rate`.

    Args:
      rate: length of a step by that of the matrix.
      head: whether the last layer is on a sphere too.
    """

    def init(params: Any) -> HyperballState:
        return HyperballState([_norm(w) for w in jax.tree.leaves(params)])

    def one(u: Any, w: Any, radius: Any, matrix: bool, last: bool) -> Any:
        plain = -rate * u
        if not matrix or (last and not head):
            return plain
        moved = w - rate * radius * _normalized(u)
        return jnp.where(radius > 0, radius * _normalized(moved) - w, plain)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("hyperball: `update` needs the parameters.")
        leaves, treedef = jax.tree.flatten(updates)
        kinds = jax.tree.leaves(mask(params)), jax.tree.leaves(heads(params))
        rest = jax.tree.leaves(params), state.radius, *kinds
        done = [one(*each) for each in zip(leaves, *rest, strict=True)]
        return treedef.unflatten(done), state

    return optax.GradientTransformation(init, update)


def _norm(x: Any) -> Any:
    return jnp.sqrt(jnp.sum(x**2))


def _normalized(x: Any) -> Any:
    norm = _norm(x)
    return x / jnp.where(norm > 0, norm, 1)
