"""The table of all options: `python -m llqr_experiments.options > docs/options.md`."""

from collections.abc import Iterator
from dataclasses import fields

from llqr_experiments.command.cli import GROUPS, presets
from llqr_experiments.config.options import SCHEDULERS, Config
from llqr_experiments.config.row import default, legal, rows
from llqr_experiments.config.schedulers import SCHEDULES

HEAD = """\
# Options

Every option of a run, written by `python -m llqr_experiments.options` from the schema
(`src/llqr_experiments/config/options.py`). On the command line: `key=value`; for a group:
`group=preset`, and `group.option=value` for what is in it.

## Groups

| group | presets |
|---|---|
"""


def page() -> str:
    """Return docs/options.md."""
    groups = "".join(f"| `{group}` | {', '.join(presets(group))} |\n" for group in GROUPS)
    rows = "".join(f"| `{n}` | {d} | {m} | {v} |\n" for n, d, m, v in _rows())
    arguments = "".join(f"| `{n}` | {d} | {m} | {v} |\n" for n, d, m, v in _schedules())
    return (
        f"{HEAD}{groups}\n## Options\n\n| option | default | meaning | legal |\n|---|---|---|---|\n"
        f"{rows}\n## Schedules\n\nOf every group whose name ends in `_scheduler`: "
        "`group.argument=value`.\n\n"
        f"| schedule: argument | default | meaning | legal |\n|---|---|---|---|\n{arguments}"
    )


def _rows() -> Iterator[tuple[str, str, str, str]]:
    for name, row, _ in rows(Config):
        if name not in SCHEDULERS:
            meaning = row.metadata["meaning"].replace("|", "\\\\|")
            yield name, f"`{default(row)}`", meaning, legal(row)


def _schedules() -> Iterator[tuple[str, str, str, str]]:
    for name, kind in SCHEDULES.items():
        for row in fields(kind):
            told = row.metadata["meaning"]
            yield f"{name}: {row.name}", f"`{default(row)}`", told, legal(row)
