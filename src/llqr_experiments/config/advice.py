"""What is legal but rarely meant: told before a run, which goes on all the same."""

from collections.abc import Iterator

import numpy as np

from llqr_experiments.config import build
from llqr_experiments.config.options import Config


def warnings(config: Config, horizon: build.Horizon, examples: int | None = None) -> list[str]:
    """Return what is legal but rarely meant.

    Args:
      config: validated options.
      horizon: how long the run is.
      examples: to train on, where that is known.
    """
    return [
        *_sam_warnings(config, horizon),
        *_preconditioner_warnings(config, horizon),
        *_size_warnings(config, horizon, examples),
    ]


def _size_warnings(config: Config, horizon: build.Horizon, examples: int | None) -> Iterator[str]:
    if config.wd_mask and config.main_optimizer.startswith("adamw_"):
        yield (
            f"wd_mask is not used: main_optimizer={config.main_optimizer} lets all parameters "
            "decay, and adamw those that the mask leaves."
        )
    if not config.use_preconditioner:
        return
    steps, first = horizon.total_steps - 1, config.precond_start_step
    if first >= steps:
        yield (
            f"precond_start_step={first}: the run has {steps} steps, and no refit: P stays the "
            "identity."
        )
    if examples is not None and not config.precond_streaming:
        if config.precond_batch_size <= examples:
            return
        yield (
            f"precond_batch_size={config.precond_batch_size}: there are {examples:,} training "
            "examples, and a refit sees some of them more than once."
        )


def _sam_warnings(config: Config, horizon: build.Horizon) -> Iterator[str]:
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


def _preconditioner_warnings(config: Config, horizon: build.Horizon) -> Iterator[str]:
    if not config.use_preconditioner:
        return
    decay = build.schedule(config, "ema_scheduler", config.ema_decay, horizon)
    if callable(decay):
        values = np.asarray([decay(t) for t in np.linspace(0, horizon.total_steps, 33)])
        if np.any(np.diff(values) < -1e-6):
            yield (
                "ema_scheduler decreases: old preconditioners weigh less and less, and P gets "
                f"noisier during the run ({values[0]:.3g} to {values[-1]:.3g})."
            )
    adam = config.main_optimizer.startswith("adam")
    if adam and not config.precond_on_update and build.structure(config).elementwise:
        yield (
            f"{config.main_optimizer} divides the scale of every gradient entry out: in front of "
            f"it, a positive {config.block_structure} P does almost nothing. "
            "precond_on_update=true puts P behind it."
        )
    rate, first = build.learning_rate(config, horizon), config.precond_start_step
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
