"""Numbers: a table, a graph, a density, a policy, an equation; all generated, seeds fixed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.suite.workloads import physics
from benchmarks.suite.workloads.images import measured
from benchmarks.suite.workloads.networks import jets, perceptron, perceptron_parameters
from benchmarks.suite.workloads.problem import Batch, Workload, rows, squared_error, take
from llqr_experiments.data import equations, problems

from . import networks


def _float32(**arrays: np.ndarray) -> Batch:
    return {name: np.asarray(values, np.float32) for name, values in arrays.items()}


def _split(arrays: Batch, cut: int) -> dict[str, Any]:
    """The first rows to train, the others to test."""
    return measured(take(arrays, slice(cut)), take(arrays, slice(cut, None)))


# --- a table ------------------------------------------------------------------------------------


def _perceptron(
    params: Any, batch: Batch, *, activation: Callable[[Any], Any] = jax.nn.relu
) -> Any:
    return perceptron(params, batch["x"], activation=activation)


def _columns(count: int) -> Batch:
    """Columns as tables have them: some lie far out, some are correlated, some are categories.

    The target is a sum of bends, products and steps of some of them, with a little noise.
    """
    rng = np.random.default_rng(0)
    a = rng.standard_normal((count, 6)) @ rng.standard_normal((6, 6)) / 6**0.5
    b = np.exp(rng.standard_normal((count, 4)))
    kind = rng.integers(0, 5, count)
    effect = rng.standard_normal((5, 3))[kind]
    target = (
        np.sin(2 * a[:, 0]) + a[:, 1] * a[:, 2] + np.abs(a[:, 3]) * effect[:, 0]
        + np.log1p(b[:, 0] * b[:, 1]) * effect[:, 1] + np.tanh(4 * (a[:, 4] - b[:, 2] + 1))
        + effect[:, 2] + 0.05 * rng.standard_normal(count)
    )  # fmt: skip
    numbers = np.concatenate([a, b], 1)
    numbers = (numbers - numbers.mean(0)) / numbers.std(0)
    target = (target - target.mean()) / target.std()
    return _float32(x=np.concatenate([numbers, np.eye(5)[kind]], 1), label=target[:, None])


def table() -> Workload:
    """A perceptron on a table, by its test loss."""
    return Workload(
        "table",
        partial(perceptron_parameters, widths=(15, 96, 96, 1)),
        _perceptron,
        squared_error,
        **_split(_columns(13_000), 12_000),
        batch=64,
        steps=600,
        metric="gaussian",
        measure="test",
        held_out=True,
        told="a table of 15 columns, MLP 15-96-96-1, ReLU",
    )


def table_large_batch() -> Workload:
    """The same with 2,048 rows in a batch."""
    return replace(
        table(),
        name="table-large-batch",
        batch=2048,
        steps=300,
        told="the same, 2,048 rows in a batch",
    )


# --- a graph ------------------------------------------------------------------------------------

_NODES, _NEIGHBOURS, _FEATURES = 3000, 6, 4


def _nodes() -> Batch:
    """Points of a square, joined to the nearest; a node's number depends on those two edges away.

    It is a bend of what its neighbours' neighbours say about it.
    """
    rng = np.random.default_rng(0)
    place = rng.uniform(size=(_NODES, 2))
    apart = ((place[:, None] - place[None]) ** 2).sum(-1)
    np.fill_diagonal(apart, np.inf)
    nearest = np.argsort(apart, 1)[:, :_NEIGHBOURS]
    x = rng.standard_normal((_NODES, _FEATURES))

    def heard(values: np.ndarray) -> np.ndarray:
        return values[nearest].mean(1) * _NEIGHBOURS**0.5

    own, others, again = rng.standard_normal((3, _FEATURES, _FEATURES)) / 2
    first = np.tanh(x @ own + heard(x) @ others)
    target = np.sin(heard(first) @ again + first).sum(1)
    target = (target - target.mean()) / target.std()
    return _float32(x=x, label=target[:, None]) | {
        "senders": nearest.reshape(-1).astype(np.int32),
        "receivers": np.repeat(np.arange(_NODES), _NEIGHBOURS).astype(np.int32),
        "counts": rng.random(_NODES) < 0.7,
    }


def _graph(params: Any, batch: Batch) -> Any:
    return networks.graph(params, batch["x"], batch["senders"], batch["receivers"])


def _masked(outputs: Any, batch: Batch) -> Any:
    return 0.5 * jnp.mean((outputs - batch["label"])[:, 0] ** 2, where=batch["counts"])


def graph() -> Workload:
    """Numbers of nodes, all in every batch; three in ten are held out."""
    train = _nodes()
    return Workload(
        "graph",
        partial(networks.graph_parameters, widths=(_FEATURES, 32, 32, 1)),
        _graph,
        _masked,
        train=train,
        fixed=train,
        test=train | {"counts": ~train["counts"]},
        batch=rows(train),
        steps=300,
        metric="gaussian",
        measure="test",
        mask=lambda batch: batch["counts"],
        layered=False,
        held_out=True,
        told="a graph of 3,000 nodes, two rounds of messages, 32 features; held-out nodes",
    )


# --- a density ----------------------------------------------------------------------------------

_CENTRES, _NARROW = 6, 0.25


def _points(count: int) -> Batch:
    """Normals around points of a circle, bent and sheared; the label is their log density.

    Every bend moves some coordinates by a function of others, so that volumes are kept.
    """
    rng = np.random.default_rng(0)
    angle = 2 * np.pi * np.arange(_CENTRES) / _CENTRES
    centres = np.stack([np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)], -1)
    x = centres[rng.integers(0, _CENTRES, count)] + _NARROW * rng.standard_normal((count, 4))
    square = ((x[:, None] - centres) ** 2).sum(-1) / _NARROW**2
    density = np.exp(-square / 2).mean(1) / (2 * np.pi * _NARROW**2) ** 2
    one, two = x[:, :2], x[:, 2:]
    two = two + np.sin(2 * one)
    one = one + 0.5 * two[:, ::-1] ** 2
    y = np.concatenate([one, two], 1)
    return _float32(x=y - y.mean(0), label=np.log(density))


def _flow(params: Any, batch: Batch) -> Any:
    return networks.flow(params, batch["x"])


def _divergence(outputs: Any, batch: Batch) -> Any:
    """How far the model's density is from the true one: a mean of the log of their ratio."""
    z = outputs["z"]
    found = outputs["volume"] - 0.5 * (z**2 + np.log(2 * np.pi)).sum(-1)
    return jnp.mean(batch["label"] - found)


