"""The runner, the benchmarks and the tools use the library by its public names alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / "run.py",
    *(
        path
        for room in ("src/llqr_experiments", "benchmarks", "tools")
        for path in sorted((ROOT / room).rglob("*.py"))
    ),
]


def private(source: str) -> Iterator[str]:
    """Yield what a module takes of the library that begins with an underscore."""
    used, known = [], {"llqr"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            used += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            used += [f"{node.module}.{name.name}" for name in node.names]
            if (node.module or "").partition(".")[0] == "llqr":
                known |= {name.asname or name.name for name in node.names}
        elif isinstance(node, ast.Attribute):
            used.append(dotted(node))
    for path in used:
        first, *others = path.split(".")
        if first in known and any(x.startswith("_") and not x.endswith("__") for x in others):
            yield path


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression that is only that; otherwise nothing that anyone imports."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "()"


def test_nothing_private_of_the_library_is_used_outside_it():
    found = {str(path.relative_to(ROOT)): list(private(path.read_text())) for path in FILES}
    assert {name: uses for name, uses in found.items() if uses} == {}
    assert len(FILES) > 150


@pytest.mark.parametrize(
    "source",
    [
        "from llqr._loops import repeat",
        "from llqr.refit import _x",
        "import llqr._mesh",
        "import llqr\nllqr.refit._x.y()",
        "from llqr import schedules\nschedules._x()",
    ],
)
def test_what_is_private_is_seen(source):
    assert list(private(source))


def test_what_is_public_is_not():
    assert not list(private("import llqr\nprint(llqr.__file__, self._llqr, llqr.tree.size)"))
