"""Beam search with a cache, compiled once for a shape of the batch.

    B  sentences        K  beams        V  size of the vocabulary        L  places of the cache

The whole search is one `lax.while_loop` that stops when every sentence has. Rules (those of
fairseq, with which the papers' BLEU was measured): hypotheses start from the end token; of
the 2 K best continuations, those that end within the first K are finished, and the first K
that do not end go on; a sentence is done with K finished hypotheses or at its longest length,
where ending is the only choice; a finished hypothesis is ranked by score / length^penalty, and
its end token counts.

The longest length follows from the number of real source tokens. The papers take the padded
width, by which a translation would depend on the other sentences of its batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llqr.typing import Array, Params, PyTree
from llqr_experiments.errors import ConfigError

PAD, END = 1, 2


@dataclass(frozen=True)
class Decoder:
    """What a search asks of a model. Made once for a model: its functions are static.

    Attributes:
      encode: (params, source [B, S]) -> memory: what all beams of a sentence share.
      start: (memory, K, L) -> cache: leaves [B, K, ...].
      step: (params, memory, cache, tokens [B, K], position) -> (log-probabilities [B, K, V],
        cache): reads the tokens at a position, 0 first, and predicts the next.
    """

    encode: Callable[[Params, Array], PyTree]
    start: Callable[[PyTree, int, int], PyTree]
    step: Callable[[Params, PyTree, PyTree, Array, Array], tuple[Array, PyTree]]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Options of a search.

    Attributes:
      beam: K; 1 is greedy search.
      penalty: exponent of the length by which scores are divided.
      ratio, extra, maximum: at most min(int(ratio * source tokens + extra), maximum) tokens
        come before the end.
      pad: token that is never produced, and does not count in a source.
      end: token that starts and ends a hypothesis.
    """

    beam: int = 5
    penalty: float = 1.0
    ratio: float = 1.2
    extra: int = 10
    maximum: int = 1023
    pad: int = PAD
    end: int = END

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ConfigError(f"beam={self.beam}: a search needs at least 1.")
        if self.ratio < 0 or self.extra < 0 or self.maximum < 1:
            raise ConfigError(
                f"ratio={self.ratio}, extra={self.extra}, maximum={self.maximum}: the longest "
                "length needs ratio >= 0, extra >= 0 and maximum >= 1."
            )

    def limit(self, tokens: int) -> int:
        """Tokens that may come before the end, for a number of source tokens."""
        return min(int(self.ratio * tokens + self.extra), self.maximum)


class Hypotheses(NamedTuple):
    """Finished hypotheses of each sentence, the best first.

    Attributes:
      tokens: [B, K, L] with the end token, then pads; without the start.
      lengths: [B, K] with the end token; 0 where there is no hypothesis: a source of pads
        alone, or fewer continuations than beams.
      scores: [B, K] sum of log-probabilities / length^penalty; -inf where there is none.
    """

    tokens: Array
    lengths: Array
    scores: Array


class _Search(NamedTuple):
    """State of the loop.

    Attributes:
      position: of the tokens that are read next.
      cache: of the model.
      live: [B, K, L] tokens of the beams.
      sums: [B, K] their log-probabilities; -inf for a beam that leads nowhere.
      finished: what is finished, in the order in which it was found.
      done: [B].
    """

    position: Array
    cache: PyTree
    live: Array
    sums: Array
    finished: Hypotheses
    done: Array


