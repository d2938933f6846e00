"""Images and signals: scikit-learn's digits, Fashion-MNIST, MNIST-1D."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from llqr_experiments import data

from . import mnist1d, networks
from .problem import Batch, Workload, cross_entropy, rows, squared_error, take

FIXED = 1000
"""Examples that losses are measured on, at most."""

NOISE = 0.4
"""Share of labels that are drawn anew in "noisy-digits"."""


def load(name: str) -> tuple[Batch, Batch]:
    """Return the training and the test images of a data set of the runner."""
    loaded = data.load(name, None, download=False)
    sources = [data.Source.of(loaded, split) for split in ("train", "test")]
    train, test = (source.gather(np.arange(len(source))) for source in sources)
    return train, test


def measured(train: Batch, test: Batch, count: int = FIXED) -> dict[str, Any]:
    """Return what is trained on and what losses are measured on, so many examples at most."""
    return {"train": train, "fixed": take(train, slice(count)), "test": take(test, slice(count))}


def pooled(arrays: Batch) -> Batch:
    """Return images of half the sides: means of 2x2 pixels."""
    x = arrays["image"]
    n, height, width, channels = x.shape
    small = x.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return {**arrays, "image": small}


def _perceptron(params: Any, batch: Batch, *, activation: Any = jax.nn.relu) -> Any:
    return networks.perceptron(params, batch["image"], activation=activation)


def _convolutional(params: Any, batch: Batch) -> Any:
    return networks.convolutional(params, batch["image"])


def _residual(params: Any, batch: Batch) -> Any:
    return networks.residual(params, batch["image"])


def _recurrent(params: Any, batch: Batch) -> Any:
    return networks.recurrent(params, batch["image"])


def digits() -> Workload:
    """An MLP on 8x8 images."""
    return Workload(
        "digits",
        partial(networks.perceptron_parameters, widths=(64, 100, 100, 10)),
        _perceptron,
        cross_entropy,
        **measured(*load("digits")),
        batch=64,
        steps=150,  # in 600, training losses end at 0
        told="digits, MLP 64-100-100-10, ReLU",
    )


def noisy() -> Workload:
    """Batches of 16 images, many with a wrong label; the labels of the test are right."""
    workload = digits()
    rng = np.random.default_rng(0)
    label = workload.train["label"]
    drawn = rng.integers(0, 10, len(label)).astype(label.dtype)
    label = np.where(rng.random(len(label)) < NOISE, drawn, label)
    train = {**workload.train, "label": label}
    return replace(
        workload,
        name="noisy-digits",
        train=train,
        fixed=take(train, slice(FIXED)),
        batch=16,
        steps=600,
        measure="test",
        told="the same, batches of 16, 40 % of the labels random; clean test loss",
    )


def autoencoder() -> Workload:
    """Six sigmoid layers between an image and itself, eight numbers in the middle.

    The labels are an eighth of the image, so that the loss is half a mean over its 64 pixels.
    """
    train, test = load("digits")

    def of(arrays: Batch) -> Batch:
        x = arrays["image"].reshape(len(arrays["image"]), -1)
        return {"image": x, "label": x / 8}

    return Workload(
        "autoencoder",
        partial(networks.perceptron_parameters, widths=(64, 48, 24, 8, 24, 48, 64)),
        partial(_perceptron, activation=jax.nn.sigmoid),
        squared_error,
        **measured(of(train), of(test)),
        batch=128,
        steps=800,
        metric="gaussian",
        told="digits, autoencoder 64-48-24-8-24-48-64, sigmoid, squared error",
    )


def full_batch() -> Workload:
    """The same with all images in every batch."""
    workload = autoencoder()
    return replace(
        workload,
        name="autoencoder-full-batch",
        batch=rows(workload.train),
        steps=400,
        told="the same, all images in a batch",
    )


def fashion_mlp() -> Workload:
    """An MLP on Fashion-MNIST at half its size."""
    train, test = (pooled(part) for part in load("fashion_mnist"))
    return Workload(
        "fashion-mlp",
        partial(networks.perceptron_parameters, widths=(196, 128, 64, 10)),
        _perceptron,
        cross_entropy,
        **measured(train, test),
        batch=128,
        steps=600,
        told="Fashion-MNIST at 14x14, MLP 196-128-64-10, ReLU",
    )


def fashion_resnet() -> Workload:
    """Residual blocks on the same images."""
    workload = fashion_mlp()
    return replace(
        workload,
        name="fashion-resnet",
        parameters=partial(networks.residual_parameters, width=12, blocks=2, classes=10),
        forward=_residual,
        fixed=take(workload.fixed, slice(500)),
        test=take(workload.test, slice(500)),
        batch=64,
        steps=300,
        told="Fashion-MNIST at 14x14, 2 residual blocks of 12 channels",
    )


def mnist1d_cnn() -> Workload:
    """Convolutions in one dimension on generated signals."""
    return Workload(
        "mnist1d",
        partial(networks.convolutional_parameters, channels=(1, 16, 16, 16), size=5, dims=1,
                classes=10),
        _convolutional,
        cross_entropy,
        **measured(*mnist1d.generate()),
        batch=64,
        steps=600,
        told="MNIST-1D, 3 convolutions of 16 channels",
    )  # fmt: skip


def recurrent_digits() -> Workload:
    """A tanh network that reads a digit four pixels at a time."""

    def of(arrays: Batch) -> Batch:
        x = arrays["image"]
        return {**arrays, "image": x.reshape(len(x), 16, 4)}

    train, test = (of(part) for part in load("digits"))
    return Workload(
        "recurrent-digits",
        partial(networks.recurrent_parameters, inputs=4, width=48, classes=10),
        _recurrent,
        cross_entropy,
        **measured(train, test),
        batch=64,
        steps=600,
        layered=False,
        told="digits, 4 pixels at a time, tanh recurrence of 48 units",
    )
