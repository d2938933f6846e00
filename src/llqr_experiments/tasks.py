"""A task: data, model, objective and what is measured, from the config."""

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
      objective: forward function and training loss; batches are dicts of image and label.
    """

    name: str
    dataset: data.Dataset
    params: Params
    objective: llqr.Objective


def build(config: Config) -> Task:
    """Load the data and make the model.

    Raises:
      DataError: the data is missing, corrupt, empty or not what the config says.
    """
    dataset = data.load(
        config.dataset.name, config.dataset.dataset_dir, download=config.dataset.download
    )
    features = int(np.prod(dataset.train.images.shape[1:]))
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
        return jnp.mean(cross_entropy(outputs, batch["label"], smoothing))

    name = f"{config.dataset.name}_{config.architecture.name}"
    return Task(name, dataset, params, llqr.Objective(forward, loss))


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
    rows = batch.get("mask", jnp.ones(outputs.shape[0], bool)).astype(outputs.dtype)
    correct = jnp.argmax(outputs, -1) == batch["label"]
    return {
        "loss": jnp.sum(rows * cross_entropy(outputs, batch["label"])),
        "correct": jnp.sum(rows * correct),
        "rows": jnp.sum(rows),
    }
