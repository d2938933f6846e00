"""Words of a text, and sequences to sort."""

import re
from collections import Counter
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.suite.workloads.problem import Batch, Workload, cross_entropy, rows, take
from llqr_experiments.data import corpus

from . import networks

LENGTH = 16
"""Words of a window."""

UNKNOWN = 0
"""The token of all words that are none of the vocabulary."""


def _words(vocabulary: int) -> dict[str, Any]:
    """Windows of Python's documentation, by words and marks; the most usual have a token.

    A row of the same mark is one: headings are underlined.
    """
    text = corpus.python_topics()
    lists = {}
    for split in ("train", "test"):
        found = re.finditer(r"\w+|([^\w\s])\1*", "".join(getattr(text, split).read()))
        lists[split] = [word[1] or word[0] for word in found]
    usual = Counter(lists["train"]).most_common(vocabulary - 1)
    number = {word: i + 1 for i, (word, _) in enumerate(usual)}

    def windows(words: list[str]) -> Batch:
        ids = np.array([number.get(word, UNKNOWN) for word in words], np.int32)
        starts = np.arange(0, len(ids) - LENGTH, LENGTH)[:, None]
        return {"tokens": ids[starts + np.arange(LENGTH)],
                "label": ids[starts + 1 + np.arange(LENGTH)]}  # fmt: skip

    train, test = (windows(words) for words in lists.values())
    fixed = take(train, np.linspace(0, rows(train) - 1, 128).astype(int))
    return {"train": train, "fixed": fixed, "test": take(test, slice(128))}


def _gru(params: Any, batch: Batch) -> Any:
    return networks.gru(params, batch["tokens"])


def gru_words() -> Workload:
    """A gated recurrence over words."""
    return Workload(
        "gru-words",
        partial(networks.gru_parameters, vocabulary=500, embedded=48, width=64),
        _gru,
        cross_entropy,
        **_words(500),
        batch=32,
        steps=400,
        layered=False,
        held_out=True,
        told="500 words of a text, GRU of 64 units, windows of 16",
    )


def _tied(params: Any, batch: Batch) -> Any:
    return networks.tied(params, batch["tokens"])


def tied_words() -> Workload:
    """A block of a transformer whose embedding is its head."""
    return Workload(
        "tied-words",
        partial(networks.tied_parameters, vocabulary=4000, width=48, depth=1, length=LENGTH),
        _tied,
        cross_entropy,
        **_words(4000),
        batch=16,
        steps=300,
        layered=False,
        held_out=True,
        told="4,000 words of a text, a block of 48 features, its head the embedding",
    )


# --- sorting ------------------------------------------------------------------------------------

_KINDS, _COUNT = 16, 10


def _scanned(params: Any, batch: Batch) -> Any:
    return networks.scanned(params, batch["tokens"])


def _second_half(logits: Any, batch: Batch) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.mean(losses, where=batch["counts"])


def _sequences(rng: np.random.Generator, count: int) -> Batch:
    """Tokens, a mark, and the tokens in order; what counts is the second half."""
    given = rng.integers(0, _KINDS, (count, _COUNT))
    mark = np.full((count, 1), _KINDS)
    tokens = np.concatenate([given, mark, np.sort(given, 1)], 1).astype(np.int32)
    counts = np.broadcast_to(np.arange(2 * _COUNT) >= _COUNT, (count, 2 * _COUNT))
    return {"tokens": tokens[:, :-1], "label": tokens[:, 1:], "counts": counts}


def scanned_transformer() -> Workload:
    """Four blocks in a scan that learn to sort."""
    rng = np.random.default_rng(0)
    train, test = _sequences(rng, 20_000), _sequences(rng, 250)
    return Workload(
        "scanned-transformer",
        partial(networks.scanned_parameters, vocabulary=_KINDS + 1, width=32, depth=4,
                length=2 * _COUNT),
        _scanned,
        _second_half,
        train=train,
        fixed=take(train, slice(250)),
        test=test,
        batch=32,
        steps=300,
        mask=lambda batch: batch["counts"],
        layered=False,
        held_out=True,
        told="10 tokens of 16 kinds to sort, 4 blocks of 32 features in a scan",
    )  # fmt: skip
