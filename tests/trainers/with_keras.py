"""Keras on JAX (KERAS_BACKEND=jax): fit trains a network on handwritten digits.

Keras takes optimizers of its own alone: a class of twenty lines holds one of optax.
"""

from typing import Any

import jax
import keras
import numpy as np
import optax
from compare import compare
from sklearn.datasets import load_digits


class FromOptax(keras.optimizers.Optimizer):
    """An optax optimizer, its state in variables of Keras."""

    def __init__(self, tx: optax.GradientTransformation) -> None:
        super().__init__(learning_rate=1.0)  # the rate is in tx
        self.tx = tx

    def build(self, variables: list[Any]) -> None:
        super().build(variables)
        leaves, self.form = jax.tree.flatten(self.tx.init({v.path: v.value for v in variables}))
        self.state = [self.add_variable(x.shape, dtype=x.dtype.name) for x in leaves]
        for variable, x in zip(self.state, leaves, strict=True):
            variable.assign(x)

    def _backend_update_step(self, grads: list[Any], variables: list[Any], rate: Any) -> None:
        params = {v.path: v.value for v in variables}
        state = self.form.unflatten([variable.value for variable in self.state])
        updates, state = self.tx.update(dict(zip(params, grads, strict=True)), state, params)
        for variable in variables:
            variable.assign_add(updates[variable.path])
        for variable, x in zip(self.state, jax.tree.leaves(state), strict=True):
            variable.assign(x)


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    """Return the mean cross-entropy of all digits before and after."""
    images, y = load_digits(return_X_y=True)
    x = (images / 16.0).astype(np.float32)
    keras.utils.set_random_seed(seed)

    relu = keras.layers.Dense(64, activation="relu")
    model = keras.Sequential([keras.Input((64,)), relu, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=FromOptax(optimizer), loss=loss)
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, batch_size=128, epochs=10, verbose=0)

    return before, model.evaluate(x, y, verbose=0)


if __name__ == "__main__":
    compare(train)
