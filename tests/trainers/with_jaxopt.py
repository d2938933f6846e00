"""jaxopt's OptaxSolver: a network of two layers on handwritten digits, in batches."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from compare import compare
from jaxopt import OptaxSolver
from sklearn.datasets import load_digits

Batch = tuple[jax.Array, jax.Array]


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    """Return the mean cross-entropy of all digits before and after."""
    images, labels = load_digits(return_X_y=True)
    digits = jnp.asarray(images / 16.0, jnp.float32), jnp.asarray(labels)
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "hidden": jax.random.normal(keys[0], (64, 64)) / 8.0,
        "out": jax.random.normal(keys[1], (64, 10)) / 8.0,
        "bias": jnp.zeros(10),
    }
    batches = drawn(digits, keys[2])

    def loss(params: dict[str, jax.Array], data: Batch) -> jax.Array:
        x, y = data
        logits = jnp.tanh(x @ params["hidden"]) @ params["out"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    solver = OptaxSolver(loss, opt=optimizer, maxiter=150)
    trained, state = solver.run_iterator(params, batches)

    assert state.iter_num == 150
    return float(loss(params, digits)), float(loss(trained, digits))


def drawn(examples: Batch, key: jax.Array) -> Iterator[Batch]:
    """Yield batches of 128 for ever."""
    x, y = examples
    while True:
        key, own = jax.random.split(key)
        rows = jax.random.randint(own, (128,), 0, len(x))
        yield x[rows], y[rows]


if __name__ == "__main__":
    compare(train)
