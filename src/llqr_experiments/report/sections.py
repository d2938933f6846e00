"""Which runs belong together: of one kind of data; of one configuration but for the seeds."""

from collections.abc import Sequence
from typing import NamedTuple

from llqr_experiments.data import kinds
from llqr_experiments.report.runs import Run, spelt

KINDS = {kind.name: kind.heading for kind in kinds.KINDS.values()} | {
    "other": "Toy functions and comparisons"
}
"""Kinds of runs, in the order of the page, and their headings."""

SEEDS = ("init_key", "rng_seed")


class Section(NamedTuple):
    """Runs of one kind.

    Attributes:
      kind: see `KINDS`.
      runs: in the order of their colours.
      alone: whether the page has no other section.
    """

    kind: str
    runs: list[Run]
    alone: bool

    @property
    def prefix(self) -> str:
        """Of names that other sections have too."""
        return "" if self.alone else f"{self.kind}-"


def kind(run: Run) -> str:
    """Return the kind of a run, by its config."""
    if run.options.get("toy.name") or run.options.get("comparison.name"):
        return "other"
    known = kinds.of(run.options.get("dataset.name"))
    return known.name if known else kinds.IMAGES.name


def sections(runs: Sequence[Run]) -> list[Section]:
    """Return the runs by kind: what differs in kind has no axis in common."""
    of = [kind(run) for run in runs]
    found = [name for name in KINDS if name in of]
    return [
        Section(name, [r for r, k in zip(runs, of, strict=True) if k == name], len(found) == 1)
        for name in found
    ]


def same_but_seeds(runs: Sequence[Run]) -> list[list[int]]:
    """Return the numbers of runs whose options are the same, but for their seeds."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for i, run in enumerate(runs):
        options = {k: spelt(v) for k, v in run.options.items() if k not in SEEDS}
        groups.setdefault(tuple(sorted(options.items())), []).append(i)
    return list(groups.values())
