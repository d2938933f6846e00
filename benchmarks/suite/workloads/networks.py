"""Networks in plain JAX: parameters are nested dicts with leaves kernel, bias, scale, embedding."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]


def kernel(key: Any, *shape: int) -> Any:
    """Return normal entries of variance 1 / fan-in."""
    return jax.random.normal(key, shape) / np.prod(shape[:-1]) ** 0.5


def layer(key: Any, *shape: int) -> Params:
    """Return a kernel and a bias of zeros."""
    return {"kernel": kernel(key, *shape), "bias": jnp.zeros(shape[-1])}


def affine(params: Params, x: Any) -> Any:
    """Return x W + b."""
    return x @ params["kernel"] + params["bias"]


# --- perceptrons --------------------------------------------------------------------------------


def perceptron_parameters(key: Any, *, widths: tuple[int, ...]) -> list[Params]:
    """Return a layer for each pair of widths."""
    keys = jax.random.split(key, len(widths) - 1)
    return [layer(k, *shape) for k, shape in zip(keys, pairwise(widths), strict=True)]


def perceptron(params: list[Params], x: Any, *, activation: Any = jax.nn.relu) -> Any:
    """Return the outputs for rows x, whose further axes are flattened."""
    x = x.reshape(x.shape[0], -1)
    for i, part in enumerate(params):
        x = affine(part, activation(x) if i else x)
    return x


# --- convolutions -------------------------------------------------------------------------------


def convolve(params: Params, x: Any, stride: int = 1) -> Any:
    """Return a convolution in one or two dimensions, channels last, with its bias."""
    dims = "NWC WIO NWC" if x.ndim == 3 else "NHWC HWIO NHWC"
    a, b, c = dims.split()
    y = jax.lax.conv_general_dilated(
        x, params["kernel"], (stride,) * (x.ndim - 2), "SAME", dimension_numbers=(a, b, c)
    )
    return y + params["bias"]


def convolutional_parameters(
    key: Any, *, channels: tuple[int, ...], size: int, dims: int, classes: int
) -> Params:
    """Return convolutions of `size` and a dense layer on their mean over places."""
    keys = jax.random.split(key, len(channels))
    shapes = [(*(size,) * dims, m, n) for m, n in pairwise(channels)]
    params = {f"conv{i}": layer(k, *s) for i, (k, s) in enumerate(zip(keys, shapes, strict=False))}
    return {**params, "head": layer(keys[-1], channels[-1], classes)}


def convolutional(params: Params, x: Any) -> Any:
    """Convolutions with ReLU, stride 2 from the second on, and the mean over places."""
    for i in range(len(params) - 1):
        x = jax.nn.relu(convolve(params[f"conv{i}"], x, 1 + min(i, 1)))
    return affine(params["head"], x.mean(tuple(range(1, x.ndim - 1))))


def residual_parameters(key: Any, *, width: int, blocks: int, classes: int) -> Params:
    """Return a stem, blocks of two 3x3 convolutions, and a dense layer."""
    keys = iter(jax.random.split(key, 2 * blocks + 2))
    params: Params = {"stem": layer(next(keys), 3, 3, 1, width)}
    for i in range(blocks):
        params[f"block{i}"] = {f"conv{j}": layer(next(keys), 3, 3, width, width) for j in (0, 1)}
    return {**params, "head": layer(next(keys), width, classes)}


def residual(params: Params, x: Any) -> Any:
    """Identity skips; means of 2x2 places after the stem, the mean over all before the head."""
    x = _halved(jax.nn.relu(convolve(params["stem"], x)))
    for i in range(len(params) - 2):
        block = params[f"block{i}"]
        inner = jax.nn.relu(convolve(block["conv0"], x))
        x = jax.nn.relu(x + convolve(block["conv1"], inner))
    return affine(params["head"], x.mean((1, 2)))


def _halved(x: Any) -> Any:
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


# --- sequences ----------------------------------------------------------------------------------


def transformer_parameters(
    key: Any, *, vocabulary: int, width: int, depth: int, length: int
) -> Params:
    """Return embeddings, pre-norm blocks with a perceptron of four widths, a norm and a head."""
    keys = iter(jax.random.split(key, 3 + 6 * depth))
    params: Params = {
        "tokens": {"embedding": 0.1 * jax.random.normal(next(keys), (vocabulary, width))},
        "positions": {"embedding": 0.1 * jax.random.normal(next(keys), (length, width))},
        "norm": norm(width),
        "head": layer(next(keys), width, vocabulary),
    }
    for i in range(depth):
        params[f"block{i}"] = block_parameters(keys, width)
    return params


def transformer(params: Params, tokens: Any, *, heads: int = 4) -> Any:
    """Return the logits of the next token at every place."""
    x = params["tokens"]["embedding"][tokens] + params["positions"]["embedding"]
    for i in range(sum(name.startswith("block") for name in params)):
        x = block(params[f"block{i}"], x, heads=heads)
    return affine(params["head"], normalised(x, params["norm"]))


def block_parameters(keys: Iterator[Any], width: int) -> Params:
    """Return attention, a perceptron of four widths and two norms; six keys are taken."""
    params: Params = {
        name: {"kernel": kernel(next(keys), width, width)}
        for name in ("query", "key", "value", "out")
    }
    params["up"] = layer(next(keys), width, 4 * width)
    params["down"] = layer(next(keys), 4 * width, width)
    return params | {"norm1": norm(width), "norm2": norm(width)}


def block(params: Params, x: Any, *, heads: int, causal: bool = True) -> Any:
    """Return [B, T, width] after attention and perceptron, each behind a norm and with a skip."""
    x = x + _attention(normalised(x, params["norm1"]), params, heads, causal)
    up = affine(params["up"], normalised(x, params["norm2"]))
    return x + affine(params["down"], jax.nn.gelu(up))


def norm(width: int) -> Params:
    """Return the scale and the bias of a layer norm."""
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def normalised(x: Any, norm: Params) -> Any:
    """Return a layer norm over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    unit = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    return unit * norm["scale"] + norm["bias"]


