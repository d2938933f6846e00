"""The command line around Hydra: help, misspelt names, errors without a traceback."""

import sys
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from llqr._errors import unknown
from llqr_experiments.config.option import default, options
from llqr_experiments.config.options import SCHEDULERS, Config
from llqr_experiments.errors import ConfigError, RunError
from llqr_experiments.run.preemption import Interrupted

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GROUPS = ("experiment", "method", "dataset", "architecture", "logging", *SCHEDULERS)

FLAGS_WITH_VALUE = (
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn",
    "--config-dir", "-cd", "--experimental-rerun",
)  # fmt: skip
"""Hydra's flags whose value is the next argument."""

EXAMPLES = """\
Train a model with LLQR. Every option is key=value, every group is group=preset.

  uv run python run.py experiment=quick-local-test
  uv run python run.py experiment=quick-local-test use_preconditioner=false
  uv run python run.py experiment=quick-local-test block_structure=diagonal
  uv run python run.py experiment=quick-local-test dataset=fashion_mnist
  uv run python run.py -m experiment=quick-local-test init_key=0,1,2
  uv run python run.py experiment=quick-local-test dry_run=true  # a plan
  uv run python -m llqr_experiments.report outputs/<date>/<time>  # a page
  uv run python -m llqr_experiments.checkpoint outputs/<date>/<time>

Hydra's own flags: -m sweeps over comma-separated values, --cfg job prints the
composed config, --info says where it comes from.
"""


def presets(group: str) -> list[str]:
    """Names of the presets in a config group."""
    names = (path.stem for path in (CONFIGS / group).glob("*.yaml"))
    return sorted(name for name in names if name == "_default" or not name.startswith("_"))


def check_arguments(arguments: Sequence[str]) -> None:
    """Answer --help and stop at a misspelt option before anything is composed.

    Args:
      arguments: of the command line, without the program's name.
    """
    if "--help" in arguments or "-h" in arguments:
        print_help()
        sys.exit(0)
    try:
        flag = ""
        for argument in arguments:
            overrides = not argument.startswith(("-", "hydra.", "hydra/"))
            if overrides and flag not in FLAGS_WITH_VALUE:
                _check_argument(argument)
            flag = argument
    except ConfigError as error:
        stop(error)


def _check_argument(argument: str) -> None:
    try:
        override = OverridesParser.create().parse_override(argument)
        value = override.value()
        values = value.list if isinstance(value, ChoiceSweep) else [value]
    except HydraException as error:
        raise ConfigError(f"cannot read {argument!r}: write key=value.\n{error}") from error
    key = override.key_or_group
    group, _, rest = key.partition(".")
    if key in GROUPS:
        for name in values:
            if isinstance(name, str) and name not in presets(key):
                raise ConfigError(unknown(key, name, presets(key)))
    elif group in SCHEDULERS:
        known = {name for preset in presets(group) for name in _keys(group, preset)}
        if rest.partition(".")[0] not in known:
            raise ConfigError(unknown(f"option of {group}", rest, known))
    else:
        names = {name for name, _, _ in options(Config)}
        if key not in names:
            message = unknown("option", key, names | set(GROUPS), see="`run.py --help` lists all.")
            raise ConfigError(message)


def _keys(group: str, preset: str) -> list[str]:
    return [str(key) for key in OmegaConf.load(CONFIGS / group / f"{preset}.yaml")]


def execute(config: DictConfig, out_dir: Path) -> None:
    """Run one experiment; a `RunError` ends in one message, not in a traceback."""
    try:
        settings: Any = OmegaConf.to_object(config)
        # Late: --help and bad options need no models.
        from llqr_experiments.command import plan
        from llqr_experiments.run import train
        from llqr_experiments.study import comparison, toys
        from llqr_experiments.task.small import shrink

        if settings.smoke:
            settings = shrink(settings)
        if settings.dry_run:
            plan.show(settings)
            _remove_if_empty(out_dir)
            return
        runner: Any = train.run
        if settings.toy.name:
            runner = toys.run
        elif settings.comparison.name:
            runner = comparison.run
        runner(settings, out_dir, command=" ".join(["run.py", *sys.argv[1:]]))
    except RunError as error:
        if not _in_sweep() or isinstance(error, Interrupted):
            stop(error)
        show(error)  # the other jobs go on; the summary tells, and ends with an error code


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def _remove_if_empty(folder: Path) -> None:
    """Hydra makes the folder of every job."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def stop(error: RunError) -> NoReturn:
    """Print an error and leave with its code."""
    show(error)
    sys.exit(error.code)


def show(error: RunError) -> None:
    """Print an error."""
    console = Console(stderr=True, highlight=False)
    console.print(f"{error.title}:", style="bold red", end=" ")
    console.print(str(error), markup=False, soft_wrap=True)


def print_help() -> None:
    """Print examples, groups and options with their defaults and meanings."""
    console = Console(highlight=False)
    console.print(EXAMPLES)
    groups = Table("group", "presets", title="Groups", title_justify="left", box=None)
    for group in GROUPS:
        groups.add_row(group, ", ".join(presets(group)))
    console.print(groups)
    table = Table("option", "default", "meaning", title="\nOptions", title_justify="left", box=None)
    for name, option, _ in options(Config):
        if name not in SCHEDULERS:
            table.add_row(name, default(option), _meaning(option))
    console.print(table)


def _meaning(option: Field[Any]) -> str:
    legal = option.metadata.get("choices")
    return option.metadata["meaning"] + (f" ({', '.join(legal)})" if legal else "")
