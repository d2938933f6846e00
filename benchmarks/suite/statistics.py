"""From trials to figures: what a target has cost, intervals, means, profiles, wins."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .protocol import LEVEL, PENALTY, RESAMPLES, THRESHOLD

Columns = Mapping[str, Sequence[Any]]


def cost(columns: Columns, target: float, axis: str, measure: str) -> float:
    """Return where a run first has a loss of at most `target`, infinite if it never has.

    Between two evaluations the logarithm of the loss is taken to be linear.

    Args:
      columns: of a trial.
      target: the loss.
      axis: "step", "gradients" or "seconds".
      measure: "train" or "test".

    Example:
      >>> run = {"step": [0, 10, 20], "train": [1.0, 0.1, 0.001]}
      >>> cost(run, 0.01, "step", "train"), cost(run, 1e-9, "step", "train")
      (15.0, inf)
    """
    losses, places = columns[measure], columns[axis]
    for i, loss in enumerate(losses):
        if loss is None:
            return math.inf
        if loss <= target:
            if i == 0 or loss <= 0:
                return float(places[i])
            before = losses[i - 1]
            share = math.log(before / target) / math.log(before / loss)
            return places[i - 1] + share * (places[i] - places[i - 1])
    return math.inf


def interval(
    values: Sequence[float], of: Callable[[np.ndarray], float] = np.median
) -> tuple[float, float, float]:
    """Return a statistic and its bootstrap interval, by the percentiles of resamples.

    Infinite values are larger than all others, so that a median may be infinite.
    """
    given = np.asarray(values, float)
    rng = np.random.default_rng(0)
    drawn = given[rng.integers(len(given), size=(RESAMPLES, len(given)))]
    found = np.sort([of(row) for row in drawn])
    edge = (1 - LEVEL) / 2
    low, high = (found[round(q * (RESAMPLES - 1))] for q in (edge, 1 - edge))
    return float(of(given)), float(low), float(high)


def penalised(value: float, budget: float) -> float:
    """Return a cost, or the penalty for a target that was not reached."""
    return value if math.isfinite(value) else PENALTY * budget


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean.

    >>> round(geometric_mean([1, 4]), 6)
    2.0
    """
    return float(np.exp(np.mean(np.log(values))))


def profile(costs: Mapping[str, Sequence[float]], factors: Sequence[float]) -> dict[str, list]:
    """Return the performance profile (Dolan and More) of each method.

    Args:
      costs: method -> cost of each task; infinite where it has failed, NaN where it does not
        apply, which counts as no task of its own.
      factors: at which the profiles are taken.

    Returns:
      Method -> share of its tasks that it does in at most a factor times the least cost.

    Example:
      >>> profile({"a": [1.0, 4.0], "b": [2.0, 2.0]}, [1, 2])
      {'a': [0.5, 1.0], 'b': [0.5, 1.0]}
    """
    table = np.array(list(costs.values()), float)
    least = np.nanmin(table, axis=0)
    found = {}
    for name, row in zip(costs, table, strict=True):
        counted = np.isfinite(least) & ~np.isnan(row)
        ratios = row[counted] / least[counted]
        found[name] = [float(np.mean(ratios <= f)) if len(ratios) else 0.0 for f in factors]
    return found


def margin(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    """Return mean x sqrt(n) / standard deviation of log(theirs / ours), paired by seed.

    Args:
      ours: seed -> loss at the end; smaller is better.
      theirs: the same of another method.

    Returns:
      0 with fewer than two seeds in common, infinite where only one side has come to an end.
    """
    seeds = sorted(set(ours) & set(theirs))
    if len(seeds) < 2:
        return 0.0
    failed = [any(not math.isfinite(side[s]) for s in seeds) for side in (ours, theirs)]
    if any(failed):
        return 0.0 if all(failed) else math.inf if failed[1] else -math.inf
    logs = np.array([math.log(theirs[s] / ours[s]) for s in seeds])
    spread = logs.std(ddof=1)
    if spread == 0:
        return math.copysign(math.inf, logs.mean()) if logs.mean() else 0.0
    return float(logs.mean() * math.sqrt(len(seeds)) / spread)


def verdict(value: float) -> str:
    """Return what a margin says.

    >>> verdict(5.0), verdict(-3.9), verdict(-4.1)
    ('ahead', 'level', 'behind')
    """
    return "ahead" if value > THRESHOLD else "behind" if value < -THRESHOLD else "level"
