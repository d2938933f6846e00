"""The command line around Hydra: help, misspelt names, errors without a traceback."""

import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString, RangeSweep, Sweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from llqr_experiments.config.options import SCHEDULERS, Config
from llqr_experiments.config.row import check, default, legal, rows, spelt
from llqr_experiments.config.schedulers import SCHEDULES
from llqr_experiments.errors import ConfigError, LostProcess, RunError, unknown
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
  uv run python run.py experiment=quick-local-test dry_run=true  # what it would do
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
    """Answer --help and stop at a misspelt or illegal option before anything is composed.

    Args:
      arguments: of the command line, without the program's name.
    """
    if "--help" in arguments or "-h" in arguments:
        print_help()
        sys.exit(0)
    try:
        for argument in _overrides(arguments):
            _check_argument(argument)
    except ConfigError as error:
        stop(error)


def _overrides(arguments: Sequence[str]) -> Iterator[str]:
    flag = ""
    for argument in arguments:
        ours = not argument.startswith(("-", "hydra.", "hydra/"))
        if ours and flag not in FLAGS_WITH_VALUE:
            yield argument
        flag = argument


def at_home(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `~` at the beginning of a path as the home folder.

    Shells leave it after "=", Hydra cannot read it, and would make a folder of that name.

    >>> at_home(["resume=~/runs/1"])[0].startswith("resume=/")
    True
    """
    paths = {name for name, row, _ in rows(Config) if row.metadata.get("path")}
    paths |= set(HYDRAS_FOLDERS)
    return [
        f"{key}={os.path.expanduser(value)}" if key in paths and value.startswith("~") else argument
        for argument in arguments
        for key, _, value in [argument.partition("=")]
    ]


HYDRAS_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")


def _check_argument(argument: str) -> None:
    try:
        override = OverridesParser.create().parse_override(argument)
        value = override.value()
        values = value.list if isinstance(value, ChoiceSweep) else [value]
        if isinstance(value, RangeSweep):
            values = list(override.sweep_iterator())
    except HydraException as error:
        raise ConfigError(_unreadable(argument, error)) from error
    values = [x.text if isinstance(x, QuotedString) else x for x in values]
    key = override.key_or_group
    group, _, rest = key.partition(".")
    if key in GROUPS:
        for name in () if override.is_delete() else values:
            if name is None or (isinstance(name, str) and name not in presets(key)):
                raise ConfigError(unknown(key, spelt(name), presets(key)))
        return
    if group in SCHEDULERS:
        arguments = {"name", *(row.name for kind in SCHEDULES.values() for row in fields(kind))}
        if rest.partition(".")[0] not in arguments:
            raise ConfigError(unknown(f"option of {group}", rest, arguments))
        return
    known = {name: row for name, row, _ in rows(Config)}
    if key in GROUPS_OF_OPTIONS:
        if value is None or override.is_delete():
            raise ConfigError(f"{argument}: {key} is a group of options, and cannot be left out.")
        return
    if key not in known:
        legal = set(known) | set(GROUPS)
        see = "`run.py --help` lists all."
        raise ConfigError(unknown("option", key, legal, see=see, aliases=ALIASES))
    if override.is_delete():
        raise ConfigError(
            f"{argument}: an option cannot be left out; its default is meant by that."
        )
    for one in values:
        _check_value(key, known[key], one)


GROUPS_OF_OPTIONS = tuple(row.name for row in fields(Config) if is_dataclass(row.type))

ALIASES = {
    "lr": "learning_rate", "rate": "learning_rate", "eta": "learning_rate",
    "epochs": "total_epochs", "num_epochs": "total_epochs", "n_epochs": "total_epochs",
    "steps": "max_steps", "num_steps": "max_steps", "iterations": "max_steps",
    "batch": "batch_size", "bs": "batch_size", "batchsize": "batch_size",
    "wd": "weight_decay", "decay": "weight_decay", "seed": "rng_seed", "init_seed": "init_key",
    "optimizer": "main_optimizer", "optim": "main_optimizer", "opt": "main_optimizer",
    "model": "architecture", "net": "architecture", "arch": "architecture",
    "data": "dataset", "data_dir": "dataset.dataset_dir", "dataset_dir": "dataset.dataset_dir",
    "structure": "block_structure", "metric": "divergence", "preset": "experiment",
    "preconditioner": "use_preconditioner", "llqr": "use_preconditioner",
    "scheduler": "lr_scheduler", "schedule": "lr_scheduler", "betas": "adam_betas",
    "sam": "sam_mode", "rho": "perturbation_rho", "ema": "ema_decay", "dtype": "precision",
    "refit_every": "update_preconditioner_every", "accumulation": "grad_acc_steps",
    "checkpoint_every": "checkpoint_freq", "eval_freq": "test_eval_freq",
    "output": "hydra.run.dir", "output_dir": "hydra.run.dir", "out_dir": "hydra.run.dir",
    "out": "hydra.run.dir",
}  # fmt: skip
"""What options are called elsewhere."""


def _unreadable(argument: str, error: HydraException) -> str:
    """How to write what Hydra cannot read: paths with letters that mean something to it."""
    key, equals, value = argument.partition("=")
    if not equals:
        return f"cannot read {argument!r}: write key=value."
    quoted = value.strip("'\"").replace("'", "\\'")
    return (
        f"cannot read {argument!r}: blanks at the ends, letters beyond ASCII, and any of "
        "()[]{},=:'\" need quotes of their own, inside those of the shell:\n"
        f"  \"{key}='{quoted}'\"\n{str(error).splitlines()[0]}"
    )


def _check_value(key: str, row: Field[Any], value: Any) -> None:
    """Raise ConfigError for a value that the schema would not take, or is out of its range."""
    if isinstance(value, Sweep) or (isinstance(value, str) and "${" in value):
        return  # known when it is composed
    try:
        holder = OmegaConf.structured(make_dataclass("One", [("value", row.type, MISSING)]))
        found: Any = OmegaConf.to_object(OmegaConf.merge(holder, {"value": value}))
    except (OmegaConfBaseException, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{key}={spelt(value)}: must be {legal(row)}.") from error
    check(key, row, found.value)


def execute(config: DictConfig, out_dir: Path) -> str | None:
    """Run one experiment; a `RunError` ends in one message, not in a traceback.

    Returns:
      Why it has failed, in a sweep, whose other jobs go on; None: it has not.
    """
    try:
        _run(settings(config), out_dir)
    except LostProcess as error:
        show(error)
        sys.stderr.flush()
        os._exit(error.code)  # at its exit, JAX would wait for the other
    except RunError as error:
        _remove_if_empty(out_dir)
        if not _in_sweep() or isinstance(error, Interrupted):
            stop(error)
        show(error)
        return str(error)
    except KeyboardInterrupt:
        _remove_if_empty(out_dir)
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _in_sweep():
            raise
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def settings(config: DictConfig) -> Any:
    """Return the composed options as a `Config`, checked.

    Raises:
      ConfigError: a value that is not legal, or one that names another that is not there.
    """
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        told = str(error).splitlines()[0]
        raise ConfigError(f"{key}: {told}" if key else told) from error


def _run(settings: Any, out_dir: Path) -> None:
    main = threading.current_thread() is threading.main_thread()
    if main:  # nothing is lost yet, and nothing shall be left

        def leave(*_: Any) -> None:
            _remove_if_empty(out_dir)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

        signal.signal(signal.SIGINT, leave)
    # Late: --help and bad options need no models.
    from llqr_experiments import processes
    from llqr_experiments.command import forecast
    from llqr_experiments.run import train
    from llqr_experiments.study import comparison, toys
    from llqr_experiments.task.small import shrink

    if main:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if settings.smoke:
        settings = shrink(settings)
    if settings.dry_run:
        forecast.show(settings)
        _remove_if_empty(out_dir)
        return
    made, wanted = out_dir, settings.distributed
    processes.connect(wanted.coordinator, wanted.processes, wanted.index)
    if processes.several():
        _check_alone(settings)
        out_dir = processes.decide(lambda: made)  # it has the time in its name
        if made != out_dir:
            _remove_if_empty(made)
    runner: Any = train.run
    if settings.toy.name:
        runner = toys.run
    elif settings.comparison.name:
        runner = comparison.run
    runner(settings, out_dir, command=shlex.join(["run.py", *sys.argv[1:]]))


def _check_alone(settings: Any) -> None:
    """Refuse what several processes cannot do together."""
    told = "distributed.processes above 1 is for one training run"
    for name in ("toy", "comparison"):
        if getattr(settings, name).name:
            raise ConfigError(f"{told}, not for {name}.name={getattr(settings, name).name}.")
    if _in_sweep():
        raise ConfigError(f"{told}, not for a sweep: start its runs one by one.")


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def _remove_if_empty(folder: Path) -> None:
    """Hydra makes the folder of every job, and one for the day."""
    parents = [parent for parent in folder.parents[:2] if HYDRAS_PARENTS.fullmatch(parent.name)]
    for path in (folder, *parents):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


HYDRAS_PARENTS = re.compile(r"outputs|\d{4}-\d\d-\d\d")


def stop(error: RunError) -> NoReturn:
    """Print an error and leave with its code."""
    show(error)
    sys.exit(error.code)


def show(error: RunError) -> None:
    """Print an error; of one that all processes have, the first tells."""
    who = ""
    if "jax" in sys.modules:
        from llqr_experiments import processes

        if not processes.first():
            if error.everywhere:
                return
            who = f"process {processes.index()}: "
    console = Console(stderr=True, highlight=False)
    console.print(f"{error.title}:", style="bold red", end=" ")
    console.print(who + str(error), markup=False, soft_wrap=True)


def print_help() -> None:
    """Print examples, groups and options with their defaults and meanings."""
    console = Console(highlight=False)
    console.print(EXAMPLES)
    groups = Table("group", "presets", title="Groups", title_justify="left", box=None)
    for group in GROUPS:
        groups.add_row(group, ", ".join(presets(group)))
    console.print(groups)
    table = Table("option", "default", "meaning", title="\nOptions", title_justify="left", box=None)
    for name, row, _ in rows(Config):
        if name not in SCHEDULERS:
            table.add_row(name, default(row), _meaning(row))
    console.print(table)
    table = Table("schedule", "arguments", title="\nSchedules", title_justify="left", box=None)
    for name, kind in SCHEDULES.items():
        table.add_row(name, ", ".join(f"{row.name}={default(row)}" for row in fields(kind)))
    console.print(table)


def _meaning(row: Field[Any]) -> str:
    choices = row.metadata.get("choices")
    return row.metadata["meaning"] + (f" ({', '.join(choices)})" if choices else "")