def real_nvp() -> Workload:
    """A density in four dimensions, by the divergence on test points."""
    return Workload(
        "real-nvp",
        partial(networks.flow_parameters, dims=4, couplings=6, width=48),
        _flow,
        _divergence,
        **_split(_points(21_000), 20_000),
        batch=128,
        steps=600,
        metric={"z": "gaussian", "volume": None},  # the loss's own curvature in the outputs
        measure="test",
        layered=False,
        held_out=True,
        told="a mixture in 4 dimensions, bent; real NVP of 6 couplings of 48 units",
    )


# --- a policy -----------------------------------------------------------------------------------

_TORQUES = np.linspace(-1, 1, 5)
_SIDE, _ROUNDS, _DISCOUNT, _TEMPERATURE = 61, 250, 0.97, 0.1
_FASTEST = 6.0


def _swing(angle: np.ndarray, speed: np.ndarray, torque: np.ndarray) -> tuple[np.ndarray, ...]:
    """A pendulum that its motor cannot lift at once, a twelfth of a second later; 0 is upright."""
    speed = speed + 0.08 * (4 * np.sin(angle) + 2 * torque)
    speed = np.clip(speed, -_FASTEST, _FASTEST)
    return (angle + 0.08 * speed + np.pi) % (2 * np.pi) - np.pi, speed


