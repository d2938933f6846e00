"""Run the pages of docs/gallery while the documentation is built: a hook of mkdocs.

Every Python block of such a page runs, in order, in one process of its own. What a block prints is
put under it, and the pictures of the page are those that it saved. Results are kept in
`.cache/gallery` under a hash of all that decides them (code of the page, library, versions): a page
that did not change is not run again, and none shows a picture of other code.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "gallery"
KEPT = ROOT / ".cache" / "gallery"
STYLE = ROOT / "tools" / "gallery.mplstyle"
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that are run: all but the list of them."""
    return sorted(page for page in PAGES.glob("*.md") if page.name != "index.md")


def key(text: str) -> str:
    """Return a hash of what decides a page's results: code, library, how it is run, versions."""
    sources = [Path(__file__), STYLE, *sorted((ROOT / "src" / "llqr").rglob("*.py"))]
    parts = [block.encode() for block in BLOCK.findall(text)]
    parts += [source.read_bytes() for source in sources]
    parts += [
        version(name).encode() for name in ("jax", "optax", "matplotlib", "scikit-learn", "numpy")
    ]
    return hashlib.sha256(b"\0".join([sys.version.encode(), *parts])).hexdigest()[:16]


def run(page: Path) -> Path:
    """Return the folder with a page's pictures and printed lines (`<number of block>.txt`).

    Raises:
      RuntimeError: the page's code failed.
    """
    folder = KEPT / f"{page.stem}-{key(page.read_text())}"
    if folder.exists():
        return folder
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as made:
        environment = os.environ | {
            "MATPLOTLIBRC": str(STYLE),
            "MPLBACKEND": "agg",
            "OPENBLAS_NUM_THREADS": "1",  # its threads and XLA's get in each other's way
            # A page says itself how many devices it has; and most of its time is compiling, without
            # the passes that only make programs faster a quarter of it (tests/conftest.py).
            "XLA_FLAGS": "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        done = subprocess.run(
            [sys.executable, __file__, page],
            cwd=made,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{page} failed:\n{done.stderr}")
        for old in KEPT.glob(f"{page.stem}-*"):
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

    for page in pages():
        for picture in sorted(run(page).glob("*.png")):
            name = f"gallery/{picture.name}"
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
