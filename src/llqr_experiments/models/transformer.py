"""Parts that the transformers share: attention, positions, embeddings, causal blocks.

Kernels are matrices (fan in, fan out), so that Kronecker structures have the sides that they
are meant for: attention's query, key, value and out are four dense layers.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llqr.typing import Array
from llqr_experiments.models.staged import Part, add, fork, main

EPSILON = 1e-5  # of layer norm

Initializer = Callable[..., Array]
_lecun = nnx.initializers.lecun_normal()


def norm(width: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm; its variance is that of centred values, which does not cancel."""
    return nnx.LayerNorm(width, epsilon=EPSILON, use_bias=bias, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head scaled dot-product attention.

    Args:
      width: of states, [..., length, width].
      heads: they divide the width.
      bias: whether query, key and value have one; out always does.
      projection: initialisation of the kernels of query, key and value.
      out: initialisation of the kernel of out.
      dropout: rate, on the attention's weights.
      rngs: random streams.

    Raises:
      ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = False,
        projection: Initializer = _lecun,
        out: Initializer = _lecun,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} must divide width={width}.")
        dense = partial(nnx.Linear, width, width, rngs=rngs)
        self.query = dense(use_bias=bias, kernel_init=projection)
        self.key = dense(use_bias=bias, kernel_init=projection)
        self.value = dense(use_bias=bias, kernel_init=projection)
        self.out = dense(kernel_init=out)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Array, keep: Array, memory: Array | None = None) -> Array:
        """Attend from `x` to `memory`, or to itself.

        Args:
          x: [..., T, width].
          keep: bool, broadcastable to [..., heads, T, S]: what each query may see.
          memory: [..., S, width].
        """
        memory = x if memory is None else memory
        return self.attend(x, self.key(memory), self.value(memory), keep)

    def attend(self, x: Array, key: Array, value: Array, keep: Array) -> Array:
        """The same with keys and values [..., S, width] that are there already."""
        query, key, value = (
            y.reshape(*y.shape[:-1], self.heads, -1) for y in (self.query(x), key, value)
        )
        scores = jnp.einsum("...thd,...shd->...hts", query, key) / math.sqrt(query.shape[-1])
        # Half precision is too coarse to sum exponentials in.
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        weights = jax.nn.softmax(jnp.where(keep, scores, jnp.finfo(scores.dtype).min))
        # A query that may see nothing, such as a pad in front, gets zeros.
        weights = self.dropout(jnp.where(keep, weights, 0.0).astype(value.dtype))
        mixed = jnp.einsum("...hts,...shd->...thd", weights, value)
        return self.out(mixed.reshape(*mixed.shape[:-2], -1))


def causal(length: int) -> Array:
    """[T, T] bool: each place sees itself and those before it."""
    return jnp.tril(jnp.ones((length, length), bool))


def self_attention(attention: Attention, x: tuple[Array, Array]) -> tuple[Array, Array]:
    """Causal attention on the main branch."""
    return attention(x[0], causal(x[0].shape[-2])), x[1]


def causal_block(
    width: int,
    mlp: int,
    attention: Attention,
    *,
    norm_bias: bool = True,
    dropout: float = 0.0,
    rngs: nnx.Rngs,
) -> list[Part]:
    """Stages of a pre-norm block: attention and a perceptron with GELU, each with its residual."""
    parts: list[Part] = []
    inner: list[list[Part]] = [
        [(attention, self_attention)],
        [
            (nnx.Linear(width, mlp, rngs=rngs), main),
            (nnx.gelu, main),  # the tanh approximation
            (nnx.Linear(mlp, width, rngs=rngs), main),
        ],
    ]
    for branch in inner:
        drop = nnx.Dropout(dropout, rngs=rngs)
        parts += [(norm(width, bias=norm_bias, rngs=rngs), fork), *branch, (drop, main), add]
    return parts


# --- embeddings and positions -------------------------------------------------------------------


def embedding(size: int, width: int, *, rngs: nnx.Rngs) -> nnx.Embed:
    """A table whose rows have length 1 on average: scaled by sqrt(width), entries of variance 1."""
    normal = nnx.initializers.normal(width**-0.5)
    return nnx.Embed(size, width, embedding_init=normal, rngs=rngs)


def lookup(table: nnx.Embed, index: Array) -> Array:
    """Rows of the table, in its precision; an index beyond it gives nan."""
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got {index.dtype}.")
    return jnp.take(table.embedding[...], index, axis=0)


def embed(table: nnx.Embed, tokens: Array) -> Array:
    """[B, L] -> [B, L, width], scaled by sqrt(width)."""
    return lookup(table, tokens) * math.sqrt(table.features)


def learned_positions(table: nnx.Embed, x: Array) -> Array:
    """Add a row of the table to each place.

    Raises:
      ValueError: the sequence is longer than the table.
    """
    length = x.shape[-2]
    if length > table.num_embeddings:
        raise ValueError(
            f"a sequence of {length} tokens is longer than the {table.num_embeddings} learned "
            "positions: build the model for that length, or cut the data."
        )
    return x + lookup(table, jnp.arange(length))


def sinusoidal_positions(x: Array) -> Array:
    """Add sines on even and cosines on odd channels (Vaswani et al., arXiv 1706.03762)."""
    length, width = x.shape[-2:]
    waves = _waves(jnp.arange(length), 10_000.0 ** (-jnp.arange(0, width, 2) / width), x.dtype)
    return x + jnp.stack(waves, -1).reshape(length, width)


def sinusoids(index: Array, width: int, dtype: Any) -> Array:
    """[...] -> [..., width]: all sines, then all cosines.

    Frequencies go from 1 to exactly 1/10000: 10000^(-i / (width / 2 - 1)).
    """
    half = width // 2
    return jnp.concatenate(_waves(index, 10_000.0 ** (-jnp.arange(half) / (half - 1)), dtype), -1)


def _waves(index: Array, frequencies: Array, dtype: Any) -> list[Array]:
    """Sines and cosines; half precision could not tell one index from the next."""
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = index[..., None].astype(wide) * frequencies.astype(wide)
    return [jnp.sin(angles).astype(dtype), jnp.cos(angles).astype(dtype)]


def sequence_length(shape: Sequence[int]) -> int:
    """Return the length that a model of sequences is built for.

    Raises:
      ValueError: the shape is not (length,).
    """
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"inputs must be sequences of shape (length,), got {tuple(shape)}.")
    return shape[0]
