"""jaxopt's OptaxSolver: a network of two layers on handwritten digits, in batches."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from compare import compare
from jaxopt import OptaxSolver
from sklearn.datasets import load_digits

STEPS = 150


def loss(params: dict[str, jax.Array], data: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = data
    logits = jnp.tanh(x @ params["hidden"]) @ params["out"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16.0, jnp.float32), jnp.asarray(labels)
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "hidden": jax.random.normal(keys[0], (64, 64)) / 8.0,
        "out": jax.random.normal(keys[1], (64, 10)) / 8.0,
        "bias": jnp.zeros(10),
    }

    def batches() -> Iterator[tuple[jax.Array, jax.Array]]:
        for rows in jax.random.randint(keys[2], (STEPS, 128), 0, len(x)):
            yield x[rows], y[rows]

    solver = OptaxSolver(loss, opt=optimizer, maxiter=STEPS)
    trained, state = solver.run_iterator(params, batches())

    return float(loss(params, (x, y))), float(loss(trained, (x, y)))


if __name__ == "__main__":
    compare(train, adam=(3e-3, 1e-2, 3e-2), llqr=(3e-3, 1e-2, 3e-2))
