"""Names in the record of a run: what is measured, on which split, and how it is written.

Whatever draws or tabulates runs asks here, so that a name has one meaning.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

SPLITS = {
    "train": "training batch",
    "train_eval": "training set",
    "valid": "valid set",
    "test": "test set",
}
"""Splits in records, and what people call them. "train" is measured while training."""


class Quantity(NamedTuple):
    """What is measured of a split.

    Attributes:
      name: of charts and their files.
      label: of an axis.
      spellings: in records, with {} for the split.
    """

    name: str
    label: str
    spellings: tuple[str, ...]


LOSS = Quantity("loss", "loss", ("{} loss",))
ACCURACY = Quantity("accuracy", "accuracy (%)", ("{} accuracy", "{} token_accuracy"))
ERROR = Quantity("error", "relative L2 error", ("{} relative error",))
PERPLEXITY = Quantity("perplexity", "perplexity", ("{} perplexity", "{}_ppl"))
BLEU = Quantity("BLEU", "BLEU", ("{} bleu",))
SAMPLED = Quantity("BLEU of a sample", "BLEU", ("{} bleu_sampled",))


def splits(quantity: Quantity, names: Iterable[str]) -> dict[str, str]:
    """Return split -> name in the record, for the splits of which the quantity was recorded.

    Args:
      quantity: to look for.
      names: in a record.

    >>> splits(ACCURACY, ["train token_accuracy", "valid loss", "valid token_accuracy"])
    {'train': 'train token_accuracy', 'valid': 'valid token_accuracy'}
    """
    known = set(names)
    spelt = ((split, s.format(split)) for split in SPLITS for s in quantity.spellings)
    return {split: name for split, name in spelt if name in known}


_MILESTONE = re.compile(r"first step with (?P<metric>.+) of (?P<share>[\d.]+) %")


def first_step(metric: str, share: float) -> str:
    """Return the name of a milestone: when a metric has reached a share, in percent.

    >>> first_step("test accuracy", 95.0)
    'first step with test accuracy of 95 %'
    """
    return f"first step with {metric} of {share:g} %"


def milestone(name: str) -> str | None:
    """Return what is reached at a milestone, None if the name is of none.

    >>> milestone(first_step("test accuracy", 95.0))
    'test accuracy of 95 %'
    """
    found = _MILESTONE.fullmatch(name)
    return f"{found['metric']} of {found['share']} %" if found else None


def metric(name: str) -> str | None:
    """Return the metric that reaches a milestone, None if the name is of none.

    >>> metric(first_step("test accuracy", 95.0))
    'test accuracy'
    """
    found = _MILESTONE.fullmatch(name)
    return found["metric"] if found else None


def is_result(name: str) -> bool:
    """Whether a person compares runs by it: a metric of a split that is evaluated, a milestone.

    The counts that BLEU is made of are none.

    >>> [is_result(name) for name in ("valid_ppl", "train loss", "valid _bleu_counts_0")]
    [True, False, False]
    """
    evaluated = [split for split in SPLITS if split != "train"]
    known = re.match(rf"(best )?({'|'.join(evaluated)})[ _]", name)
    part = " _bleu_" in name or name.endswith(" examples")
    return milestone(name) is not None or (known is not None and not part)
