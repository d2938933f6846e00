"""Folders of runs as they write them, and pages as browsers read them."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

META = {
    "command": "run.py experiment=quick",
    "started": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef+",
    "devices": ["cpu:0"],
    "platform": "Linux",
    "python": "3.11.7",
    "versions": {"llqr": "0.1.0", "jax": "0.10.2", "grain": None},
    "steps": 20,
}
CONFIG = {
    "dataset": {"name": "digits"},
    "architecture": {"name": "mlp"},
    "learning_rate": 0.1,
    "sam_mode": None,
}


def rows(accuracy: float = 90.0, *, sam: bool = False) -> list[dict[str, Any]]:
    """What a run of 20 steps logs."""
    sharp = {"sam sharpness": 0.1} if sam else {}
    refit = {"refit objective before": 100.0, "refit objective after": 2.0}
    return [
        {"step": 0, **refit, "seconds": 2.0},
        {"step": 1, "train loss": 2.0, "train accuracy": 20.0, **sharp, "seconds": 3.0},
        {"step": 10, "train loss": 1.0, "train accuracy": 70.0, **sharp, "seconds": 4.0},
        {"step": 10, "test loss": 0.4, "test accuracy": accuracy + 1, "seconds": 4.5},
        {"step": 20, "test loss": 0.5, "test accuracy": accuracy, "seconds": 6.0},
    ]


def write_run(
    folder: Path,
    logged: list[dict[str, Any]],
    tail: str = "",
    options: dict[str, Any] | None = None,
    **meta: Any,
) -> Path:
    """Write a run's three files; JSON is YAML. `meta` adds to meta.json."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(CONFIG | (options or {})))
    (folder / "meta.json").write_text(json.dumps(META | meta))
    lines = "".join(json.dumps(row) + "\n" for row in logged)
    (folder / "metrics.jsonl").write_text(lines + tail)
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text of every cell of a table."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data
