"""What every run writes before it starts: enough to run it again."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from omegaconf import OmegaConf

from llqr_experiments.config.options import Config
from llqr_experiments.errors import ConfigError
from llqr_experiments.files import write
from llqr_experiments.record.trackers import Aim, Jsonl, TensorBoard, Trackers

INCIDENTAL = (
    "logging", "report_freq", "checkpoint_freq", "checkpoint_keep", "data_threads", "resume",
)  # fmt: skip
"""Options that may differ when a run goes on in its folder: they do not change its numbers."""


def enter(config: Config, out_dir: Path, command: str, **facts: Any) -> bool:
    """Make the run's folder, with config.yaml and meta.json, or enter one that holds the same run.

    Args:
      config: validated options.
      out_dir: the run's folder.
      command: as typed.
      **facts: more entries of meta.json.

    Returns:
      Whether there was a run.

    Raises:
      ConfigError: the folder cannot be written, or holds a run with other options.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        known = out_dir / "config.yaml"
        if known.exists():
            there = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(known))
            check_same(OmegaConf.to_container(there), options(config), out_dir)
            again = {"command": command, "started": _now(), "commit": _commit()}
            _update_meta(out_dir, lambda meta: meta | {"again": [*meta.get("again", ()), again]})
            return True
        if (out_dir / "metrics.jsonl").exists():
            raise ConfigError(f"{out_dir} holds the metrics of a run without its config.yaml.")
        write_meta(config, out_dir, command, **facts)
    except OSError as error:
        raise ConfigError(
            f"{out_dir} cannot be written ({error.strerror}): choose another folder with "
            "hydra.run.dir=..."
        ) from error
    return False


def options(config: Config) -> dict[str, Any]:
    """Return a config as plain data."""
    found = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}


def check_same(there: Any, here: dict[str, Any], out_dir: Path) -> None:
    """Raise ConfigError if two runs differ in what decides their numbers.

    An option that is younger than the run in the folder had its default there.

    Args:
      there: options of the run in the folder.
      here: options of this one.
      out_dir: the folder, for the message.
    """
    there = options(Config()) | dict(there)
    differ = [
        f"{name}={there[name]} there, {here[name]} here"
        for name in here
        if name not in INCIDENTAL and there[name] != here[name]
    ]
    if differ:
        listed = "; ".join(differ[:4]) + (f"; and {len(differ) - 4} more" if differ[4:] else "")
        raise ConfigError(
            f"{out_dir} holds a run with other options ({listed}). Give another folder "
            f"(hydra.run.dir=...); resume={out_dir} goes on from its newest checkpoint there."
        )


def write_meta(config: Config, out_dir: Path, command: str, **facts: Any) -> None:
    """Make a folder and write meta.json and config.yaml, which tells that all is there.

    Args:
      config: validated options.
      out_dir: the run's folder.
      command: as typed, for meta.json.
      **facts: more entries of meta.json.

    Raises:
      ConfigError: the folder holds a run already.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if (out_dir / "config.yaml").exists():
        raise ConfigError(
            f"{out_dir} already holds a run; give another folder (hydra.run.dir=...)."
        )
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
    path = out_dir / "meta.json"
    meta = json.loads(path.read_text()) if path.exists() else {}
    write(path, json.dumps(change(meta), indent=2) + "\n")


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
    trackers.add("metrics.jsonl", lambda: Jsonl(out_dir / "metrics.jsonl", at.get("Jsonl", start)))
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
