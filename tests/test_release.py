"""What is released: one version everywhere, a wheel that needs jax, optax and jaxtyping alone."""

import json
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tools import pictures

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere():
    version = PROJECT["version"]
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(name for name in changes if name != "Unreleased") == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == version  # type: ignore[index]


def test_the_declared_ranges_are_those_that_are_written_down():
    first, last = re.search(
        r"jax>=(\d+\.\d+),<0\.(\d+)", " ".join(PROJECT["dependencies"])
    ).groups()  # type: ignore[union-attr]
    line = f"Python 3.11 to 3.13, JAX {first} to 0.{int(last) - 1}"
    for page in ("README.md", "docs/index.md", "CONTRIBUTING.md"):
        assert line in (ROOT / page).read_text(), page


def test_pictures_are_committed_at_a_release_only():
    """Mend it with `python -m tools.pictures`, which does it once for a version."""
    noted = json.loads(pictures.NOTED.read_text())
    assert noted == {"version": PROJECT["version"], "sha256": pictures.checksums()}


@pytest.mark.slow
def test_the_wheel_runs_in_a_bare_environment(tmp_path):
    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("uv", "build", "--quiet", "--out-dir", tmp_path, ROOT)  # the wheel is made from the sdist
    (wheel,), (source,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert PROJECT["version"] in wheel.name
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert "llqr/py.typed" in inside
    assert not any(name.startswith(("tests", "docs", "benchmarks")) for name in inside)
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "tests/cases.py"} <= names

    run("uv", "venv", "--quiet", tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    run("uv", "pip", "install", "--quiet", "--python", python, wheel)
    installed = run("uv", "pip", "list", "--quiet", "--format", "freeze", "--python", python)
    packages = {line.partition("==")[0] for line in installed.splitlines()}
    needs = {"jax", "optax", "jaxtyping"}
    below = {"absl-py", "jaxlib", "ml-dtypes", "numpy", "opt-einsum", "scipy", "wadler-lindig"}
    assert packages - below - {"chex", "typing-extensions"} == needs | {"llqr"}

    (lines,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "index.md").read_text(), re.M | re.S
    )
    assert "llqr.streaming" in lines
    (tmp_path / "lines.py").write_text(f"{lines}\nassert value < 0.5, value\nprint('trained')\n")
    assert "trained" in run(python, "lines.py")
