"""What the library's docstrings mean to mkdocstrings, which reads them: an extension of griffe."""

import re
from typing import Any

import griffe


class SingularExample(griffe.Extension):
    """`Example:` is the section that griffe calls `Examples:`; it would be plain text otherwise."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            named = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = named
