"""What is fixed before anything runs.

Every method has one rate to tune, by the same number of trials: a grid around its customary rate,
and then further ones, each beyond the best rate if that lies at an end and beside it if not. In
the tier "full" it has the same number of values of a second setting besides, at the best rate. It
is tuned by the loss at the end, on a seed that is used for nothing else. Every tier's grid is a
part of a finer one's, so that what was run for "quick" is not run again for "full".
"""

from dataclasses import dataclass

WARMUP_SHARE = 0.05
"""Of the steps: the rate rises linearly, and then falls linearly to 0."""

TUNING_SEED = 1000

TARGETS = {"easy": 0.5, "medium": 0.8, "hard": 0.95}
"""Share of the way from the loss at the start to the baselines' best, in logarithms."""

THRESHOLD = 4.0
"""A win: mean margin x sqrt(n) / standard deviation above this, margins being paired by seed."""

PENALTY = 2.0
"""A target that is not reached counts as this times what the run has spent (PAR2)."""

SPAN = 100.0
"""Largest rate of a grid by the smallest, the customary one being in the middle."""

RESAMPLES = 2000
"""Of a bootstrap interval; `LEVEL` is its level."""
LEVEL = 0.95


def rounded(rate: float) -> float:
    """Return a rate as it is typed."""
    return float(f"{rate:.3g}")


@dataclass(frozen=True)
class Tier:
    """How much is run.

    Attributes:
      name: how it is asked for.
      rates: values of the rate in the grid, an odd number.
      further: values that are chosen by what the ones before have given.
      alternatives: whether a second setting is tuned too.
      seeds: of the runs that are compared.
      defaults: seeds of the untuned defaults.
      shorter: the workloads' steps are divided by this.
      points: evaluations of a run, besides that of the start.
    """

    name: str
    rates: int
    further: int
    alternatives: bool
    seeds: int
    defaults: int
    shorter: int = 1
    points: int = 20

    def grid(self, customary: float) -> list[float]:
        """Return the rates to try, the customary one first and then outwards.

        >>> TIERS["quick"].grid(0.1)
        [0.1, 0.0316, 0.316, 0.01, 1.0]
        """
        middle = self.rates // 2
        exponents = sorted(range(-middle, middle + 1), key=lambda i: (abs(i), i))
        return [rounded(customary * self.ratio**i) for i in exponents]

    @property
    def ratio(self) -> float:
        """Of a rate of the grid to the next smaller one."""
        return SPAN ** (1 / (self.rates - 1))

    def following(self, losses: dict[float, float]) -> float:
        """Return the rate to try next, rate -> loss being those so far.

        It lies a step of the grid beyond the best rate if that is the smallest or the largest, and
        in the middle between it and one of its neighbours, the better one's side first, if not.

        >>> TIERS["quick"].following({0.01: 3.0, 0.0316: 2.0, 0.1: 1.0})
        0.316
        >>> TIERS["quick"].following({0.01: 3.0, 0.0316: 1.0, 0.1: 2.0})
        0.0562
        """
        known = sorted(losses)
        best = min(known, key=lambda rate: losses[rate])
        place = known.index(best)
        if place == 0:
            return rounded(best / self.ratio)
        if place == len(known) - 1:
            return rounded(best * self.ratio)
        beside = min(known[place - 1], known[place + 1], key=lambda rate: losses[rate])
        return rounded((best * beside) ** 0.5)


TIERS = {
    tier.name: tier
    for tier in (
        Tier("smoke", 3, 1, False, seeds=2, defaults=0, shorter=20, points=4),
        Tier("quick", 5, 2, False, seeds=5, defaults=2),
        Tier("full", 9, 4, True, seeds=10, defaults=10),
    )
}


def multiplier(step: int, steps: int, *, decays: bool = True, warms: bool = True) -> float:
    """Return what the rate is multiplied by: a linear warm-up, then a linear decay to 0.

    >>> [round(multiplier(step, 40), 2) for step in (0, 1, 2, 21, 39)]
    [0.5, 1.0, 1.0, 0.5, 0.03]
    """
    warmup = max(1, round(WARMUP_SHARE * steps))
    rise = (step + 1) / warmup if warms else 1.0
    fall = (steps - step) / max(1, steps - warmup) if decays else 1.0
    return min(rise, fall, 1.0)
