"""The arguments of schedules, by the name of the schedule: rows as of any other option.

They are those of `llqr.schedules`, where the formulas are; a test compares names and defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from llqr_experiments.config.row import check, option
from llqr_experiments.errors import ConfigError, unknown


@dataclass
class Constant:
    """The value of the option."""


@dataclass
class CosineAnnealing:
    """Half a cosine, and back again."""

    t_max: float = option(200, "half a period, in epochs", above=0)
    eta_min: float = option(0.0, "the value there", low=0)
    cycle: bool = option(True, "whether the value returns after that")


@dataclass
class CosineDecayWithFloor:
    """Half a cosine, and then no more."""

    t_max: float = option(200, "length of the decay, in epochs", above=0)
    eta_min: float = option(0.0, "the value from there on", low=0)


@dataclass
class WarmupCosineDecay:
    """A rise, then half a cosine."""

    init_lr: float = option(1e-5, "the value at step 0", low=0)
    warmup_epochs: float = option(5, "length of the rise, in epochs", low=0)
    t_max: float = option(200, "length of rise and decay, in epochs", above=0)
    eta_min: float = option(0.0, "the value from there on", low=0)


@dataclass
class StepWarmup:
    """A rise."""

    warmup_ratio: float = option(1e-4, "length of the rise over that of the run", above=0, high=1)
    init_value: float = option(0.0, "the value at step 0", low=0)


@dataclass
class Linear:
    """A straight line down."""

    decay_factor: float = option(0.01, "the last value over the first", low=0)
    transition_begin: float = option(0, "where the line begins, in epochs", low=0)
    transition_epochs: float = option(2, "its length, in epochs", above=0)


@dataclass
class PiecewiseConstant:
    """A factor at every boundary."""

    boundaries: list[list[float]] = option(
        [[15, 10]], "pairs of an epoch, >= 0 and rising, and a factor > 0", of={"length": 2}
    )


@dataclass
class WarmupPiecewiseDecay:
    """A rise, then a factor at every epoch of a list."""

    epoch_decay_bounds: list[float] = option(
        [30, 70, 90], "where the value drops, in epochs", of={"low": 0}, rising=True
    )
    scaling_factor: float = option(0.1, "the factor of each drop", above=0)
    warmup_ratio: float = option(0.05, "length of the rise over that of the run", above=0, high=1)
    init_lr: float = option(1e-6, "the value at step 0", low=0)


@dataclass
class InverseSqrt:
    """A rise, then one over the square root of the step."""

    warmup_updates: float = option(4000, "length of the rise, in steps", above=0)
    warmup_init_lr: float = option(0.0, "the value at step 0", low=0)


@dataclass
class CosineRampStepIncrease:
    """Half a cosine up, then stairs."""

    init_value: float = option(0.005, "the value up to the ramp", low=0)
    target_value: float | None = option(
        None, "the value at the end of the ramp; null: that of the option", low=0
    )
    ramp_start_step: float = option(4000, "where the ramp begins, in steps", low=0)
    ramp_end_step: float = option(150_000, "where it ends", low=0)
    step_start_step: float = option(200_000, "the first stair, in steps", low=0)
    step_interval: float = option(50_000, "length of a stair, in steps", above=0)
    step_delta: float = option(0.05, "height of a stair", low=0)


SCHEDULES: dict[str, type] = {
    "constant": Constant,
    "cosine_annealing": CosineAnnealing,
    "cosine_decay_with_floor": CosineDecayWithFloor,
    "warmup_cosine_decay": WarmupCosineDecay,
    "step_warmup": StepWarmup,
    "linear": Linear,
    "piecewise_constant": PiecewiseConstant,
    "warmup_piecewise_decay": WarmupPiecewiseDecay,
    "inverse_sqrt": InverseSqrt,
    "cosine_ramp_step_increase": CosineRampStepIncrease,
}
"""What each takes, by name."""

_ARGUMENTS = frozenset(row.name for kind in SCHEDULES.values() for row in fields(kind))


def check_scheduler(group: str, given: Any) -> None:
    """Raise ConfigError if a group does not name a schedule, with arguments that it takes.

    Args:
      group: such as lr_scheduler.
      given: `{"name": ..., argument: value}`.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{group}={given}: must be one of its presets; {group}=constant is off.")
    name = given.get("name")
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ConfigError(f"{group}.name: {unknown('schedule', name, SCHEDULES)}")
    rows = {row.name: row for row in fields(SCHEDULES[name])}
    for argument, value in given.items():
        if argument == "name":
            continue
        if argument not in rows:
            if argument in _ARGUMENTS and name == "constant":  # off, whatever a preset gave
                continue
            told = unknown(f"argument of {name}", argument, rows)
            if argument in _ARGUMENTS:
                told += f". ~{group}.{argument} leaves out what a preset gave."
            raise ConfigError(told)
        if argument == "boundaries":
            value = boundaries(value)
        check(f"{group}.{argument}", rows[argument], value)
        if argument == "boundaries":
            _check_boundaries(f"{group}.{argument}", value)


def boundaries(given: Any) -> Any:
    """Return the pairs of a mapping; what is a list of pairs stays so."""
    return [list(pair) for pair in given.items()] if isinstance(given, Mapping) else given


def _check_boundaries(name: str, pairs: list[list[float]]) -> None:
    epochs, factors = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    rising = all(a < b for a, b in pairwise(epochs))
    if not rising or min(epochs, default=0) < 0 or min(factors, default=1) <= 0:
        raise ConfigError(
            f"{name}={pairs}: must be pairs of an epoch, >= 0 and rising, and a factor > 0."
        )
