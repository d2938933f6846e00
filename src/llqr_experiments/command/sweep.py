"""A sweep: what its runs' folders are called, and a summary of what each reached."""

import csv
import io
import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from rich.console import Console
from rich.table import Table

from llqr_experiments.files import write
from llqr_experiments.record import measures

LAST = ("best", "seconds", "status", "why")
"""Columns at the end."""


JOBS = ".jobs"
"""Folder with a file for every job of a sweep: jobs may run in processes of their own."""


class Summary(Callback):
    """Hydra calls it around a multirun and around each of its jobs."""

    def __init__(self) -> None:
        self._total = 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Name each run's folder after the options that are swept over.

        Hydra would name all of them: a folder's name may not be so long, nor have a path in it.
        """
        shutil.rmtree(Path(config.hydra.sweep.dir) / JOBS, ignore_errors=True)  # of an earlier one
        # As they were typed: an interpolation in one may be known to its job only, or to none.
        task: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        self._total = _count(task)
        constant = unswept(task)
        with read_write(config.hydra):  # the runs are composed with these overrides
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join(constant)}]"
            )

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Name a job above what it prints, and note that it has begun."""
        job, name = config.hydra.job, _name(config)
        if config.hydra.mode is not RunMode.MULTIRUN:
            return
        console = Console(highlight=False)
        console.print(f"\n[bold]job {job.num + 1} of {self._total}[/]", end="   ")
        console.print(name, markup=False, soft_wrap=True)
        self._note(config, status="not finished")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note how a job has ended: it returns why it failed."""
        if config.hydra.mode is not RunMode.MULTIRUN:
            return
        why = job_return._return_value
        if why is None:
            self._note(config, status="finished")
        else:
            self._note(config, status="failed", why=" ".join(str(why).split()))

    def _note(self, config: DictConfig, **facts: str) -> None:
        if config.dry_run:
            return
        path = Path(config.hydra.sweep.dir) / JOBS / f"{config.hydra.job.num}.json"
        with suppress(OSError):  # a full disk: the run itself has said so
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps({"name": _name(config), **facts}))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, and write summary.csv into the sweep's folder."""
        folder = Path(config.hydra.sweep.dir)
        rows = collect(folder)
        shutil.rmtree(folder / JOBS, ignore_errors=True)
        if not rows:
            return
        console = Console(highlight=False)
        ends = Counter(row["status"] for row in rows)
        told = ", ".join(f"{n} {status}" for status, n in ends.items())
        console.print(f"\n{len(rows)} run{'s' * (len(rows) > 1)}: {told}", soft_wrap=True)
        console.print(table(rows))
        for row in rows:
            if row.get("why"):
                console.print(f"{_options(row)}: {row['why']}", markup=False, soft_wrap=True)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, _columns(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)
        write(folder / "summary.csv", text.getvalue())
        print(f"in {folder}: summary.csv")
        if any(row["status"] != "finished" for row in rows):
            sys.exit(1)  # each one has said why; a sweep does not end with the first


def _name(config: DictConfig) -> str:
    return str(OmegaConf.select(config, "hydra.job.override_dirname"))


def _count(overrides: Sequence[str]) -> int:
    """How many jobs a sweep has."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    swept = [list(found.sweep_string_iterator()) for found in parsed if found.is_sweep_override()]
    return math.prod(len(values) for values in swept)


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
    found: dict[str, dict[str, Any]] = {}
    inside: list[Path] = []
    for path in sorted(folder.rglob("meta.json")):
        name = str(path.parent.relative_to(folder))
        if "=" not in name or any(path.is_relative_to(run) for run in inside):
            continue  # the runs of a comparison are no jobs
        inside.append(path.parent)
        row: dict[str, Any] = dict(_overrides(name))
        try:
            found[name] = row | _results(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError, OSError):  # cut off by a kill
            found[name] = row | {"status": "meta.json cannot be read"}
    for job in _jobs(folder):  # some have failed before they wrote a file
        name = job.pop("name")
        known = found.get(name, dict(_overrides(name)))
        found[name] = known | (
            job if job["status"] != "finished" or not known.get("status") else {}
        )
    return list(found.values())


def _jobs(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((folder / JOBS).glob("*.json"), key=lambda path: int(path.stem)):
        with suppress(ValueError, OSError):
            yield json.loads(path.read_text())


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


def _options(row: dict[str, Any]) -> str:
    """What a job was called, and how it ended."""
    given = [f"{k}={v}" for k, v in row.items() if k not in LAST and not measures.is_result(k)]
    return f"{','.join(given)} {row['status']}"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as a table, without the options that are the same for all."""
    names = [
        name
        for name in _columns(rows)
        if (name != "why" and len({str(row.get(name)) for row in rows}) > 1)
        or measures.is_result(name)
        or len(rows) == 1
    ]
    found = Table(box=None, pad_edge=False)
    for name in names:
        found.add_column(name, justify="left" if _is_text(rows, name) else "right")
    for row in rows:
        found.add_row(*(_cell(row.get(name, "")) for name in names))
    return found


def _is_text(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return any(isinstance(row.get(name), str) and row[name] for row in rows)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
