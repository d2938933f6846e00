"""Trainers of other packages, unchanged, with `llqr.streaming` where they had `optax.adam`.

The packages stand in an environment of their own: scripts of tests/trainers train there, with each
optimizer at the best of three rates, and print losses.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parent / "trainers"
PACKAGES = (
    "blackjax==1.7.1",
    "flowjax==19.1.2",
    "gpjax==1.0.0",
    "jaxopt==0.8.5",
    "jinns==1.10.2",
    "keras==3.15.1",
    "netket==3.23.0",
    "numpyro==0.22.0",
    "optimistix==0.1.0",
    "scikit-learn",  # digits
)


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the interpreter of an environment with the packages and this project."""
    folder = tmp_path_factory.mktemp("trainers")

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("uv", "venv", "--quiet", "--python", sys.executable, folder / "bare")
    found = folder / "bare" / "bin" / "python"
    run("uv", "pip", "install", "--quiet", "--python", found, ROOT, *PACKAGES)
    yield found
    shutil.rmtree(folder)  # a gigabyte


def told(python: Path, script: str, *arguments: str) -> Any:
    """Return what a script prints in its last line."""
    # Users compile with all passes, and for one device.
    changed = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in changed}
    done = subprocess.run(
        [python, SCRIPTS / script, *arguments],
        cwd=python.parent,
        env=environment | {"OPENBLAS_NUM_THREADS": "1", "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(script, found)
    return found


def check(
    python: Path,
    name: str,
    *,
    adam: tuple[float, ...],
    ours: tuple[float, ...],
    most: float,
    left: float,
) -> None:
    """Run a script and compare what it ends at.

    Args:
      python: the interpreter.
      name: of the package.
      adam: Adam's rates.
      ours: those of `llqr.streaming`.
      most: our loss may be this much of Adam's.
      left: our loss must be below this share of the loss at the start.
    """
    rates = ["--adam", *map(str, adam), "--llqr", *map(str, ours)]
    found = told(python, f"with_{name}.py", *rates)
    assert found["llqr"] <= most * found["adam"], found
    assert found["llqr"] < left * found["start"], found


def test_numpyro(python):
    adam, ours = (1e-2, 3e-2, 1e-1), (1e-2, 3e-2, 1e-1)
    check(python, "numpyro", adam=adam, ours=ours, most=1.02, left=0.5)


def test_flowjax(python):
    adam, ours = (3e-3, 1e-2, 3e-2), (3e-3, 1e-2, 3e-2)
    check(python, "flowjax", adam=adam, ours=ours, most=1.0, left=0.7)


def test_optimistix(python):
    adam, ours = (1e-2, 3e-2, 1e-1), (3e-3, 1e-2, 3e-2)
    check(python, "optimistix", adam=adam, ours=ours, most=1.0, left=0.01)


def test_jaxopt(python):
    adam, ours = (3e-2, 1e-1, 3e-1), (1e-2, 3e-2, 1e-1)
    check(python, "jaxopt", adam=adam, ours=ours, most=0.5, left=0.01)


def test_gpjax(python):
    adam, ours = (1e-2, 3e-2, 1e-1), (1e-1, 3e-1, 1.0)
    check(python, "gpjax", adam=adam, ours=ours, most=0.5, left=0.01)


def test_jinns(python):
    adam, ours = (3e-3, 1e-2, 3e-2), (3e-3, 1e-2, 3e-2)
    check(python, "jinns", adam=adam, ours=ours, most=0.5, left=0.05)


def test_exact_steps_on_an_equation_of_jinns(python):
    before, after = told(python, "exact_with_jinns.py")
    assert before > 0.1
    assert after < 1e-5


def test_netket(python):
    adam, ours = (1e-2, 3e-2, 1e-1), (3e-3, 1e-2, 3e-2)
    check(python, "netket", adam=adam, ours=ours, most=0.7, left=0.01)


def test_keras(python):
    adam, ours = (3e-2, 1e-1, 3e-1), (1e-2, 3e-2, 1e-1)
    check(python, "keras", adam=adam, ours=ours, most=0.5, left=0.01)


def test_blackjax(python):
    adam, ours = (1e-2, 3e-2, 1e-1), (1e-1, 3e-1, 5e-1)
    check(python, "blackjax", adam=adam, ours=ours, most=1.1, left=0.2)


def test_the_page_of_exact_steps_shows_what_is_run():
    script = set(map(ast.dump, _statements((SCRIPTS / "exact_with_jinns.py").read_text())))
    page = (ROOT / "docs" / "six-digits.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "jinns" in block]
    shown = [
        node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Assign | ast.Return)
    ]
    assert {ast.dump(node) for node in shown} <= script


def test_the_documentation_shows_what_is_run():
    """Each snippet's statements are those of one script, but for what makes the optimizer."""
    scripts = [set(map(ast.dump, _statements(path.read_text()))) for path in SCRIPTS.glob("with_*")]
    page = (ROOT / "docs" / "migrate.md").read_text()
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(scripts) + 1  # Keras has two
    for block in blocks:
        own = [x for x in ast.parse(block).body if not ast.unparse(x).startswith("optimizer = ")]
        assert sum(set(map(ast.dump, own)) <= script for script in scripts) == 1, block


def _statements(text: str) -> list[ast.stmt]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
