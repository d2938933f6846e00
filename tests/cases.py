"""The one list of problems that every operator is tested on.

A case is an objective, float64 parameters and a batch, all tiny: dense matrices over its
parameters are cheap. `metrics` are those whose curvature `tests.oracle.curvature` knows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llqr
from llqr.structures.preconditioner import Preconditioner

CATEGORICAL = (
    "newton",
    "gauss_newton",
    "ngd",
    "reverse_kl",
    "renyi(0.3)",
    "renyi(2)",
    "renyi_zero",
    "renyi_2",
)
"""Metrics of a single categorical output; `metric` turns a name into what users pass."""


def metric(name: Any) -> Any:
    """Return the metric behind a name of the list: "renyi(0.3)" is the order 0.3."""
    if isinstance(name, dict):
        return {key: metric(value) for key, value in name.items()}
    if isinstance(name, tuple):
        return tuple(metric(value) for value in name)
    if isinstance(name, str) and name.startswith("renyi("):
        return llqr.metrics.renyi(float(name[6:-1]))
    return name


@dataclass(frozen=True, eq=False)  # hashed by identity: metrics may be dicts
class Case:
    """One problem.

    Attributes:
      name: of the test's id.
      objective: forward function, loss and mask.
      make: seed -> (params, batch), trees of numpy arrays.
      metrics: names, or trees of names, that the case runs with.
    """

    name: str
    objective: llqr.Objective
    make: Callable[[np.random.Generator], tuple[Any, Any]]
    metrics: tuple[Any, ...]

    @cached_property
    def _made(self) -> tuple[Any, Any]:
        assert jax.config.jax_enable_x64, "cases are float64: read them inside a test"
        return jax.tree.map(jnp.asarray, self.make(np.random.default_rng(7)))

    @property
    def params(self) -> Any:
        """Float64 parameters, away from any symmetric point."""
        return self._made[0]

    @property
    def batch(self) -> Any:
        """The data."""
        return self._made[1]

    @property
    def bound(self) -> llqr.BoundObjective:
        """The objective on the batch."""
        return self.objective.bind(self.batch)

    def control(self, seed: int, scale: float = 1.0) -> Any:
        """Return a random perturbation of the parameters."""
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape)), self.params)


def cross_entropy(logits: Any, y: Any, smoothing: float = 0.0) -> Any:
    """Mean cross-entropy against smoothed one-hot targets."""
    k = logits.shape[-1]
    target = (1.0 - smoothing) * jax.nn.one_hot(y, k, dtype=logits.dtype) + smoothing / k
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), axis=-1))


def _dense(rng: np.random.Generator, m: int, n: int) -> dict[str, np.ndarray]:
    return {"kernel": rng.normal(size=(m, n)) / np.sqrt(m), "bias": 0.3 * rng.normal(size=n)}


def _apply(layer: Any, x: Any) -> Any:
    return x @ layer["kernel"] + layer["bias"]


# --- multilayer perceptrons -----------------------------------------------------------------


def _mlp_params(rng: np.random.Generator) -> dict[str, Any]:
    return {"in": _dense(rng, 5, 4), "mid": _dense(rng, 4, 4), "out": _dense(rng, 4, 3)}


def _mlp(params: Any, x: Any, activation: Callable[[Any], Any]) -> Any:
    x = activation(_apply(params["in"], x))
    return _apply(params["out"], activation(_apply(params["mid"], x)))


def _mlp_make(rng: np.random.Generator) -> tuple[Any, Any]:
    return _mlp_params(rng), {"x": rng.normal(size=(6, 5)), "y": rng.integers(0, 3, 6)}


MLP_TANH = Case(
    "mlp_tanh",
    llqr.Objective(
        lambda params, batch: _mlp(params, batch["x"], jnp.tanh),
        lambda z, batch: cross_entropy(z, batch["y"]),
    ),
    _mlp_make,
    CATEGORICAL,
)

MLP_RELU = Case(
    "mlp_relu",  # outputs are log-probabilities
    llqr.Objective(
        lambda params, batch: jax.nn.log_softmax(_mlp(params, batch["x"], jax.nn.relu)),
        lambda z, batch: cross_entropy(z, batch["y"], smoothing=0.1),
    ),
    _mlp_make,
    ("newton", "gauss_newton", "ngd", "reverse_kl", "renyi(0.3)", "renyi_2"),
)

# --- masked rows ----------------------------------------------------------------------------


def masked_cross_entropy(logits: Any, y: Any, mask: Any) -> Any:
    """Mean cross-entropy over the rows that count."""
    logits = jnp.where(mask[..., None], logits, 0.0)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(mask, y, 0)[..., None], -1)
    total = jnp.sum(jnp.where(mask, picked[..., 0], 0.0))
    return -total / jnp.maximum(jnp.sum(mask), 1).astype(total.dtype)


def _masked_make(rng: np.random.Generator) -> tuple[Any, Any]:
    params, batch = _mlp_make(rng)
    batch["mask"] = np.array([True, False, True, True, False, True])
    return params, batch


MLP_MASKED = Case(
    "mlp_masked",
    llqr.Objective(
        lambda params, batch: _mlp(params, batch["x"], jnp.tanh),
        lambda z, batch: masked_cross_entropy(z, batch["y"], batch["mask"]),
        lambda batch: batch["mask"],
    ),
    _masked_make,
    CATEGORICAL,
)

# --- convolutions and batch norm in inference mode ------------------------------------------


def _cnn_make(rng: np.random.Generator) -> tuple[Any, Any]:
    params = {
        "conv": {"kernel": 0.3 * rng.normal(size=(3, 3, 2, 3))},
        "norm": {"scale": 1 + 0.2 * rng.normal(size=3), "bias": 0.2 * rng.normal(size=3)},
        "head": _dense(rng, 12, 3),
    }
    batch = {
        "x": rng.normal(size=(4, 4, 4, 2)),
        "y": rng.integers(0, 3, 4),
        "stats": {"mean": 0.2 * rng.normal(size=3), "var": 0.5 + rng.uniform(size=3)},
    }
    return params, batch


def _cnn(params: Any, batch: Any) -> Any:
    x = jax.lax.conv_general_dilated(
        batch["x"],
        params["conv"]["kernel"],
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = (x - batch["stats"]["mean"]) * jax.lax.rsqrt(batch["stats"]["var"] + 1e-5)
    x = jax.nn.relu(x * params["norm"]["scale"] + params["norm"]["bias"])
    return _apply(params["head"], x.reshape(x.shape[0], -1))


CNN = Case(
    "cnn",
    llqr.Objective(_cnn, lambda z, batch: cross_entropy(z, batch["y"], smoothing=0.1)),
    _cnn_make,
    ("newton", "gauss_newton", "ngd", "renyi(2)", "renyi_zero"),
)

# --- attention, tied embedding, padding -----------------------------------------------------

PAD = 0


def _attention_make(rng: np.random.Generator) -> tuple[Any, Any]:
    params = {
        "embed": {"embedding": rng.normal(size=(5, 4))},  # also the read-out
        "position": 0.5 * rng.normal(size=(1, 6, 4)),
        "cls": 0.5 * rng.normal(size=(1, 1, 4)),
        "attention": {
            **{
                name: {
                    "kernel": 0.5 * rng.normal(size=(4, 2, 2)),
                    "bias": 0.2 * rng.normal(size=(2, 2)),
                }
                for name in ("query", "key", "value")
            },
            "out": {"kernel": 0.5 * rng.normal(size=(2, 2, 4)), "bias": 0.2 * rng.normal(size=4)},
        },
        "norm": {"scale": 1 + 0.2 * rng.normal(size=4)},
        "temperature": np.array(1.3),
    }
    batch = {
        "x": np.array([[1, 4, 2, 3], [3, 3, 1, PAD]]),
        "y": np.array([[4, 2, 3, 1], [1, 2, 4, 0]]),
    }
    return params, batch


def _attention(params: Any, batch: Any) -> Any:
    tokens = batch["x"]
    embedding = params["embed"]["embedding"]
    x = embedding[tokens] + params["position"][:, : tokens.shape[1]]
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * params["norm"]["scale"]
    cls = jnp.broadcast_to(params["cls"], (x.shape[0], 1, x.shape[2]))
    keys = jnp.concatenate([cls, x], axis=1)  # every token sees the class token
    block = params["attention"]

    def project(name: str, h: Any) -> Any:
        return jnp.einsum("btd,dhk->bthk", h, block[name]["kernel"]) + block[name]["bias"]

    q, k, v = project("query", x), project("key", keys), project("value", keys)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(2.0)
    alive = jnp.concatenate([jnp.ones((x.shape[0], 1), bool), tokens != PAD], axis=1)
    weights = jax.nn.softmax(jnp.where(alive[:, None, None, :], scores, -1e30))
    mixed = jnp.einsum("bhts,bshk->bthk", weights, v)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, block["out"]["kernel"]) + block["out"]["bias"]
    return params["temperature"] * (x @ embedding.T)


ATTENTION = Case(
    "attention",
    llqr.Objective(
        _attention,
        lambda z, batch: masked_cross_entropy(z, batch["y"], batch["x"] != PAD),
        lambda batch: batch["x"] != PAD,
    ),
    _attention_make,
    ("newton", "ngd", "reverse_kl", "renyi_2"),
)

# --- several outputs ------------------------------------------------------------------------


def _heads_params(rng: np.random.Generator, regression: int) -> dict[str, Any]:
    return {
        "trunk": _dense(rng, 5, 4),
        "class": _dense(rng, 4, 3),
        "value": _dense(rng, 4, regression),
    }


def _heads_make(rng: np.random.Generator) -> tuple[Any, Any]:
    batch = {
        "x": rng.normal(size=(5, 5)),
        "y": rng.integers(0, 3, 5),
        "t": rng.normal(size=(5, 2)),
        "mask": {"class": np.array([True, True, False, True, True]), "value": np.arange(5) < 2},
    }
    return _heads_params(rng, 2), batch


def _heads(params: Any, batch: Any) -> Any:
    x = jnp.tanh(_apply(params["trunk"], batch["x"]))
    return {"class": _apply(params["class"], x), "value": _apply(params["value"], x)}


def _heads_loss(z: Any, batch: Any) -> Any:
    mask = batch["mask"]["value"][:, None]
    error = jnp.where(mask, (z["value"] - batch["t"]) ** 2, 0.0)
    return masked_cross_entropy(z["class"], batch["y"], batch["mask"]["class"]) + jnp.mean(error)


TWO_HEADS = Case(
    "two_heads",  # a dict, each output with its own mask
    llqr.Objective(_heads, _heads_loss, lambda batch: batch["mask"]),
    _heads_make,
    (
        "newton",
        "gauss_newton",
        {"class": "ngd", "value": "gaussian"},
        {"class": None, "value": "gaussian"},
        {"class": "renyi(2)", "value": None},
    ),
)


def _pair_make(rng: np.random.Generator) -> tuple[Any, Any]:
    batch = {"x": rng.normal(size=(5, 5)), "y": rng.integers(0, 3, 5), "t": rng.normal(size=5)}
    return _heads_params(rng, 1), batch


def _pair(params: Any, batch: Any) -> Any:
    z = _heads(params, batch)
    return z["class"], z["value"][:, 0]


PAIR = Case(
    "pair",  # a tuple; the regression is one number for each row
    llqr.Objective(
        _pair,
        lambda z, batch: cross_entropy(z[0], batch["y"]) + jnp.mean((z[1] - batch["t"]) ** 2),
    ),
    _pair_make,
    ("newton", "gauss_newton", ("reverse_kl", "gaussian"), ("ngd", None)),
)

CASES = (MLP_TANH, MLP_RELU, MLP_MASKED, CNN, ATTENTION, TWO_HEADS, PAIR)

RUNS = tuple((case, name) for case in CASES for name in case.metrics)
"""Every case with every metric that it runs with."""


def label(value: Any) -> str:
    """Return a short test id for a case or a metric."""
    if isinstance(value, Case):
        return value.name
    if isinstance(value, dict):
        return "+".join(map(str, value.values()))
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def product(plan: Any, arrays: Any, x: Any) -> Any:
    """Return P x, P of these arrays of blocks."""
    return Preconditioner.on(plan, tuple(arrays), x).product(x)
