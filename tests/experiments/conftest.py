"""Fixtures that tests of the runner ask for."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest


@pytest.fixture
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch, empty_folder: None) -> list[str]:
    """Cut the network, work in an empty folder, and return the list of URLs asked for."""
    asked: list[str] = []

    def refuse(url: str, timeout: float) -> None:
        asked.append(url)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked
