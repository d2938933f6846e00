"""Names of the library in the documentation link to their entry in the API: a hook of mkdocs.

A docstring or a page says `llqr.Refit` in backticks, and need not know where that is explained.
"""

import re
from pathlib import Path
from typing import Any

API = Path(__file__).resolve().parent.parent / "docs" / "api.md"
PLACE = "api.md"
LEFT = r"<a\b.*?</a>|<h\d\b.*?</h\d>|<pre\b.*?</pre>"
"""What is left alone: links, headings, code."""


def entries() -> set[str]:
    """Return the names that the API explains."""
    return set(re.findall(r"^::: (\S+)", API.read_text(), re.MULTILINE))


def link(html: str, to: str, names: set[str]) -> str:
    """Return `html` with names in code linked.

    Args:
      html: of a page.
      to: address of the API from there.
      names: those that it explains.

    Example:
      >>> link("<p><code>llqr.find(state)</code></p>", "../api/", {"llqr.find"})
      '<p><a href="../api/#llqr.find"><code>llqr.find(state)</code></a></p>'
      >>> link("<h2><code>llqr.find</code></h2>", "../api/", {"llqr.find"})
      '<h2><code>llqr.find</code></h2>'
    """

    def linked(found: re.Match[str]) -> str:
        name = found["name"]
        known = name is not None and name in names
        return f'<a href="{to}#{name}">{found[0]}</a>' if known else found[0]

    code = r"<code>(?P<name>llqr(?:\.\w+)+)(?:\([^<]*)?</code>"
    return re.sub(f"{LEFT}|{code}", linked, html, flags=re.DOTALL)


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    """Link the names on a page."""
    api = files.get_file_from_path(PLACE)
    return link(html, api.url_relative_to(page.file), entries())