def _looked_up(values: np.ndarray, angle: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Return bilinear values of a grid over angles, which close, and speeds."""
    a = (angle / np.pi + 1) / 2 * (_SIDE - 1)
    b = (speed / _FASTEST + 1) / 2 * (_SIDE - 1)
    i, j = (np.minimum(c.astype(int), _SIDE - 2) for c in (a, b))
    u, v = a - i, b - j
    return (
        (1 - u) * ((1 - v) * values[i, j] + v * values[i, j + 1])
        + u * ((1 - v) * values[i + 1, j] + v * values[i + 1, j + 1])
    )  # fmt: skip


def _quality(values: np.ndarray, angle: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Return what each torque is worth, [..., torques]."""
    reward = -(angle**2) - 0.1 * speed**2
    following = _swing(angle[..., None], speed[..., None], _TORQUES)
    return reward[..., None] - 0.01 * _TORQUES**2 + _DISCOUNT * _looked_up(values, *following)


def _teacher(count: int) -> Batch:
    """States of a pendulum, and the policy of a value iteration there."""
    rng = np.random.default_rng(0)
    grid = np.meshgrid(np.linspace(-np.pi, np.pi, _SIDE), np.linspace(-_FASTEST, _FASTEST, _SIDE),
                       indexing="ij")  # fmt: skip
    values = np.zeros((_SIDE, _SIDE))
    for _ in range(_ROUNDS):
        values = _quality(values, *grid).max(-1)
    angle, speed = rng.uniform(-np.pi, np.pi, count), rng.uniform(-_FASTEST, _FASTEST, count)
    quality = _quality(values, angle, speed)
    weight = np.exp((quality - quality.max(-1, keepdims=True)) / _TEMPERATURE)
    policy = weight / weight.sum(-1, keepdims=True)
    x = np.stack([np.cos(angle), np.sin(angle), speed / 3], -1)
    return _float32(x=x, policy=policy) | {"label": quality.argmax(-1).astype(np.int32)}


def _distillation(logits: Any, batch: Batch) -> Any:
    """Kullback-Leibler divergence of the policy from the teacher's, a mean over states."""
    policy = batch["policy"]
    apart = jnp.log(jnp.maximum(policy, 1e-30)) - jax.nn.log_softmax(logits)
    return jnp.mean((policy * apart).sum(-1))


def policy_distillation() -> Workload:
    """A pendulum's policy from states of it; the label is the teacher's first choice."""
    return Workload(
        "policy-distillation",
        partial(perceptron_parameters, widths=(3, 64, 64, len(_TORQUES))),
        partial(_perceptron, activation=jnp.tanh),
        _distillation,
        **_split(_teacher(21_000), 20_000),
        batch=128,
        steps=600,
        measure="test",
        held_out=True,
        told="a pendulum's policy by value iteration, MLP 3-64-64-5, tanh",
    )


# --- an equation --------------------------------------------------------------------------------


def _residuals(params: Any, batch: Batch) -> Any:
    value, first, second = jets(params, batch["x"])
    terms = jnp.concatenate([value[:, None], first, second], -1)
    return (batch["operator"] * terms).sum(-1)


def wave() -> Workload:
    """u_tt = u_xx, two standing waves, by the error of the solution."""
    points = equations.grid(problems.WAVE, (20, 20), (20,) * 4)
    test = equations.solution_rows(problems.WAVE)
    train = points.gather(np.arange(len(points)))
    return physics.equation(
        "wave",
        _residuals,
        train,
        test.gather(np.arange(0, len(test), 4)),
        "the wave equation, two standing waves, tanh 2-32-32-32-1, float64",
        (2, 32, 32, 32, 1),
        held_out=True,
    )
