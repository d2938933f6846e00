"""Every Python block of the README and the documentation runs."""

import doctest
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import llqr
from llqr_experiments.command import cli
from tests.experiments import support
from tools import crosslinks, drawn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    if page.name == "README.md":
        assert len(blocks) == 3
        assert float(namespace["value"]) < 1.0  # the example trains
        assert "objective" in capsys.readouterr().out


@pytest.mark.parametrize("page", drawn.pages(), ids=lambda page: page.stem)
def test_gallery(page):
    """The page runs, and shows the picture that it draws and no other."""
    found = {picture.name for picture in drawn.run(page).glob("*.png")}
    assert found == {f"{page.stem}.png"}
    assert set(re.findall(r"\]\((.*?\.png)\)", page.read_text())) == found


def test_pictures_of_the_gallery_belong_to_their_code():
    text = drawn.pages()[0].read_text()
    assert drawn.key_of_page(text) == drawn.key_of_page(text.replace("# ", "# About ", 1))  # prose
    assert drawn.key_of_page(text) != drawn.key_of_page(
        text.replace("import jax\n", "import jax  # now\n", 1)
    )


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for preset in re.findall(r"experiment=([\w-]+)", text):
        assert (ROOT / "configs" / "experiment" / f"{preset}.yaml").exists()


def test_commands_of_the_tuning_guide_are_legal():
    page = (ROOT / "docs" / "tuning.md").read_text()
    page = page.replace("\\\n", " ")
    commands = re.findall(r"^(?:\w+=\S+ )*uv run python run.py (.*)$", page, re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        arguments = shlex.split(command, comments=True)
        cli.check_arguments(arguments)
        support.config(*arguments)
    for module in re.findall(r"python -m ([\w.]+)", page):
        assert importlib.util.find_spec(module), module


def test_the_architecture_names_every_module_of_the_runner():
    """A room has a heading, and each of its modules stands there by its name."""
    room_of_modules = ROOT / "src" / "llqr_experiments"
    text = (ROOT / "docs" / "architecture.md").read_text()
    parts = re.split(r"^\*\*`(\w+)/`", text, flags=re.MULTILINE)
    rooms = dict(zip(parts[1::2], parts[2::2], strict=True))
    for path in room_of_modules.rglob("*.py"):
        place = path.relative_to(room_of_modules).with_suffix("").parts
        if len(place) > 1 and place[-1] != "__init__":
            name = "/".join(place[1:])
            assert f"`{name}`" in rooms[place[0]], (
                f"{place[0]}/ has no {name} in docs/architecture.md"
            )


def test_the_api_explains_every_public_name():
    explained = crosslinks.entries()
    for name in llqr.__all__:
        assert f"llqr.{name}" in explained or name in (
            "diagnostics",
            "quadratic",
            "stages",
            "structures",
        ), name


def test_names_link_to_the_api():
    found = doctest.testmod(crosslinks)
    assert found.attempted > 0
    assert found.failed == 0
