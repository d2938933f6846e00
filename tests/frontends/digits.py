"""The problem of the front-end tests: scikit-learn's handwritten digits, a few hundred of them."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

BATCH = 64
EXAMPLES = 320


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.images[:EXAMPLES] / 16.0, data.target[:EXAMPLES]


def batches(count: int, dtype: Any = np.float32) -> list[dict[str, Any]]:
    """Return `count` batches of images [64, 8, 8, 1] and labels [64], the set over and over."""
    x, y = _digits()
    made = []
    for i in range(count):
        rows = (np.arange(BATCH) + i * BATCH) % EXAMPLES
        made.append(
            {"x": jnp.asarray(x[rows, :, :, None], dtype), "y": jnp.asarray(y[rows], jnp.int32)}
        )
    return made


def flat(batch: dict[str, Any]) -> Any:
    """Return the images as rows [64, 64]."""
    return batch["x"].reshape(batch["x"].shape[0], -1)


def cross_entropy(logits: Any, batch: dict[str, Any]) -> Any:
    """Return the mean cross-entropy."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def assert_refit(info: Any, number: int) -> None:
    """Assert that refit `number` happened, decreased Phi and was installed.

    A block whose share of g.Pg turned negative may have kept its old arrays.
    """
    assert int(info.refits) == number
    assert int(info.count("nonfinite")) == int(info.count("rejected")) == 0
    assert float(info.objective_after) < float(info.objective_before)


def assert_same_step(tree: Any, expected: Any, rtol: float = 1e-11) -> None:
    """Assert that two steps of one model agree to float64 rounding, leaf by leaf."""
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(expected)
    assert len(leaves) == len(others)
    scale = max(np.abs(np.asarray(x)).max() for x in others)
    for a, b in zip(leaves, others, strict=True):
        assert a.dtype == b.dtype == jnp.float64
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=rtol * scale)
