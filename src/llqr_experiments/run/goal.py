"""What the best checkpoint of a run is best in."""

import math
from typing import NamedTuple

from llqr.errors import unknown
from llqr_experiments.config.options import Config
from llqr_experiments.data.kinds import KINDS
from llqr_experiments.data.material import Material
from llqr_experiments.errors import ConfigError
from llqr_experiments.task.tasks import CLASSES, NUMBERS


class Goal(NamedTuple):
    """A metric, and whether more of it is better."""

    metric: str
    maximize: bool

    def better(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far; None: there is none yet.

        >>> Goal("test loss", False).better(0.5, 0.7), Goal("test loss", False).better(0.7, 0.7)
        (True, False)
        """
        if not math.isfinite(value):
            return False
        return best is None or (value > best if self.maximize else value < best)


def goal(config: Config, made: Material) -> Goal:
    """Return the goal of a run: its own, that of translation, or that of the data, in this order.

    Raises:
      ConfigError: nothing of that name is measured.
    """
    chosen = Goal(*made.best)
    if config.translation_eval.enabled:
        chosen = _of_translation(config, made) or chosen
    if config.checkpoint_metric is not None:
        chosen = _named(config.checkpoint_metric, config, made)
    maximize = config.maximize_checkpoint_metric
    return chosen if maximize is None else chosen._replace(maximize=maximize)


def _of_translation(config: Config, made: Material) -> Goal | None:
    options = config.translation_eval
    if not KINDS[made.kind].decoded:
        raise ConfigError(f"translation_eval.enabled=true: {made.name} is no translation.")
    if options.checkpoint_metric == "bleu":
        return Goal("valid bleu", options.maximize_checkpoint_metric)
    return None


def _named(name: str, config: Config, made: Material) -> Goal:
    splits = [*made.evaluated, *(["train_eval"] if config.add_train_eval else [])]
    totals = dict.fromkeys((*CLASSES, *NUMBERS), 1.0)
    known = [metric for split in splits for metric in made.rates(split, totals)]
    if name not in known:
        hint = " (it needs add_train_eval=true)" if name.startswith("train_eval") else ""
        raise ConfigError(unknown("checkpoint_metric", name, known) + hint)
    return Goal(name, "accuracy" in name)
