"""What of LLQR runs on the test set: a release, at its defaults, once.

No default, rule or constant of the library may be chosen there. So a method of ours is refused,
wherever it would be compiled for one of these workloads, unless all of this holds:

  it is one of `METHODS` that has `released` options, with just these
  no second setting: of ours the rate is tuned, as everybody's, and nothing else
  the library is a release: it comes from this checkout, and CHANGELOG.md has nothing unreleased

Its trials are kept in a section of the release, with its version and a hash of its code. Another
release begins one of its own; the same version with other code or options is refused.
"""

import hashlib
import re
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path

import llqr

from .methods import METHODS
from .methods.method import Method
from .workloads.problem import Workload

ROOT = Path(__file__).parents[2]
SECTION = "release "
"""Of a workload's results, a version behind it."""


class RefusedError(RuntimeError):
    """LLQR may not run so on the test set."""


def as_run(method: Method, workload: Workload) -> Method:
    """Return a method as it runs on a workload: on the test set ours are as released.

    Raises:
      RefusedError: it is ours, and does not run there.
    """
    if not (workload.held_out and method.ours):
        return method
    if why := refusal(method):
        raise RefusedError(f"{workload.name} is of the test set: {why}")
    return replace(method, options=method.released or {}, alternatives=())


def check(workload: Workload, method: Method, alternative: int | None) -> None:
    """Raise where a method of ours must not be compiled for a workload.

    Raises:
      RefusedError: it is of the test set, and the method not what a release has.
    """
    if not (workload.held_out and method.ours):
        return
    why = refusal(method)
    if not why and alternative is not None:
        why = f"of {method.name} the rate is tuned there, and no second setting."
    if not why and method.options != method.released:
        why = f"{method.name} runs there with what a release has by default, {method.released}."
    if why:
        raise RefusedError(f"{workload.name} is of the test set: {why}")


def refusal(method: Method) -> str:
    """Return why a method does not run on the test set, nothing if it does."""
    if not method.ours:
        return ""
    known = METHODS.get(method.name)
    fields = "build", "rate", "released", "decays", "share"
    if known is None or any(getattr(method, f) != getattr(known, f) for f in fields):
        return f"{method.name} is no method of the suite, and variants of LLQR are not run there."
    if known.released is None:
        return f"{method.name} is not run there: it has no `released` options."
    return unreleased()


def unreleased() -> str:
    """Return why the library is no release, nothing if it is one."""
    where = Path(llqr.__file__).parent
    if where != ROOT / "src" / "llqr":
        return f"llqr is imported from {where}, not from this checkout."
    found = re.search(r"^## Unreleased$(.*?)(?=^## |\Z)", _changes(), re.MULTILINE | re.DOTALL)
    if found and found[1].strip():
        return f"CHANGELOG.md has unreleased changes, so that the library is not {version()}."
    return ""


def section(workload: Workload, method: Method, usual: str) -> str:
    """Return where a method's trials on a workload are kept: `usual`, or in a release's own."""
    return f"{SECTION}{version()}" if workload.held_out and method.ours else usual


def stamp(workload: Workload, method: Method) -> dict[str, str]:
    """Return what is written beside a release's trials: its version and its code."""
    return {"version": version(), "code": code()} if workload.held_out and method.ours else {}


def newest(sections: list[str]) -> str | None:
    """Return the section of the last release.

    >>> newest(["targets", "release 0.9.1", "release 0.10.0"])
    'release 0.10.0'
    """
    there = [name for name in sections if name.startswith(SECTION)]
    numbers = {name: [int(n) for n in re.findall(r"\d+", name)] for name in there}
    return max(there, key=lambda name: numbers[name], default=None)


@cache
def version() -> str:
    """Return the version of this checkout."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@cache
def code() -> str:
    """Return a hash of the library's sources."""
    place = Path(llqr.__file__).parent
    found = hashlib.sha256()
    for file in sorted(place.rglob("*.py")):
        found.update(f"{file.relative_to(place)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:12]


def _changes() -> str:
    return (ROOT / "CHANGELOG.md").read_text()
