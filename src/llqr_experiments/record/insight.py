"""What a refit did, and how near the learned steps come to the exact one."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from matplotlib.figure import Figure

import llqr
from llqr.exact import ExactState
from llqr.inverses import SOLVERS
from llqr.tree import cosine, divide, norm
from llqr.typing import Array, Float, Params
from llqr_experiments.config import build
from llqr_experiments.config.options import Config
from llqr_experiments.config.row import accepted, become
from llqr_experiments.errors import ConfigError
from llqr_experiments.record.console import REASONS

BARS = ("#8aa6c1", "#c8452c", "#5b8c5a")


def gradient_cosine(
    refit: llqr.BoundObjective, training: llqr.BoundObjective, params: Params
) -> Float[Array, ""]:
    """Return the cosine of the loss gradients on a refit batch and on a training batch.

    Near 0, P is learned for a direction that training does not take: refit later
    (`precond_start_step`) or on more examples.
    """
    return _cosine(_gradient(refit, params), _gradient(training, params))


# Apart: training batches may have many shapes, and the refit's gradient is compiled once.
@jax.jit
def _gradient(objective: llqr.BoundObjective, params: Params) -> Params:
    return jax.grad(objective)(params)


_cosine = jax.jit(cosine)


def step_length(
    tx: optax.GradientTransformationExtraArgs,
    opt_state: Any,
    training: llqr.BoundObjective,
    params: Params,
) -> Float[Array, ""]:
    """Return the length of the update that follows, by that of the parameters.

    Args:
      tx: the optimizer.
      opt_state: its state after a refit.
      training: the loss on the next training batch; a perturbation is left out.
      params: the parameters.
    """
    return _length(tx, opt_state, _gradient(training, params), params)


@partial(jax.jit, static_argnames="tx")
def _length(tx: Any, opt_state: Any, gradient: Params, params: Params) -> Float[Array, ""]:
    updates, _ = tx.update(gradient, opt_state, params, refresh=False)
    return divide(norm(updates), norm(params))


def refit_record(report: llqr.Report, agreement: float, length: float) -> dict[str, float]:
    """Return what is logged about a refit, as one record.

    Args:
      report: of the preconditioner after it.
      agreement: cosine of refit and training gradient.
      length: of the next update, by that of the parameters.
    """
    blocks = report.blocks
    guarded = [b for b in blocks if b.status in REASONS]
    record = {
        "refit objective before": report.objective_before,
        "refit objective after": report.objective_after,
        "refit steps": float(report.steps),
        "refit guarded blocks": float(len(guarded)),
        "refit indefinite blocks": float(sum(b.status == "indefinite" for b in blocks)),
        "refit cosine Pg and g": report.cosine,
        "refit cosine refit and training gradient": agreement,
        "refit update over parameters": length,
        "Maximum across preconditioner": max(b.maximum for b in blocks),
        "Minimum across preconditioner": min(b.minimum for b in blocks),
        "Preconditioner l2 norm": sum(b.norm**2 for b in blocks) ** 0.5,
    }
    for b in blocks:
        record[f"{b.leaf} l2 norm"] = b.norm
        record[f"{b.leaf} cosine Pg and g"] = b.cosine
        for slot, (frobenius, spectral) in b.skew.items():
            record[f"{b.leaf}/{slot}/frob skew"] = frobenius
            record[f"{b.leaf}/{slot}/spectral skew"] = spectral
    for b in guarded:
        record[f"{b.leaf} guarded, {REASONS[b.status]}"] = 1.0
    skews = [pair for b in blocks for pair in b.skew.values()]
    for i, kind in enumerate(("frob", "spectral")):
        if skews:
            mean = sum(pair[i] for pair in skews) / len(skews)
            record[f"Average {kind} skew across preconditioner"] = mean
    return record


def streaming_record(info: llqr.RefitInfo) -> dict[str, float]:
    """Return what is logged of streaming refits, beside the training loss; nothing before one."""
    host = jax.device_get(info)
    if not host.refits:
        return {}
    return {
        "refits": float(host.refits),
        "refit objective before": float(host.objective_before),
        "refit objective after": float(host.objective_after),
        "refit guarded blocks": float(sum(word in REASONS for word in host.words)),
        "refit cosine Pm and m": float(host.cosine),
    }


def exact_record(state: ExactState) -> dict[str, float]:
    """Return what is logged of exact steps, beside the training loss; nothing before one."""
    host = jax.device_get(state)
    solved = {"exact/cg steps": float(host.steps), "exact/residual": float(host.residual)}
    if not host.trust:
        return solved
    known = host.trust
    if not known.solver:
        return {}
    record = {
        "exact/damping": float(known.damping),
        "exact/ratio": float(known.ratio),
        "exact/tries": float(known.tries),
        "exact/refused": float(known.refused),
        "exact/curvature": float(known.top),
        "exact/rank": float(known.rank),
    }
    iterative = SOLVERS[known.solver] == "cg"
    return record | ({"exact/cg steps": solved["exact/cg steps"]} if iterative else {})


def sharpness_record(info: llqr.SharpnessInfo) -> dict[str, float]:
    """Return what is logged of SAM; a loss that no pass has taken is left out."""
    host = jax.device_get(info)
    record = {
        "sam active steps": float(host.active),
        "sam gradient evaluations": float(host.evaluations),
        "sam guarded norms": float(host.guarded),
        "sam perturbation norm": float(host.perturbation_norm),
    }
    clean, perturbed = float(host.clean_loss), float(host.perturbed_loss)
    taken = {"sam clean loss": clean, "sam perturbed loss": perturbed}
    taken["sam sharpness"] = perturbed - clean
    return record | {name: value for name, value in taken.items() if math.isfinite(value)}


def measure(config: Config, objective: llqr.BoundObjective, params: Params) -> llqr.Quality:
    """Compare the structures of `config.quality` with the exact step on one refit batch.

    Raises:
      ConfigError: the exact step does not exist or cannot be found (see the message).
    """
    try:
        return llqr.quality(
            objective,
            params,
            structures=config.quality,
            metric=build.metric(config),
            refit=build.published(config, build.Horizon(1.0, config.total_epochs)),
            **accepted(llqr.quality, become(config, "llqr")),
        )
    except ValueError as error:  # no minimum, or too ill-conditioned
        raise ConfigError(f"quality: {error}") from error


def metrics(quality: llqr.Quality) -> dict[str, float]:
    """Return the numbers that go into the record."""
    values = {}
    for row in quality.rows:
        values[f"quality {row.name} share"] = row.share
        values[f"quality {row.name} best share"] = row.best_share
        values[f"quality {row.name} cosine"] = row.whole.cosine
    return values


def draw(found: dict[str, llqr.Quality], title: str, out: Path) -> None:
    """Draw best share and cosine of every step, one bar for each moment.

    Args:
      found: moment ("before training", ...) -> quality.
      title: above the picture.
      out: PNG to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    names = [row.name for row in next(iter(found.values())).rows]
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (moment, quality) in enumerate(found.items()):
        height = 0.8 / len(found)
        places = [k + i * height for k in range(len(names))]
        style: dict[str, Any] = {"height": height, "color": BARS[i % len(BARS)], "label": moment}
        left.barh(places, [100 * row.best_share for row in quality.rows], **style)
        right.barh(places, [row.whole.cosine for row in quality.rows], **style)
    left.set(xlabel="share of the exact decrease, at the best length (%)")
    right.set(xlabel="cosine with the exact step")
    left.set_yticks([k + 0.4 - 0.4 / len(found) for k in range(len(names))], names)
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="x")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, ncols=len(found),
                  loc="outside lower center")  # fmt: skip
    figure.savefig(out, dpi=130)
