"""How near the learned steps come to the exact one, before and after training."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import llqr
from llqr._types import Params
from llqr_experiments.errors import ConfigError
from llqr_experiments.spec import Config

BARS = ("#8aa6c1", "#c8452c", "#5b8c5a")


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
            metric=llqr.metrics.resolve(config.divergence, config.divergence_order_param),
            damping=config.damping,
            divergence_reduction="mean" if config.divergence_reduction == "mean" else "sum",
            max_dim=config.precond_max_dim,
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
