"""What the study trains: four networks on real data that comes with the packages.

  name     data                                    network                                   steps
  digits   scikit-learn's digits, 8x8              64-100-300-10, ReLU                        1000
  mlp      Fashion-MNIST                           784-100-300-10, ReLU                       1000
  cnn      Fashion-MNIST, means of 2x2 pixels      3 convolutions, 2 dense layers              400
  chars    documentation of the Python language    2 pre-norm layers, d 48, 32 characters      800

Parameters are nested dicts with leaves named kernel, bias, scale and embedding. A forward
function takes (params, batch) and returns logits, the loss takes (logits, batch).
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llqr
from llqr_experiments import data
from llqr_experiments.data import language

WIDTH, HEADS, DEPTH, LENGTH = 48, 4, 2, 32
Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Workload:
    """A problem to train on.

    Attributes:
      name: what it is asked for by.
      parameters: key -> initial parameters.
      forward: (params, batch) -> logits.
      train: arrays of the training examples, one row each.
      fixed: the training examples that the training loss is measured on.
      test: the examples of the test loss.
      batch: examples of a training batch.
      steps: length of a run.
    """

    name: str
    parameters: Callable[[Any], Any]
    forward: Callable[[Any, Batch], Any]
    train: Batch
    fixed: Batch
    test: Batch
    batch: int
    steps: int

    def initial(self, seed: int) -> Any:
        """Return the parameters of a seed."""
        return self.parameters(jax.random.key(seed))

    @property
    def objective(self) -> llqr.Objective:
        """The objective, without a batch."""
        return llqr.Objective(self.forward, loss)

    def batches(self, seed: int, size: int | None = None) -> Iterator[Batch]:
        """Shuffled batches without end; what fills no batch at an epoch's end is left out."""
        rng = np.random.default_rng(seed)
        count = len(self.train["label"])
        size = min(size or self.batch, count)
        while True:
            order = rng.permutation(count)
            for start in range(0, count - size + 1, size):
                yield _rows(self.train, order[start : start + size])


