"""A problem to train on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llqr

Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Workload:
    """Data, a network and a loss.

    Attributes:
      name: what it is asked for by.
      parameters: key -> initial parameters; leaves named kernel, bias, scale or embedding.
      forward: (parameters, batch) -> outputs.
      loss: (outputs, batch) -> mean loss over the rows.
      train: arrays of the training examples, one row each.
      fixed: examples that the training loss is measured on.
      test: examples of the test loss.
      batch: examples of a training batch; all of them, if there are no more.
      steps: of a run.
      metric: of the curvature: "ngd" for cross-entropy, "gaussian" for half a squared error; or one
        for each of several outputs.
      measure: the loss that tunes and that targets are set in.
      test_loss: (parameters, batch) -> what is measured on `test`; None: the loss.
      mask: batch -> the rows of the outputs that count; None: all.
      layered: whether each kernel is used once, as K-FAC needs it, and the loss one that it knows.
      float64: whether everything is double precision.
      held_out: whether it is of the test set: see `release`.
      told: one line for tables.
    """

    name: str
    parameters: Callable[[Any], Any]
    forward: Callable[[Any, Batch], Any]
    loss: Callable[[Any, Batch], Any]
    train: Batch
    fixed: Batch
    test: Batch
    batch: int
    steps: int
    metric: llqr.metrics.MetricLike = "ngd"
    measure: Literal["train", "test"] = "train"
    test_loss: Callable[[Any, Batch], Any] | None = None
    mask: Callable[[Batch], Any] | None = None
    layered: bool = True
    float64: bool = False
    held_out: bool = False
    told: str = ""

    @property
    def objective(self) -> llqr.Objective:
        """The objective, without a batch."""
        return llqr.Objective(self.forward, self.loss, mask=self.mask)

    @property
    def full_batch(self) -> bool:
        """Whether every step sees all examples."""
        return self.batch >= rows(self.train)

    @property
    def classes(self) -> bool:
        """Whether outputs are logits of classes, so that there is an accuracy."""
        return self.metric == "ngd"

    def size(self) -> int:
        """Return the number of parameters."""
        shapes = jax.eval_shape(self.parameters, jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(shapes))

    def initial(self, seed: int) -> Any:
        """Return the parameters of a seed, each array with a buffer of its own."""
        return jax.tree.map(jnp.copy, self.parameters(jax.random.key(seed)))

    def batches(self, seed: int, size: int | None = None) -> Iterator[Batch]:
        """Shuffled batches without end; what fills no batch at an epoch's end is left out."""
        count = rows(self.train)
        size = min(size or self.batch, count)
        if size == count:
            while True:
                yield self.train
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(count)
            for start in range(0, count - size + 1, size):
                yield take(self.train, order[start : start + size])

    def measured(self, params: Any, train: Batch, test: Batch) -> dict[str, Any]:
        """Return the losses on the fixed and on the test examples, and the accuracy on these."""
        outputs = self.forward(params, test)
        own = self.test_loss
        found = {
            "train": self.objective(params, train),
            "test": self.loss(outputs, test) if own is None else own(params, test),
        }
        return found | ({"accuracy": self.accuracy(outputs, test)} if self.classes else {})

    def accuracy(self, outputs: Any, batch: Batch) -> Any:
        """Return the share of rows, of those that count, whose likeliest class is their label."""
        right = outputs.argmax(-1) == batch["label"]
        return jnp.mean(right, where=None if self.mask is None else self.mask(batch))

    def shortened(self, factor: int) -> "Workload":
        """Return the same with fewer steps."""
        return replace(self, steps=max(10, self.steps // factor))


def rows(arrays: Batch) -> int:
    """Return how many examples there are."""
    return len(next(iter(arrays.values())))


def take(arrays: Batch, index: Any) -> Batch:
    """Return some of the examples."""
    return {name: values[index] for name, values in arrays.items()}


def cross_entropy(logits: Any, batch: Batch) -> Any:
    """Mean cross-entropy over rows."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def squared_error(outputs: Any, batch: Batch) -> Any:
    """Half the squared error of a row, as a mean over rows."""
    error = (outputs - batch["label"]) ** 2
    return 0.5 * error.reshape(len(error), -1).sum(-1).mean()
