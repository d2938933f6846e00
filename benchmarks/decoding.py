"""Beam search with its cache against one that decodes every prefix again.

    uv run python benchmarks/decoding.py           # the translation model of the papers, 39 M
    uv run python benchmarks/decoding.py --quick   # a small one, as a smoke test

The same search, over two decoders: the model's own, and one whose cache is the tokens alone,
so that each step runs the decoder over the whole prefix of each beam. Both encode the source
once, and both read out one place a step. Prefixes have the shape of the longest, as a compiled
loop must; shapes that grow would halve what the second takes, less 50 compilations.

The end token is made unlikely, so that every search takes as many steps as its length says.
Weights are those of initialisation: time does not depend on them.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from reporting import environment, show, spread, write
from rich.progress import track

from llqr_experiments.models import MODELS, make, network
from llqr_experiments.models.decoding import END, PAD, Decoder, Rules, beam_search
from llqr_experiments.models.translation import State, decoder

NAME = "transformer-iwslt-de-en"
LENGTHS = (10, 25, 50)


def without_cache(net: Any, depth: int) -> Decoder:
    """Return the decoder that reads the whole prefix at each step."""
    segments = net.model.bind({}).segments
    middle = 1 + depth

    def run(part: Any, params: Any, state: Any) -> Any:
        for segment in part:
            state = segment(segment.control(params), state)
        return state

    def encode(params: Any, source: jax.Array) -> Any:
        tokens = {"source": source, "target_in": source[:, :1]}
        return run(segments[:middle], params, tokens)

    def start(memory: Any, beams: int, length: int) -> jax.Array:
        return jnp.full((memory.x.shape[0], beams, length), PAD, jnp.int32)

    def step(
        params: Any, memory: Any, cache: jax.Array, tokens: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        cache = cache.at[:, :, position].set(tokens)
        beams = cache.shape[1]
        tile = lambda x: jnp.repeat(x, beams, 0)  # noqa: E731
        prefixes = cache.reshape(-1, cache.shape[-1])
        state = State(tile(memory.x), None, None, tile(memory.source), prefixes)
        state = run(segments[middle:-1], params, state)
        state = state._replace(x=jax.lax.dynamic_slice_in_dim(state.x, position, 1, 1))
        return run(segments[-1:], params, state).reshape(*tokens.shape, -1), cache

    return Decoder(encode, start, step)


def endless(found: Decoder) -> Decoder:
    """Return the decoder with an end token that comes only where it must."""

    def step(*arguments: Any) -> tuple[jax.Array, Any]:
        log_probs, cache = found.step(*arguments)
        return log_probs.at[..., END].add(-1e4), cache

    return replace(found, step=step)


def seconds(act: Callable[[], Any], repeats: int) -> list[float]:
    """Return [median, smallest, largest] of a call, after one that compiles."""
    jax.block_until_ready(act())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(act())
        times.append(time.perf_counter() - start)
    return spread(times)


def main() -> None:
    """Measure, print a table, write JSON with the environment."""
    parser = argparse.ArgumentParser(description="Beam search with and without a cache.")
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--sentences", type=int, default=2, help="in the batch")
    parser.add_argument("--width", type=int, default=25, help="source tokens of a sentence")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    options = dict(MODELS[NAME].small) if arguments.quick else {"source_vocabulary": 8848}
    model = make(NAME, (), 100 if arguments.quick else 6632, seed=0, options=options)
    net = network(model)
    depth = (len(model.groups) - 2) // 2
    source = jnp.full((arguments.sentences, arguments.width), 4, jnp.int32).at[:, -1].set(END)
    decoders = [endless(decoder(model)), endless(without_cache(net, depth))]
    rows = []
    for length in track(LENGTHS[:1] if arguments.quick else LENGTHS, "decoding"):
        rules = Rules(ratio=0.0, extra=length - 1)
        found = [beam_search(one, net.params, source, rules) for one in decoders]
        if not (found[0].lengths == length).all() or not jnp.allclose(
            found[0].scores, found[1].scores, rtol=1e-4
        ):
            raise AssertionError("the two searches differ.")
        cached, again = (
            seconds(partial(beam_search, one, net.params, source, rules), arguments.repeats)
            for one in decoders
        )
        rows.append(
            {
                "length": length,
                "with the cache, s": cached,
                "every prefix again, s": again,
                "ratio": again[0] / cached[0],
            }
        )
    where = environment(
        beam=Rules().beam, sentences=arguments.sentences, source_tokens=arguments.width
    )
    show("beam search of a batch", rows)
    write("decoding_quick" if arguments.quick else "decoding", where, rows)


if __name__ == "__main__":
    main()
