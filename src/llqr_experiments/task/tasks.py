"""A task: data, model, objective and what is measured, from the config."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import llqr
from llqr.typing import Array, Bool, Float, Params, PyTree
from llqr_experiments import models
from llqr_experiments.config.names import OF_NUMBERS
from llqr_experiments.config.options import Architecture, Config
from llqr_experiments.data import IGNORE, kinds
from llqr_experiments.data.material import Material
from llqr_experiments.errors import ConfigError
from llqr_experiments.models.decoding import Decoder

STATISTICS = "statistics"
"""The key of a bound batch under which the model's running statistics travel."""

KEY = "key"
"""The key of a bound batch under which the random key of dropout travels."""


class Carry(NamedTuple):
    """What one micro-batch hands on to the next."""

    statistics: PyTree  # running statistics of the model
    key: Array  # of dropout
    sums: dict[str, Array]  # over the rows so far, see `measure`


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
      name: "<dataset>_<architecture>".
      material: data and its streams.
      params: initial parameters.
      statistics: running statistics of the model before training; empty without batch norm.
      objective: inference in float32, for refits and evaluation. Batches are dicts of inputs and
        label, of mask where some examples do not count, and of statistics: see `bound`.
      decoder: what a beam search asks of a model of translation; None for others.
      training: `(params, batch, carry) -> (loss, carry)` in the mode and precision of training.
      probing: the same network as an objective, so that a streaming refit shares the forward pass
        of the step; its batches carry the key of dropout too.
    """

    name: str
    material: Material
    params: Params
    statistics: PyTree
    objective: llqr.Objective
    training: Callable[[Params, dict[str, Array], Carry], tuple[Array, Carry]]
    probing: llqr.Objective
    decoder: Decoder | None = None


def build(config: Config, made: Material | None = None) -> Task:
    """Make the model for some data; None: load what the config names.

    Raises:
      ConfigError: data or model cannot be made as they are asked for.
      DataError: the data is missing, corrupt, empty or not what the config says.
    """
    made = kinds.make(config.dataset) if made is None else made
    name = config.architecture.name
    _check_fit(name, made)
    options = made.options | architecture_options(config.architecture)
    model = models.make(name, made.shape, made.classes, seed=config.init_key, options=options)
    title = f"{config.dataset.name}_{name}"
    _check_answers(config, made)
    return assemble(
        title, made, model, smoothing=config.label_smoothing, precision=config.precision
    )


def assemble(
    name: str,
    made: Material,
    model: models.Staged,
    *,
    smoothing: float = 0.0,
    precision: str = "float32",
) -> Task:
    """Return the task of a model on some data.

    Args:
      name: of the task.
      made: data; of its streams, nothing is asked.
      model: of a kind that takes such data.
      smoothing: of the labels in the loss.
      precision: of training, as in the config; float64 is for all, and needs `wide`.
    """
    network = models.network(model)
    if precision == "float64":
        network = replace(
            network,
            params=_cast(network.params, jnp.float64),
            statistics=_cast(network.statistics, jnp.float64),
        )

    def loss(outputs: Array, batch: dict[str, Array]) -> Float[Array, ""]:
        rows = losses(outputs, batch, smoothing)
        kept = keep(batch)
        if kept is None:
            return jnp.mean(rows)
        return jnp.sum(rows, where=kept) / jnp.maximum(jnp.sum(kept), 1)

    forward = network.model.as_forward(made.inputs, context=lambda batch: batch[STATISTICS])
    objective = llqr.Objective(forward, loss, keep, _batch_axes)
    run = _running(network, made.inputs, precision == "bf16")
    training = _training(run, loss)
    probing = llqr.Objective(
        lambda params, batch: run(params, batch[STATISTICS], batch[KEY], batch)[0], loss, keep
    )
    decoder = models.translation.decoder(model) if kinds.KINDS[made.kind].decoded else None
    return Task(
        name, made, network.params, network.statistics, objective, training, probing, decoder
    )


def _check_fit(name: str, made: Material) -> None:
    if name in models.MODELS and models.MODELS[name].takes != made.kind:
        fitting = [key for key, model in models.MODELS.items() if model.takes == made.kind]
        raise ConfigError(
            f"architecture={name} is for {models.MODELS[name].takes}, and {made.name} holds "
            f"{made.kind}: choose {', '.join(fitting)}, or another dataset."
        )


def architecture_options(architecture: Architecture) -> dict[str, Any]:
    """Return the options of a model that are given."""
    values = {f.name: getattr(architecture, f.name) for f in fields(architecture)}
    return {name: value for name, value in values.items() if name != "name" and value is not None}


def _check_answers(config: Config, made: Material) -> None:
    """Whether loss and metric are those of numbers, where labels are numbers."""
    if not kinds.KINDS[made.kind].numeric:
        return
    if config.label_smoothing:
        raise ConfigError(
            f"label_smoothing={config.label_smoothing} is for classes; {made.name} has numbers."
        )
    curved = config.use_preconditioner or config.exact_steps
    if curved and config.divergence not in OF_NUMBERS:
        raise ConfigError(
            f"divergence={config.divergence} is for classes; {made.name} has numbers: choose "
            f"{', '.join(OF_NUMBERS)}."
        )


def wide(config: Config) -> AbstractContextManager[Any]:
    """Return the context that a run in float64 is made, forecast and measured in."""
    return jax.enable_x64(True) if config.precision == "float64" else nullcontext()


def _running(network: models.Network, inputs: Callable[..., Any], half: bool) -> Any:
    """The network in training mode, in bfloat16 or not; outputs and statistics in float32."""

    def run(params: Params, statistics: PyTree, key: Array, batch: dict[str, Array]) -> Any:
        given = inputs(batch)
        if half:
            params, given = _cast(params, jnp.bfloat16), _cast(given, jnp.bfloat16)
        outputs, statistics = network.training(params, statistics, key, given)
        return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32)), statistics

    return run


def _training(run: Any, loss: Callable[..., Array]) -> Any:
    """The loss of training, and what a micro-batch hands on."""

    def training(params: Params, batch: dict[str, Array], carry: Carry) -> tuple[Array, Carry]:
        statistics, key, sums = carry
        outputs, statistics = run(params, statistics, key, batch)
        sums = jax.tree.map(jnp.add, sums, measure(outputs, batch))
        return loss(outputs, batch), Carry(statistics, jax.random.fold_in(key, 1), sums)

    return training


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating-point arrays in another precision."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(dtype) if floating(x) else x, tree)


def bound(task: Task, batch: dict[str, Any], statistics: PyTree) -> llqr.BoundObjective:
    """Return the objective on a batch, with the model's running statistics."""
    return task.objective.bind({**batch, STATISTICS: statistics})


