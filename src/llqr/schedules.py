"""Schedules of the learning rates, the EMA decay, the SAM radius and the refit cadence.

Every factory takes the base value first and returns a pure function from the global step (a Python
int or an integer array, traced or not) to the value: a float array of the step's shape, float32
(float64 under x64). Steps are counted in that type too, exactly up to 2**24 in float32.

Notation:

| symbol | meaning                                                     | unit            |
|--------|-------------------------------------------------------------|-----------------|
| b      | `base`: a learning rate, EMA decay, radius or refit cadence | of the schedule |
| s      | global step, from 0                                         | steps           |
| spe    | `steps_per_epoch`, may be fractional                        | steps per epoch |
| E      | `total_epochs`, length of the run                           | epochs          |
| W      | length of the warm-up                                       | steps           |

Example:
  >>> every = make("piecewise_constant", 100, steps_per_epoch=390.625, boundaries={15: 10})
  >>> [int(every(step)) for step in (0, 5859, 5860)]
  [100, 100, 1000]
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ParamSpec

import jax
import jax.numpy as jnp
import optax

from llqr.errors import unknown

_P = ParamSpec("_P")
_Curve = Callable[[Any], Any]  # array of float steps -> array of values
Schedule = Callable[[jax.typing.ArrayLike], jax.Array]  # an optax.Schedule that returns an array
SCHEDULES: dict[str, Callable[..., Schedule]] = {}  # every factory by name

# An argument's range is part of its type: lowest, highest, and the words of the error message.
_NON_NEGATIVE = (0.0, math.inf, "a finite number >= 0")
_POSITIVE = (math.ulp(0.0), math.inf, "a finite number > 0")
NonNegative = Annotated[float, _NON_NEGATIVE]
Positive = Annotated[float, _POSITIVE]
Ratio = Annotated[float, (math.ulp(0.0), 1.0, "a number in (0, 1]")]
_ONE_STEP = (1, math.inf, "at least 1")


def _check(name: str, value: Any, legal: tuple[float, float, str]) -> None:
    """Raise ValueError unless `value` is a finite number in the range `legal`."""
    low, high, text = legal
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    if not (math.isfinite(number) and low <= number <= high):
        raise ValueError(f"{name} must be {text}, got {value!r}")


def _factory(build: Callable[_P, _Curve]) -> Callable[_P, Schedule]:
    """Register a factory, check its numbers, and hand its schedules float steps."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> Schedule:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            parameter = signature.parameters[name]
            for legal in getattr(parameter.annotation, "__metadata__", ()):
                if value is not parameter.default:
                    _check(name, value, legal)
        curve = build(*args, **kwargs)
        return lambda step: curve(jnp.asarray(step, float))

    SCHEDULES[build.__name__] = checked
    return checked


def _half_cosine(start: float, end: float, fraction: jax.Array) -> jax.Array:
    """Return end + (start - end) * (1 + cos(pi fraction)) / 2, exact at `end`."""
    return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * fraction))


def _stairs(
    base: float, steps_per_epoch: float, scales: Iterable[tuple[float, float]], origin: int = 0
) -> _Curve:
    """Return `base` times the scales of the epochs reached, as a function of s - origin."""
    products: dict[int, float] = {}
    for epoch, scale in scales:
        # First step at or past the epoch; rounded, as 15 epochs of 50000 / 3 steps are 250000.
        step = math.ceil(round(steps_per_epoch * epoch, 6)) - origin
        products[step] = products.get(step, 1.0) * scale
    return optax.piecewise_constant_schedule(base, products)


@_factory
def constant(base: NonNegative) -> _Curve:
    """Keep the base value.

    Args:
      base: the value b.

    Returns:
      s -> b

    Raises:
      ValueError: if `base` is negative or not finite.
    """
    return lambda s: jnp.full_like(s, base)


@_factory
def cosine_annealing(
    base: NonNegative,
    steps_per_epoch: Positive,
    t_max: Positive = 200,
    eta_min: NonNegative = 0.0,
    cycle: bool = True,
) -> _Curve:
    """Go from b to eta_min along half a cosine, and back again unless `cycle` is false.

    Args:
      base: the value b at step 0.
      steps_per_epoch: spe, steps per epoch.
      t_max: half a period, epochs.
      eta_min: the value at t_max; above b for a rising schedule, as of an EMA decay.
      cycle: true to return to b past t_max, false to stay at eta_min.

    Returns:
      s -> eta_min + (b - eta_min) * (1 + cos(pi s / (spe t_max))) / 2

    Raises:
      ValueError: if an argument is negative, or `steps_per_epoch` or `t_max` zero.
    """
    half_period = steps_per_epoch * t_max
    last = math.inf if cycle else half_period
    return lambda s: _half_cosine(base, eta_min, jnp.minimum(s, last) / half_period)


