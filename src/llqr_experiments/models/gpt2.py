"""GPT-2 small (Radford et al., 2019): a causal pre-norm transformer over text."""

from collections.abc import Sequence
from typing import Literal, get_args

from flax import nnx

from llqr.errors import check_choice
from llqr.typing import Array
from llqr_experiments.models.staged import Part, Staged, log_softmax
from llqr_experiments.models.transformer import (
    Attention,
    causal_block,
    embed,
    embedding,
    learned_positions,
    norm,
    sequence_length,
    sinusoidal_positions,
)

Positions = Literal["sinusoidal", "learned"]


class Head(nnx.Module):
    """The layer onto the vocabulary, under the name by which rule tables know it."""

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs):
        self.lm_head = nnx.Linear(width, classes, rngs=rngs)


def gpt2_small(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 768,
    heads: int = 12,
    depth: int = 12,
    dropout: float = 0.1,
    positions: Positions = "sinusoidal",
    tied: bool = False,
    rngs: nnx.Rngs,
) -> Staged:
    """Return GPT-2, as the papers have it but for attention's output projection.

    Tokens [B, L] -> log-probabilities [B L, classes] of the next token, rows flattened. A
    segment is the embedding, a block, or the head. Dropout is on embeddings, on the weights
    of attention and at the end of each residual branch.

    Args:
      shape: (L,): with learned positions, the longest input.
      classes: size of the vocabulary.
      width: of the states; the perceptrons are four times as wide.
      heads: of attention.
      depth: number of blocks.
      dropout: its rate.
      positions: "sinusoidal", of any length; or "learned", drawn from N(0, 1).
      tied: whether the output matrix is the embedding, without a bias.
      rngs: random streams.

    Raises:
      ValueError: the heads do not divide the width, or an unknown kind of positions.

    Example:
      >>> import jax.numpy as jnp
      >>> model = gpt2_small((8,), 50, width=16, heads=2, depth=1, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8), int)).shape
      (16, 50)
    """
    length = sequence_length(shape)
    check_choice("positions", positions, get_args(Positions))
    if positions == "sinusoidal" and width % 2:
        raise ValueError(f"width={width} must be even: positions are pairs of sine and cosine.")
    table = embedding(classes, width, rngs=rngs)
    places: Part = sinusoidal_positions
    if positions == "learned":
        normal = nnx.initializers.normal(1.0)
        learned = nnx.Embed(length, width, embedding_init=normal, rngs=rngs)
        places = (learned, learned_positions)
    stem: list[Part] = [(table, embed), places, nnx.Dropout(dropout, rngs=rngs)]
    blocks: list[list[Part]] = []
    for _ in range(depth):
        attention = Attention(width, heads, dropout=dropout, rngs=rngs)
        blocks.append(causal_block(width, 4 * width, attention, dropout=dropout, rngs=rngs))
    end: Part = (table, read_out) if tied else (Head(width, classes, rngs=rngs), head)
    return Staged([stem, *blocks, [norm(width, rngs=rngs), end]])


def head(part: Head, x: Array) -> Array:
    """Log-probabilities, [B, L, width] -> [B L, classes]."""
    return log_softmax(part.lm_head(x.reshape(-1, x.shape[-1])))


def read_out(table: nnx.Embed, x: Array) -> Array:
    """The same with the embedding as matrix."""
    return log_softmax(x.reshape(-1, x.shape[-1]) @ table.embedding[...].T)
