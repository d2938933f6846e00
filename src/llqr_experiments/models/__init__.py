"""Models of the experiments, in Flax NNX: `make` by name, `network` for their pure functions."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from flax import nnx

from llqr.errors import unknown
from llqr_experiments import capacity
from llqr_experiments.errors import ConfigError
from llqr_experiments.models import (
    gpt2,
    grok,
    mlp,
    pinn,
    pyramidnet,
    resnet,
    translation,
    vgg,
    vit,
    wide_resnet,
)
from llqr_experiments.models.staged import Network, Staged, network

__all__ = ["MODELS", "Network", "Staged", "make", "network", "translation"]


@dataclass(frozen=True)
class Model:
    """A model of the catalogue.

    Attributes:
      factory: `(shape or sizes of the data, classes, *, options, rngs) -> Staged`.
      small: options of a small sibling, for smoke runs and tests.
      takes: kind of data: images, operations, text, translation, equations or tables.
    """

    factory: Callable[..., Staged]
    small: Mapping[str, Any] = field(default_factory=dict)
    takes: str = "images"

    @property
    def options(self) -> list[str]:
        """Names of its own options."""
        known = inspect.signature(self.factory).parameters.values()
        return [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.name != "rngs"]


MODELS: dict[str, Model] = {
    "mlp": Model(mlp.mlp, {"hidden": [16]}),
    "mlp-legacy": Model(mlp.mlp_legacy, {"hidden": [16]}),
    "resnet-18": Model(resnet.resnet18, {"width": 4, "depth": 1}),
    "resnet-50": Model(resnet.resnet50, {"width": 4, "depth": 1}),
    "vgg16-bn": Model(vgg.vgg16, {"width": 4, "blocks": [1, 2], "hidden": [16, 16]}),
    "wide-resnet-28-10": Model(wide_resnet.wide_resnet, {"width": 1, "units_per_group": 2}),
    "pyramidnet-110": Model(pyramidnet.pyramidnet, {"alpha": 6, "depth": 11}),
    "vit-ti-16": Model(vit.vit, {"width": 16, "depth": 1, "heads": 2}),
    "vit-s-16": Model(partial(vit.vit, width=384, heads=6), {"width": 16, "depth": 1, "heads": 2}),
    "grok-transformer": Model(
        grok.grok_transformer, {"width": 16, "heads": 2, "mlp": 32, "depth": 1}, "operations"
    ),
    "gpt2-small": Model(gpt2.gpt2_small, {"width": 16, "heads": 2, "depth": 1}, "text"),
    "transformer-iwslt-de-en": Model(
        translation.transformer_iwslt,
        {"width": 16, "heads": 2, "mlp": 32, "depth": 1},
        "translation",
    ),
    "pinn": Model(pinn.pinn, {"hidden": [8, 8]}, "equations"),
    "regressor": Model(pinn.regressor, {"hidden": [8, 8]}, "tables"),
}


def make(
    name: str, shape: Sequence[int], classes: int, *, seed: int, options: Mapping[str, Any]
) -> Staged:
    """Return a model.

    Args:
      name: one of `MODELS`.
      shape: of an input, without the batch.
      classes: number of outputs.
      seed: of the initial parameters.
      options: of the model; what is left out is up to it.

    Raises:
      ConfigError: an unknown name, an option that the model does not have, or a size it cannot
        be built in.
    """
    if name not in MODELS:
        raise ConfigError(unknown("architecture", name, MODELS))
    model = MODELS[name]
    for key in options:
        if key not in model.options:
            raise ConfigError(
                f"architecture.{key}={options[key]}: {name} has no such option, only "
                f"{', '.join(model.options) or 'none'}."
            )
    given = ", ".join(f"{key}={value}" for key, value in options.items()) or "its own sizes"
    try:
        if any(isinstance(x, int) and x > LARGE for x in jax.tree.leaves(options)):
            like = nnx.eval_shape(
                lambda: model.factory(shape, classes, **options, rngs=nnx.Rngs(0))
            )
            capacity.check(
                sum(4 * math.prod(x.shape) for x in jax.tree.leaves(nnx.state(like))),
                f"architecture {name} with {given}",
            )
        return model.factory(shape, classes, **options, rngs=nnx.Rngs(seed))
    except ConfigError:
        raise
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"architecture {name} with {given}: {error}") from error


LARGE = 1024
"""From this size of anything on, all sizes together are looked at before they are made."""
