"""From the config to schedules, optimizer and preconditioner."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llqr
from llqr import schedules
from llqr._tree import leaf_names
from llqr._types import Schedule
from llqr.metrics import Reduction
from llqr.refits import Probe
from llqr.route import CheckpointPolicy, Memory
from llqr.sharpness import Sign
from llqr.structures import catalogue
from llqr.transform import Graft
from llqr_experiments.config.options import OPERATOR_MODES, Config
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


def schedule(config: Config, group: str, base: float, horizon: Horizon) -> float | Schedule:
    """Return the schedule of a config group around its base value; a constant is a number."""
    arguments = dict(getattr(config, group))
    name = arguments.pop("name")
    if name == "constant":
        return base
    if name == "piecewise_constant":  # pairs: Hydra replaces a list whole, and merges a mapping
        arguments["boundaries"] = dict(arguments.get("boundaries", ()))
    legal = inspect.signature(schedules.SCHEDULES.get(name, schedules.make)).parameters
    for known in ("steps_per_epoch", "total_epochs"):
        if known in legal:
            arguments.setdefault(known, getattr(horizon, known))
    try:
        return schedules.make(name, base, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{group}: {error}") from error


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


def optimizer(config: Config, horizon: Horizon) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a run: the main one alone, or wrapped by LLQR.

    Raises:
      ConfigError: unknown structure or divergence (the nearest is named), or an illegal value.
    """
    base = optax.with_extra_args_support(base_optimizer(config, horizon))
    if not config.use_preconditioner:
        return base
    try:
        chosen = structure(config)
        if config.precond_solver == "cg" and not chosen.linear:
            raise ConfigError(
                "precond_solver=cg needs a structure that is linear in its arrays (scalar, "
                f"diagonal, dense), not block_structure={chosen.name}; cg_zoom_hz takes any."
            )
        return llqr.llqr(
            base,
            structure=chosen,
            metric=metric(config),
            damping=config.damping,
            divergence_reduction=cast(Reduction, config.divergence_reduction),
            identity_scaling=config.precond_identity_scaling,
            max_dim=config.precond_max_dim,
            graft=cast(Graft, config.precond_graft),
            precondition="update" if config.precond_on_update else "gradient",
            route=route(config),
            refit=refit_options(config, horizon),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
    rho = schedule(config, "perturbation_rho_scheduler", config.perturbation_rho, horizon)
    mode = config.sam_mode
    if mode is None:
        return None
    common: dict[str, Any] = {"rho": rho, "start": config.start_sam_after_step or 0}
    shape: dict[str, Any] = {
        "direction": config.perturb_mode,
        "norm": config.norm_mode,
        "epsilon": config.gbar_eps,
    }
    beta, groups = config.gbar_beta, config.sam_groups
    sign = cast(Sign, config.sam_research_perturb_sign)
    method = {
        "base_sam": lambda: llqr.sam(**common, **shape, groups=groups, sign=sign),
        "base_fsam": lambda: llqr.friendly_sam(
            **common, **shape, beta=beta, groups=groups, sign=sign
        ),
        "past_fsam": lambda: llqr.past_friendly_sam(**common, **shape, beta=beta),
        "asam": lambda: llqr.asam(**common, groups=groups, eta=config.asam_eta),
        "fisher_sam": lambda: llqr.fisher_sam(**common, groups=groups, eta=config.fisher_sam_eta),
    }[mode]()
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


def warnings(config: Config, horizon: Horizon) -> list[str]:
    """Return what is legal but rarely meant."""
    return [*_sam_warnings(config, horizon), *_preconditioner_warnings(config, horizon)]


def _sam_warnings(config: Config, horizon: Horizon) -> Iterator[str]:
    if not config.sam_mode:
        return
    start, steps = config.start_sam_after_step or 0, horizon.total_steps - 1
    scheduler = config.perturbation_rho_scheduler
    if start >= steps:
        yield f"start_sam_after_step={start}: the run has {steps} steps, none of them perturbed."
    if start and scheduler["name"] != "constant":
        yield (
            "perturbation_rho_scheduler counts from step 0, also where "
            f"start_sam_after_step={start} delays SAM."
        )
    target = scheduler.get("target_value")
    if target is not None and target != config.perturbation_rho:
        yield (
            f"perturbation_rho={config.perturbation_rho:g} is not used: the scheduler's "
            f"target_value is {target:g}. target_value=null takes perturbation_rho."
        )
    unused = config.sam_mode == "fisher_sam" or not config.sam_use_preconditioner_on_update
    if config.use_preconditioner and unused and config.perturb_mode == "ema_grad":
        advice = "" if start else " use_preconditioner=false saves them."
        yield (
            f"sam_mode={config.sam_mode}: neither the perturbation nor the update of a perturbed "
            f"step uses P, and refits are made all the same.{advice}"
        )


def _preconditioner_warnings(config: Config, horizon: Horizon) -> Iterator[str]:
    if not config.use_preconditioner:
        return
    decay = schedule(config, "ema_scheduler", config.ema_decay, horizon)
    if callable(decay):
        values = np.asarray([decay(t) for t in np.linspace(0, horizon.total_steps, 33)])
        if np.any(np.diff(values) < -1e-6):
            yield (
                "ema_scheduler decreases: old preconditioners weigh less and less, and P gets "
                f"noisier during the run ({values[0]:.3g} to {values[-1]:.3g})."
            )
    adam = config.main_optimizer.startswith("adam")
    if adam and not config.precond_on_update and structure(config).elementwise:
        yield (
            f"{config.main_optimizer} divides the scale of every gradient entry out: in front of "
            f"it, a positive {config.block_structure} P does almost nothing. "
            "precond_on_update=true puts P behind it."
        )
    rate, first = learning_rate(config, horizon), config.precond_start_step
    follows = config.precond_on_update and config.precond_probe in ("gradient", "minibatch")
    if follows and callable(rate) and float(rate(first)) == 0:
        yield (
            f"the learning rate of step {first} is 0, and so is the update that the refit there is "
            "made on: it learns nothing, and P stays as it is until the next one. "
            f"precond_start_step={first + 1} moves the first refit."
        )
    if config.divergence == "newton" and config.damping == 0:
        yield (
            "divergence=newton is indefinite: its objective has no lower bound, and only the "
            "number of inner steps and the guards keep P bounded. Set damping, or use ngd."
        )


def structure(config: Config) -> llqr.Structure:
    """Return the structure of P."""
    found = catalogue.get(config.block_structure)
    return found if config.precond_rank is None else replace(found, rank=config.precond_rank)


def metric(config: Config) -> Any:
    """Return the metric of the step."""
    return llqr.metrics.resolve(config.divergence, config.divergence_order_param)


def route(config: Config) -> llqr.Route:
    """Return how curvature products are computed.

    Chunks of the batch and second derivatives example by example are one mechanism here:
    the smaller number of examples decides.
    """
    sizes = (config.llqr_batch_update_chunk_size, config.llqr_second_order_chunk_size)
    given = [size for size in sizes if size is not None]
    return llqr.Route(
        layerwise=not config.llqr_use_fast_paths,
        memory=cast(Memory, OPERATOR_MODES[config.llqr_operator_mode]),
        checkpoint_policy=cast(CheckpointPolicy, config.llqr_checkpoint_policy),
        chunk_size=min(given) if given else None,
    )


def refit_options(config: Config, horizon: Horizon) -> llqr.Refit:
    """Return when and how P is learned."""
    every = schedule(
        config, "precond_update_scheduler", config.update_preconditioner_every, horizon
    )
    return llqr.Refit(
        every=cast(int, every),
        start=config.precond_start_step,
        until=config.update_preconditioner_until or None,
        steps=config.precond_steps,
        learning_rate=schedule(config, "precond_lr_scheduler", config.precond_lr, horizon),
        tolerance=config.precond_tolerance,
        anneal=config.precond_anneal,
        solver=config.precond_solver,
        momentum=config.momentum if config.precond_momentum is None else config.precond_momentum,
        clip_norm=config.precond_clip_norm or None,
        clip_value=config.precond_clip_element_wise or None,
        warm_start=config.warm_start_precond,
        ema_decay=schedule(config, "ema_scheduler", config.ema_decay, horizon),
        normalize_gradient=config.normalize_grad_for_lqr,
        allow_grad_inversion=config.allow_grad_inversion,
        probe=cast(Probe, config.precond_probe),
        probes=config.precond_probes,
        fresh_batches=config.multibatch_training,
        per_example=not config.batch_solve_precond,
        seed=config.rng_seed,
    )


def refit_steps(config: Config, horizon: Horizon) -> frozenset[int]:
    """Return the steps before which P is refitted, all at once: the loop never asks a device."""
    if not config.use_preconditioner:
        return frozenset()
    steps = np.arange(horizon.total_steps - 1)
    due = jax.vmap(refit_options(config, horizon).is_due)(jnp.asarray(steps))
    return frozenset(steps[np.asarray(due)].tolist())
