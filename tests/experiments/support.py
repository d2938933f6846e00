"""Runs for tests: composed by Hydra as on the command line, executed in this process."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from llqr_experiments.command import cli
from llqr_experiments.config.options import Config
from llqr_experiments.record import console
from llqr_experiments.run import checkpoint, train

ConfigStore.instance().store(name="schema", node=Config)


def config(*overrides: str) -> Config:
    """Compose and validate, as run.py does; on one device, unless an override says otherwise."""
    overrides = ("mesh.data=1", *overrides)
    with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=list(overrides))
    return OmegaConf.to_object(composed)  # type: ignore[return-value]


def run(out: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train the quick preset with overrides; return the rows of metrics.jsonl.

    Without checkpoints, unless an override asks for them.
    """
    quick = ("experiment=quick-local-test", "logging.aim=false", "checkpoint_freq=null", *overrides)
    train.run(config(*quick), out, command="test")
    return rows(out)


def rows(out: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the time, which no two runs share."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in metrics]


def final(run: Path) -> dict[str, np.ndarray]:
    """Arrays of the newest checkpoint."""
    folder = run / "checkpoints"
    return checkpoint.read(folder, checkpoint.steps(folder)[-1])[0]


def assert_same_end(run: Path, other: Path) -> None:
    """Last checkpoints agree to the last bit, and so do all metrics."""
    mine, theirs = final(run), final(other)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert timeless(rows(run)) == timeless(rows(other))


def interrupt(monkeypatch, at: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal when `at` steps are shown."""
    shown = console.Display.progress

    def progress(self, step, rates):
        shown(self, step, rates)
        if step == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(console.Display, "progress", progress)
