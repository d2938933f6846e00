"""Adam and llqr.streaming in one trainer, each at the best of its rates."""

import json
import math
import sys
from collections.abc import Callable, Sequence

import optax

import llqr


def ours(rate: float) -> optax.GradientTransformation:
    """Return the optimizer that stands in Adam's place."""
    return llqr.streaming(rate, refit=llqr.Streaming(probe="gradient"))


def compare(train, *, adam: Sequence[float], llqr: Sequence[float]) -> None:
    """Print the loss at the start, and at the end by each optimizer at its best rate, as JSON.

    Args:
      train: takes an optimizer and a seed, trains, and returns the loss before and after.
      adam: three rates.
      llqr: three rates.
    """
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    found: dict[str, object] = {}
    for name, make, rates in (("adam", optax.adam, adam), ("llqr", ours, llqr)):
        losses = {}
        for rate in rates:
            found["start"], losses[rate] = train(make(rate), seed)
        found[f"{name}_rates"] = losses
        found[name] = min(loss for loss in losses.values() if math.isfinite(loss))
    print(json.dumps(found))
