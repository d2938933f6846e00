"""Six whole models, written as their authors would, by AdamW and by `llqr.streaming`.

    OPENBLAS_NUM_THREADS=1 uv run python -m benchmarks.first_hour           # all: minutes each
    OPENBLAS_NUM_THREADS=1 uv run python -m benchmarks.first_hour unet gnn  # some; others are kept
    uv run python -m benchmarks.first_hour unet --quick                     # does it run?
    uv run python -m benchmarks.first_hour report                           # a Markdown table

Nothing is adapted to the library beyond what its documentation says of each framework: no rule for
a leaf is written by hand, all options are the defaults. Three optimizers have three rates each, as
many steps, and the same batches from the same start:

    AdamW       optax.adamw(rate)
    probes      llqr.streaming(rate), `update` with the objective; one compiled step with a refit
                and one without, of which `llqr.Streaming.is_due` takes one
    gradients   llqr.streaming(rate, refit=llqr.Streaming(probe="gradient")) in the loop of AdamW

The loss of a training is the mean of its last ten steps; each optimizer's best rate counts. Times
are those of steps without a refit, as medians of 20 of each optimizer in turns. What the library
said of the layouts it found (`llqr.errors.LayoutWarning`) is kept with the results.
"""

import argparse
import json
import math
import pydoc_data.topics
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits, make_moons

import llqr
import llqr.integrations.equinox as llqr_eqx
import llqr.integrations.linen as llqr_linen
import llqr.integrations.nnx as llqr_nnx
from benchmarks.reporting import RESULTS, environment, show, write
from benchmarks.suite.tables import markdown
from llqr.errors import LayoutWarning

METHODS = ("AdamW", "probes", "gradients")
PARTS = (*METHODS, "times")
NAME = "first_hour"
LAST = 10
"""Steps at the end of a training whose mean loss counts."""


class Method(NamedTuple):
    """An optimizer at a rate, and what a loop passes to its `update`.

    Attributes:
      name: one of `METHODS`.
      rate: the learning rate.
      options: of the optimizer, beside what the model's framework and loss ask for.
    """

    name: str
    rate: float
    options: dict[str, Any] = {}  # noqa: RUF012

    def optimizer(self, **options: Any) -> Any:
        """Return the optimizer.

        Args:
          **options: of `llqr.streaming` where it has an objective: metric, structure.
        """
        if self.name == "AdamW":
            return optax.adamw(self.rate, **self.options)
        if self.name == "probes":
            return llqr.streaming(self.rate, **{**options, **self.options})
        refit = llqr.Streaming(probe="gradient")
        return llqr.streaming(self.rate, **{"refit": refit, **self.options})

    def extra(self, bind: Callable[[], Any], due: bool) -> dict[str, Any]:
        """Return the keywords of `update` in one step."""
        return {"objective": bind(), "refresh": due} if self.name == "probes" else {}


class Loop(NamedTuple):
    """A training at its start.

    Attributes:
      carry: what goes from step to step.
      step: (carry, batch, due) -> (carry, loss), compiled.
      params: carry -> parameters.
      score: carry -> what counts beside the loss; None where nothing does.
    """

    carry: Any
    step: Callable[..., tuple[Any, Any]]
    params: Callable[[Any], Any]
    score: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Model:
    """A model with its data.

    Attributes:
      title: of its row.
      begin: (method, seed) -> the training at its start.
      batches: seed -> (step -> batch).
      steps: of a training.
      rates: the same for all methods.
      score: name of what counts beside the loss.
    """

    title: str
    begin: Callable[[Method, int], Loop]
    batches: Callable[[int], Callable[[int], Any]]
    steps: int
    rates: tuple[float, ...]
    score: str = ""


# 1. A U-Net that predicts noise: Flax NNX, nnx.Optimizer.


