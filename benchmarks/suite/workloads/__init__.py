"""What is trained, by name. `problem` says what a workload is, `networks` has the networks."""

from collections.abc import Callable
from functools import cache

from . import images, physics, sequences
from .problem import Workload

MAKERS: dict[str, Callable[[], Workload]] = {
    "digits": images.digits,
    "noisy-digits": images.noisy,
    "autoencoder": images.autoencoder,
    "autoencoder-full-batch": images.full_batch,
    "recurrent-digits": images.recurrent_digits,
    "fashion-mlp": images.fashion_mlp,
    "fashion-resnet": images.fashion_resnet,
    "mnist1d": images.mnist1d_cnn,
    "modular-addition": sequences.modular_addition,
    "characters": sequences.characters,
    "translation": sequences.translation,
    "poisson": physics.poisson,
    "burgers": physics.burgers,
}
"""To add a workload, add its maker."""

FLOAT64 = ("poisson", "burgers")
"""Known before a workload is made: JAX is told first."""


@cache
def load(name: str) -> Workload:
    """Return a workload by its name, a key of `MAKERS`.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in MAKERS:
        raise ValueError(f"unknown workload {name!r}: choose from {', '.join(MAKERS)}.")
    return MAKERS[name]()