def _batch_axes(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: None if name in (STATISTICS, KEY) else 0 for name in batch}


def keep(batch: dict[str, Array]) -> Bool[Array, " rows"] | None:
    """Return which rows of the outputs count; None: all of them."""
    label, mask = batch["label"], batch.get("mask")
    if label.ndim == 1:
        return mask
    kept = label != IGNORE
    if mask is not None:
        kept = kept & mask.reshape(-1, *[1] * (label.ndim - 1))
    return kept.reshape(-1)


def valid(batch: dict[str, Array], *_: Any) -> Float[Array, ""]:
    """Return how many rows of a batch count."""
    kept = keep(batch)
    return jnp.asarray(batch["label"].size if kept is None else jnp.sum(kept), jnp.float32)


def is_numeric(batch: dict[str, Any]) -> bool:
    """Whether labels are numbers, which outputs are to equal, and not classes."""
    return bool(jnp.issubdtype(batch["label"].dtype, jnp.floating))


def losses(
    outputs: Array, batch: dict[str, Array], smoothing: float = 0.0
) -> Float[Array, " rows"]:
    """Return the loss of each row: half a square for numbers, the cross-entropy for classes.

    Both are negative log-likelihoods, of a normal distribution but for a constant.
    """
    labels = batch["label"].reshape(-1)
    if is_numeric(batch):
        return 0.5 * (outputs - labels) ** 2
    return cross_entropy(outputs, labels, smoothing)


def cross_entropy(
    log_probs: Float[Array, "rows classes"], labels: Array, smoothing: float = 0.0
) -> Float[Array, " rows"]:
    """Return the cross-entropy of each row, with the target (1 - s) onehot + s / classes."""
    targets = jax.nn.one_hot(labels, log_probs.shape[-1], dtype=log_probs.dtype)
    return optax.softmax_cross_entropy(log_probs, optax.smooth_labels(targets, smoothing))


CLASSES, NUMBERS = ("loss", "correct", "rows"), ("loss", "squares", "rows")


def sums_of(batch: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of what `measure` returns for such a batch."""
    return NUMBERS if is_numeric(batch) else CLASSES


def measure(outputs: Array, batch: dict[str, Any]) -> dict[str, Float[Array, ""]]:
    """Return sums over the rows that count.

    Returns:
      "loss", without smoothing; of classes "correct", right answers; of numbers "squares", of the
      labels; "rows".
    """
    labels, rows = batch["label"].reshape(-1), keep(batch)
    rows = jnp.ones(labels.shape, bool) if rows is None else rows
    loss = jnp.sum(losses(outputs, batch), where=rows)
    count = jnp.sum(rows, dtype=jnp.float32)
    if is_numeric(batch):
        return {"loss": loss, "squares": jnp.sum(labels**2, where=rows), "rows": count}
    correct = jnp.argmax(outputs, -1) == labels
    return {
        "loss": loss, "correct": jnp.sum(correct, where=rows, dtype=jnp.float32), "rows": count,
    }  # fmt: skip


def examples(outputs: Array, batch: dict[str, Any]) -> dict[str, Float[Array, " rows"]]:
    """Return what histograms are made of: loss of every row, and probability of its class."""
    loss = losses(outputs, batch)
    if is_numeric(batch):
        return {"nll": loss}
    return {"p_correct": jnp.exp(-loss), "nll": loss}
