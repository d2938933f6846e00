"""A task: data, model, objective and what is measured, from the config."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import llqr
from llqr._types import Array, Float, Params
from llqr.integrations.nnx import stages
from llqr_experiments import data
from llqr_experiments.models import MLP
from llqr_experiments.spec import Config


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
      name: "<dataset>_<architecture>".
      dataset: training and test split.
      params: initial parameters.
      objective: forward function and loss in float32, for refits and evaluation; batches are
        dicts of image and label, and of mask where some rows do not count.
      training: the same in the precision of training.
    """

    name: str
    dataset: data.Images
    params: Params
    objective: llqr.Objective
    training: llqr.Objective


def build(config: Config) -> Task:
    """Load the data and make the model.

    Raises:
      DataError: the data is missing, corrupt, empty or not what the config says.
    """
    dataset = data.images(**vars(config.dataset))
    features = int(np.prod(dataset.shape))
    model = MLP(
        features,
        config.architecture.hidden,
        dataset.num_classes,
        rngs=nnx.Rngs(config.init_key),
    )
    staged, params = stages(model.stages())
    forward = staged.as_forward(inputs=_flat_images)
    smoothing = config.label_smoothing

    def loss(outputs: Array, batch: dict[str, Array]) -> Float[Array, ""]:
        rows = cross_entropy(outputs, batch["label"], smoothing)
        if "mask" not in batch:
            return jnp.mean(rows)
        return jnp.sum(rows, where=batch["mask"]) / jnp.maximum(valid(batch), 1)

    name = f"{config.dataset.name}_{config.architecture.name}"
    objective = training = llqr.Objective(forward, loss, _mask)
    if config.precision == "bf16":
        training = llqr.Objective(_in_bfloat16(forward), loss, _mask)
    return Task(name, dataset, params, objective, training)


def _in_bfloat16(forward: Callable[..., Array]) -> Callable[..., Array]:
    """The same function computed in bfloat16, with outputs in float32."""

    def half(tree: Any) -> Any:
        floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if floating(x) else x, tree)

    return lambda params, batch: forward(half(params), half(batch)).astype(jnp.float32)


def _mask(batch: dict[str, Array]) -> Array | None:
    return batch.get("mask")


def valid(batch: dict[str, Array]) -> Float[Array, ""]:
    """Return how many rows of a batch count."""
    mask = batch.get("mask")
    return jnp.asarray(len(batch["label"]) if mask is None else jnp.sum(mask), jnp.float32)


def _flat_images(batch: dict[str, Array]) -> Array:
    images = batch["image"]
    return images.reshape(images.shape[0], -1)


def cross_entropy(
    log_probs: Float[Array, "rows classes"], labels: Array, smoothing: float = 0.0
) -> Float[Array, " rows"]:
    """Return the cross-entropy of each row, with the target (1 - s) onehot + s / classes."""
    targets = jax.nn.one_hot(labels, log_probs.shape[-1], dtype=log_probs.dtype)
    return optax.softmax_cross_entropy(log_probs, optax.smooth_labels(targets, smoothing))


def measure(outputs: Array, batch: dict[str, Any]) -> dict[str, Float[Array, ""]]:
    """Return sums over the rows that count: loss (no smoothing), correct answers, rows."""
    rows = batch.get("mask", jnp.ones(outputs.shape[0], bool))
    correct = jnp.argmax(outputs, -1) == batch["label"]
    return {
        "loss": jnp.sum(cross_entropy(outputs, batch["label"]), where=rows),
        "correct": jnp.sum(correct, where=rows, dtype=jnp.float32),
        "rows": jnp.sum(rows, dtype=jnp.float32),
    }


def examples(outputs: Array, batch: dict[str, Any]) -> dict[str, Float[Array, " rows"]]:
    """Return what histograms are made of: probability of the label and loss of every row."""
    loss = cross_entropy(outputs, batch["label"])
    return {"p_correct": jnp.exp(-loss), "nll": loss}
