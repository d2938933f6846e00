"""Adam and `llqr.streaming` in one trainer, each at the best of its rates.

A script here is run as `python with_NAME.py --adam 0.01 0.03 --llqr 0.1 0.3 --seed 0`.
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import optax

import llqr


def compare(train: Callable[[Any, int], tuple[float, float]], **options: Any) -> None:
    """Print the loss at the start and that of each optimizer's best rate, as JSON.

    Args:
      train: takes an optax optimizer and a seed, trains, and returns the loss before and after.
      options: of `llqr.streaming`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--adam", type=float, nargs="+", required=True)
    parser.add_argument("--llqr", type=float, nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    def ours(rate: float) -> optax.GradientTransformation:
        return llqr.streaming(rate, refit=llqr.Streaming(probe="gradient"), **options)

    found: dict[str, Any] = {}
    for name, make, rates in (("adam", optax.adam, asked.adam), ("llqr", ours, asked.llqr)):
        losses = {}
        for rate in rates:
            found["start"], losses[rate] = train(make(rate), asked.seed)
        found[name] = min((x for x in losses.values() if math.isfinite(x)), default=math.inf)
        found[f"{name} by rate"] = {str(rate): repr(loss) for rate, loss in losses.items()}
    print(json.dumps(found))
