"""What Muon is made of, link by link, and NorMuon's normalisation of neurons.

The iteration is optax's: `optax.contrib.scale_by_muon` without a memory is Newton-Schulz alone.

References: Muon, Jordan et al., kellerjordan.github.io/posts/muon, 2024; NorMuon, Li et al., arXiv
2510.05491, algorithm 1. SOAP-Muon is known from the optimizer track of modded-nanogpt, without a
text: that its steps have Muon's length is an assumption.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .matrices import as_matrix, by_kind, dimensions, on_matrices


def momentum(beta: float, *, nesterov: bool = True) -> optax.GradientTransformation:
    """Return the momentum of matrices, made orthogonal, at Muon's length."""
    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=beta, nesterov=nesterov, weight_dimension_numbers=dimensions
        ),
        scale_by_shape(),
    )


def orthogonalize() -> optax.GradientTransformationExtraArgs:
    """Return Newton-Schulz on updates that are matrices, at Muon's length; others pass."""
    return on_matrices(momentum(0.0, nesterov=False))


def scale_by_shape() -> optax.GradientTransformation:
    """Multiply matrices by sqrt(max(1, neurons / inputs)), as Muon does."""

    def scaled(x: Any) -> Any:
        inputs, neurons = as_matrix(x).shape
        return math.sqrt(max(1.0, neurons / inputs)) * x

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates))


class NeuronState(NamedTuple):
    """Second moments of neurons."""

    square: Any  # v of each leaf, (neurons,)


def scale_by_neuron(b2: float, eps: float = 1e-10) -> optax.GradientTransformation:
    """Divide each neuron's updates by the root of a running mean of their mean square.

    The matrix keeps its Frobenius norm, so that it is as long as Muon's; algorithm 1 sets the
    length 0.2 sqrt(m n) in its place. With o a column of O and v its second moment,

      v <- b2 v + (1 - b2) mean(o^2),   o <- o / (sqrt(v) + eps),   then O <- O |before| / |O|.
    """

    def init(params: Any) -> NeuronState:
        return NeuronState(jax.tree.map(lambda x: jnp.zeros_like(x, shape=x.shape[-1:]), params))

    def one(o: Any, v: Any) -> Any:
        new = o / (jnp.sqrt(v) + eps)
        return new * (jnp.linalg.norm(as_matrix(o)) / (jnp.linalg.norm(as_matrix(new)) + eps))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, NeuronState]:
        del params
        square = jax.tree.map(
            lambda o, v: b2 * v + (1 - b2) * jnp.mean(as_matrix(o) ** 2, 0), updates, state.square
        )
        return jax.tree.map(one, updates, square), NeuronState(square)

    return optax.GradientTransformation(init, update)


def scale_by_muon(beta: float = 0.95, b2: float | None = None) -> optax.GradientTransformation:
    """Return Muon's direction, NorMuon's with a `b2`; Adam's on vectors and embeddings."""
    links = [momentum(beta)] if b2 is None else [momentum(beta), scale_by_neuron(b2)]
    return by_kind(optax.chain(*links), optax.scale_by_adam(nesterov=True))
