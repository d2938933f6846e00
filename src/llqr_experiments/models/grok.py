"""The two-layer transformer of the grokking experiments (Power et al., arXiv 2201.02177)."""

from collections.abc import Sequence

from flax import nnx

from llqr_experiments.models.staged import Staged, classify, flat
from llqr_experiments.models.transformer import (
    Attention,
    causal_block,
    embed,
    embedding,
    learned_positions,
    norm,
    sequence_length,
)


def grok_transformer(
    shape: Sequence[int],
    classes: int,
    *,
    vocabulary: int = 99,
    width: int = 128,
    heads: int = 4,
    mlp: int = 512,
    depth: int = 2,
    max_length: int = 5,
    rngs: nnx.Rngs,
) -> Staged:
    """Return a causal pre-norm transformer that reads all its places at once at the end.

    Tokens [B, L] -> log-probabilities [B, classes]. A segment is the embedding, a block, or
    the head.

    Args:
      shape: (L,), the length of every input: the head has weights for each place.
      classes: number of outputs.
      vocabulary: number of tokens.
      width: of the states.
      heads: of attention.
      mlp: width inside the perceptrons.
      depth: number of blocks.
      max_length: number of learned positions.
      rngs: random streams.

    Raises:
      ValueError: the heads do not divide the width, or L exceeds `max_length`.

    Example:
      >>> import jax.numpy as jnp
      >>> model = grok_transformer((4,), 97, width=16, mlp=32, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 4), int)).shape
      (2, 97)
    """
    length = sequence_length(shape)
    if length > max_length:
        raise ValueError(f"inputs of {length} tokens are longer than max_length={max_length}.")
    normal = nnx.initializers.normal(1.0)
    positions = nnx.Embed(max_length, width, embedding_init=normal, rngs=rngs)
    stem = [(embedding(vocabulary, width, rngs=rngs), embed), (positions, learned_positions)]
    blocks = [
        causal_block(width, mlp, Attention(width, heads, rngs=rngs), norm_bias=False, rngs=rngs)
        for _ in range(depth)
    ]
    head = [
        (norm(length * width, bias=False, rngs=rngs), flat),
        (nnx.Linear(length * width, classes, rngs=rngs), classify),
    ]
    return Staged([stem, *blocks, head])
