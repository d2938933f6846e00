"""Models of images at small size, with their inference written out: one list for all tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llqr_experiments import models
from tests.experiments import models_oracle

CLASSES, BATCH = 3, 4


def layout(name, shape, classes, **options):
    """A model without arrays."""
    return nnx.eval_shape(lambda: models.make(name, shape, classes, seed=0, options=options))


def parameters_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@dataclass(frozen=True)
class Case:
    """A model at its small size.

    Attributes:
      name: of the model.
      oracle: its inference written out.
      momentum: of batch norm; None: it has none.
      options: on top of the small ones.
    """

    name: str
    oracle: Callable[..., Any]
    momentum: float | None = None
    options: dict = field(default_factory=dict)

    def __str__(self):
        return self.name

    @property
    def has_dropout(self):
        return "dropout" in models.MODELS[self.name].options

    def make(self, **options):
        """The model with random numbers in place of its own start, which compiles a lot."""
        small = {**models.MODELS[self.name].small, **self.options, **options}
        model = layout(self.name, (8, 8, 1), CLASSES, **small)
        rng = np.random.default_rng(0)
        state = jax.tree.map_with_path(partial(_filled, rng), nnx.state(model))
        nnx.update(model, state)
        return model

    def batch(self):
        rng = np.random.default_rng(1)
        x = jnp.asarray(rng.normal(size=(BATCH, 8, 8, 1)), float)
        return {"x": x, "y": jnp.arange(BATCH) % CLASSES}


def _filled(rng, path, leaf):
    """An array for a leaf: kernels of the usual size, nothing else at zero or one."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return jnp.zeros(leaf.shape, leaf.dtype)
    x, name = rng.normal(size=leaf.shape), str(path)
    if "kernel" in name:
        x /= np.sqrt(np.prod(leaf.shape[:-1]))
    else:
        x = 1 + abs(x) / 3 if "scale" in name or "var" in name else x / 3
    return jnp.asarray(x, float)


CASES = [
    Case("mlp", models_oracle.mlp),
    Case("mlp-legacy", models_oracle.mlp),
    Case("resnet-18", models_oracle.resnet18, 0.99),
    Case("resnet-50", models_oracle.resnet50, 0.99),
    Case("vgg16-bn", models_oracle.vgg, 0.9),
    Case("wide-resnet-28-10", models_oracle.wide_resnet, 0.9),
    Case("pyramidnet-110", models_oracle.pyramidnet, 0.9),
    Case("vit-ti-16", models_oracle.vit),
    Case("vit-s-16", models_oracle.vit),
]