def _attention(x: Any, block: Params, heads: int, causal: bool) -> Any:
    batch, length, width = x.shape
    q, k, v = (
        (x @ block[name]["kernel"]).reshape(batch, length, heads, width // heads)
        for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    return mixed.reshape(batch, length, width) @ block["out"]["kernel"]


def recurrent_parameters(key: Any, *, inputs: int, width: int, classes: int) -> Params:
    """Return a tanh cell whose recurrent kernel is orthogonal, and a head."""
    first, second, third = jax.random.split(key, 3)
    recur = jax.random.orthogonal(second, width)
    return {
        "cell": layer(first, inputs, width),
        "recur": {"kernel": recur},
        "head": layer(third, width, classes),
    }


def recurrent(params: Params, x: Any) -> Any:
    """Return the logits after the last place of [B, T, inputs]."""

    def advance(hidden: Any, now: Any) -> tuple[Any, None]:
        drive = affine(params["cell"], now) + hidden @ params["recur"]["kernel"]
        return jnp.tanh(drive), None

    width = params["recur"]["kernel"].shape[0]
    hidden, _ = jax.lax.scan(advance, jnp.zeros((x.shape[0], width), x.dtype), x.swapaxes(0, 1))
    return affine(params["head"], hidden)


# --- functions with their derivatives -----------------------------------------------------------


def jets(params: list[Params], x: Any) -> tuple[Any, Any, Any]:
    """Return u, its first and its unmixed second derivatives of a tanh perceptron.

    They are carried forward, value, gradient and curvature of every unit together:

      linear   v W + b,   g W,     h W
      tanh     t = tanh v, t' g,   t' h + t'' g^2       t' = 1 - t^2,  t'' = -2 t t'

    Args:
      params: layers, the last with one unit.
      x: points, (n, d).

    Returns:
      (n,), (n, d) and (n, d).
    """
    n, d = x.shape
    value = x
    first = jnp.broadcast_to(jnp.eye(d, dtype=x.dtype), (n, d, d))  # point, coordinate, unit
    second = jnp.zeros_like(first)
    for i, part in enumerate(params):
        if i:
            t = jnp.tanh(value)
            slope = (1 - t * t)[:, None]
            second = slope * (second - 2 * t[:, None] * first**2)
            value, first = t, slope * first
        weights = part["kernel"]
        value, first, second = affine(part, value), first @ weights, second @ weights
    return value[:, 0], first[..., 0], second[..., 0]
