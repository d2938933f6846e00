"""The transformer that translates (Vaswani et al., arXiv 1706.03762), and how it decodes.

Post-norm encoder and decoder; the target embedding is also the output matrix: its module
comes twice in the list of stages, so there is one set of weights and it is no part of the
state. Tokens are {"source": [B, S], "target_in": [B, T]}; pads may stand on any side, and
influence nothing. Masks follow from the tokens, which travel in the state as constants.

Rows of the output are in their natural order. (The papers move the rows of pads to the end;
here a mask takes them out of the loss and of the metric, wherever they are.)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llqr.typing import Array, Params
from llqr_experiments.models.decoding import PAD, Decoder
from llqr_experiments.models.staged import Part, Staged, log_softmax
from llqr_experiments.models.transformer import (
    Attention,
    causal,
    embed,
    embedding,
    norm,
    sinusoids,
)


class State(NamedTuple):
    """What the stages hand on.

    Attributes:
      x: [B, S or T, width] hidden states of the encoder, then of the decoder.
      skip: the same, beside a residual branch; None elsewhere.
      memory: [B, S, width] what the encoder made; None while it runs.
      source: [B, S] tokens.
      target: [B, T] tokens that the decoder reads.
    """

    x: Array
    skip: Array | None
    memory: Array | None
    source: Array
    target: Array


def transformer_iwslt(
    shape: Sequence[int] | None,
    classes: int,
    *,
    source_vocabulary: int | None = None,
    width: int = 512,
    heads: int = 4,
    mlp: int = 1024,
    depth: int = 6,
    dropout: float = 0.3,
    rngs: nnx.Rngs,
) -> Staged:
    """Return the translation model.

    {"source", "target_in"} -> log-probabilities [B T, classes], rows flattened. Segments: the
    source embedding, encoder blocks, decoder blocks (the target embedding in the first), the
    read-out. Dropout is on embeddings and at the end of each residual branch.

    Args:
      shape: of nothing: sentences have any length.
      classes: size of the target vocabulary.
      source_vocabulary: size of the source vocabulary; None: that of the target.
      width: of the states.
      heads: of attention.
      mlp: width inside the perceptrons.
      depth: blocks of the encoder, and of the decoder.
      dropout: its rate.
      rngs: random streams.

    Raises:
      ValueError: the heads do not divide the width, or a width without two frequencies.

    Example:
      >>> import jax.numpy as jnp
      >>> model = transformer_iwslt(None, 9, width=8, heads=2, mlp=8, depth=1, rngs=nnx.Rngs(0))
      >>> tokens = {"source": jnp.ones((2, 5), int), "target_in": jnp.ones((2, 3), int)}
      >>> model(tokens).shape
      (6, 9)
    """
    if width < 4 or width % 2:
        raise ValueError(f"width={width} must be even, and 4 at least: half of it are sines.")
    if depth < 1:
        raise ValueError(f"depth={depth}: the encoder and the decoder need a block each.")
    tables = [_embedding(n or classes, width, rngs) for n in (source_vocabulary, classes)]
    block = partial(_block, width, heads, mlp, dropout, rngs)
    drop = lambda: (nnx.Dropout(dropout, rngs=rngs), on_x)  # noqa: E731
    encoder = [block([encoder_attention]) for _ in range(depth)]
    decoder = [block([decoder_attention, cross_attention]) for _ in range(depth)]
    decoder[0] = [(tables[1], enter_target), drop(), *decoder[0]]
    stem = [(tables[0], enter_source), drop()]
    return Staged([stem, *encoder, *decoder, [(tables[1], read_out)]])


def _embedding(size: int, width: int, rngs: nnx.Rngs) -> nnx.Embed:
    """A table whose row for pads is zero at first."""
    table = embedding(size, width, rngs=rngs)
    table.embedding[...] = table.embedding[...].at[PAD].set(0.0)
    return table


def _block(
    width: int, heads: int, mlp: int, dropout: float, rngs: nnx.Rngs, attentions: Sequence[Any]
) -> list[Part]:
    """Attentions and a perceptron with ReLU; after each, the residual and a norm."""
    xavier = nnx.initializers.xavier_uniform()
    half = nnx.initializers.variance_scaling(0.5, "fan_avg", "uniform")  # gain 1 / sqrt(2)
    dense = partial(nnx.Linear, kernel_init=xavier, rngs=rngs)
    attention = partial(Attention, width, heads, bias=True, projection=half, out=xavier, rngs=rngs)
    branches: list[list[Part]] = [[(attention(), how)] for how in attentions]
    branches.append([(dense(width, mlp), fork), (nnx.relu, on_x), (dense(mlp, width), on_x)])
    parts: list[Part] = []
    for branch in branches:
        drop = nnx.Dropout(dropout, rngs=rngs)
        parts += [*branch, (drop, on_x), (norm(width, rngs=rngs), add_norm)]
    return parts


# --- how a part is applied ----------------------------------------------------------------------


def on_x(part: Any, state: State) -> State:
    """The hidden states alone."""
    return state._replace(x=part(state.x))


def fork(part: Any, state: State) -> State:
    """Start of a residual branch."""
    return state._replace(x=part(state.x), skip=state.x)


def add_norm(part: nnx.LayerNorm, state: State) -> State:
    """End of a residual branch."""
    assert state.skip is not None
    return state._replace(x=part(state.x + state.skip), skip=None)


def enter_source(table: nnx.Embed, tokens: Any) -> State:
    """Embedded source; the target waits as tokens."""
    source, target = tokens["source"], tokens["target_in"]
    return State(_placed(table, source, _places(source)), None, None, source, target)


def enter_target(table: nnx.Embed, state: State) -> State:
    """The encoder's states become the memory, and the target is embedded."""
    x = _placed(table, state.target, _places(state.target))
    return state._replace(x=x, memory=state.x)


