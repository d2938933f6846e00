"""Draw what the documentation shows while it is built: a hook of mkdocs.

  docs/gallery   every Python block of a page runs, in order, in one process of its own; what a
                 block prints is put under it, and the pictures of the page are those that it saved
  DRAWINGS       folders of pictures that a command draws, from results that are kept or from code

All of it is kept in `.cache/drawn` under a hash of what decides it (code, results, versions): what
did not change is not drawn again, and no picture is of other code or results.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "gallery"
KEPT = ROOT / ".cache" / "drawn"
STYLE = ROOT / "tools" / "gallery.mplstyle"
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
VERSIONS = ("jax", "optax", "matplotlib", "scikit-learn", "numpy")


@dataclass(frozen=True)
class Drawing:
    """A folder of pictures.

    Attributes:
      folder: below docs.
      command: what draws it: Python's arguments, `{}` where it draws.
      sources: patterns of the files that decide how it looks.
    """

    folder: str
    command: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is kept under."""
        return self.folder.replace("/", "-")


SUITE = ("benchmarks/suite/**/*.py", "benchmarks/results/suite/*.json")
DRAWINGS = (
    Drawing(
        "images/suite",
        ("-m", "benchmarks.suite", "draw", "--tier", "quick", "--into", "{}"),
        SUITE,
    ),
    Drawing(
        "images/suite/full",
        ("-m", "benchmarks.suite", "draw", "--tier", "full", "--into", "{}"),
        SUITE,
    ),
    Drawing(
        "images/suite/test",
        ("-m", "benchmarks.suite", "draw", "--set", "test", "--tier", "quick", "--into", "{}"),
        SUITE,
    ),
    Drawing(
        "images/equations",
        ("-m", "benchmarks.equations", "draw", "--into", "{}"),
        ("benchmarks/equations/*.py", "benchmarks/results/equations/*.json"),
    ),
    Drawing(
        "images/study",
        ("-m", "benchmarks.study_curves", "{}"),
        ("benchmarks/study_curves.py", "benchmarks/results/study_*.json"),
    ),
    Drawing(
        "images/potholes",
        ("run.py", "experiment=sharpness-potholes", "hydra.run.dir={}"),
        ("run.py", "src/**/*.py", "configs/**/*.yaml"),
    ),
)


def pages() -> list[Path]:
    """Return the pages that are run: all but the list of them."""
    return sorted(page for page in PAGES.glob("*.md") if page.name != "index.md")


def key(sources: Iterable[Path], *given: str) -> str:
    """Return a hash of files, of what else is given, and of how and by what is drawn."""
    parts = [sys.version, *map(version, VERSIONS), *given]
    files = [Path(__file__), *sorted(sources)]
    parts = [part.encode() for part in parts] + [file.read_bytes() for file in files]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def key_of_page(text: str) -> str:
    """Return a hash of what decides a page's results: its code and the library."""
    return key([STYLE, *(ROOT / "src" / "llqr").rglob("*.py")], *BLOCK.findall(text))


def run(page: Path) -> Path:
    """Return the folder with a page's pictures and printed lines (`<number of block>.txt`).

    Raises:
      RuntimeError: the page's code failed.
    """
    found, command = key_of_page(page.read_text()), (__file__, str(page))
    return _kept(f"gallery-{page.stem}", found, command, page=True)


def draw(drawing: Drawing) -> Path:
    """Return the folder with the pictures of a drawing.

    Raises:
      RuntimeError: its command failed.
    """
    sources = (file for pattern in drawing.sources for file in ROOT.glob(pattern))
    return _kept(drawing.name, key(sources, *drawing.command), drawing.command)


def _kept(name: str, found: str, command: Iterable[str], *, page: bool = False) -> Path:
    """Return the folder that a command fills, as it was kept or anew.

    Args:
      name: of what is drawn.
      found: the hash of what decides it.
      command: Python's arguments.
      page: whether it is a page of the gallery: it saves where it runs, in the gallery's style.
    """
    folder = KEPT / f"{name}-{found}"
    if folder.exists():
        return folder
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as made:
        environment = os.environ | {
            "MPLBACKEND": "agg",
            "OPENBLAS_NUM_THREADS": "1",  # its threads and XLA's get in each other's way
            # A page says itself how many devices it has; and most of its time is compiling, without
            # the passes that only make programs faster a quarter of it (tests/conftest.py).
            "XLA_FLAGS": "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        done = subprocess.run(
            [sys.executable, *(argument.format(made) for argument in command)],
            cwd=made if page else ROOT,
            env=environment | ({"MATPLOTLIBRC": str(STYLE)} if page else {}),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr}")
        for old in KEPT.glob(f"{name}-*"):
            if re.fullmatch(rf"{name}-[0-9a-f]{{16}}", old.name):
                shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            shutil.copytree(made, folder)
    return folder


def execute(page: Path) -> None:
    """Run the blocks of a page here, each one's output into a file."""
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, found in enumerate(BLOCK.finditer(text)):
        above = "\n" * (text.count("\n", 0, found.start()) + 1)  # tracebacks show lines of the page
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(above + found[1], str(page), "exec"), namespace)
        Path(f"{number}.txt").write_text(printed.getvalue())


def on_files(files: Any, config: Any) -> Any:
    """Give mkdocs the pictures."""
    from mkdocs.structure.files import File

    places = [("gallery", run(page)) for page in pages()]
    places += [(drawing.folder, draw(drawing)) for drawing in DRAWINGS]
    for place, folder in places:
        for picture in sorted(folder.glob("*.png")):
            name = f"{place}/{picture.name}"
            files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put what a block prints under it."""
    source = Path(page.file.abs_src_path or "")
    if source not in pages():
        return markdown
    folder, numbers = run(source), iter(range(1000))

    def with_output(found: re.Match[str]) -> str:
        printed = (folder / f"{next(numbers)}.txt").read_text()
        return f"{found[0]}\n```text\n{printed}```\n" if printed else found[0]

    return BLOCK.sub(with_output, markdown)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
