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

from llqr_experiments.errors import ConfigError
from llqr_experiments.spec import Config
from llqr_experiments.tracking import Aim, Jsonl, Trackers


def write_meta(config: Config, out_dir: Path, command: str, **facts: Any) -> None:
    """Make the run's folder and write config.yaml and meta.json.

    Args:
      config: validated options.
      out_dir: the run's folder.
      command: as typed.
      **facts: more entries of meta.json.

    Raises:
      ConfigError: the folder holds a run already.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if (out_dir / "metrics.jsonl").exists():
        raise ConfigError(
            f"{out_dir} already holds a run; give another folder (hydra.run.dir=...)."
        )
    (out_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    meta = {
        "command": command,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _commit(),
        "seeds": {"init_key": config.init_key, "rng_seed": config.rng_seed},
        "devices": [str(device) for device in jax.devices()],
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in ("llqr", "jax", "optax", "flax", "grain")},
        **facts,
    }
    (out_dir / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def open_trackers(
    config: Config, experiment: str, out_dir: Path, say: Callable[[str], None]
) -> Trackers:
    """Return the run's trackers: metrics.jsonl, and Aim if it is wanted and there.

    Args:
      config: validated options.
      experiment: name in Aim.
      out_dir: the run's folder.
      say: prints a line for the user.
    """
    trackers = Trackers(say)
    trackers.add("metrics.jsonl", lambda: Jsonl(out_dir / "metrics.jsonl"))
    if config.logging.aim:
        trackers.add("Aim", lambda: Aim(config.logging.aim_repo, experiment, config))
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
