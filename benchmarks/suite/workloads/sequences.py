"""Sequences: modular addition, text by the character, German number words into English."""

import tempfile
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from llqr_experiments.data import language, operations
from llqr_experiments.data.translation import number_words

from . import networks
from .problem import Batch, Workload, cross_entropy, rows, take

MODULUS = 31
LENGTH = 32
"""Characters of a window."""


def _last(params: Any, batch: Batch) -> Any:
    return networks.transformer(params, batch["tokens"])[:, -1]


def _all(params: Any, batch: Batch) -> Any:
    return networks.transformer(params, batch["tokens"])


def modular_addition() -> Workload:
    """All sums modulo a prime, six of ten of them seen."""
    loaded = operations.grokking("mod_sum", p=MODULUS)
    train, test = (part.gather(np.arange(len(part))) for part in (loaded.train, loaded.test))
    return Workload(
        "modular-addition",
        partial(networks.transformer_parameters, vocabulary=loaded.vocabulary, width=48, depth=1,
                length=loaded.length),
        _last,
        cross_entropy,
        train=train,
        fixed=train,
        test=test,
        batch=128,
        steps=150,  # in 500, training losses end at 0
        told=f"a + b modulo {MODULUS}, one block of 48 features",
    )  # fmt: skip


def characters() -> Workload:
    """A small GPT on the documentation of the Python language."""
    with tempfile.TemporaryDirectory() as cache_dir:
        text = language.text("python_topics", target_len=LENGTH, cache_dir=cache_dir)
        train = text.train.gather(np.arange(len(text.train)))
        test = text.test.gather(np.arange(text.test.targets // LENGTH))
    return Workload(
        "characters",
        partial(networks.transformer_parameters, vocabulary=text.vocabulary, width=48, depth=2,
                length=LENGTH),
        _all,
        cross_entropy,
        train=train,
        fixed=take(train, np.linspace(0, rows(train) - 1, 250).astype(int)),
        test=take(test, slice(250)),
        batch=16,
        steps=400,
        told="characters of a text, 2 blocks of 48 features, windows of 32",
    )  # fmt: skip


def translation() -> Workload:
    """German number words, a mark, English ones: a causal model of the second half."""
    corpus = number_words.corpus()
    pairs = {
        split: list(zip(sides["de"], sides["en"], strict=True)) for split, sides in corpus.items()
    }
    words = sorted({w for both in pairs.values() for pair in both for s in pair for w in s.split()})
    number = {word: i + 3 for i, word in enumerate(words)}  # 0 pads, 1 separates, 2 ends

    def encode(split: list[tuple[str, str]]) -> Batch:
        lines = [
            [*(number[w] for w in de.split()), 1, *(number[w] for w in en.split()), 2]
            for de, en in split
        ]
        tokens = np.zeros((len(lines), longest), np.int32)
        for i, line in enumerate(lines):
            tokens[i, : len(line)] = line
        after = np.cumsum(tokens == 1, 1) > 0
        label = tokens[:, 1:]
        return {"tokens": tokens[:, :-1], "label": label, "counts": after[:, :-1] & (label > 0)}

    longest = max(len((de + " " + en).split()) for both in pairs.values() for de, en in both) + 2
    train = encode(pairs["train"])
    return Workload(
        "translation",
        partial(networks.transformer_parameters, vocabulary=len(words) + 3, width=48, depth=2,
                length=longest - 1),
        _all,
        _masked,
        train=train,
        fixed=take(train, slice(300)),
        test=encode(pairs["test"][:300]),
        batch=32,
        steps=250,
        mask=lambda batch: batch["counts"],
        told="German number words into English, 2 blocks of 48 features",
    )  # fmt: skip


def _masked(logits: Any, batch: Batch) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.sum(losses, where=batch["counts"]) / jnp.sum(batch["counts"])
