"""Do the tests bite? Deliberate faults, each of which a test must notice.

    uv run python tools/faults.py --check      # is every text of the list still in the code?
    uv run python tools/faults.py              # each fault in a copy of this tree, and its test
    uv run python tools/faults.py --only 3,17  # these alone

The faults are in tools/faults.toml: one slip of a line or two each, with the test that must fail.
Where code moves, its fault moves along: a text that is not found exactly once is an error.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tools" / "faults.toml"
LIMIT = 600
"""Seconds for a test, after which a fault that hangs it counts as noticed."""
PASSED, FAILED = 0, 1
"""What pytest ends with; anything else is no verdict."""


class Stale(Exception):
    """The list does not fit the code."""


@dataclass(frozen=True)
class Fault:
    """A deliberate fault.

    Attributes:
      number: in the list, from 1.
      what: is wrong, in words.
      file: where, below the root.
      old: text there, found exactly once.
      new: text in its place.
      tests: pytest's names of those that must fail, one of them at least.
    """

    number: int
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """Return the content of the file with the fault in it.

        Raises:
          Stale: the text to be replaced is not there, or there more than once.
        """
        found = text.count(self.old)
        if found != 1:
            raise Stale(f"{self.number}: {found} times in {self.file}, and not once:\n{self.old}")
        return text.replace(self.old, self.new)


def read(path: Path) -> list[Fault]:
    """Return the faults of a list."""
    rows = tomllib.loads(path.read_text("utf-8"))["fault"]
    return [
        Fault(i, row["what"], row["file"], row["old"], row["new"], tuple(row["test"].split()))
        for i, row in enumerate(rows, 1)
    ]


def check(faults: list[Fault], root: Path) -> None:
    """Raise Stale, with all that is wrong, where the list does not fit a tree."""
    wrong = []
    for fault in faults:
        path = root / fault.file
        try:
            if not path.is_file():
                raise Stale(f"{fault.number}: there is no {fault.file}")
            fault.planted(path.read_text("utf-8"))
            for test in fault.tests:
                where, *_, name = test.partition("[")[0].split("::")
                text = (root / where).read_text("utf-8") if (root / where).is_file() else ""
                if f"def {name}(" not in text:
                    raise Stale(f"{fault.number}: there is no test {test}")
        except Stale as error:
            wrong.append(str(error))
    if wrong:
        raise Stale("\n\n".join(wrong))


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of what git knows of a tree, and of what is new in it, as it lies on the disk."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="llqr-faults-") as folder:
        copy = Path(folder) / "tree"
        for name in names.decode().split("\0"):
            if (root / name).is_file():  # not what is deleted, nor a link to a folder
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, copy / name)
        yield copy


def tested(tests: tuple[str, ...], tree: Path) -> tuple[int, str]:
    """Run tests in a tree, up to the first that fails; return pytest's code and what it said."""
    compiled = {  # shared by all runs, and kept where the caller has a folder of its own
        "JAX_COMPILATION_CACHE_DIR": str(tree.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    ours = {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment = compiled | os.environ | ours
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=line", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"not at an end after {LIMIT} s"
    return done.returncode, done.stdout + done.stderr


def judged(fault: Fault, tree: Path) -> bool:
    """Plant a fault in a tree, run its test, and mend the tree; return whether it was noticed.

    Raises:
      Stale: pytest gave no verdict.
    """
    path = tree / fault.file
    whole = path.read_text("utf-8")
    try:
        path.write_text(fault.planted(whole), "utf-8")
        code, said = tested(fault.tests, tree)
    finally:
        path.write_text(whole, "utf-8")
    if code not in (PASSED, FAILED):
        raise Stale(f"{fault.number}: pytest ended with {code}\n{said[-3000:]}")
    return code == FAILED


def sound(faults: list[Fault], tree: Path) -> None:
    """Raise Stale where a test fails without any fault, or is not run on the copy."""
    where = [sys.executable, "-c", "import llqr; print(llqr.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    done = subprocess.run(where, cwd=tree, env=environment, capture_output=True, text=True)
    if not done.stdout.startswith(str(tree)):
        raise Stale(f"the copy is not what is imported: {done.stdout}{done.stderr}")
    tests = tuple(dict.fromkeys(test for fault in faults for test in fault.tests))
    code, said = tested(tests, tree)
    if code != PASSED:
        raise Stale(f"the tests do not pass without a fault:\n{said[-3000:]}")


def table(faults: list[Fault], noticed: dict[int, bool]) -> None:
    """Print what became of each fault."""
    rows = [
        (str(f.number), f.file.removeprefix("src/"), f.what, "noticed" if noticed[f.number] else
         "SURVIVES") for f in faults if f.number in noticed
    ]  # fmt: skip
    heads = ("", "file", "fault", "")
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(4)]
        for row in (heads, *rows):
            print("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip())
        return
    found = Table(*heads, box=None)
    for *row, verdict in rows:
        found.add_row(*row, verdict if verdict == "noticed" else f"[bold red]{verdict}[/]")
    Console(width=None if sys.stdout.isatty() else 140).print(found)


def numbers(text: str) -> set[int]:
    """Return the numbers of "3,7-9"."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def main() -> int:
    """Plant the faults, and say which are noticed."""
    parser = argparse.ArgumentParser(
        description="Do the tests bite? Plants deliberate faults in a copy of the tree, one after "
        "the other, and runs the test that must notice each.",
        epilog="Ends with 0 where all are noticed, 1 where some survive, 2 where the list does not "
        "fit the code.",
    )
    parser.add_argument("--only", type=numbers, metavar="N", help="these numbers: 3 or 3,7-9")
    parser.add_argument("--check", action="store_true", help="only look whether the list fits")
    parser.add_argument(
        "--quick", action="store_true", help="do not first run the tests without any fault"
    )
    parser.add_argument("--list", type=Path, default=LIST, help="of faults (%(default)s)")
    given = parser.parse_args()
    faults = read(given.list)
    try:
        check(faults, ROOT)
        chosen = [f for f in faults if given.only is None or f.number in given.only]
        print(f"{len(faults)} faults fit the code, {len(chosen)} are chosen.", flush=True)
        if given.check:
            return 0
        noticed: dict[int, bool] = {}
        with copied(ROOT) as tree:
            if not given.quick:
                print("their tests without a fault: ", end="", flush=True)
                sound(chosen, tree)
                print("pass", flush=True)
            for fault in chosen:
                began = time.monotonic()
                print(f"{fault.number:>3}  {fault.what}: ", end="", flush=True)
                noticed[fault.number] = judged(fault, tree)
                word = "noticed" if noticed[fault.number] else "SURVIVES"
                print(f"{word} ({time.monotonic() - began:.0f} s)", flush=True)
    except Stale as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    print()
    table(chosen, noticed)
    survived = [number for number, seen in noticed.items() if not seen]
    print(f"\n{len(noticed) - len(survived)} of {len(noticed)} faults are noticed.")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
