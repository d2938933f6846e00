"""The benchmarks start: what they measure is measured by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    "arguments", [["study.py", "--smoke", "--only", "probe kfac, momentum"]], ids=lambda a: a[0]
)
def test_smoke(arguments):
    command = [sys.executable, str(HERE / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert "LLQR probe kfac, momentum" in done.stdout
    assert "nan" not in done.stdout
