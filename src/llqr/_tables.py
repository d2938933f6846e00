"""Tables that are read in a terminal."""

from collections.abc import Sequence


def table(lines: Sequence[tuple[str, ...]], left: int, total: tuple[str, ...] | None = None) -> str:
    """Align columns under a ruled head, the first `left` of them to the left."""
    every = [*lines, total] if total else list(lines)
    widths = [max(len(line[i]) for line in every) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in every
    ]
    rule = "-" * max(map(len, text))
    text.insert(1, rule)
    if total:
        text.insert(-1, rule)
    return "\n".join(text)