@_factory
def cosine_decay_with_floor(
    base: NonNegative, steps_per_epoch: Positive, t_max: Positive = 200, eta_min: NonNegative = 0.0
) -> _Curve:
    """Go from b to eta_min along half a cosine and stay: `cosine_annealing` without the cycle.

    Args:
      base: the value b at step 0.
      steps_per_epoch: spe, steps per epoch.
      t_max: length of the decay, epochs.
      eta_min: the value from t_max on.

    Returns:
      s -> eta_min + (b - eta_min) * (1 + cos(pi min(s / (spe t_max), 1))) / 2

    Raises:
      ValueError: if an argument is negative, or `steps_per_epoch` or `t_max` zero.
    """
    return cosine_annealing(base, steps_per_epoch, t_max, eta_min, cycle=False)


@_factory
def warmup_cosine_decay(
    base: NonNegative,
    steps_per_epoch: Positive,
    init_lr: NonNegative = 1e-5,
    warmup_epochs: NonNegative = 5,
    t_max: Positive = 200,
    eta_min: NonNegative = 0.0,
) -> _Curve:
    """Rise linearly to b, go to eta_min along half a cosine and stay.

    Args:
      base: the value b at the end of the warm-up.
      steps_per_epoch: spe, steps per epoch.
      init_lr: the value at step 0.
      warmup_epochs: length of the warm-up, epochs; 0 leaves it out.
      t_max: length of the warm-up and the decay together, epochs.
      eta_min: the value from t_max on.

    Returns:
      s -> init_lr + (b - init_lr) * s / W                                        if s < W
           eta_min + (b - eta_min) * (1 + cos(pi min((s - W) / (D - W), 1))) / 2  else
      with W = int(spe warmup_epochs), D = int(spe t_max)

    Raises:
      ValueError: if an argument is negative, or the decay is left without a step.
    """
    warmup, end = int(steps_per_epoch * warmup_epochs), int(steps_per_epoch * t_max)
    _check(f"t_max = {t_max!r} less warmup_epochs, in whole steps,", end - warmup, _ONE_STEP)
    rise = optax.linear_schedule(init_lr, base, warmup)
    decay = cosine_decay_with_floor(base, 1, end - warmup, eta_min)
    return optax.join_schedules([rise, decay], [warmup])


@_factory
def step_warmup(
    base: NonNegative,
    steps_per_epoch: Positive,
    total_epochs: Positive,
    warmup_ratio: Ratio = 1e-4,
    init_value: NonNegative = 0.0,
) -> _Curve:
    """Rise linearly from init_value to b over a fraction of the run, then stay.

    Args:
      base: the value b from step W on.
      steps_per_epoch: spe, steps per epoch.
      total_epochs: E, epochs.
      warmup_ratio: W over the run, in (0, 1]; the preconditioner's rate takes 0.2, an EMA decay 1.
      init_value: the value at step 0; the preconditioner's rate takes 5e-4.

    Returns:
      s -> init_value + (b - init_value) * min(s / W, 1)  with W = E spe warmup_ratio, not rounded

    Raises:
      ValueError: if an argument is out of its range.
    """
    warmup = total_epochs * steps_per_epoch * warmup_ratio
    return lambda s: init_value + (base - init_value) * jnp.minimum(s / warmup, 1.0)


@_factory
def linear(
    base: NonNegative,
    steps_per_epoch: Positive,
    decay_factor: NonNegative = 0.01,
    transition_begin: NonNegative = 0,
    transition_epochs: Positive = 2,
) -> _Curve:
    """Go linearly from b to decay_factor * b, then stay.

    Args:
      base: the value b up to the transition.
      steps_per_epoch: spe, steps per epoch.
      decay_factor: the last value over b.
      transition_begin: start of the transition, epochs.
      transition_epochs: length of the transition, epochs.

    Returns:
      s -> b * (1 + (decay_factor - 1) * clip((s - B) / T, 0, 1))
      with B = int(spe transition_begin), T = int(spe transition_epochs)

    Raises:
      ValueError: if an argument is negative, or the transition shorter than one step.
    """
    begin, steps = int(steps_per_epoch * transition_begin), int(steps_per_epoch * transition_epochs)
    # Without a step to decay in, optax would keep b for ever.
    _check(f"transition_epochs = {transition_epochs!r}, in whole steps,", steps, _ONE_STEP)
    return optax.linear_schedule(base, decay_factor * base, steps, begin)


@_factory
def piecewise_constant(
    base: NonNegative, steps_per_epoch: Positive, boundaries: Mapping[float, float] | None = None
) -> _Curve:
    """Multiply b by a scale at each boundary passed; meant for the refit cadence.

    Args:
      base: the value b before the first boundary.
      steps_per_epoch: spe, steps per epoch.
      boundaries: epoch -> scale; None means {15: 10}. An epoch may be fractional.

    Returns:
      s -> b * product of the scales whose epoch satisfies s >= spe * epoch

    Raises:
      ValueError: if an argument is out of its range, as a negative epoch or a scale of 0.
    """
    scales = {15: 10} if boundaries is None else boundaries
    for epoch, scale in scales.items():
        _check("an epoch of boundaries", epoch, _NON_NEGATIVE)
        _check(f"boundaries[{epoch!r}]", scale, _POSITIVE)
    return _stairs(base, steps_per_epoch, scales.items())


