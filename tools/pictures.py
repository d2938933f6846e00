"""Pictures that are committed, at a release only: the README's, and those of long runs.

    uv run python -m tools.pictures        # after the version has been raised

What the documentation shows besides is drawn when it is built (`tools/drawn.py`). This draws the
README's picture anew, saves all of them in few colours, and notes version and checksums in
tools/pictures.json, which tests/test_release.py compares.
"""

import hashlib
import json
import shutil
import sys
import tomllib

from PIL import Image

from tools import drawn

DOCS = drawn.ROOT / "docs"
NOTED = drawn.ROOT / "tools" / "pictures.json"
README = DOCS / "images" / "first-page.png"
COLORS = 128


def version() -> str:
    """Return the version of the project."""
    return tomllib.loads((drawn.ROOT / "pyproject.toml").read_text())["project"]["version"]


def checksums() -> dict[str, str]:
    """Return picture -> checksum, of all below docs."""
    pictures = sorted(DOCS.rglob("*.png"))
    digest = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures}
    return {str(path.relative_to(DOCS)): found for path, found in digest.items()}


def write() -> None:
    """Draw the README's picture, save all in few colours, and note what they are."""
    (suite,) = (drawing for drawing in drawn.DRAWINGS if drawing.folder == "images/suite")
    shutil.copy(drawn.draw(suite) / README.name, README)
    for path in DOCS.rglob("*.png"):
        with Image.open(path) as picture:
            if picture.mode != "P":
                few = picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
                few.save(path, optimize=True)
    noted = {"version": version(), "sha256": checksums()}
    NOTED.write_text(json.dumps(noted, indent=2) + "\n")


def main() -> None:
    """Do it once for a version."""
    if json.loads(NOTED.read_text())["version"] == version():
        sys.exit(f"{version()} has its pictures: they are committed at a release only.")
    write()


if __name__ == "__main__":
    main()
