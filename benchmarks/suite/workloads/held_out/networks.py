"""Networks of the test set, in plain JAX as those of the development set."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.suite.workloads.networks import (
    Params,
    affine,
    block,
    block_parameters,
    convolve,
    kernel,
    layer,
    norm,
    normalised,
    perceptron,
    perceptron_parameters,
)

# --- images -------------------------------------------------------------------------------------


def _unit_parameters(key: Any, inputs: int, width: int) -> Params:
    """Return a norm, two 3x3 convolutions, and one of a place where the widths differ."""
    first, second, third = jax.random.split(key, 3)
    params: Params = {
        "norm0": norm(inputs),
        "conv0": layer(first, 3, 3, inputs, width),
        "norm1": norm(width),
        "conv1": layer(second, 3, 3, width, width),
    }
    return params if inputs == width else params | {"skip": layer(third, 1, 1, inputs, width)}


def _unit(params: Params, x: Any, stride: int = 1, shift: Any = 0.0) -> Any:
    """Norm, convolution, a shift of each channel, norm, convolution, and a skip (pre-activation).

    A norm is over the channels of a place: examples do not see each other.
    """
    inner = convolve(params["conv0"], jax.nn.silu(normalised(x, params["norm0"])), stride) + shift
    inner = convolve(params["conv1"], jax.nn.silu(normalised(inner, params["norm1"])))
    return inner + (convolve(params["skip"], x, stride) if "skip" in params else x)


def resnet_parameters(key: Any, *, channels: int, widths: tuple[int, ...], classes: int) -> Params:
    """Return a stem, a residual unit for each width, a norm and a head."""
    keys = iter(jax.random.split(key, len(widths) + 2))
    params: Params = {"stem": layer(next(keys), 3, 3, channels, widths[0])}
    for i, (inputs, width) in enumerate(pairwise((widths[0], *widths))):
        params[f"unit{i}"] = _unit_parameters(next(keys), inputs, width)
    return params | {"norm": norm(widths[-1]), "head": layer(next(keys), widths[-1], classes)}


def resnet(params: Params, x: Any) -> Any:
    """Return logits; a unit that widens halves both sides of the image."""
    x = convolve(params["stem"], x, 2)
    for i in range(len(params) - 3):
        unit = params[f"unit{i}"]
        x = _unit(unit, x, stride=2 if "skip" in unit else 1)
    return affine(params["head"], jax.nn.silu(normalised(x, params["norm"])).mean((1, 2)))


def unet_parameters(key: Any, *, width: int, features: int) -> Params:
    """Return a U-Net of two scales for images of one channel, told the level of their noise."""
    keys = iter(jax.random.split(key, 9))
    wide = 2 * width
    return {
        "level": layer(next(keys), features, width),
        "shifts": {n: layer(next(keys), width, w)
                   for n, w in (("down", width), ("middle", wide), ("up", width))},
        "stem": layer(next(keys), 3, 3, 1, width),
        "down": _unit_parameters(next(keys), width, width),
        "middle": _unit_parameters(next(keys), width, wide),
        "up": _unit_parameters(next(keys), width + wide, width),
        "head": layer(next(keys), 3, 3, width, 1),
    }  # fmt: skip


def unet(params: Params, x: Any, level: Any) -> Any:
    """Return an image for each image [n, h, w, 1] and what is told of its noise [n, features]."""
    level = jax.nn.silu(affine(params["level"], level))
    shift = {n: affine(part, level)[:, None, None] for n, part in params["shifts"].items()}
    fine = _unit(params["down"], convolve(params["stem"], x), shift=shift["down"])
    coarse = _unit(params["middle"], fine, 2, shift["middle"])
    coarse = coarse.repeat(2, 1).repeat(2, 2)
    both = jnp.concatenate([fine, coarse], -1)
    return convolve(params["head"], jax.nn.silu(_unit(params["up"], both, shift=shift["up"])))


def vision_transformer_parameters(
    key: Any, *, patch: int, places: int, width: int, depth: int, classes: int
) -> Params:
    """Return an embedding of patches, one of places, blocks, a norm and a head."""
    keys = iter(jax.random.split(key, 3 + 6 * depth))
    params: Params = {
        "patches": layer(next(keys), patch * patch, width),
        "positions": {"embedding": 0.1 * jax.random.normal(next(keys), (places, width))},
        "norm": norm(width),
        "head": layer(next(keys), width, classes),
    }
    return params | {f"block{i}": block_parameters(keys, width) for i in range(depth)}


def vision_transformer(params: Params, patches: Any, *, heads: int = 4) -> Any:
    """Return logits from the mean over patches [n, places, pixels]."""
    x = affine(params["patches"], patches) + params["positions"]["embedding"]
    for i in range(sum(name.startswith("block") for name in params)):
        x = block(params[f"block{i}"], x, heads=heads, causal=False)
    return affine(params["head"], normalised(x, params["norm"]).mean(1))


def vae_parameters(key: Any, *, pixels: int, width: int, latent: int) -> Params:
    """Return an encoder to means and logarithms of spreads, and a decoder."""
    first, second = jax.random.split(key)
    return {
        "encoder": perceptron_parameters(first, widths=(pixels, width, width, 2 * latent)),
        "decoder": perceptron_parameters(second, widths=(latent, width, width, pixels)),
    }


def vae(params: Params, x: Any, noise: Any) -> Params:
    """Return the decoded images, and means and logarithms of spreads of codes.

    The codes are drawn by the noise given. Their spreads lie between e^-3 and e^3.
    """
    mean, spread = jnp.split(perceptron(params["encoder"], x, activation=jax.nn.silu), 2, -1)
    spread = 3 * jnp.tanh(spread / 3)
    code = mean + jnp.exp(spread) * noise
    pixels = perceptron(params["decoder"], code, activation=jax.nn.silu)
    return {"pixels": pixels, "mean": mean, "spread": spread}


# --- sequences ----------------------------------------------------------------------------------


def gru_parameters(key: Any, *, vocabulary: int, embedded: int, width: int) -> Params:
    """Return an embedding, a gated cell whose recurrent kernels are orthogonal, and a head."""
    keys = iter(jax.random.split(key, 6))
    recur = [jax.random.orthogonal(next(keys), width) for _ in range(3)]
    return {
        "tokens": {"embedding": 0.1 * jax.random.normal(next(keys), (vocabulary, embedded))},
        "cell": layer(next(keys), embedded, 3 * width),
        "recur": {"kernel": jnp.concatenate(recur, -1)},
        "head": layer(next(keys), width, vocabulary),
    }


def gru(params: Params, tokens: Any) -> Any:
    """Return the logits of the next token at every place of [B, T]."""
    drive = affine(params["cell"], params["tokens"]["embedding"][tokens])
    width = params["recur"]["kernel"].shape[0]

    def advance(hidden: Any, now: Any) -> tuple[Any, Any]:
        again = jnp.split(hidden @ params["recur"]["kernel"], 3, -1)
        reset, update, new = jnp.split(now, 3, -1)
        update = jax.nn.sigmoid(update + again[1])
        new = jnp.tanh(new + jax.nn.sigmoid(reset + again[0]) * again[2])
        hidden = update * hidden + (1 - update) * new
        return hidden, hidden

    start = jnp.zeros((tokens.shape[0], width), drive.dtype)
    _, hidden = jax.lax.scan(advance, start, drive.swapaxes(0, 1))
    return affine(params["head"], hidden.swapaxes(0, 1))


def tied_parameters(key: Any, *, vocabulary: int, width: int, depth: int, length: int) -> Params:
    """Return embeddings, blocks and a norm: the head is the embedding."""
    keys = iter(jax.random.split(key, 2 + 6 * depth))
    params: Params = {
        "tokens": {"embedding": 0.1 * jax.random.normal(next(keys), (vocabulary, width))},
        "positions": {"embedding": 0.1 * jax.random.normal(next(keys), (length, width))},
        "norm": norm(width),
    }
    return params | {f"block{i}": block_parameters(keys, width) for i in range(depth)}


def tied(params: Params, tokens: Any, *, heads: int = 4) -> Any:
    """Return the logits of the next token at every place."""
    table = params["tokens"]["embedding"]
    x = table[tokens] + params["positions"]["embedding"]
    for i in range(sum(name.startswith("block") for name in params)):
        x = block(params[f"block{i}"], x, heads=heads)
    return normalised(x, params["norm"]) @ table.T


def scanned_parameters(key: Any, *, vocabulary: int, width: int, depth: int, length: int) -> Params:
    """Return a transformer whose blocks are one, each leaf with an axis of layers in front."""
    first, second, third, fourth = jax.random.split(key, 4)

    def one(key: Any) -> Params:
        return block_parameters(iter(jax.random.split(key, 6)), width)

    return {
        "tokens": {"embedding": 0.1 * jax.random.normal(first, (vocabulary, width))},
        "positions": {"embedding": 0.1 * jax.random.normal(second, (length, width))},
        "layers": jax.vmap(one)(jax.random.split(third, depth)),
        "norm": norm(width),
        "head": layer(fourth, width, vocabulary),
    }


def scanned(params: Params, tokens: Any, *, heads: int = 4) -> Any:
    """Return the logits of the next token at every place, by a scan over the layers."""
    x = params["tokens"]["embedding"][tokens] + params["positions"]["embedding"]
    x, _ = jax.lax.scan(lambda x, one: (block(one, x, heads=heads), None), x, params["layers"])
    return affine(params["head"], normalised(x, params["norm"]))


# --- numbers ------------------------------------------------------------------------------------


def graph_parameters(key: Any, *, widths: tuple[int, ...]) -> list[Params]:
    """Return for each pair of widths a kernel of a node's own features and one of its neighbours'.

    The last pair is a head, of its own features alone.
    """
    keys = iter(jax.random.split(key, 2 * len(widths)))
    *pairs, last = pairwise(widths)
    hidden = [
        layer(next(keys), *shape) | {"neighbours": {"kernel": kernel(next(keys), *shape)}}
        for shape in pairs
    ]
    return [*hidden, layer(next(keys), *last)]


def graph(params: list[Params], x: Any, senders: Any, receivers: Any) -> Any:
    """Return an output for each node; a node hears the mean of its neighbours."""
    nodes = x.shape[0]
    degree = jax.ops.segment_sum(jnp.ones(receivers.shape, x.dtype), receivers, nodes)
    share = 1 / jnp.maximum(degree, 1)[:, None]
    for part in params[:-1]:
        heard = share * jax.ops.segment_sum(x[senders], receivers, nodes)
        x = jax.nn.silu(affine(part, x) + heard @ part["neighbours"]["kernel"])
    return affine(params[-1], x)


def flow_parameters(key: Any, *, dims: int, couplings: int, width: int) -> list[Any]:
    """Return a perceptron for each coupling, to shifts and logarithms of scales."""
    half = dims // 2
    return [
        perceptron_parameters(k, widths=(half, width, width, 2 * half))
        for k in jax.random.split(key, couplings)
    ]


def flow(params: list[Any], x: Any) -> Params:
    """Return where a real NVP (Dinh et al., arXiv 1605.08803) sends points, and its log volume."""
    still, moved = jnp.split(x, 2, -1)
    volume = 0.0
    for part in params:
        shift, scale = jnp.split(perceptron(part, still, activation=jnp.tanh), 2, -1)
        scale = jnp.tanh(scale)  # bounded, as in the paper
        still, moved = moved * jnp.exp(scale) + shift, still
        volume = volume + scale.sum(-1)
    return {"z": jnp.concatenate([still, moved], -1), "volume": volume}