def encoder_attention(part: Attention, state: State) -> State:
    """From every source token to every source token."""
    return fork(lambda x: part(x, _seen(state.source)), state)


def decoder_attention(part: Attention, state: State) -> State:
    """From each target token to those up to it."""
    keep = _seen(state.target) & causal(state.target.shape[-1])
    return fork(lambda x: part(x, keep), state)


def cross_attention(part: Attention, state: State) -> State:
    """From each target token to every source token."""
    return fork(lambda x: part(x, _seen(state.source), state.memory), state)


def read_out(table: nnx.Embed, state: State) -> Array:
    """Log-probabilities of the next token, rows flattened."""
    return log_softmax(state.x.reshape(-1, table.features) @ table.embedding[...].T)


def _seen(tokens: Array) -> Array:
    """[B, S] -> [B, 1, 1, S]: what any query of any head may see."""
    return (tokens != PAD)[:, None, None, :]


def _places(tokens: Array) -> Array:
    """Count of the real tokens up to each, so that it does not matter where pads are."""
    return jnp.cumsum(tokens != PAD, -1)


def _placed(table: nnx.Embed, tokens: Array, places: Array) -> Array:
    """Scaled embeddings with their positions; pads have none. The first place is 1."""
    x = embed(table, tokens)
    waves = sinusoids(places + PAD, table.features, x.dtype)
    return x + jnp.where((tokens != PAD)[..., None], waves, 0)


# --- decoding -----------------------------------------------------------------------------------


class Memory(NamedTuple):
    """What all beams of a sentence share.

    Attributes:
      keys: [B, S, width] of each cross-attention.
      values: the same.
      source: [B, S] tokens.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    source: Array


class Cache(NamedTuple):
    """What a beam has read.

    Attributes:
      keys: [B, K, L, width] of each self-attention of the decoder.
      values: the same.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


def decoder(model: Staged) -> Decoder:
    """Return the functions of a beam search, on the parameters of `network(model)`.

    They run the model's own stages, one token of each beam at a time. Only attention differs:
    it reads a cache. The K beams of a sentence stand where a sequence's places are; nothing
    but self-attention mixes places, and that sees each beam's own cache.
    """
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def stages(params: Params) -> list[tuple[Any, Any]]:
        """(part, how) in order, without dropout."""
        whole = nnx.merge(graphdef, nnx.State(params), rest)
        whole.eval()
        return [(part, how) for _, part, how in whole.stages()]

    return Decoder(partial(_encode, stages), _empty, partial(_step, stages))


def _encode(stages: Any, params: Params, source: Array) -> Memory:
    parts = stages(params)
    middle = [how for _, how in parts].index(enter_target)
    state: Any = {"source": source, "target_in": source[:, :1]}
    for part, how in parts[:middle]:
        state = how(part, state)
    cross = [part for part, how in parts if how is cross_attention]
    return Memory(
        tuple(part.key(state.x) for part in cross),
        tuple(part.value(state.x) for part in cross),
        source,
    )


def _empty(memory: Memory, beams: int, length: int) -> Cache:
    """As many self-attentions as cross-attentions."""
    size, _, width = memory.keys[0].shape
    empty = jnp.zeros((size, beams, length, width), memory.keys[0].dtype)
    layers = (empty,) * len(memory.keys)
    return Cache(layers, layers)


def _step(
    stages: Any, params: Params, memory: Memory, cache: Cache, tokens: Array, position: Array
) -> tuple[Array, Cache]:
    parts = stages(params)
    (table, _), *parts = parts[[how for _, how in parts].index(enter_target) :]
    x = _placed(table, tokens, jnp.broadcast_to(position + 1, tokens.shape))
    state: Any = State(x, None, None, memory.source, tokens)
    past = zip(cache.keys, cache.values, strict=True)
    crossed = zip(memory.keys, memory.values, strict=True)
    layers, seen = [], _seen(memory.source)
    for part, how in parts:
        if how is decoder_attention:
            new = part.key(state.x), part.value(state.x)
            layers.append([_write(*pair, position) for pair in zip(next(past), new, strict=True)])
            state = fork(partial(_attend_own, part, *layers[-1], position), state)
        elif how is cross_attention:
            key, value = next(crossed)
            state = fork(partial(part.attend, key=key, value=value, keep=seen), state)
        else:
            state = how(part, state)
    keys, values = zip(*layers, strict=True)
    return state.reshape(*tokens.shape, -1), Cache(keys, values)


def _write(cache: Array, new: Array, position: Array) -> Array:
    """Put [B, K, width] at a place of [B, K, L, width]."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new[:, :, None], position, 2)


def _attend_own(part: Attention, key: Array, value: Array, position: Array, x: Array) -> Array:
    """Each beam attends to its own past: [B, K, width] -> [B, K, width]."""
    keep = jnp.arange(key.shape[2]) <= position
    return part.attend(x[:, :, None], key, value, keep)[:, :, 0]