def loss(logits: Any, batch: Batch) -> Any:
    """Mean cross-entropy over rows."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def _rows(arrays: Batch, index: Any) -> Batch:
    return {name: values[index] for name, values in arrays.items()}


def _kernel(key: Any, *shape: int) -> Any:
    return jax.random.normal(key, shape) / np.prod(shape[:-1]) ** 0.5


def _layer(key: Any, *shape: int) -> dict[str, Any]:
    return {"kernel": _kernel(key, *shape), "bias": jnp.zeros(shape[-1])}


# --- the networks -------------------------------------------------------------------------------


def _mlp_parameters(key: Any, *, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    keys = jax.random.split(key, len(widths) - 1)
    return [_layer(k, *shape) for k, shape in zip(keys, pairwise(widths), strict=True)]


def _mlp(params: list[dict[str, Any]], batch: Batch) -> Any:
    x = batch["image"].reshape(batch["image"].shape[0], -1)
    for i, layer in enumerate(params):
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


_CONVOLUTIONS = ((3, 3, 1, 16), (3, 3, 16, 32), (3, 3, 32, 32))


def _cnn_parameters(key: Any) -> dict[str, Any]:
    keys = jax.random.split(key, 5)
    shapes = (*_CONVOLUTIONS, (512, 64), (64, 10))
    return {f"layer{i}": _layer(k, *s) for i, (k, s) in enumerate(zip(keys, shapes, strict=True))}


def _cnn(params: dict[str, Any], batch: Batch) -> Any:
    x = batch["image"]
    for i in range(3):
        layer, stride = params[f"layer{i}"], min(i, 1) + 1
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layer["bias"])
    x = x.reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params["layer3"]["kernel"] + params["layer3"]["bias"])
    return x @ params["layer4"]["kernel"] + params["layer4"]["bias"]


def _transformer_parameters(key: Any, *, vocabulary: int) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 3 + 6 * DEPTH))
    params: dict[str, Any] = {
        "tokens": {"embedding": 0.1 * jax.random.normal(next(keys), (vocabulary, WIDTH))},
        "positions": {"embedding": 0.1 * jax.random.normal(next(keys), (LENGTH, WIDTH))},
        "norm": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)},
        "head": _layer(next(keys), WIDTH, vocabulary),
    }
    for i in range(DEPTH):
        block: dict[str, Any] = {
            name: {"kernel": _kernel(next(keys), WIDTH, WIDTH)}
            for name in ("query", "key", "value", "out")
        }
        block["up"] = _layer(next(keys), WIDTH, 4 * WIDTH)
        block["down"] = _layer(next(keys), 4 * WIDTH, WIDTH)
        for norm in ("norm1", "norm2"):
            block[norm] = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
        params[f"block{i}"] = block
    return params


def _normalised(x: Any, norm: dict[str, Any]) -> Any:
    x = x - x.mean(-1, keepdims=True)
    return (
        x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    )


def _attention(x: Any, block: dict[str, Any]) -> Any:
    batch, length, width = x.shape
    q, k, v = (
        (x @ block[name]["kernel"]).reshape(batch, length, HEADS, width // HEADS)
        for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return mixed.reshape(batch, length, width) @ block["out"]["kernel"]


def _transformer(params: dict[str, Any], batch: Batch) -> Any:
    x = params["tokens"]["embedding"][batch["tokens"]] + params["positions"]["embedding"]
    for i in range(DEPTH):
        block = params[f"block{i}"]
        x = x + _attention(_normalised(x, block["norm1"]), block)
        up = _normalised(x, block["norm2"]) @ block["up"]["kernel"] + block["up"]["bias"]
        x = x + jax.nn.gelu(up) @ block["down"]["kernel"] + block["down"]["bias"]
    x = _normalised(x, params["norm"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


# --- the data -----------------------------------------------------------------------------------


def _images(name: str) -> tuple[Batch, Batch, int]:
    loaded = data.load(name, None, download=False)
    sources = [data.Source.of(loaded, split) for split in ("train", "test")]
    train, test = (s.gather(np.arange(len(s))) for s in sources)
    return train, test, loaded.num_classes


def _pooled(arrays: Batch) -> Batch:
    """Means of 2x2 pixels."""
    image = arrays["image"]
    n, height, width, channels = image.shape
    small = image.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return {**arrays, "image": small}


def _mlp_on(name: str, data_set: str) -> Workload:
    train, test, classes = _images(data_set)
    widths = (train["image"][0].size, 100, 300, classes)
    fixed = _rows(train, slice(10_000))
    parameters = partial(_mlp_parameters, widths=widths)
    return Workload(name, parameters, _mlp, train, fixed, test, batch=128, steps=1000)


def _cnn_workload() -> Workload:
    train, test, _ = _images("fashion_mnist")
    train, test = _pooled(train), _pooled(test)
    fixed, test = _rows(train, slice(5000)), _rows(test, slice(5000))
    return Workload("cnn", _cnn_parameters, _cnn, train, fixed, test, batch=128, steps=400)


@cache
def perceptron(width: int) -> Workload:
    """Return an MLP 196-width-width-10 on the images of "cnn", for as many steps."""
    parameters = partial(_mlp_parameters, widths=(196, width, width, 10))
    return replace(load("cnn"), name=f"mlp of {width}", parameters=parameters, forward=_mlp)


def _chars() -> Workload:
    with tempfile.TemporaryDirectory() as cache_dir:
        text = language.text("python_topics", target_len=LENGTH, cache_dir=cache_dir)
        train = text.train.gather(np.arange(len(text.train)))
        whole = np.arange(text.test.targets // LENGTH)
        test = text.test.gather(whole)
    fixed = _rows(train, np.linspace(0, len(train["label"]) - 1, 1000).astype(int))
    test = _rows(test, slice(1000))
    parameters = partial(_transformer_parameters, vocabulary=text.vocabulary)
    return Workload("chars", parameters, _transformer, train, fixed, test, batch=16, steps=800)


_MAKERS: dict[str, Callable[[], Workload]] = {
    "digits": partial(_mlp_on, "digits", "digits"),
    "mlp": partial(_mlp_on, "mlp", "fashion_mnist"),
    "cnn": _cnn_workload,
    "chars": _chars,
}
NAMES = tuple(_MAKERS)


@cache
def load(name: str) -> Workload:
    """Return a workload by its name, one of `NAMES`."""
    return _MAKERS[name]()
