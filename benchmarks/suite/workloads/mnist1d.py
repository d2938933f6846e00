"""MNIST-1D (Greydanus, arXiv 2011.14439), generated: ten templates, moved, stretched and noisy.

The recipe and its constants are those of the package `mnist1d` 0.0.2, which would bring downloads
and a global random seed along; the numbers drawn are not its own, and the set is another sample.
"""

import numpy as np
from scipy.ndimage import gaussian_filter

from .problem import Batch

COUNT, TRAIN_SHARE, LENGTH = 5000, 0.8, 40
TEMPLATE, LEAST_PADDING, PADDING, MOST_SHIFT = 12, 36, 60, 48
SCALE, SMOOTH_NOISE, NOISE, SHEAR = 0.4, 0.25, 0.02, 0.75

_TEMPLATES = np.array([
    [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
    [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
    [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
    [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
    [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
    [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
    [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
    [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
    [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
])  # fmt: skip


def generate(seed: int = 42) -> tuple[Batch, Batch]:
    """Return the training and the test split: "image" (n, 40, 1) and "label" (n,)."""
    rng = np.random.default_rng(seed)
    shapes = _TEMPLATES - _TEMPLATES.mean(1, keepdims=True)
    shapes = shapes / shapes.std(1, keepdims=True)
    shapes = (shapes - shapes[:, :1]) / 6
    label = rng.permutation(np.repeat(np.arange(10), COUNT // 10))
    signal = np.stack([_signal(shapes[i], rng) for i in label])
    signal = ((signal - signal.mean()) / signal.std())[..., None].astype(np.float32)
    cut = int(TRAIN_SHARE * COUNT)
    parts = [{"image": signal[s], "label": label[s].astype(np.int32)}
             for s in (slice(cut), slice(cut, None))]  # fmt: skip
    return parts[0], parts[1]


def _signal(template: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    padding = LEAST_PADDING + int(rng.random() * (PADDING - LEAST_PADDING + 1))
    x = _stretched(np.concatenate([template + 1e-8, np.zeros(padding)]), TEMPLATE + PADDING)
    x = np.roll(x * (1 + SCALE * (rng.random() - 0.5)), rng.integers(MOST_SHIFT))
    smooth = gaussian_filter(SMOOTH_NOISE * rng.standard_normal(len(x)), 2)
    x = np.where(x != 0, x, smooth) + NOISE * rng.standard_normal(len(x))
    x = x - SHEAR * (rng.random() - 0.5) * np.linspace(-0.5, 0.5, len(x))
    return _stretched(x, LENGTH)


def _stretched(x: np.ndarray, length: int) -> np.ndarray:
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(x)), x)
