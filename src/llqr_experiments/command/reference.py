"""The table of all options: `python -m llqr_experiments.options > docs/options.md`."""

from collections.abc import Iterator

from llqr_experiments.command.cli import GROUPS, presets
from llqr_experiments.config.option import default, legal, options
from llqr_experiments.config.options import SCHEDULERS, Config

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
    return (
        f"{HEAD}{groups}\n## Options\n\n| option | default | meaning | legal |\n|---|---|---|---|\n"
        f"{rows}"
    )


def _rows() -> Iterator[tuple[str, str, str, str]]:
    for name, option, _ in options(Config):
        if name not in SCHEDULERS:
            meaning = option.metadata["meaning"].replace("|", "\\\\|")
            yield name, f"`{default(option)}`", meaning, legal(option)
