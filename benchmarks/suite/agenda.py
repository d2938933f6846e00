"""Which trials are due, from what is there already."""

import math
from collections.abc import Callable, Collection
from typing import Any

from .methods.method import Method
from .protocol import TUNING_SEED, Tier
from .store import Setting

Get = Callable[[Setting], dict[str, Any] | None]


def final(trial: dict[str, Any] | None, measure: str) -> float:
    """Return the loss at the end, infinite for a run that has diverged or is not there."""
    loss = trial["columns"][measure][-1] if trial else None
    return math.inf if loss is None else loss


def rates(tier: Tier, method: Method, measure: str, get: Get) -> list[float]:
    """Return the rates to try, so far as is known: a single 0 for a method that has none."""
    if method.rate is None:
        return [0.0]
    found = tier.grid(method.rate)
    for _ in range(tier.further):
        trials = {rate: get(Setting(rate, TUNING_SEED)) for rate in found}
        if None in trials.values():
            break
        found.append(tier.following({rate: final(t, measure) for rate, t in trials.items()}))
    return found


def best(tier: Tier, method: Method, measure: str, get: Get) -> Setting:
    """Return the setting with the least loss on the tuning seed, of those that have been run."""
    return min(_tried(tier, method, measure, get), key=lambda s: final(get(s), measure))


def next_tuning(tier: Tier, method: Method, measure: str, get: Get) -> Setting | None:
    """Return a setting to tune on, None if all have been run."""
    for setting in _tried(tier, method, measure, get):
        if get(setting) is None:
            return setting
    return None


def _tried(tier: Tier, method: Method, measure: str, get: Get) -> list[Setting]:
    """All rates; and once these have been run, the alternatives at the best of them."""
    settings = [Setting(rate, TUNING_SEED) for rate in rates(tier, method, measure, get)]
    if tier.alternatives and all(get(s) is not None for s in settings):
        rate = min(settings, key=lambda s: final(get(s), measure)).rate
        numbers = range(len(method.alternatives))
        settings += [Setting(rate, TUNING_SEED, number) for number in numbers]
    return settings


def compared(tier: Tier, method: Method, measure: str, get: Get) -> list[Setting]:
    """Return the runs that are compared: the tuned setting on fresh seeds."""
    chosen = best(tier, method, measure, get)
    return [Setting(chosen.rate, seed, chosen.alternative) for seed in range(tier.seeds)]


def untuned(tier: Tier, method: Method) -> list[Setting]:
    """Return the runs of the customary settings."""
    return [Setting(method.rate or 0.0, seed) for seed in range(tier.defaults)]


def next_run(tier: Tier, method: Method, measure: str, get: Get) -> Setting | None:
    """Return a run on a fresh seed, by seed and tuned before untuned, None if all are there."""
    tuned, usual = compared(tier, method, measure, get), untuned(tier, method)
    due = [s for s in (*tuned, *usual) if get(s) is None]
    return min(due, key=lambda s: (s.seed, s not in tuned), default=None)


def at_the_edge(tried: Collection[float], setting: Setting) -> bool:
    """Whether a tuned rate is the smallest or the largest that was tried."""
    return len(tried) > 1 and setting.rate in (min(tried), max(tried))
