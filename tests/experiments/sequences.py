"""Tiny transformers with their data, and the same models once more in plain numpy."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llqr_experiments.models import Network, make, network

PAD = 1


@dataclass(frozen=True)
class Case:
    """A tiny model with tokens and labels; labels that are PAD do not count."""

    name: str
    model: str
    shape: tuple[int, ...]
    classes: int
    options: dict[str, Any]
    inputs: Any
    labels: Any

    @cache  # noqa: B019
    def build(self) -> Network:
        net = network(make(self.model, self.shape, self.classes, seed=1, options=self.options))
        assert net.statistics == {}
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), net.params)
        return Network(net.model.bind({}), wide, {}, net.training)

    def batch(self) -> Any:
        x = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), self.inputs)
        return {"x": x, "y": jnp.asarray(self.labels, jnp.int32)}

    def __hash__(self) -> int:
        return hash(self.name)


TINY = {"width": 4, "heads": 2, "depth": 1}
TEXT = np.array([[4, 2, 3, 0], [5, 5, 0, 6]])
TEXT_LABELS = [2, 3, 0, PAD, 5, PAD, 6, 2]
SENTENCES = {
    "source": np.array([[4, 5, 7, 2], [PAD, PAD, 6, 2]]),
    "target_in": np.array([[2, 4, 3], [2, 5, PAD]]),
}
GPT = Case("gpt2", "gpt2-small", (4,), 7, TINY, TEXT, TEXT_LABELS)
TIED = {**TINY, "tied": True, "positions": "learned"}
GPT_TIED = Case("gpt2, tied", "gpt2-small", (4,), 7, TIED, TEXT, TEXT_LABELS)
TRANSLATION = Case(
    "translation", "transformer-iwslt-de-en", (), 7, {**TINY, "mlp": 6, "source_vocabulary": 8},
    SENTENCES, [4, 3, 2, 5, 2, PAD],
)  # fmt: skip
GROK = Case("grok", "grok-transformer", (4,), 5, {**TINY, "mlp": 6, "vocabulary": 7}, TEXT, [3, 2])
CASES = [GROK, GPT, GPT_TIED, TRANSLATION]


class Plain:
    """The models once more, in numpy, one example at a time: parameters in order of use."""

    def __init__(self, net: Network):
        owned = [net.params[name] for name in net.model.names if name in net.params]
        self.params = iter(jax.tree.map(np.asarray, owned))

    def dense(self, x, p=None):
        p = next(self.params) if p is None else p
        return x @ p["kernel"] + p.get("bias", 0.0)

    def norm(self, x):
        p = next(self.params)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p["scale"] + p.get("bias", 0.0)

    def attention(self, x, memory, keep, heads=2):
        p = next(self.params)
        q, k, v = (
            self.dense(y, p[n]) for y, n in ((x, "query"), (memory, "key"), (memory, "value"))
        )
        mixed = []
        for columns in np.split(np.arange(x.shape[1]), heads):
            scores = q[:, columns] @ k[:, columns].T / np.sqrt(len(columns))
            weights = np.exp(scores) * keep
            weights = weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)
            mixed.append(weights @ v[:, columns])
        return self.dense(np.concatenate(mixed, 1), p["out"])

    def causal_block(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, np.tri(len(x)))
        h = self.dense(self.norm(x))
        h = h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
        return x + self.dense(h)

    def post_block(self, x, attentions):
        for memory, keep in attentions:
            x = self.norm(x + self.attention(x, x if memory is None else memory, keep))
        return self.norm(x + self.dense(np.maximum(self.dense(x), 0)))


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def plain_text(case):
    """GPT-2 or the grokking transformer."""
    out = []
    for tokens in case.inputs:
        plain = Plain(case.build())
        table = next(plain.params)["embedding"]
        x = table[tokens] * 2.0  # sqrt(width)
        if case is GPT:
            angles = np.arange(4)[:, None] / np.array([1.0, 100.0])
            x = x + np.stack([np.sin(angles), np.cos(angles)], -1).reshape(4, 4)
        else:
            x = x + next(plain.params)["embedding"][: len(tokens)]
        x = plain.causal_block(x)
        if case is GROK:
            out.append(log_softmax(plain.dense(plain.norm(x.reshape(-1)))))
        elif case is GPT:
            out.extend(log_softmax(plain.dense(plain.norm(x), next(plain.params)["lm_head"])))
        else:
            out.extend(log_softmax(plain.norm(x) @ table.T))
    return np.stack(out)


def plain_translation(case):
    def place(table, tokens):
        real = tokens != PAD
        index = np.cumsum(real)[:, None] + 1
        waves = np.concatenate([f(index / np.array([1, 10_000])) for f in (np.sin, np.cos)], 1)
        return table[tokens] * 2.0 + waves * real[:, None]

    out = []
    for source, target in zip(*case.inputs.values(), strict=True):
        plain = Plain(case.build())
        seen = source != PAD
        memory = place(next(plain.params)["embedding"], source)
        memory = plain.post_block(memory, [(None, seen)])
        table = next(plain.params)["embedding"]
        own = np.tri(len(target)) * (target != PAD)
        x = plain.post_block(place(table, target), [(None, own), (memory, seen)])
        out.extend(log_softmax(x @ table.T))
    return np.stack(out)
