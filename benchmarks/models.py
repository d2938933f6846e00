"""The models that the benchmarks run on, in plain JAX.

Parameters are nested dicts with leaves named kernel, bias, scale and embedding, so that the
ready rule tables see them as they see Flax's. A forward function takes (params, batch).

  name          model                                                        parameters
  mlp           784-100-300-10, ReLU                                         0.11 M
  cnn           a stem and three residual blocks, 32x32x3                    0.31 M
  transformer   two pre-norm layers, d 128, 4 heads, length 64, causal       0.47 M
  resnet18      CIFAR's ResNet-18, batch norm in inference mode              11.17 M
  unet          noise prediction, 16x16x3, three widths, time embedding      0.77 M
  scanned       twelve transformer layers in a scan, stacked leaves          2.45 M

The runner has a ResNet-18 too (`llqr_experiments.models`), made of stages; this one is a plain
function, because `refit_memory.py` asks what a network costs that is not cut anywhere. Its
running statistics are data that all examples share: they travel in the batch, under "stats",
and `batch_axes` says so where a batch is split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import llqr

Shapes = dict[str, Any]
"""A tree of shapes: tuples where the parameters have arrays."""

HEADS = 4
EPSILON = 1e-5  # of both norms
STAGES = (64, 128, 256, 512)
FREQUENCIES = 16


def cross_entropy(outputs: jax.Array, batch: Any) -> jax.Array:
    """Mean cross-entropy over rows; labels of any shape are flattened like the rows."""
    labels = batch["y"].reshape(-1)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def images(key: jax.Array, size: int, shape: tuple[int, ...], classes: int = 10) -> Any:
    """Normal images with random labels."""
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (size, *shape))
    return {"x": x, "y": jax.random.randint(keys[1], (size,), 0, classes)}


def tokens(key: jax.Array, size: int, length: int, vocabulary: int) -> Any:
    """Random text; the label of a position is the next token."""
    text = jax.random.randint(key, (size, length + 1), 0, vocabulary)
    return {"x": text[:, :-1], "y": text[:, 1:]}


@dataclass(frozen=True)
class Model:
    """A model with its data and the sizes of its training and refit batches."""

    name: str
    shapes: Shapes
    forward: Callable[[Any, Any], jax.Array]
    data: Callable[[jax.Array, int], Any]
    batch: int
    refit_batch: int
    steps: int  # training steps timed together, for a steady clock
    loss: Callable[[Any, Any], jax.Array] = cross_entropy
    batch_axes: Callable[[Any], Any] | None = None
    metric: Literal["ngd", "gaussian"] = "ngd"

    def init(self, seed: int = 0) -> Any:
        """Return initial parameters."""
        return initial(self.shapes, seed)

    @property
    def objective(self) -> llqr.Objective:
        """The objective, without a batch."""
        return llqr.Objective(self.forward, self.loss, batch_axes=self.batch_axes)


def initial(shapes: Shapes, seed: int = 0) -> Any:
    """Return LeCun-normal kernels, embeddings of unit length, unit scales and zero biases."""
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    paths, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(seed), len(paths))
    lecun = jax.nn.initializers.lecun_normal()
    make = {
        "kernel": lecun,
        "embedding": lambda key, shape: jax.random.normal(key, shape) / shape[-1] ** 0.5,
        "scale": lambda _, shape: jnp.ones(shape),
        "bias": lambda _, shape: jnp.zeros(shape),
    }
    return treedef.unflatten(
        [make[path[-1].key](key, shape) for key, (path, shape) in zip(keys, paths, strict=True)]
    )


def count(params: Any) -> int:
    """Return the number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def _dense(fan_in: int, fan_out: int) -> Shapes:
    return {"kernel": (fan_in, fan_out), "bias": (fan_out,)}


def _norm(size: int) -> Shapes:
    return {"scale": (size,), "bias": (size,)}


