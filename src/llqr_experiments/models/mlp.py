"""The multilayer perceptron of the papers."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from llqr import _types as t


class MLP(nnx.Module):
    """Flatten, then dense layers with ReLU between them, then log-softmax.

    Parameter groups are `layers_0`, `layers_2`, ...: every stage has a number, and the
    activations between the dense layers count.

    Args:
      features: size of a flattened input.
      hidden: widths of the hidden layers.
      classes: number of outputs.
      rngs: random streams; kernels are LeCun-normal, biases zero.

    Example:
      >>> import jax.numpy as jnp
      >>> model = MLP(64, (100, 300), 10, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)
    """

    def __init__(self, features: int, hidden: Sequence[int], classes: int, *, rngs: nnx.Rngs):
        widths = [features, *hidden, classes]
        self.dense = len(widths) - 1
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            setattr(self, f"layers_{2 * i}", nnx.Linear(fan_in, fan_out, rngs=rngs))

    def __call__(self, x: t.Float[t.Array, "batch ..."]) -> t.Float[t.Array, "batch classes"]:
        """Return log-probabilities."""
        x = x.reshape(x.shape[0], -1)
        for _, stage in self.stages():
            x = stage(x)
        return x

    def stages(self) -> list[tuple[str, Callable[[t.Array], t.Array]]]:
        """Return (name, module or function) in order, from flattened inputs."""
        parts: list[tuple[str, Callable[[t.Array], t.Array]]] = []
        for i in range(self.dense):
            parts.append((f"layers_{2 * i}", getattr(self, f"layers_{2 * i}")))
            parts.append((f"layers_{2 * i + 1}", nnx.relu))
        parts[-1] = (parts[-1][0], _log_softmax)
        return parts


def _log_softmax(logits: t.Array) -> t.Array:
    """Log-probabilities, in float32 at least: near certainty, half precision rounds them to 0."""
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
