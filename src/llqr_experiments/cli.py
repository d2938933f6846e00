"""The command line around Hydra: help, misspelt names, errors without a traceback."""

import sys
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from llqr._errors import unknown
from llqr_experiments.spec import SCHEDULERS, Config, ConfigError, options

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GROUPS = ("experiment", "dataset", "architecture", "logging", *SCHEDULERS)
BAD_INPUT, FAILED = 2, 1

_EXAMPLES = """\
Train a model with LLQR; every option is key=value, every group is group=preset.

  uv run python run.py experiment=quick-local-test
  uv run python run.py experiment=quick-local-test use_preconditioner=false
  uv run python run.py experiment=quick-local-test block_structure=diagonal learning_rate=0.3
  uv run python run.py experiment=quick-local-test dataset=fashion_mnist total_epochs=3
  uv run python run.py -m experiment=quick-local-test init_key=0,1,2      (a sweep)
"""


def choices(group: str) -> list[str]:
    """Names of the presets in a config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def check_arguments(arguments: Sequence[str]) -> None:
    """Answer --help and stop at a misspelt option before Hydra or JAX start.

    Args:
      arguments: of the command line, without the program's name.
    """
    if "--help" in arguments or "-h" in arguments:
        print_help()
        sys.exit(0)
    legal = [name for name, _, _ in options(Config)]
    for argument in arguments:
        if argument.startswith("-") or argument.startswith("hydra"):
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            stop(f"cannot read {argument!r}: write options as key=value.\n{error}")
        key = override.key_or_group
        if key in GROUPS:
            value = override.value()
            if isinstance(value, str) and value not in choices(key):
                stop(unknown(key, value, choices(key)))
        elif key.partition(".")[0] not in SCHEDULERS and key not in legal:
            stop(unknown("option", key, [*legal, *GROUPS]))


def read(config: DictConfig) -> Config:
    """Turn Hydra's composed config into a validated `Config`."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), config))  # type: ignore[return-value]


def execute(config: DictConfig, out_dir: Path) -> None:
    """Run one experiment; bad input ends in one message, not in a traceback."""
    try:
        settings = read(config)
        from llqr_experiments import train  # JAX starts here, after the options are known to be good

        train.run(settings, out_dir, command=" ".join(["run.py", *sys.argv[1:]]))
    except (ConfigError, *_user_errors()) as error:
        stop(str(error))


def _user_errors() -> tuple[type[Exception], ...]:
    from llqr_experiments.data import DataError

    return (DataError,)


def stop(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Print an error and leave."""
    Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {message}", soft_wrap=True)
    sys.exit(code)


def print_help() -> None:
    """Print examples, groups and options with their defaults and meanings."""
    console = Console(highlight=False)
    console.print(_EXAMPLES)
    groups = Table("group", "presets", title="Groups", title_justify="left", box=None)
    for group in GROUPS:
        groups.add_row(group, ", ".join(choices(group)))
    console.print(groups)
    table = Table("option", "default", "meaning", title="\nOptions", title_justify="left", box=None)
    for name, option, _ in options(Config):
        if name in SCHEDULERS:
            continue
        default = option.default if option.default is not MISSING else option.default_factory()
        shown = {None: "null", True: "true", False: "false"}.get(default, default) \
            if not isinstance(default, list) else default
        meaning = option.metadata["meaning"]
        if legal := option.metadata.get("choices"):
            meaning += f" ({', '.join(legal)})"
        table.add_row(name, str(shown), meaning)
    console.print(table)
    console.print("\nHydra's own flags: -m sweeps over comma-separated values, --cfg job prints "
                  "the composed config, --resolve, --info.")