def _apply(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# --- multilayer perceptron --------------------------------------------------------------------


def mlp_shapes(*sizes: int) -> Shapes:
    """Shapes of a perceptron: hidden0, hidden1, ..., logits."""
    names = [f"hidden{i}" for i in range(len(sizes) - 2)] + ["logits"]
    return {n: _dense(a, b) for n, a, b in zip(names, sizes[:-1], sizes[1:], strict=True)}


def mlp(params: Any, batch: Any) -> jax.Array:
    """A perceptron with ReLU."""
    x = batch["x"]
    for i in range(len(params) - 1):
        x = jax.nn.relu(_apply(params[f"hidden{i}"], x))
    return _apply(params["logits"], x)


# --- small convolutional network --------------------------------------------------------------


def cnn_shapes(*widths: int) -> Shapes:
    """Shapes of a stem and one residual block for each further width."""
    blocks = {
        f"block{i}": {
            "conv0": {"kernel": (3, 3, fan_in, fan_out)},
            "conv1": {"kernel": (3, 3, fan_out, fan_out)},
            "skip": {"kernel": (1, 1, fan_in, fan_out)},
        }
        for i, (fan_in, fan_out) in enumerate(pairwise(widths))
    }
    stem = {"kernel": (3, 3, 3, widths[0])}
    return {"stem": stem, **blocks, "logits": _dense(widths[-1], 10)}


def cnn(params: Any, batch: Any) -> jax.Array:
    """A stem and residual blocks with projections, all but the first with stride 2."""
    x = jax.nn.relu(_conv(batch["x"], params["stem"]["kernel"]))
    for i in range(len(params) - 2):
        block, stride = params[f"block{i}"], 1 if i == 0 else 2
        y = jax.nn.relu(_conv(x, block["conv0"]["kernel"], stride))
        y = _conv(y, block["conv1"]["kernel"])
        x = jax.nn.relu(y + _conv(x, block["skip"]["kernel"], stride))
    return _apply(params["logits"], jnp.mean(x, (1, 2)))


# --- transformer language model ---------------------------------------------------------------


def transformer_shapes(layers: int, width: int, inner: int, vocabulary: int, length: int) -> Shapes:
    """Shapes of a pre-norm transformer with learned positions."""
    layer = {
        "norm0": _norm(width),
        "query": _dense(width, width),
        "key": _dense(width, width),
        "value": _dense(width, width),
        "out": _dense(width, width),
        "norm1": _norm(width),
        "up": _dense(width, inner),
        "down": _dense(inner, width),
    }
    return {
        "token": {"embedding": (vocabulary, width)},
        "position": {"embedding": (length, width)},
        **{f"layer{i}": layer for i in range(layers)},
        "norm": _norm(width),
        "lm_head": {"kernel": (width, vocabulary)},
    }


def transformer(params: Any, batch: Any) -> jax.Array:
    """A causal language model: tokens [batch, length] -> logits [batch * length, vocabulary]."""
    x = params["token"]["embedding"][batch["x"]] + params["position"]["embedding"]
    for i in range(sum(name.startswith("layer") for name in params)):
        x = _layer(params[f"layer{i}"], x)
    return _vocabulary(params, x)


def scanned_shapes(layers: int, **sizes: int) -> Shapes:
    """Shapes of the same with its layers stacked: one leaf for each name."""
    shapes = transformer_shapes(1, **sizes)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    stacked = jax.tree.map(lambda s: (layers, *s), shapes.pop("layer0"), is_leaf=is_shape)
    return {**shapes, "layers": stacked}


def scanned(params: Any, batch: Any) -> jax.Array:
    """The same, as a scan over its layers."""
    x = params["token"]["embedding"][batch["x"]] + params["position"]["embedding"]
    x, _ = jax.lax.scan(lambda x, layer: (_layer(layer, x), None), x, params["layers"])
    return _vocabulary(params, x)


def _layer(layer: Any, x: jax.Array) -> jax.Array:
    x = x + _attention(layer, _layer_norm(layer["norm0"], x))
    y = _apply(layer["up"], _layer_norm(layer["norm1"], x))
    return x + _apply(layer["down"], jax.nn.gelu(y))


def _vocabulary(params: Any, x: jax.Array) -> jax.Array:
    logits = _layer_norm(params["norm"], x) @ params["lm_head"]["kernel"]
    return logits.reshape(-1, logits.shape[-1])


def _layer_norm(params: Any, x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON)
    return x * params["scale"] + params["bias"]


def _attention(params: Any, x: jax.Array) -> jax.Array:
    size, length, width = x.shape
    heads = lambda y: y.reshape(size, length, HEADS, width // HEADS)  # noqa: E731
    q, k, v = (heads(_apply(params[name], x)) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // HEADS) ** 0.5
    past = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(past, scores, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return _apply(params["out"], mixed.reshape(x.shape))


# --- ResNet-18 for CIFAR ----------------------------------------------------------------------


def resnet18_shapes(classes: int = 10) -> Shapes:
    """Shapes of a 3x3 stem of 64 channels and two basic blocks for each of four widths."""
    shapes: Shapes = {"stem": _conv_norm(3, 3, STAGES[0])}
    fan_in = STAGES[0]
    for i, width in enumerate(STAGES):
        for j in range(2):
            block = {"first": _conv_norm(3, fan_in, width), "second": _conv_norm(3, width, width)}
            if fan_in != width:
                block["skip"] = _conv_norm(1, fan_in, width)
            shapes[f"stage{i}_block{j}"] = block
            fan_in = width
    return {**shapes, "logits": _dense(fan_in, classes)}


def _conv_norm(window: int, fan_in: int, fan_out: int) -> Shapes:
    return {"conv": {"kernel": (window, window, fan_in, fan_out)}, "norm": _norm(fan_out)}


def resnet18(params: Any, batch: Any) -> jax.Array:
    """ResNet-18, batch norm with the statistics in batch["stats"]."""
    stats = batch["stats"]
    x = jax.nn.relu(_conv_batch_norm(params["stem"], stats["stem"], batch["x"]))
    for i in range(len(STAGES)):
        for j in range(2):
            name = f"stage{i}_block{j}"
            block, own, stride = params[name], stats[name], 2 if i > 0 and j == 0 else 1
            y = jax.nn.relu(_conv_batch_norm(block["first"], own["first"], x, stride))
            y = _conv_batch_norm(block["second"], own["second"], y)
            if "skip" in block:
                x = _conv_batch_norm(block["skip"], own["skip"], x, stride)
            x = jax.nn.relu(x + y)
    return _apply(params["logits"], jnp.mean(x, (1, 2)))


def _conv_batch_norm(params: Any, stats: Any, x: jax.Array, stride: int = 1) -> jax.Array:
    x = _conv(x, params["conv"]["kernel"], stride)
    x = (x - stats["mean"]) * jax.lax.rsqrt(stats["var"] + EPSILON)
    return x * params["norm"]["scale"] + params["norm"]["bias"]


def resnet18_data(key: jax.Array, size: int) -> Any:
    """Images, labels, and the statistics of batch norm before training: 0 and 1."""

    def stats(shapes: Shapes) -> Any:
        if "norm" in shapes:
            channels = shapes["norm"]["scale"]
            return {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}
        return {name: stats(inner) for name, inner in shapes.items()}

    shapes = {name: inner for name, inner in resnet18_shapes().items() if name != "logits"}
    return {**images(key, size, (32, 32, 3)), "stats": stats(shapes)}


def resnet18_batch_axes(batch: Any) -> Any:
    """Return where the examples are: nowhere in the statistics, which all of them share."""
    return {name: None if name == "stats" else 0 for name in batch}


# --- U-Net that predicts noise ------------------------------------------------------------------


def unet_shapes(widths: tuple[int, ...], embedded: int) -> Shapes:
    """Shapes of two blocks for each width down, and one up with what was kept."""
    shapes: Shapes = {
        "time0": _dense(2 * FREQUENCIES, embedded),
        "stem": {"kernel": (3, 3, 3, widths[0])},
    }
    for i, (before, width) in enumerate(pairwise((widths[0], *widths))):
        shapes[f"down{i}_0"] = _unet_block(before, width, embedded)
        shapes[f"down{i}_1"] = _unet_block(width, width, embedded)
    for i, (below, width) in reversed(list(enumerate(pairwise((*reversed(widths), widths[0]))))):
        kept = widths[len(widths) - 1 - i]
        shapes[f"up{i}"] = _unet_block(below + kept, width, embedded)
    return {**shapes, "out": {"kernel": (3, 3, widths[0], 3)}}


def _unet_block(fan_in: int, fan_out: int, embedded: int) -> Shapes:
    return {
        "conv0": {"kernel": (3, 3, fan_in, fan_out)},
        "time": _dense(embedded, fan_out),
        "norm": _norm(fan_out),
        "conv1": {"kernel": (3, 3, fan_out, fan_out)},
        "skip": {"kernel": (1, 1, fan_in, fan_out)},
    }


def unet(params: Any, batch: Any) -> jax.Array:
    """Noise of images [batch, 16, 16, 3] at times in [0, 1]: each row's, flattened."""
    angles = batch["t"][:, None] * 2.0 ** jnp.arange(FREQUENCIES)
    time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    time = jax.nn.silu(_apply(params["time0"], time))

    def block(name: str, x: jax.Array) -> jax.Array:
        own = params[name]
        y = _conv(jax.nn.silu(x), own["conv0"]["kernel"])
        y = _layer_norm(own["norm"], y + _apply(own["time"], time)[:, None, None])
        return _conv(jax.nn.silu(y), own["conv1"]["kernel"]) + _conv(x, own["skip"]["kernel"])

    depth = sum(name.startswith("up") for name in params)
    x, kept = _conv(batch["x"], params["stem"]["kernel"]), []
    for i in range(depth):
        x = block(f"down{i}_1", block(f"down{i}_0", x))
        kept.append(x)
        x = x if i == depth - 1 else x[:, ::2, ::2]
    for i in range(depth):
        x = x if i == 0 else jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        x = block(f"up{i}", jnp.concatenate([x, kept.pop()], -1))
    return _conv(x, params["out"]["kernel"]).reshape(len(x), -1)


def noised(key: jax.Array, size: int) -> Any:
    """Normal images, the noise in them, and their times."""
    keys = jax.random.split(key, 3)
    x, noise = (jax.random.normal(k, (size, 16, 16, 3)) for k in keys[:2])
    return {"x": x, "y": noise.reshape(size, -1), "t": jax.random.uniform(keys[2], (size,))}


def squared_error(outputs: jax.Array, batch: Any) -> jax.Array:
    """Half the squared error of a row, as a mean over rows."""
    return 0.5 * jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, -1))


# --- the catalogue ----------------------------------------------------------------------------

MODELS = {
    "mlp": Model(
        name="MLP 784-100-300-10",
        shapes=mlp_shapes(784, 100, 300, 10),
        forward=mlp,
        data=lambda key, size: images(key, size, (784,)),
        batch=128,
        refit_batch=64,
        steps=40,
    ),
    "cnn": Model(
        name="residual CNN, 32x32x3",
        shapes=cnn_shapes(32, 32, 64, 128),
        forward=cnn,
        data=lambda key, size: images(key, size, (32, 32, 3)),
        batch=32,
        refit_batch=32,
        steps=4,
    ),
    "transformer": Model(
        name="transformer, 2 layers, d 128",
        shapes=transformer_shapes(layers=2, width=128, inner=512, vocabulary=256, length=64),
        forward=transformer,
        data=lambda key, size: tokens(key, size, 64, 256),
        batch=16,
        refit_batch=16,
        steps=4,
    ),
    "resnet18": Model(
        name="ResNet-18, 32x32x3",
        shapes=resnet18_shapes(),
        forward=resnet18,
        data=resnet18_data,
        batch=128,
        refit_batch=128,
        steps=1,
        batch_axes=resnet18_batch_axes,
    ),
    "unet": Model(
        name="U-Net, 16x16x3, widths 32, 64, 96",
        shapes=unet_shapes((32, 64, 96), 64),
        forward=unet,
        data=noised,
        batch=32,
        refit_batch=32,
        steps=4,
        loss=squared_error,
        metric="gaussian",
    ),
    "scanned": Model(
        name="transformer, 12 layers in a scan, d 128",
        shapes=scanned_shapes(layers=12, width=128, inner=512, vocabulary=256, length=64),
        forward=scanned,
        data=lambda key, size: tokens(key, size, 64, 256),
        batch=16,
        refit_batch=16,
        steps=2,
    ),
}
