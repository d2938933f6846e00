"""Rewrite `constraint-dependencies` in pyproject.toml from a fresh resolution.

uv.lock records registry addresses and stays out of the repository; the versions that it
holds are kept as constraints instead, one line for each package (and for each Python
range, where the range decides). Run it as `make lock`.
"""

import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "# >>> written by `make lock`; do not edit by hand\n"
END = "# <<< written by `make lock`"


def constraints(lock: dict) -> list[str]:
    """One `name==version ; marker` for every registry package of a uv lock."""
    lines = []
    for package in lock["package"]:
        if "registry" not in package["source"]:
            continue  # the project itself
        pin = f"{package['name']}=={package['version']}"
        markers = package.get("resolution-markers", [])
        if any("extra ==" in marker or "extra !=" in marker for marker in markers):
            continue  # split by the conflicting CUDA extras: jax's own bounds decide
        # uv simplifies a split over every supported Python; keep what is left, joined by "or".
        lines.append(pin if not markers else f"{pin} ; {' or '.join(f'({m})' for m in markers)}")
    return lines


def splice(text: str, lines: list[str]) -> str:
    """Put `lines` between the two marks of pyproject.toml."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    body = "".join(f'  "{line}",\n' for line in lines)
    return f"{before}{BEGIN}constraint-dependencies = [\n{body}]\n{END}{after}"


def main() -> None:
    """Resolve without constraints, write them, and check that they resolve."""
    pyproject = ROOT / "pyproject.toml"
    original = pyproject.read_text()
    lock = ROOT / "uv.lock"
    try:
        pyproject.write_text(splice(original, []))
        lock.unlink(missing_ok=True)
        subprocess.run(["uv", "lock"], cwd=ROOT, check=True)
        lines = constraints(tomllib.loads(lock.read_text()))
    except BaseException:
        pyproject.write_text(original)
        raise
    pyproject.write_text(splice(original, lines))
    subprocess.run(["uv", "lock"], cwd=ROOT, check=True)  # the constraints must resolve
    print(f"{len(lines)} constraints written to pyproject.toml")


if __name__ == "__main__":
    main()
