"""From the config to schedules, optimizer and preconditioner."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llqr
from llqr import schedules
from llqr.structures import catalogue
from llqr.tree import leaf_names
from llqr.typing import Schedule
from llqr_experiments.config import schedulers
from llqr_experiments.config.options import Config
from llqr_experiments.config.row import BOUNDS, HOLDS, accepted, become, rows
from llqr_experiments.errors import ConfigError


@dataclass(frozen=True)
class Horizon:
    """How long a run is.

    Attributes:
      steps_per_epoch: training examples / batch size, not rounded.
      total_epochs: passes over the training set.
      max_steps: updates after which the run ends; schedules do not see it.
    """

    steps_per_epoch: float
    total_epochs: float
    max_steps: int | None = None

    @property
    def total_steps(self) -> int:
        """Loop indices; the last one evaluates only, so that one fewer updates are made."""
        steps = int(self.steps_per_epoch * self.total_epochs)
        return (steps if self.max_steps is None else min(steps, self.max_steps)) + 1


EARLY = 1e4
"""Steps in an epoch where the data is not known yet: enough for every part of a schedule."""

MOST_STEPS = 2**24
"""Schedules count in float32, exactly up to here."""


def schedule(config: Config, group: str, base: float, horizon: Horizon) -> float | Schedule:
    """Return the schedule of a config group around its base value; a constant is a number."""
    arguments = dict(getattr(config, group))
    name = arguments.pop("name")
    if name == "constant":
        return base
    if "boundaries" in arguments:
        arguments["boundaries"] = dict(schedulers.boundaries(arguments["boundaries"]))
    arguments = {k: float(v) if type(v) is int else v for k, v in arguments.items()}  # no int64
    legal = inspect.signature(schedules.SCHEDULES[name]).parameters
    for known in ("steps_per_epoch", "total_epochs"):
        if known in legal:
            arguments.setdefault(known, getattr(horizon, known))
    try:
        made = schedules.make(name, base, **arguments)
        jax.eval_shape(made, 0)
    except OverflowError as error:
        raise ConfigError(f"{group}: {arguments} has a part of more than 2**31 steps.") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{group}: {error}") from error
    return made


def check_schedules(config: Config, horizon: Horizon) -> None:
    """Raise ConfigError if a schedule leaves the range of its option during a run.

    Args:
      config: validated options.
      horizon: how long the run is.
    """
    last = horizon.total_steps - 1
    steps = np.arange(0, last + 1, 1 + last // 2**20)
    for name, row, base in rows(config):
        group = row.metadata.get("by")
        found = schedule(config, group, base, horizon) if group else base
        if not callable(found):
            continue
        values = np.asarray(found(steps), float)
        for rule, holds in HOLDS.items():
            bound = row.metadata.get(rule, -np.inf if rule in ("low", "above") else np.inf)
            inside = np.isclose(values, bound, rtol=1e-6, atol=0) | holds(values, bound)
            if not (inside & np.isfinite(values)).all():
                first = int(np.argmin(inside & np.isfinite(values)))
                raise ConfigError(
                    f"{group} gives {name}={values[first]:.6g} at step {steps[first]:,}: it must "
                    f"be {'finite' if np.isinf(bound) else f'{BOUNDS[rule]} {bound:g}'}."
                )


def _around(config: Config, horizon: Horizon) -> Callable[[str, Any], Any]:
    """(group, value) -> the schedule of that group around the value."""
    return lambda group, base: schedule(config, group, base, horizon)


def learning_rate(config: Config, horizon: Horizon) -> float | Schedule:
    """Return the learning rate of the main optimizer."""
    return schedule(config, "lr_scheduler", config.learning_rate, horizon)


def base_optimizer(config: Config, horizon: Horizon) -> optax.GradientTransformation:
    """Return the main optimizer with its weight decay.

    Decay is decoupled for the adamw family; for the others wd * parameters joins the
    (preconditioned) gradient before momentum.
    """
    rate = learning_rate(config, horizon)
    name, (b1, b2) = config.main_optimizer, config.adam_betas
    decay = config.weight_decay or 0.0
    mask = _decay_mask(config.wd_mask or [])
    if name.startswith("adamw"):
        if name != "adamw":  # the name carries the second beta; mask and betas do not enter
            return optax.adamw(rate, 0.9, float(f"0.{name[-2:]}"), weight_decay=decay)
        return optax.adamw(rate, b1, b2, weight_decay=decay, mask=mask)
    made = {
        "sgd": lambda: optax.sgd(rate),
        "polyak": lambda: optax.sgd(rate, momentum=config.momentum),
        "adam": lambda: optax.adam(rate, b1, b2),
    }[name]()
    if decay:
        return optax.chain(optax.add_decayed_weights(decay, mask), made)
    return made


def _decay_mask(parts: list[str]) -> Any:
    """A function from parameters to which of them decay."""

    def mask(params: Any) -> Any:
        decays = [not any(part in name for part in parts) for name in leaf_names(params)]
        return jax.tree.unflatten(jax.tree.structure(params), decays)

    return mask


def check_mask(config: Config, params: Any) -> None:
    """Raise ConfigError if no parameter is left out of weight decay, and some should be."""
    names, mask = leaf_names(params), config.wd_mask
    if config.weight_decay and mask and not any(part in name for part in mask for name in names):
        shown = ", ".join(names[:4]) + (", ..." if names[4:] else "")
        raise ConfigError(
            f"wd_mask={list(mask)}: no parameter has one of these in its path, and all would "
            f"decay. The paths are {shown}; null lets all of them decay."
        )


def optimizer(config: Config, horizon: Horizon) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a run: the main one alone, or wrapped by LLQR or by exact steps.

    Raises:
      ConfigError: unknown structure or divergence (the nearest is named), or an illegal value.
    """
    base = optax.with_extra_args_support(base_optimizer(config, horizon))
    if not (config.use_preconditioner or config.exact_steps):
        return base
    try:
        if config.exact_steps:
            return exact(config, base)
        chosen = structure(config)
        if config.precond_solver == "cg" and not (chosen.linear or config.precond_streaming):
            raise ConfigError(
                "precond_solver=cg needs a structure that is linear in its arrays (scalar, "
                f"diagonal, dense), not block_structure={chosen.name}; cg_zoom_hz takes any."
            )
        return llqr.llqr(
            base,
            structure=chosen,
            metric=metric(config),
            route=route(config),
            refit=refit_options(config, horizon),
            **become(config, "llqr"),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def exact(
    config: Config, base: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Return exact steps in front of a base optimizer."""
    trust = llqr.Trust(**become(config, "trust"))
    return llqr.exact(
        base,
        metric=metric(config),
        damping=trust if config.exact_trust else config.damping,
        divergence_reduction=config.divergence_reduction,  # pyright: ignore[reportArgumentType]
        **become(config, "exact"),
    )


METHODS: dict[str, Callable[..., llqr.Sharpness]] = {
    "base_sam": llqr.sam,
    "base_fsam": llqr.friendly_sam,
    "past_fsam": llqr.past_friendly_sam,
    "asam": llqr.asam,
    "fisher_sam": llqr.fisher_sam,
}
"""By `sam_mode`. Each takes what it has of the options of SAM."""


@dataclass(frozen=True)
class Ascent:
    """How a run perturbs its parameters.

    Attributes:
      method: of the perturbation.
      source: of the base vector, as in `sam_research_base_vector_source`.
      configured: whether P multiplies the gradient of a perturbed step as it does others'.
    """

    method: llqr.Sharpness
    source: str
    configured: bool

    @property
    def uses_preconditioner(self) -> bool:
        """Whether the perturbation is along P w."""
        return self.method.direction != "ema_grad"


def ascent(config: Config, horizon: Horizon) -> Ascent | None:
    """Return how parameters are perturbed; None without SAM."""
    given = become(config, "sam", _around(config, horizon))
    mode = config.sam_mode
    if mode is None:
        return None
    make = METHODS[mode]
    method = make(**accepted(make, given | become(config, mode)))
    vanilla = mode == "fisher_sam" or not config.sam_use_preconditioner_on_update
    return Ascent(method, config.sam_research_base_vector_source, not vanilla)


def momentum_of(opt_state: Any) -> Any:
    """Return the momentum in the state of a main optimizer: its trace or Adam's first moment.

    Raises:
      ConfigError: there is none, or more than one.
    """
    kinds = (optax.TraceState, optax.ScaleByAdamState)
    is_one = lambda x: isinstance(x, kinds)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_one) if is_one(x)]
    if len(found) != 1:
        raise ConfigError(
            "sam_research_base_vector_source=main_optimizer_momentum: the optimizer has "
            f"{len(found)} momentum buffers, and needs exactly one."
        )
    return found[0].trace if isinstance(found[0], optax.TraceState) else found[0].mu


def structure(config: Config) -> llqr.Structure:
    """Return the structure of P.

    Raises:
      ConfigError: there is none of that name; the nearest is named.
    """
    try:
        found = catalogue.get(config.block_structure)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return found if config.precond_rank is None else replace(found, rank=config.precond_rank)


def metric(config: Config) -> Any:
    """Return the metric of the step."""
    return llqr.metrics.resolve(config.divergence, config.divergence_order_param)


def route(config: Config) -> llqr.Route:
    """Return how curvature products are computed.

    Chunks of the batch and second derivatives example by example are one mechanism here:
    the smaller number of examples decides.
    """
    return llqr.Route(**become(config, "route"))


def refit_options(config: Config, horizon: Horizon) -> llqr.Refit | llqr.Streaming:
    """Return when and how P is learned."""
    if config.precond_streaming:
        return llqr.Streaming(**become(config, "streaming"))
    return published(config, horizon)


def published(config: Config, horizon: Horizon) -> llqr.Refit:
    """Return the options of refits for which training stops."""
    return llqr.Refit(**become(config, "refit", _around(config, horizon)))


def refit_steps(config: Config, horizon: Horizon) -> frozenset[int]:
    """Return the steps before which P is refitted, all at once: the loop never asks a device."""
    if not config.use_preconditioner:
        return frozenset()
    steps = np.arange(horizon.total_steps - 1)
    due = jax.vmap(refit_options(config, horizon).is_due)(jnp.asarray(steps))
    return frozenset(steps[np.asarray(due)].tolist())
