"""What every run writes before it starts: enough to run it again."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llqr_experiments.config.options import SCHEDULERS, Config
from llqr_experiments.errors import ConfigError
from llqr_experiments.files import write
from llqr_experiments.record.lock import ELSEWHERE
from llqr_experiments.record.trackers import Aim, Jsonl, TensorBoard, Trackers

INCIDENTAL = (
    "logging", "report_freq", "checkpoint_freq", "checkpoint_keep", "data_threads", "resume",
    "mesh", "distributed",
)  # fmt: skip
"""Options that may differ when a run goes on in its folder: they do not change its numbers (other
devices round them differently)."""


FILES = ("config.yaml", "meta.json", "metrics.jsonl")
"""What every run writes."""


def look(config: Config, out_dir: Path) -> bool:
    """Return whether a folder holds this run already; nothing is written.

    What has not made a first step is no run, and another one may take its place.

    Args:
      config: validated options.
      out_dir: the run's folder.

    Raises:
      ConfigError: the folder holds a run with other options, or one that is damaged.
    """
    for path in (out_dir / name for name in FILES):
        if path.is_dir():
            raise ConfigError(
                f"{path} is a folder, and a run writes a file of that name: move it away, or "
                f"{ELSEWHERE}."
            )
    if (out_dir / "checkpoints").is_file():
        raise ConfigError(f"{out_dir / 'checkpoints'} is a file, and must be a folder.")
    if not begun(out_dir):
        return False
    check_same(_there(out_dir), options(config), out_dir)
    _meta(out_dir)
    return True


def enter(config: Config, out_dir: Path, command: str, *, again: bool, **facts: Any) -> None:
    """Write config.yaml and meta.json into a run's folder, or note that it goes on.

    Args:
      config: validated options.
      out_dir: the run's folder.
      command: as typed.
      again: what `look` has returned.
      **facts: more entries of meta.json.

    Raises:
      ConfigError: the folder cannot be written.
    """
    try:
        if again:
            start = {"command": command, "started": _now(), "commit": _commit()}
            _update_meta(out_dir, lambda meta: meta | {"again": [*meta.get("again", ()), start]})
        else:
            _write_meta(config, out_dir, command, **facts)
    except OSError as error:
        if not again:  # a folder in which nothing has begun is as it was
            for name in FILES[:2]:
                (out_dir / name).unlink(missing_ok=True)
        raise ConfigError(f"{out_dir} cannot be written ({error.strerror}): {ELSEWHERE}.") from (
            error
        )


def begun(folder: Path) -> bool:
    """Return whether a folder holds a run that has made a step, or runs that have."""
    if any(path.name.isdigit() for path in folder.glob("checkpoints/*/*")):
        return True
    try:
        if "finished" in json.loads((folder / "meta.json").read_text("utf-8")):
            return True
    except (OSError, ValueError, TypeError):  # none, or damaged: what else is there decides
        pass
    if any(step >= 1 for step in _steps(folder / "metrics.jsonl")):
        return True
    return any(begun(path.parent) for path in folder.glob("*/config.yaml"))


def _steps(path: Path) -> Iterator[int]:
    """Steps of the rows of a record, as far as they can be read."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError):
                continue


def options(config: Config) -> dict[str, Any]:
    """Return a config as plain data."""
    found = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}


def filled(given: Any) -> dict[str, Any]:
    """Return options by their full names; those that are younger than a run had their default."""
    return _flat(options(Config())) | _flat(dict(given))


