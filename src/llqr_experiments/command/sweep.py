"""A sweep: what its runs' folders are called, and a summary of what each reached."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write
from rich.console import Console
from rich.table import Table

from llqr_experiments.files import write
from llqr_experiments.record import measures

LAST = ("best", "seconds", "status")
"""Columns at the end."""


class Summary(Callback):
    """Hydra calls it at the start and at the end of a multirun."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Name each run's folder after the options that are swept over.

        Hydra would name all of them: a folder's name may not be so long, nor have a path in it.
        """
        constant = unswept(config.hydra.overrides.task)
        with read_write(config.hydra):  # the runs are composed with these overrides
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join(constant)}]"
            )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, and write summary.csv into the sweep's folder."""
        folder = Path(config.hydra.sweep.dir)
        rows = collect(folder)
        if not rows:
            return
        Console(highlight=False).print(table(rows))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, _columns(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)
        write(folder / "summary.csv", text.getvalue())
        print(f"in {folder}: summary.csv")
        if any(row["status"] != "finished" for row in rows):
            sys.exit(1)  # each one has said why; a sweep does not end with the first


def unswept(overrides: Sequence[str]) -> list[str]:
    """Return the keys of overrides that have one value for all runs.

    Where every one has, the first does not count: each run needs a name.

    Example:
      >>> unswept(["experiment=grokking", "init_key=0,1", "dataset.dataset_dir=/data/x"])
      ['experiment', 'dataset.dataset_dir']
      >>> unswept(["experiment=grokking", "init_key=0"])
      ['init_key']
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = {found.key_or_group for found in parsed if found.is_sweep_override()}
    constant = [found.key_or_group for found in parsed if found.key_or_group not in swept]
    return constant if swept else constant[1:]


def collect(folder: Path) -> list[dict[str, Any]]:
    """Return one row for each run below a folder: its name's options, its results, its time.

    Results are the metrics of all evaluated splits, and the steps of milestones.
    """
    rows = []
    for path in sorted(folder.rglob("meta.json")):
        name = str(path.parent.relative_to(folder))
        if "=" not in name:
            continue
        row: dict[str, Any] = dict(_overrides(name))
        try:
            rows.append(row | _results(json.loads(path.read_text())))
        except (ValueError, TypeError, KeyError, AttributeError, OSError):  # cut off by a kill
            rows.append(row | {"status": "meta.json cannot be read"})
    return rows


def _results(meta: dict[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in meta.get("results", {}).items() if measures.is_result(k)}
    if meta.get("best"):
        found["best"] = meta["best"]["value"]
    found["seconds"] = round(sum(meta.get("time", {}).values()), 1) or ""
    found["status"] = "finished" if "finished" in meta else "not finished"
    return found


def _overrides(name: str) -> Iterable[tuple[str, str]]:
    """The pairs in Hydra's name of a job: "a=1,b=[2,3]"."""
    for part in re.split(r",(?=[^,=\[\]]+=)", name):
        key, _, value = part.partition("=")
        yield key, value


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of all rows, the common ones last: not every run has reached a milestone."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [n for n in names if n not in LAST] + [n for n in LAST if n in names]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table, without the options that are the same for all."""
    names = [
        name
        for name in _columns(rows)
        if len({str(row.get(name)) for row in rows}) > 1
        or measures.is_result(name)
        or len(rows) == 1
    ]
    found = Table(
        title=f"{len(rows)} run{'s' * (len(rows) > 1)}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in names:
        found.add_column(name, justify="left" if _is_text(rows, name) else "right")
    for row in rows:
        found.add_row(*(_cell(row.get(name, "")) for name in names))
    return found


def _is_text(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return any(isinstance(row.get(name), str) and row[name] for row in rows)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