class ResBlock(nnx.Module):
    """Two convolutions, with the time between them."""

    def __init__(self, inputs: int, outputs: int, time: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.GroupNorm(inputs, num_groups=8, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs)
        self.time = nnx.Linear(time, outputs, rngs=rngs)
        self.norm2 = nnx.GroupNorm(outputs, num_groups=8, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), rngs=rngs)
        self.skip = nnx.Conv(inputs, outputs, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """(images, embedded times) -> images."""
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = h + self.time(nnx.silu(time))[:, None, None, :]
        return self.skip(x) + self.conv2(nnx.silu(self.norm2(h)))


class UNet(nnx.Module):
    """8x8 -> 4x4 -> 8x8, with a skip connection and an embedding of the time."""

    def __init__(self, width: int = 16, time: int = 64, *, rngs: nnx.Rngs):
        self.frequencies = time // 4
        self.time_mlp = nnx.Sequential(
            nnx.Linear(time // 2, time, rngs=rngs), nnx.silu, nnx.Linear(time, time, rngs=rngs)
        )
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.encoder = ResBlock(width, width, time, rngs=rngs)
        self.down = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs)
        self.middle = ResBlock(2 * width, 2 * width, time, rngs=rngs)
        self.up = nnx.ConvTranspose(2 * width, width, (2, 2), strides=(2, 2), rngs=rngs)
        self.decoder = ResBlock(2 * width, width, time, rngs=rngs)
        self.norm = nnx.GroupNorm(width, num_groups=8, rngs=rngs)
        self.head = nnx.Conv(width, 1, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """(images, times) -> the noise in them."""
        angles = t[:, None] * jnp.exp(jnp.linspace(0.0, jnp.log(1000.0), self.frequencies))
        time = self.time_mlp(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        skip = self.encoder(self.stem(x), time)
        h = self.middle(self.down(skip), time)
        h = self.decoder(jnp.concatenate([self.up(h), skip], axis=-1), time)
        return self.head(nnx.silu(self.norm(h)))


def noise_loss(predicted: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean squared error of the noise."""
    return jnp.mean((predicted - batch["noise"]) ** 2)


def denoise(model: UNet, batch: dict[str, jax.Array]) -> jax.Array:
    """The noise in a batch."""
    return model(batch["x"], batch["t"])


def unet(method: Method, seed: int) -> Loop:
    """The U-Net in its loop."""
    model = UNet(rngs=nnx.Rngs(seed))
    objective = llqr_nnx.objective(model, denoise, noise_loss)
    optimizer = nnx.Optimizer(model, method.optimizer(metric="gaussian"), wrt=nnx.Param)

    @partial(nnx.jit, static_argnames="due")
    def step(model: UNet, optimizer: nnx.Optimizer, batch: Any, due: bool) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda m: noise_loss(denoise(m, batch), batch))(model)
        extra = method.extra(lambda: llqr_nnx.bind(objective, model, batch), due)
        optimizer.update(model, grads, **extra)
        return loss

    def act(carry: Any, batch: Any, due: bool) -> tuple[Any, Any]:
        run: Any = step
        return carry, run(*carry, batch, due=due)

    return Loop((model, optimizer), act, lambda carry: nnx.state(carry[0], nnx.Param))


def noisy_digits(seed: int) -> Callable[[int], Any]:
    """Digits with noise, by a cosine schedule."""
    digits: Any = load_digits()
    images = jnp.asarray(digits.images[..., None] / 8 - 1, jnp.float32)

    @jax.jit
    def batch(step: Any) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed + 1), step), 3)
        x = images[jax.random.randint(keys[0], (32,), 0, len(images))]
        t = jax.random.uniform(keys[1], (32,))
        noise = jax.random.normal(keys[2], x.shape)
        angle = (t * jnp.pi / 2)[:, None, None, None]
        return {"x": jnp.cos(angle) * x + jnp.sin(angle) * noise, "t": t, "noise": noise}

    return batch


# 2. A graph network with segment sums: a dict of parameters, one graph in a batch.

NODES, EDGES, CLASSES, FEATURES, HIDDEN = 400, 1200, 4, 16, 32


def linear(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """The parameters of a layer, as Haiku names them."""
    return {"w": jax.random.normal(key, (inputs, outputs)) / inputs**0.5, "b": jnp.zeros(outputs)}


def affine(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A layer."""
    return x @ layer["w"] + layer["b"]


def graph_parameters(key: jax.Array) -> Any:
    """An encoder, two rounds of messages, a readout."""
    keys = iter(jax.random.split(key, 8))
    params = {"encoder": linear(next(keys), FEATURES, HIDDEN)}
    for i in range(2):
        params[f"message_{i}"] = linear(next(keys), 2 * HIDDEN, HIDDEN)
        params[f"update_{i}"] = linear(next(keys), 2 * HIDDEN, HIDDEN)
    return {**params, "readout": linear(next(keys), HIDDEN, CLASSES)}


def node_logits(params: Any, graph: dict[str, jax.Array]) -> jax.Array:
    """The classes of all nodes."""
    h = jax.nn.relu(affine(params["encoder"], graph["nodes"]))
    senders, receivers = graph["senders"], graph["receivers"]
    degree = jax.ops.segment_sum(jnp.ones(len(senders)), receivers, NODES)
    for i in range(2):
        pairs = jnp.concatenate([h[senders], h[receivers]], axis=-1)
        messages = jax.nn.relu(affine(params[f"message_{i}"], pairs))
        total = jax.ops.segment_sum(messages, receivers, NODES)
        mean = total / jnp.maximum(degree, 1.0)[:, None]
        update = affine(params[f"update_{i}"], jnp.concatenate([h, mean], axis=-1))
        h = h + jax.nn.relu(update)
    return affine(params["readout"], h)


def node_loss(logits: jax.Array, graph: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy of the nodes whose labels are known."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, graph["labels"])
    return jnp.sum(losses * graph["train"]) / jnp.sum(graph["train"])


def block_graph(seed: int) -> dict[str, jax.Array]:
    """A stochastic block model with four communities and noisy features; a quarter is labelled."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=NODES)
    first, second = np.triu_indices(NODES, 1)
    chance = np.where(labels[first] == labels[second], 3.0, 1.0)
    edges = rng.choice(len(first), size=EDGES, replace=False, p=chance / chance.sum())
    senders = np.concatenate([first[edges], second[edges]])
    receivers = np.concatenate([second[edges], first[edges]])
    centres = rng.normal(size=(CLASSES, FEATURES))
    nodes = 0.5 * centres[labels] + rng.normal(size=(NODES, FEATURES))
    return {
        "nodes": jnp.asarray(nodes, jnp.float32),
        "senders": jnp.asarray(senders),
        "receivers": jnp.asarray(receivers),
        "labels": jnp.asarray(labels),
        "train": jnp.asarray(rng.permutation(NODES) < NODES // 4),
    }


def held_out_accuracy(params: Any, graph: dict[str, jax.Array]) -> jax.Array:
    """The share of right answers among the nodes whose labels are not known."""
    right = jnp.argmax(node_logits(params, graph), axis=-1) == graph["labels"]
    return jnp.sum(right & ~graph["train"]) / jnp.sum(~graph["train"])


node_objective = llqr.Objective(node_logits, node_loss, mask=lambda graph: graph["train"])


def plain_loop(
    method: Method, objective: llqr.Objective, params: Any, metric: str, score: Any = None
) -> Loop:
    """The loop that a dict of parameters has."""
    tx = method.optimizer(metric=metric)

    @partial(jax.jit, static_argnames="due")
    def step(carry: Any, batch: Any, due: bool) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, grads = jax.value_and_grad(objective)(params, batch)
        extra = method.extra(lambda: objective.bind(batch), due)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    found = None if score is None else lambda carry: score(carry[0])
    return Loop((params, tx.init(params)), step, lambda carry: carry[0], found)


def gnn(method: Method, seed: int) -> Loop:
    """The graph network in its loop."""
    score = partial(held_out_accuracy, graph=block_graph(seed))
    return plain_loop(method, node_objective, graph_parameters(jax.random.key(seed)), "ngd", score)


def whole_graph(seed: int) -> Callable[[int], Any]:
    """The same graph in every step."""
    graph = block_graph(seed)
    return lambda step: graph


# 3. A physics-informed network: Equinox, the wave equation, float32.

SLABS, IN_SLAB, CAUSALITY = 16, 16, 1e-3


def solution(t: jax.Array, x: jax.Array) -> jax.Array:
    """A standing wave."""
    return jnp.sin(jnp.pi * x) * jnp.cos(jnp.pi * t)


def displacement(mlp: eqx.nn.MLP, t: jax.Array, x: jax.Array) -> jax.Array:
    """The network with its conditions built in: both ends held, at rest at t = 0."""
    return jnp.sin(jnp.pi * x) + t**2 * x * (1 - x) * mlp(jnp.stack([t, x]))


def residuals(mlp: eqx.nn.MLP, points: jax.Array) -> jax.Array:
    """u_tt - u_xx at points (slab of time, point, (t, x))."""

    def at(point: jax.Array) -> jax.Array:
        u = partial(displacement, mlp)
        return jax.grad(jax.grad(u, 0), 0)(*point) - jax.grad(jax.grad(u, 1), 1)(*point)

    return jax.vmap(jax.vmap(at))(points)


def causal_loss(residual: jax.Array, points: jax.Array) -> jax.Array:
    """Mean square of residuals, each slab weighed by what was learned of those before it."""
    del points
    slabs = jnp.mean(residual**2, axis=1)
    before = jnp.cumsum(slabs) - slabs
    return jnp.mean(jax.lax.stop_gradient(jnp.exp(-CAUSALITY * before)) * slabs)


def pinn(method: Method, seed: int) -> Loop:
    """The wave in its loop. Its loss is told without the causal weights, which are low at first."""
    model = eqx.nn.MLP(2, "scalar", 64, 3, jnp.tanh, key=jax.random.key(seed))
    objective = llqr_eqx.objective(model, residuals, causal_loss)
    tx = method.optimizer(metric="gaussian", structure=llqr_eqx.rules("auto", model))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(carry: Any, points: jax.Array, due: bool) -> tuple[Any, jax.Array]:
        model, state = carry

        def loss(model: eqx.nn.MLP) -> tuple[jax.Array, jax.Array]:
            found = residuals(model, points)
            return causal_loss(found, points), jnp.mean(found**2)

        (_, told), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        extra = method.extra(lambda: objective.bind(points), due)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, **extra)
        return (eqx.apply_updates(model, updates), state), told

    def params(carry: Any) -> Any:
        return eqx.filter(carry[0], eqx.is_inexact_array)

    return Loop((model, state), step, params, lambda carry: wave_error(carry[0]))


def wave_error(mlp: eqx.nn.MLP) -> jax.Array:
    """The relative error in the mean square sense."""
    t, x = map(jnp.ravel, jnp.meshgrid(jnp.linspace(0, 1, 33), jnp.linspace(0, 1, 33)))
    wrong = jax.vmap(partial(displacement, mlp))(t, x) - solution(t, x)
    return jnp.linalg.norm(wrong) / jnp.linalg.norm(solution(t, x))


def collocation(seed: int) -> Callable[[int], Any]:
    """Random points, by slabs of time."""

    @jax.jit
    def batch(step: Any) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed + 1), step)
        found = jax.random.uniform(key, (SLABS, IN_SLAB, 2))
        return found.at[..., 0].set((jnp.arange(SLABS)[:, None] + found[..., 0]) / SLABS)

    return batch


# 4. A transformer: Flax Linen, its layers scanned and rematerialised.


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """As `nn.scan` wants it: (carry, mask) -> (carry, nothing)."""
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(h, h, mask=mask)
        h = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(h)), None


class Transformer(nn.Module):
    """Characters -> logits of the next ones."""

    characters: int
    width: int = 64
    layers: int = 4
    length: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(tokens [batch, length]) -> logits."""
        x = nn.Embed(self.characters, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.layers,
        )
        x, _ = stack()(x, nn.make_causal_mask(tokens))
        return nn.Dense(self.characters)(nn.LayerNorm()(x))


def next_loss(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy of the next characters."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def characters() -> tuple[np.ndarray, int]:
    """Python's language reference, which comes with Python, and how many characters it has."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    letters = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
    used, tokens = np.unique(letters, return_inverse=True)
    return tokens.astype(np.int32), len(used)


def transformer(method: Method, seed: int) -> Loop:
    """The transformer in its loop, with a TrainState."""
    tokens, count = characters()
    net = Transformer(count)
    variables = net.init(jax.random.key(seed), jnp.asarray(tokens[None, : net.length]))
    objective = llqr_linen.objective(lambda v, batch: net.apply(v, batch["x"]), next_loss)
    state = TrainState.create(
        apply_fn=net.apply, params=variables["params"], tx=method.optimizer(metric="ngd")
    )

    @partial(jax.jit, static_argnames="due")
    def step(state: TrainState, batch: Any, due: bool) -> tuple[TrainState, jax.Array]:
        def loss(params: Any) -> jax.Array:
            return next_loss(state.apply_fn({"params": params}, batch["x"]), batch)

        value, grads = jax.value_and_grad(loss)(state.params)
        extra = method.extra(lambda: llqr_linen.bind(objective, batch), due)
        if not extra:
            return state.apply_gradients(grads=grads), value
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value

    return Loop(state, step, lambda state: state.params)


def windows(seed: int) -> Callable[[int], Any]:
    """Windows of the text, and the characters after each."""
    tokens, _ = characters()
    rng, length = np.random.default_rng(seed + 1), Transformer.length
    starts = rng.integers(len(tokens) - length, size=(1000, 8))
    found = tokens[starts[..., None] + np.arange(length + 1)]
    return lambda step: {"x": found[step, :, :-1], "y": found[step, :, 1:]}


# 5. A normalising flow: real NVP on two moons.

COUPLINGS, CONDITIONER = 6, 64


def flow_parameters(key: jax.Array) -> Any:
    """Two hidden layers for each coupling; the identity at first."""
    params: dict[str, Any] = {}
    for i, own in enumerate(jax.random.split(key, COUPLINGS)):
        keys = jax.random.split(own, 2)
        last = linear(own, CONDITIONER, 2)
        params[f"coupling_{i}"] = {
            "linear_0": linear(keys[0], 1, CONDITIONER),
            "linear_1": linear(keys[1], CONDITIONER, CONDITIONER),
            "linear_2": jax.tree.map(jnp.zeros_like, last),
        }
    return params


def log_likelihood(params: Any, x: jax.Array) -> jax.Array:
    """The logarithm of the density at each point."""
    total = jnp.zeros(len(x))
    for i in range(COUPLINGS):
        layers, fixed, moved = params[f"coupling_{i}"], x[:, i % 2], x[:, 1 - i % 2]
        h = jnp.tanh(affine(layers["linear_0"], fixed[:, None]))
        h = jnp.tanh(affine(layers["linear_1"], h))
        shift, scale = jnp.split(affine(layers["linear_2"], h), 2, axis=-1)
        scale = jnp.tanh(scale[:, 0])
        moved = moved * jnp.exp(scale) + shift[:, 0]
        x = jnp.stack([fixed, moved] if i % 2 == 0 else [moved, fixed], axis=-1)
        total = total + scale
    return total - jnp.sum(x**2, axis=-1) / 2 - jnp.log(2 * jnp.pi)


flow_objective = llqr.Objective(log_likelihood, lambda outputs, x: -jnp.mean(outputs))


def flow(method: Method, seed: int) -> Loop:
    """The flow in its loop. One number for each example: the metric is that of numbers."""
    params = flow_parameters(jax.random.key(seed))
    return plain_loop(method, flow_objective, params, "gaussian")


def moons(seed: int) -> Callable[[int], Any]:
    """Two moons of 4,096 points."""
    points: Any = make_moons(4096, noise=0.05, random_state=seed)[0]
    points = ((points - points.mean(0)) / points.std(0)).astype(np.float32)
    picks = np.random.default_rng(seed + 1).integers(len(points), size=(1000, 256))
    return lambda step: points[picks[step]]


# 6. Bags of words.

VOCABULARY, LENGTH, TOPICS, DOCUMENTS = 2000, 40, 8, 4096


def bag_parameters(key: jax.Array) -> Any:
    """An embedding, a hidden layer, a readout."""
    keys = jax.random.split(key, 3)
    return {
        "words": {"embeddings": 0.1 * jax.random.normal(keys[0], (VOCABULARY, 64))},
        "hidden": linear(keys[1], 64, 64),
        "logits": linear(keys[2], 64, TOPICS),
    }


def topic_logits(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """The mean of the words of a document, and an MLP; word 0 is padding."""
    words, there = params["words"]["embeddings"][batch["words"]], batch["words"] > 0
    total = jnp.sum(words * there[..., None], axis=1)
    mean = total / jnp.sum(there, axis=1)[:, None]
    return affine(params["logits"], jax.nn.relu(affine(params["hidden"], mean)))


bag_objective = llqr.Objective(topic_logits, next_loss)


def bag(method: Method, seed: int) -> Loop:
    """The classifier in its loop."""
    words, topics = documents(seed)
    unseen = {"words": jnp.asarray(words[DOCUMENTS:]), "y": jnp.asarray(topics[DOCUMENTS:])}

    def score(params: Any) -> jax.Array:
        return jnp.mean(jnp.argmax(topic_logits(params, unseen), axis=-1) == unseen["y"])

    return plain_loop(method, bag_objective, bag_parameters(jax.random.key(seed)), "ngd", score)


def documents(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of 10 to 40 words by Zipf's law, some of them their topic's; 1,024 more, unseen."""
    rng = np.random.default_rng(seed)
    common = 1 / np.arange(1, VOCABULARY)
    topics = rng.integers(TOPICS, size=DOCUMENTS + 1024)
    words = np.zeros((len(topics), LENGTH), np.int32)
    order = [rng.permutation(VOCABULARY - 1) for _ in range(TOPICS)]
    chances = [common / sum(common) * 0.85 + 0.15 * (common / sum(common))[o] for o in order]
    for i, topic in enumerate(topics):
        count = rng.integers(10, LENGTH + 1)
        words[i, :count] = 1 + rng.choice(VOCABULARY - 1, size=count, p=chances[topic])
    return words, topics


def bags(seed: int) -> Callable[[int], Any]:
    """Batches of 64 documents."""
    words, topics = documents(seed)
    picks = np.random.default_rng(seed + 1).integers(DOCUMENTS, size=(1000, 64))
    return lambda step: {"words": words[picks[step]], "y": topics[picks[step]]}


LOW, HIGH = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
HELD_OUT = "accuracy, held out"
MODELS = {
    "unet": Model("U-Net, predicts noise (NNX)", unet, noisy_digits, 300, HIGH),
    "gnn": Model("graph network", gnn, whole_graph, 300, HIGH, HELD_OUT),
    "pinn": Model("PINN, wave (Equinox)", pinn, collocation, 400, HIGH, "error"),
    "transformer": Model("scanned transformer (Linen)", transformer, windows, 300, LOW),
    "flow": Model("real NVP", flow, moons, 400, LOW),
    "bag": Model("bags of words", bag, bags, 300, HIGH, HELD_OUT),
}


class Training(NamedTuple):
    """What a training gave: the losses of its steps, and the score at its end."""

    losses: list[float]
    score: float | None

    @property
    def end(self) -> float:
        """The mean loss of the last steps; infinite, where one is not finite."""
        mean = statistics.fmean(self.losses[-LAST:])
        return mean if math.isfinite(mean) else math.inf


def train(model: Model, method: Method, steps: int, seed: int = 0) -> Training:
    """Train from the start.

    Args:
      model: one of `MODELS`.
      method: the optimizer.
      steps: so many.
      seed: of parameters and data.
    """
    loop, batch = model.begin(method, seed), model.batches(seed)
    options, carry, losses = llqr.Streaming(), loop.carry, []
    for i in range(steps):
        due = method.name == "probes" and bool(options.is_due(i))
        carry, loss = loop.step(carry, batch(i), due=due)
        losses.append(loss)
    score = None if loop.score is None else float(loop.score(carry))
    return Training([float(x) for x in losses], score)


def step_times(model: Model, steps: int = 20, warmup: int = 12) -> dict[str, float]:
    """Return milliseconds of a step without a refit of each method: medians, taken in turns."""
    batch, going, times = model.batches(0), {}, {name: [] for name in METHODS}
    for name in METHODS:
        loop = model.begin(Method(name, model.rates[0]), 0)
        carry = loop.carry
        for i in range(warmup):  # those of probes too: what a step costs does not depend on P
            carry, loss = loop.step(carry, batch(i), due=False)
        jax.block_until_ready(loss)
        going[name] = [loop, carry]
    for i in range(warmup, warmup + steps):
        data = jax.block_until_ready(batch(i))
        for name, (loop, carry) in going.items():
            start = time.perf_counter()
            carry, loss = loop.step(carry, data, due=False)
            jax.block_until_ready((jax.tree.leaves(carry), loss))
            times[name].append(1e3 * (time.perf_counter() - start))
            going[name][1] = carry
    return {name: statistics.median(found) for name, found in times.items()}


def measure(
    name: str, parts: Iterable[str], before: dict[str, Any] | None = None, quick: bool = False
) -> dict[str, Any]:
    """Return the row of a model.

    Args:
      name: of the model.
      parts: some of `PARTS`.
      before: its row, of which the other parts are kept.
      quick: 20 steps at one rate.
    """
    model = MODELS[name]
    steps = 20 if quick else model.steps
    begun = model.begin(Method("AdamW", 1e-3), 0)
    row: dict[str, Any] = {
        "name": name,
        "model": model.title,
        "parameters": sum(x.size for x in jax.tree.leaves(begun.params(begun.carry))),
        "steps": steps,
        "score": model.score,
        "trainings": {},
        "ms": {},
        "warnings": [],
    }
    if before is not None and before["steps"] == steps:
        row |= {key: before[key] for key in ("start", "trainings", "ms", "warnings")}
    for method in (m for m in METHODS if m in parts):
        found = row["trainings"][method] = {}
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", LayoutWarning)
            for rate in model.rates[: 1 if quick else None]:
                trained = train(model, Method(method, rate), steps)
                row["start"] = trained.losses[0]
                found[f"{rate:g}"] = {"loss": trained.end, "score": trained.score}
                print(f"{name}, {method}, {rate:g}: {found[f'{rate:g}']}", flush=True)
        said = [str(w.message) for w in heard if issubclass(w.category, LayoutWarning)]
        row["warnings"] = list(dict.fromkeys([*row["warnings"], *said]))
    if "times" in parts:
        row["ms"] = step_times(model)
    return row


def best(row: dict[str, Any], method: str) -> tuple[str, float, float | None]:
    """Return the best rate of a method, the loss there, and the score."""
    found = row["trainings"][method]
    rate = min(found, key=lambda rate: found[rate]["loss"])
    return rate, found[rate]["loss"], found[rate]["score"]


def stored() -> dict[str, dict[str, Any]]:
    """Return the rows that were stored before, by name."""
    path = RESULTS / f"{NAME}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["name"]: row for row in rows}


def summary(row: dict[str, Any]) -> dict[str, str]:
    """Return the figures of a row, of those parts that are there."""
    found = {"model": row["model"], "parameters": f"{row['parameters']:,}"}
    found |= {"steps": str(row["steps"]), "start": f"{row['start']:.3g}"}
    for method in METHODS:
        if method in row["trainings"]:
            rate, loss, score = best(row, method)
            found[f"{method} (rate)"] = f"{loss:.3g} ({rate})"
            if score is not None:
                found[f"{method} (rate)"] += f"; {row['score']} {score:.3g}"
    for method in METHODS[1:] if row["ms"] else ():
        found[f"step of {method}"] = f"{row['ms'][method] / row['ms']['AdamW']:.2f}"
    return found


def report() -> str:
    """Return the table of what is stored, in Markdown."""
    rows = [summary(row) for row in stored().values()]
    head = list(max(rows, key=len))
    return markdown(head, [[row.get(column, "") for column in head] for row in rows])


def main() -> None:
    """Measure, print, write; or report what was written."""
    parser = argparse.ArgumentParser(description="Six models of strangers in their first hour.")
    parser.add_argument("names", nargs="*", default=[], help=f"{', '.join(MODELS)}, or report")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="keeps the others")
    parser.add_argument("--quick", action="store_true", help="20 steps at one rate, not stored")
    given = parser.parse_args()
    if given.names == ["report"]:
        print(report())
        return
    if unknown := set(given.names) - set(MODELS):
        parser.error(f"unknown {sorted(unknown)}: choose from {', '.join(MODELS)}, or report")
    for name in given.names or MODELS:
        row = measure(name, given.parts, stored().get(name), given.quick)
        show(name, [{"figure": key, "value": value} for key, value in summary(row).items()])
        print(*row["warnings"], sep="\n")
        if not given.quick:
            rows = stored() | {name: row}
            write(NAME, environment(), [rows[n] for n in MODELS if n in rows])


if __name__ == "__main__":
    main()
