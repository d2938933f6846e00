"""The benchmarks start: what they measure is measured by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["correctness", "gpt2-small", "resnet-18"])
def test_the_accelerator_check_runs_in_small(part):
    """On a CPU; what is not right there is not right on a GPU either."""
    command = [sys.executable, str(HERE / "accelerator.py"), "--smoke", part]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{part} on cpu" in done.stdout
    assert "False" not in done.stdout
    assert "nan" not in done.stdout


def test_the_accelerator_check_tells_a_wrong_structure(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    accelerator = pytest.importorskip("accelerator")
    learned = accelerator.learned
    monkeypatch.setattr(
        accelerator, "learned", lambda *a, wide: learned(*a, wide=wide) * (1.0 if wide else 1.02)
    )
    monkeypatch.setattr(accelerator.llqr, "STRUCTURES", ("diagonal",))
    rows = accelerator.correctness(smoke=False)
    assert [(row["refit"], row["right"]) for row in rows] == [
        ("published", False), ("streaming", False),
    ]  # fmt: skip
    monkeypatch.setattr(accelerator, "learned", learned)
    assert all(row["right"] for row in accelerator.correctness(smoke=False))
