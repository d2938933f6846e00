"""The one list of staged problems on which the exact LQR is tested; float64, tiny."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llqr import lqr


@dataclass(frozen=True)
class Staged:
    """A staged model, parameters, inputs and a loss on its output array.

    Attributes:
      name: of the test's id.
      model: the stages.
      make: rng -> (params, inputs, labels).
      mask: rows that count, or None.
      damping: with which newton is convex.
      output: final state -> logits, where the final state is more than the logits.
    """

    name: str
    model: lqr.StagedModel
    make: Callable[[np.random.Generator], tuple[Any, Any, Any]]
    mask: tuple[bool, ...] | None = None
    damping: float = 30.0

    def build(self, seed: int = 0) -> tuple[Any, Any, Callable[[Any], Any]]:
        """Return (params, inputs, loss)."""
        params, inputs, labels = jax.tree.map(jnp.asarray, self.make(np.random.default_rng(seed)))
        weights = jnp.ones(labels.shape) if self.mask is None else jnp.asarray(self.mask, float)

        def loss(z: Any) -> Any:
            rows = -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], 1)[:, 0]
            return jnp.sum(jnp.where(weights > 0, rows, 0.0)) / jnp.sum(weights)

        return params, inputs, loss

    @property
    def rows(self) -> Any:
        """The mask as an array, or None."""
        return None if self.mask is None else jnp.asarray(self.mask)


def _dense(activation: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda p, x: activation(x @ p["w"] + p["b"])


def _chain(widths: list[int], batch: int, rank: int | None = None) -> Callable[..., Any]:
    """Make parameters, inputs and labels of a chain of dense layers named layer0, layer1, ..."""

    def make(rng: np.random.Generator) -> tuple[Any, Any, Any]:
        params = {}
        for i, (m, n) in enumerate(pairwise(widths)):
            w = rng.normal(size=(m, n)) / np.sqrt(m)
            if rank is not None:
                u, s, v = np.linalg.svd(w, full_matrices=False)
                w = (u[:, :rank] * s[:rank]) @ v[:rank]
            params[f"layer{i}"] = {"w": w, "b": 0.3 * rng.normal(size=n)}
        return params, rng.normal(size=(batch, widths[0])), np.arange(batch) % widths[-1]

    return make


def _layers(depth: int) -> list[tuple[str, Callable[[Any, Any], Any]]]:
    linear = lambda x: x  # noqa: E731
    return [(f"layer{i}", _dense(jnp.tanh if i < depth - 1 else linear)) for i in range(depth)]


def _passive() -> list[tuple[str, Callable[[Any, Any], Any]]]:
    first, second = _layers(2)
    return [
        ("shift", lambda _, x: x + 0.1),
        first,
        ("square", lambda _, x: x + 0.2 * x**2),
        ("twice", lambda _, x: 2.0 * x),
        second,
        ("log-softmax", lambda _, x: jax.nn.log_softmax(x)),
    ]


def _skip() -> list[tuple[str, Callable[[Any, Any], Any]]]:
    """A state of (main, skip)."""
    return [
        ("layer0", lambda p, x: (jnp.tanh(x @ p["w"] + p["b"]), x)),
        ("layer1", lambda p, s: (jnp.sin(s[0] @ p["w"] + p["b"]), s[0])),
        ("add", lambda _, s: s[0] + s[1]),
        ("layer2", _dense(lambda x: x)),
    ]


def _record() -> list[tuple[str, Callable[[Any, Any], Any]]]:
    """Integer tokens in, and an integer mask that travels along."""

    def embed(p: Any, tokens: Any) -> Any:
        return {"h": p["table"][tokens], "keep": (tokens > 0).astype(jnp.int32)}

    def mix(p: Any, s: Any) -> Any:
        kept = s["keep"][..., None].astype(s["h"].dtype)
        mean = jnp.sum(kept * s["h"], 1, keepdims=True) / jnp.sum(kept, 1, keepdims=True)
        return {"h": jnp.tanh(s["h"] @ p["w"] + mean), "keep": s["keep"]}

    return [("embed", embed), ("mix", mix), ("head", lambda p, s: s["h"][:, -1] @ p["w"])]


def _record_data(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    params = {
        "embed": {"table": rng.normal(size=(5, 3))},
        "mix": {"w": rng.normal(size=(3, 3))},
        "head": {"w": rng.normal(size=(3, 3))},
    }
    tokens = np.array([[0, 1, 2], [3, 0, 4], [1, 1, 3]])
    return params, tokens, np.array([0, 1, 2])


STAGED = [
    Staged("one stage", lqr.stages_from_functions(_layers(1)), _chain([3, 4], 4)),
    Staged("three stages", lqr.stages_from_functions(_layers(3)), _chain([3, 4, 5, 3], 4)),
    Staged("fourteen stages", lqr.stages_from_functions(_layers(14)), _chain([3] * 15, 3)),
    Staged("wide", lqr.stages_from_functions(_layers(2)), _chain([2, 9, 3], 3)),
    Staged("narrow", lqr.stages_from_functions(_layers(3)), _chain([4, 1, 4, 3], 4)),
    Staged("low rank", lqr.stages_from_functions(_layers(3)), _chain([3, 4, 4, 3], 4, rank=1)),
    Staged("passive", lqr.stages_from_functions(_passive()), _chain([3, 4, 3], 4)),
    Staged("skip", lqr.stages_from_functions(_skip()), _chain([3, 3, 3, 3], 4)),
    Staged("record", lqr.stages_from_functions(_record()), _record_data),
    Staged(
        "masked", lqr.stages_from_functions(_layers(2)), _chain([3, 4, 3], 4),
        mask=(True, False, True, True),
    ),
]  # fmt: skip


def _tied() -> list[tuple[str, Callable[[Any, Any], Any], tuple[str, ...]]]:
    """An embedding that is read twice more: alone, and beside parameters of a stage's own."""

    def embed(table: Any, tokens: Any) -> Any:
        return {"h": table[tokens], "tokens": tokens}

    def scores(p: Any, s: Any) -> Any:
        return {"h": jnp.tanh(s["h"] @ p["mix"]) + p["embed"][s["tokens"]] ** 2}

    def head(p: Any, s: Any) -> Any:
        return jnp.mean(s["h"], 1) @ p["embed"].T

    return [("embed", embed, ()), ("mix", scores, ("embed",)), ("head", head, ("embed",))]


def _tied_data(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    params = {"embed": rng.normal(size=(4, 3)), "mix": rng.normal(size=(3, 3))}
    return params, np.array([[0, 1, 2], [3, 0, 3], [1, 1, 3]]), np.array([0, 1, 2])


SHARED = [Staged("tied", lqr.stages_from_functions(_tied()), _tied_data)]
"""Problems where stages share parameters: all but the Riccati recursion."""
