"""What is trained, by name. `problem` says what a workload is, `networks` has the networks.

There are two sets: on one, methods are developed; what they are worth is said by the other.
"""

from collections.abc import Callable
from functools import cache

from . import held_out, images, physics, sequences
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
"""Of the development set. To add a workload, add its maker."""

SETS: dict[str, dict[str, Callable[[], Workload]]] = {
    "development": MAKERS,
    "test": held_out.MAKERS,
}

FLOAT64 = ("poisson", "burgers", *held_out.FLOAT64)
"""Known before a workload is made: JAX is told first."""


@cache
def load(name: str) -> Workload:
    """Return a workload by its name, a key of one of `SETS`.

    Raises:
      ValueError: there is none of this name.
    """
    return SETS[set_of(name)][name]()


def set_of(name: str) -> str:
    """Return the set that a workload is of.

    Raises:
      ValueError: there is no workload of this name.
    """
    for found, makers in SETS.items():
        if name in makers:
            return found
    names = ", ".join(name for makers in SETS.values() for name in makers)
    raise ValueError(f"unknown workload {name!r}: choose from {names}.")


def choose(of: str, asked: list[str]) -> list[str]:
    """Return the workloads that are asked for by name, or else all of a set.

    Raises:
      ValueError: there is no such set or workload, or they are of two sets.

    Example:
      >>> choose("test", [])[:2], choose("development", ["wave", "graph"])
      (['diffusion', 'vision-transformer'], ['wave', 'graph'])
    """
    if of not in SETS:
        raise ValueError(f"unknown set {of!r}: choose from {', '.join(SETS)}.")
    if len({set_of(name) for name in asked}) > 1:
        raise ValueError("workloads of two sets: they are run and reported apart, so name one's.")
    return asked or list(SETS[of])
