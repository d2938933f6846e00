"""Images: noise prediction, a vision transformer, a ResNet, a variational autoencoder."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.suite.workloads.images import load, measured, pooled
from benchmarks.suite.workloads.problem import Batch, Workload, cross_entropy, squared_error

from . import networks

COPIES = 8
"""Of an image, each with noise of its own."""

SPREAD = 0.2
"""Standard deviation of a pixel around its decoded value."""

SIDE = 14
"""Of an image that is encoded. Outputs are divided by it, so that losses are for one pixel."""


def _copies(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the images several times, in another order."""
    return rng.permutation(np.repeat(image, COPIES, 0))


# --- diffusion ----------------------------------------------------------------------------------


def _noisy(image: np.ndarray, rng: np.random.Generator) -> Batch:
    """Images between themselves and noise, by a cosine schedule, and the noise to predict.

    Noise is an eighth of itself, so that the loss is half a mean over 64 pixels.
    """
    x = 2 * _copies(image, rng) - 1
    noise = rng.standard_normal(x.shape)
    time = rng.uniform(0.02, 0.98, (len(x), 1))
    angle = (np.pi / 2 * time)[..., None, None]
    waves = np.pi * time * 2.0 ** np.arange(4)
    arrays = {
        "image": np.cos(angle) * x + np.sin(angle) * noise,
        "level": np.concatenate([np.sin(waves), np.cos(waves)], -1),
        "label": noise / 8,
    }
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def _denoise(params: Any, batch: Batch) -> Any:
    return networks.unet(params, batch["image"], batch["level"]) / 8


def diffusion() -> Workload:
    """The noise in an 8x8 image, by a U-Net."""
    rng = np.random.default_rng(0)
    train, test = (_noisy(part["image"], rng) for part in load("digits"))
    return Workload(
        "diffusion",
        partial(networks.unet_parameters, width=12, features=8),
        _denoise,
        squared_error,
        **measured(train, test, 500),
        batch=64,
        steps=300,
        metric="gaussian",
        measure="test",
        held_out=True,
        told="digits, noise prediction by a U-Net of 12 and 24 channels",
    )


# --- classes ------------------------------------------------------------------------------------


def _patches(arrays: Batch) -> Batch:
    """Images of 28x28 as 16 patches of 7x7."""
    x = arrays["image"].reshape(-1, 4, 7, 4, 7).swapaxes(2, 3).reshape(-1, 16, 49)
    return {**arrays, "image": x}


def _attend(params: Any, batch: Batch) -> Any:
    return networks.vision_transformer(params, batch["image"])


def vision_transformer() -> Workload:
    """Two blocks on patches."""
    train, test = (_patches(part) for part in load("fashion_mnist"))
    return Workload(
        "vision-transformer",
        partial(networks.vision_transformer_parameters, patch=7, places=16, width=48, depth=2,
                classes=10),
        _attend,
        cross_entropy,
        **measured(train, test, 500),
        batch=32,
        steps=400,
        held_out=True,
        told="Fashion-MNIST, 16 patches of 7x7, 2 blocks of 48 features",
    )  # fmt: skip


def _residual(params: Any, batch: Batch) -> Any:
    return networks.resnet(params, batch["image"])


def resnet() -> Workload:
    """Residual units of two widths with norms, by its test loss."""
    train, test = (pooled(part) for part in load("fashion_mnist"))
    return Workload(
        "resnet",
        partial(networks.resnet_parameters, channels=1, widths=(12, 12, 24), classes=10),
        _residual,
        cross_entropy,
        **measured(train, test, 500),
        batch=64,
        steps=300,
        measure="test",
        held_out=True,
        told="Fashion-MNIST at 14x14, pre-activation ResNet of 12, 12 and 24 channels",
    )


# --- a variational autoencoder ------------------------------------------------------------------


def _autoencode(params: Any, batch: Batch) -> Any:
    outputs = networks.vae(params, batch["image"], batch["noise"])
    outputs["pixels"] = outputs["pixels"] / SPREAD
    return {name: values / SIDE for name, values in outputs.items()}


def _evidence(outputs: Any, batch: Batch) -> Any:
    """The negative evidence bound of a pixel, without constants, as a mean over rows.

    The code's divergence from a normal of unit spread is 1/2 (m^2 + e^(2 s) - 1) - s.
    """
    apart = ((outputs["pixels"] - batch["label"]) ** 2).sum(-1)
    wide = 2 * SIDE * outputs["spread"]
    divergence = (outputs["mean"] ** 2 + (jnp.exp(wide) - 1 - wide) / SIDE**2).sum(-1)
    return 0.5 * jnp.mean(apart + divergence)


def vae(latent: int = 8) -> Workload:
    """Codes of eight numbers for images of 14x14, by the test loss."""
    rng = np.random.default_rng(0)

    def of(arrays: Batch) -> Batch:
        x = pooled(arrays)["image"]
        x = x.reshape(len(x), -1)
        noise = rng.standard_normal((len(x), latent)).astype(np.float32)
        return {"image": x, "noise": noise, "label": x / np.float32(SPREAD * SIDE)}

    train, test = (of(part) for part in load("fashion_mnist"))
    return Workload(
        "vae",
        partial(networks.vae_parameters, pixels=196, width=96, latent=latent),
        _autoencode,
        _evidence,
        **measured(train, test),
        batch=64,
        steps=500,
        metric="gaussian",
        measure="test",
        layered=False,
        held_out=True,
        told="Fashion-MNIST at 14x14, variational autoencoder 196-96-96-8-96-96-196",
    )


def vae_large_batch() -> Workload:
    """The same with 1,024 images in a batch, by the training loss."""
    return replace(
        vae(),
        name="vae-large-batch",
        batch=1024,
        steps=200,
        measure="train",
        told="the same, 1,024 images in a batch",
    )