@partial(jax.jit, static_argnames=("decoder", "rules"))
def beam_search(
    decoder: Decoder, params: Params, source: Array, rules: Rules | None = None
) -> Hypotheses:
    """Return the hypotheses of a batch of sentences.

    Equal candidates are ordered by beam, then by token, so the result is the same each time.

    Args:
      decoder: the model.
      params: its parameters.
      source: [B, S] tokens, with pads on any side.
      rules: of the search; None: beam 5.
    """
    rules = Rules() if rules is None else rules
    real = jnp.sum(source != rules.pad, -1)
    size, width = source.shape
    limit = jnp.asarray([rules.limit(n) for n in range(width + 1)])[real]
    length = rules.limit(width) + 1
    memory = decoder.encode(params, source)
    shape = (size, rules.beam)
    tokens = jnp.full((*shape, length), rules.pad, jnp.int32)

    def body(search: _Search) -> _Search:
        at = search.position
        previous = search.live[:, :, jnp.maximum(at - 1, 0)]
        read = jnp.where(at == 0, rules.end, previous)
        log_probs, cache = decoder.step(params, memory, search.cache, read, at)
        allowed = _allowed(log_probs, at, limit, rules)
        return _advance(search._replace(cache=cache), allowed, limit, rules)

    dtype = jax.eval_shape(
        lambda cache: decoder.step(params, memory, cache, tokens[..., 0], jnp.int32(0))[0],
        decoder.start(memory, rules.beam, length),
    ).dtype
    nothing = jnp.full(shape, -jnp.inf, dtype)
    search = jax.lax.while_loop(
        lambda search: ~jnp.all(search.done),
        body,
        _Search(
            position=jnp.int32(0),
            cache=decoder.start(memory, rules.beam, length),
            live=tokens,
            sums=nothing.at[:, 0].set(0.0),  # all beams are the same at first: one counts
            finished=Hypotheses(tokens, jnp.zeros(shape, jnp.int32), nothing),
            done=real == 0,
        ),
    )
    order = jnp.argsort(-search.finished.scores, axis=1, stable=True)
    return _choose(search.finished, order)


def _allowed(log_probs: Array, position: Array, limit: Array, rules: Rules) -> Array:
    """Log-probabilities [B, K, V], -inf for what must not come; a nan is never chosen."""
    token = jnp.arange(log_probs.shape[-1])
    is_end = token == rules.end
    last = (position >= limit)[:, None, None]
    legal = (token != rules.pad) & ~(is_end & (position == 0)) & (is_end | ~last)
    return jnp.where(legal & ~jnp.isnan(log_probs), log_probs, -jnp.inf)


def _advance(search: _Search, log_probs: Array, limit: Array, rules: Rules) -> _Search:
    """Choose continuations, take the finished ones out, and go on with the others."""
    size, beam, vocabulary = log_probs.shape
    at = search.position
    sums = (search.sums[..., None] + log_probs).reshape(size, -1)
    top, index = jax.lax.top_k(sums, 2 * beam)
    origin, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
    tokens = _choose(search.live, origin).at[:, :, at].set(token)
    ends = token == rules.end

    finishes = ends & jnp.isfinite(top) & (jnp.arange(2 * beam) < beam) & ~search.done[:, None]
    scores = top / (at + 1).astype(top.dtype) ** rules.penalty
    finished = _collect(search.finished, finishes, tokens, at + 1, scores)
    done = search.done | jnp.all(finished.lengths > 0, -1) | (at >= limit)

    # At most one candidate of each beam ends, so K of the 2 K do not.
    go_on = jnp.argsort(ends, axis=1, stable=True)[:, :beam]
    origin, live, sums = _choose((origin, tokens, top), go_on)
    return _Search(at + 1, _choose(search.cache, origin), live, sums, finished, done)


def _collect(
    finished: Hypotheses, finishes: Array, tokens: Array, length: Array, scores: Array
) -> Hypotheses:
    """Put the candidates that finish into the free slots, in order, as far as there are some."""
    beam = finished.lengths.shape[1]
    taken = jnp.sum(finished.lengths > 0, -1, keepdims=True)
    slot = jnp.where(finishes, taken + jnp.cumsum(finishes, -1) - 1, beam)
    row = jnp.arange(slot.shape[0])[:, None]
    put = lambda old, new: old.at[row, slot].set(new, mode="drop")  # noqa: E731
    return Hypotheses(
        put(finished.tokens, tokens), put(finished.lengths, length), put(finished.scores, scores)
    )


def _choose(tree: PyTree, index: Array) -> PyTree:
    """Take beams [B, n] of every leaf [B, K, ...]."""
    row = jnp.arange(index.shape[0])[:, None]
    return jax.tree.map(lambda x: x[row, index], tree)