@_factory
def warmup_piecewise_decay(
    base: NonNegative,
    steps_per_epoch: Positive,
    total_epochs: Positive,
    epoch_decay_bounds: Sequence[float] = (30, 70, 90),
    scaling_factor: Positive = 0.1,
    warmup_ratio: Ratio = 0.05,
    init_lr: NonNegative = 1e-6,
) -> _Curve:
    """Rise linearly to b, then multiply by scaling_factor at each epoch of a list.

    Args:
      base: the value b at the end of the warm-up.
      steps_per_epoch: spe, steps per epoch.
      total_epochs: E, epochs.
      epoch_decay_bounds: where the value drops, epochs; (30, 40, 45) for a run of 50.
      scaling_factor: the factor of each drop.
      warmup_ratio: the warm-up as a fraction of the run, in (0, 1].
      init_lr: the value at step 0.

    Returns:
      s -> init_lr + (b - init_lr) * s / W                       if s < W
           b * scaling_factor ** (number of bounds <= s / spe)   else
      with W = int(warmup_ratio * int(E spe))

    Raises:
      ValueError: if an argument or a bound is out of its range.
    """
    for index, bound in enumerate(epoch_decay_bounds):
        _check(f"epoch_decay_bounds[{index}]", bound, _NON_NEGATIVE)
    warmup = int(warmup_ratio * int(total_epochs * steps_per_epoch))
    rise = optax.linear_schedule(init_lr, base, warmup)
    drops = ((bound, scaling_factor) for bound in epoch_decay_bounds)
    return optax.join_schedules([rise, _stairs(base, steps_per_epoch, drops, warmup)], [warmup])


@_factory
def inverse_sqrt(
    base: NonNegative, warmup_updates: Positive = 4000, warmup_init_lr: NonNegative = 0.0
) -> _Curve:
    """Rise linearly to b over W steps, then decay as one over the square root of the step.

    Args:
      base: the value b at step W.
      warmup_updates: W, steps.
      warmup_init_lr: the value at step 0.

    Returns:
      s -> warmup_init_lr + (b - warmup_init_lr) * s / W   if s < W
           b * sqrt(W / s)                                 else

    Raises:
      ValueError: if an argument is negative, or `warmup_updates` zero.
    """
    rise = step_warmup(base, 1, warmup_updates, 1, warmup_init_lr)
    return lambda s: rise(s) * jnp.sqrt(warmup_updates / jnp.maximum(s, warmup_updates))


@_factory
def cosine_ramp_step_increase(
    base: NonNegative,
    init_value: NonNegative = 0.005,
    target_value: Annotated[float | None, _NON_NEGATIVE] = None,
    ramp_start_step: NonNegative = 4000,
    ramp_end_step: NonNegative = 150_000,
    step_start_step: NonNegative = 200_000,
    step_interval: Positive = 50_000,
    step_delta: NonNegative = 0.05,
) -> _Curve:
    """Rise along half a cosine, then climb stairs; meant for the radius of SAM.

    Args:
      base: the value b, the target unless `target_value` is given.
      init_value: v0, the value up to the ramp.
      target_value: the value at the end of the ramp; None means b, a number leaves b unused.
      ramp_start_step: s0, steps.
      ramp_end_step: s1, steps.
      step_start_step: s2, the first stair, steps.
      step_interval: k, length of a stair, steps.
      step_delta: d, height of a stair.

    Returns:
      s -> v0 + (target - v0) * (1 - cos(pi clip((s - s0) / (s1 - s0), 0, 1))) / 2
           + d * (floor((s - s2) / k) + 1 if s >= s2 else 0)

    Raises:
      ValueError: if an argument is negative, `step_interval` zero, or s1 not past s0.
    """
    length = ramp_end_step - ramp_start_step
    _check(f"ramp_end_step = {ramp_end_step!r} less ramp_start_step", length, _POSITIVE)
    target = base if target_value is None else target_value

    def curve(s: jax.Array) -> jax.Array:
        left = jnp.clip((ramp_end_step - s) / length, 0.0, 1.0)
        # Floor division is exact; compiled, floor(x / k) is of x * (1 / k) and loses a stair.
        stairs = (s - step_start_step) // step_interval + 1.0
        return _half_cosine(target, init_value, left) + step_delta * jnp.maximum(stairs, 0.0)

    return curve


def make(name: str, base: float, **arguments: Any) -> Schedule:
    """Build the schedule called `name`.

    Args:
      name: a key of `SCHEDULES`.
      base: the value b.
      **arguments: the other arguments of the factory.

    Returns:
      The schedule.

    Raises:
      ValueError: for an unknown name or argument, naming the nearest, or a value out of range.

    Example:
      >>> make("linaer", 0.1, steps_per_epoch=100)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: unknown schedule 'linaer': did you mean 'linear'? Legal: ...
    """
    if name not in SCHEDULES:
        raise ValueError(unknown("schedule", name, SCHEDULES))
    legal = list(inspect.signature(SCHEDULES[name]).parameters)
    for argument in arguments:
        if argument not in legal:
            raise ValueError(unknown(f"argument of {name}", argument, legal))
    return SCHEDULES[name](base, **arguments)
