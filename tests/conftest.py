"""Every test: float64 and strict promotion where numbers are checked; two CPU devices."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported anywhere, and inherited by the processes that tests start. Two devices, so
# that sharded paths run on any machine. Most of the time of tests goes into compiling: without the
# passes that only make programs faster, and with XLA's older way to write loops (versions that have
# no other ignore this), it is a quarter of what it would be.
_FLAGS = (
    "--xla_force_host_platform_device_count=2",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# Many tests compile the same programs: they share a cache on disk, made anew for each session.
# Workers inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.mkdtemp(prefix="llqr-tests-")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE.parent))  # `from tests import cases` in importlib mode

_FLOAT32 = ("experiments", "frontends", "test_docs.py", "test_reproduction.py")
"""Folders whose tests run at JAX's own defaults: what users run is float32."""


def _repeated() -> dict[str, set[str]]:
    """Test -> its cases in repeated.txt."""
    lines = (_HERE / "repeated.txt").read_text().splitlines()
    groups = "\n".join(line for line in lines if not line.startswith("#")).split("\n\n")
    found = [group.strip().splitlines() for group in groups]
    return {lines[0]: set(lines[1:]) for lines in found if lines}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases of repeated.txt as slow."""
    left = _repeated()
    seen = set()
    for item in items:
        test, _, case = item.nodeid.partition("[")
        seen.add(test)
        if case[:-1] in left.get(test, ()):
            item.add_marker(pytest.mark.slow)
            left[test].discard(case[:-1])
    whole = not any("::" in argument for argument in config.args)
    stale = [f"{test}[{case}]" for test in seen & set(left) for case in left[test]]
    if whole and stale:
        raise pytest.UsageError(f"tests/repeated.txt names cases that are not there: {stale}")


def pytest_collection_finish() -> None:
    """Keep what is imported out of every later collection of garbage: there is much of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_functions() -> Iterator[None]:
    """Each one holds memory mappings, and a process may have about 65,000 of them."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _forget_after_slow_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module of large models alone can hold too many: XLA's compiler then ends the process."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _no_type_checker(request: pytest.FixtureRequest) -> Iterator[None]:
    """What has a wrong type on purpose meets no type checker, where `make typed` puts one."""
    wrong = request.node.get_closest_marker("wrong_type") is not None
    jaxtyping.config.update("jaxtyping_disable", wrong)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _precision_of_the_process() -> Iterator[None]:
    """A page of the documentation may set it for its readers; the next test has JAX's own."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def float64() -> Iterator[None]:
    """Compare numbers.

    A context, not the global flag: doctests of src run in the same process and show float32.
    """
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test in float64 with strict dtype promotion, unless it is of what users run."""
    if request.path.relative_to(_HERE).parts[0] in _FLOAT32:
        yield
        return
    request.getfixturevalue("float64")
    with jax.numpy_dtype_promotion("strict"):
        yield