def _flat(given: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def check_same(there: Any, here: dict[str, Any], out_dir: Path) -> None:
    """Raise ConfigError if two runs differ in what decides their numbers.

    An option that is younger than the run in the folder had its default there.

    Args:
      there: options of the run in the folder.
      here: options of this one.
      out_dir: the folder, for the message.
    """
    there, here = filled(there), _flat(here)
    free = tuple(f"{group}." for group in SCHEDULERS)  # their arguments go by the schedule
    if unknown := [name for name in there if name not in here and not name.startswith(free)]:
        raise ConfigError(
            f"{out_dir} holds a run of another version of llqr, with options that are unknown to "
            f"this one ({', '.join(unknown[:4])}): go on with that version, or "
            f"{_way_on(out_dir)}."
        )
    differ = [
        f"{name}={there.get(name, '(none)')} there, {here.get(name, '(none)')} here"
        for name in here | there
        if name.partition(".")[0] not in INCIDENTAL and there.get(name) != here.get(name)
    ]
    if differ:
        listed = "; ".join(differ[:4]) + (f"; and {len(differ) - 4} more" if differ[4:] else "")
        raise ConfigError(
            f"{out_dir} holds a run with other options ({listed}): {_way_on(out_dir)}."
        )


def _way_on(out_dir: Path) -> str:
    """What to do where the run in a folder cannot go on there."""
    if any(out_dir.glob("checkpoints/latest/*")):
        return f"{ELSEWHERE}; resume={out_dir} goes on from its newest checkpoint there"
    return ELSEWHERE


def _there(out_dir: Path) -> dict[str, Any]:
    """Options of the run in a folder."""
    path = out_dir / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{out_dir} holds a run without its config.yaml: {_way_on(out_dir)}.")
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(found, dict) or not found:
            raise ValueError("no options")
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{path} is damaged ({_first_line(error)}): restore it, or {_way_on(out_dir)}."
        ) from error
    return {str(name): value for name, value in found.items()}


def _meta(out_dir: Path) -> dict[str, Any]:
    """What meta.json says; empty without one."""
    path = out_dir / "meta.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({_first_line(error)}): move it away, and the same command goes on "
            "without what it says."
        ) from error
    return found


def finished(out_dir: Path) -> bool:
    """Return whether the run in a folder came to its end."""
    return "finished" in _meta(out_dir)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _write_meta(config: Config, out_dir: Path, command: str, **facts: Any) -> None:
    """Write meta.json and config.yaml."""
    meta = {
        "command": command,
        "started": _now(),
        "commit": _commit(),
        "seeds": {"init_key": config.init_key, "rng_seed": config.rng_seed},
        "devices": [str(device) for device in jax.devices()],
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in VERSIONS},
        **facts,
    }
    write(out_dir / "meta.json", json.dumps(meta, indent=2) + "\n")
    write(out_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))


VERSIONS = ("llqr", "jax", "jaxlib", "optax", "flax", "grain", "orbax-checkpoint", "numpy")


def finish(out_dir: Path, **facts: Any) -> None:
    """Note in meta.json that a run came to its end."""
    _update_meta(out_dir, lambda meta: meta | {"finished": _now(), **facts})


def _update_meta(out_dir: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    write(out_dir / "meta.json", json.dumps(change(_meta(out_dir)), indent=2) + "\n")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def open_trackers(
    config: Config,
    experiment: str,
    out_dir: Path,
    say: Callable[[str], None],
    positions: dict[str, Any] | None = None,
) -> Trackers:
    """Return the run's trackers: metrics.jsonl, and Aim and TensorBoard if wanted and there.

    Args:
      config: validated options.
      experiment: name in Aim.
      out_dir: the run's folder.
      say: prints a line for the user.
      positions: where they were at the checkpoint from which the run goes on; None: it starts.
    """
    trackers, at = Trackers(say), positions or {}
    # A record that had failed before the checkpoint is gone on with as it is.
    start = 0 if positions is None else None
    trackers.add(
        "metrics.jsonl", lambda: Jsonl(out_dir / "metrics.jsonl", at.get("Jsonl", start), say)
    )
    if config.logging.aim:
        repo = config.logging.aim_repo
        trackers.add("Aim", lambda: Aim(repo, experiment, config, at.get("Aim")))
    if config.logging.tensorboard:
        trackers.add(
            "TensorBoard", lambda: TensorBoard(out_dir / "tensorboard", at.get("TensorBoard"))
        )
    return trackers


def _commit() -> str | None:
    """Commit of the checkout, with "+" if it has changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        git = partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True)
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        dirty = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def shorten(path: Path) -> Path:
    """Return the path from here, if it lies below."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
