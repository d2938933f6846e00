"""Runs as their folders tell them, whole or broken off."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from llqr_experiments.errors import ConfigError
from llqr_experiments.record import translations
from llqr_experiments.record.translations import Sample

FILES = ("config.yaml", "meta.json", "metrics.jsonl")
"""What makes a folder a run."""
ABSENT = "—"


class Point(NamedTuple):
    """A value that was logged; None where it was not finite."""

    step: int
    seconds: float
    value: float | None


@dataclass(frozen=True)
class Translation:
    """A split, or a part of it, in translation; None where the file does not say."""

    step: int
    split: str
    bleu: float | None
    signature: str | None
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Run:
    """What a run has written.

    Attributes:
      folder: where it is.
      name: what the page calls it.
      options: option -> value, with dots in the names of nested ones.
      config: text of config.yaml.
      meta: of meta.json.
      rows: of metrics.jsonl, with the seconds of all sessions added up.
      translations: of translations.jsonl.
      unreadable: lines of both that are cut off.
    """

    folder: Path
    name: str
    options: dict[str, Any]
    config: str
    meta: dict[str, Any]
    rows: list[dict[str, Any]]
    translations: list[Translation]
    unreadable: int

    def names(self) -> list[str]:
        """Return what was logged, in the order of its first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def series(self, name: str) -> list[Point]:
        """Return what was logged under a name, by step; of two at one step, the later."""
        found = {row["step"]: row for row in self.rows if name in row}
        return [Point(step, row["seconds"], row[name]) for step, row in sorted(found.items())]

    def last(self) -> int:
        """Return the last step that was logged."""
        return max((row["step"] for row in self.rows), default=0)

    def phases(self) -> dict[str, float]:
        """Return seconds by phase, the rest as "other"; empty if they were not logged.

        They are in a row, under "time <phase>", or in meta.json, under "time".
        """
        last = self.rows[-1]["session"] if self.rows else 0.0
        noted = self.meta.get("time")
        found = [({k[5:]: v for k, v in r.items() if k.startswith("time ")}, r) for r in self.rows]
        for split, row in reversed(found):
            if split:
                return _with_rest(split, row["session"])
        return _with_rest(noted, last) if isinstance(noted, dict) else {}


def _with_rest(split: dict[str, Any], total: float) -> dict[str, float]:
    known = {name: value for name, value in split.items() if _finite(value) is not None}
    total = known.pop("total", total)
    rest = {"other": total - sum(known.values())}
    return {name: value for name, value in (rest | known).items() if value > 0}


def read(folder: Path) -> Run:
    """Read a run.

    Args:
      folder: with config.yaml, meta.json and metrics.jsonl.

    Returns:
      The run, named after its folder.

    Raises:
      ConfigError: the folder is no run, or a file of it cannot be read.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}.")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        inside = any((sub / FILES[-1]).is_file() for sub in folder.iterdir())
        hint = f" Folders in it are runs: give those, {folder}/*/." if inside else ""
        raise ConfigError(f"{folder} is no run: it lacks {', '.join(missing)}.{hint}")
    try:
        config = (folder / "config.yaml").read_text()
        options = _flat(OmegaConf.to_container(OmegaConf.create(config), resolve=False))
        meta = json.loads((folder / "meta.json").read_text())
        rows, unreadable = _rows((folder / "metrics.jsonl").read_bytes())
        said, lost = _translations(folder / translations.FILE)
    except Exception as error:  # of YAML, JSON, text or file: one message names the run
        raise ConfigError(f"{folder} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"{folder} cannot be read: meta.json is no object.")
    return Run(folder, folder.name, options, config, meta, rows, said, unreadable + lost)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def _lines(text: bytes) -> Iterable[str]:
    return filter(None, text.decode(errors="replace").split("\n"))


def _rows(text: bytes) -> tuple[list[dict[str, Any]], int]:
    """Rows of a metrics.jsonl, and how many lines are none: a killed run cuts its last."""
    rows, unreadable = [], 0
    for line in _lines(text):
        try:
            row = json.loads(line)
            values = {k: _finite(v) for k, v in row.items()}
            rows.append(values | {"step": int(row["step"]), "seconds": float(row["seconds"])})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            unreadable += 1
    return _lineage(rows), unreadable


def _finite(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if number else None


def _lineage(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what a resumed run did again, and add up the seconds of all sessions.

    A resumed run appends, from the step of its checkpoint on: what the killed session wrote
    past that step did not lead to what follows. Its clock may go on or start at zero.
    """
    kept: list[dict[str, Any]] = []
    step, elapsed = 0, 0.0
    for row in rows:
        if row["step"] < step and not any(name.startswith("time ") for name in row):
            kept = [old for old in kept if old["step"] <= row["step"]]
            elapsed = 0.0
        before = kept[-1]["seconds"] if kept else 0.0
        if row["seconds"] + elapsed < before:
            elapsed = before
        step = row["step"]
        kept.append(row | {"seconds": row["seconds"] + elapsed, "session": row["seconds"]})
    return kept


def _translations(path: Path) -> tuple[list[Translation], int]:
    """What translations.jsonl holds, and how many lines of it are cut off; it need not exist."""
    found, unreadable = [], 0
    for line in _lines(path.read_bytes()) if path.is_file() else ():
        try:
            row = json.loads(line)
            samples = tuple(Sample(*(str(s[name]) for name in Sample._fields))
                            for s in row["samples"])  # fmt: skip
            signature = row.get("signature") and str(row["signature"])
            bleu = _finite(row.get("bleu"))
            found.append(Translation(int(row["step"]), str(row["split"]), bleu, signature, samples))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            unreadable += 1
    return found, unreadable


def named(runs: Sequence[Run]) -> list[Run]:
    """Name runs by as many of the last parts of their paths as tell them apart."""
    runs = list({run.folder: run for run in runs}.values())
    for count in range(1, max(len(run.folder.parts) for run in runs) + 1):
        names = ["/".join(run.folder.parts[-count:]) for run in runs]
        if len(set(names)) == len(runs):
            return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    return runs


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the options that are not the same in all runs: name -> value in each run."""
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    values = {name: [spelt(run.options.get(name, ABSENT)) for run in runs] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def spelt(value: Any) -> str:
    """As in a config: null, true, 0.1."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def status(run: Run) -> str:
    """Say whether a run reached its end, from meta.json and what was logged."""
    if not run.rows:
        return "nothing logged"
    total = run.meta.get("steps")
    if "finished" in run.meta:
        return "finished"
    losses = run.series("train loss")
    if losses and losses[-1].value is None:
        return f"stopped: loss not finite at step {losses[-1].step:,}"
    if not isinstance(total, int):
        return "finished" if run.phases() else "not known"
    ends = (row for row in run.rows if row["step"] >= total)
    evaluated = any(name in row for row in ends for name in ("test loss", "valid loss"))
    return "finished" if evaluated else f"not finished: step {run.last():,} of {total:,}"
