"""The page's frame and style sheet, and the pieces that it is put together from."""

import html
from collections.abc import Sequence

from llqr_experiments.report.canvas import color, dash

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
.kind > h2 { font-size: 1.4rem; border-bottom: 2px solid #ddd }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem }
figure h3, figure h4, .run h3, .run h4 { font-size: 1rem; margin: 0 0 .2rem }
h4 { font-size: 1rem; margin: .8rem 0 .2rem }
.lead { font-size: 1.1rem; margin: 0 0 1rem }
.scroll { overflow-x: auto; border: 1px solid #ddd; border-radius: 4px }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  overflow-wrap: normal }
th, td { padding: .4rem .7rem; text-align: left; vertical-align: top; border-top: 1px solid #eee }
thead th { border-top: 0; background: #f6f6f6; vertical-align: bottom }
thead th.number { white-space: normal }
th:first-child { position: sticky; left: 0; background: #fff; min-width: 8.5rem; max-width: 16rem;
  overflow-wrap: anywhere }
.codes th:first-child { min-width: 13rem }
thead th:first-child { background: #f6f6f6 }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.best { font-weight: 700 }
.note { color: #555; font-size: .85rem; font-weight: 400 }
.status { min-width: 10rem }
.warn { color: #8a3b00 }
.key { vertical-align: middle; margin-right: .4rem }
code, pre { font: .85rem/1.45 ui-monospace, monospace }
.options a { white-space: nowrap }
.options code, th code { display: inline-block; background: #f2f2f2; border-radius: 3px;
  padding: 0 .3rem; margin: 0 .2rem .2rem 0 }
.options code { white-space: nowrap }
.pictures { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)) }
figure { margin: 0; min-width: 0 }
img { display: block; width: 100%; height: auto }
figcaption { font-size: .85rem; color: #555 }
.run { border-top: 1px solid #ddd; padding: .8rem 0 }
.sample { border-top: 1px solid #eee; padding: .2rem 0 }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem .8rem;
  margin: .3rem 0; font-size: .9rem }
dt { color: #555 }
dd { margin: 0 }
summary { cursor: pointer; font-size: .9rem }
pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; margin: .4rem 0 }
@media (max-width: 40rem) {
  body { padding: .8rem } h1 { font-size: 1.3rem }
  th:first-child { max-width: 8.5rem } .codes th:first-child { min-width: 8.5rem }
  th, td { padding: .35rem .5rem } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="lead">{lead}</p>
{body}
</body>
</html>
"""

escape = html.escape


def heading(level: int, text: str, anchor: str = "") -> str:
    """Return a heading; what is given is escaped."""
    place = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{place}>{escape(text)}</h{level}>"


def key(i: int) -> str:
    """Return the line of run i, as in the pictures."""
    pattern = {"-": "", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[dash(i)]
    return (
        f'<svg class="key" width="22" height="8" aria-hidden="true"><path d="M0 4H22" stroke="'
        f'{color(i)}" stroke-width="4" stroke-dasharray="{pattern or "none"}"/></svg>'
    )


def number(text: str, note: str = "", *, best: bool = False) -> str:
    """Return a cell with a number, and what is said below it; both are escaped."""
    below = f'<br><span class="note">{escape(note)}</span>' if note else ""
    return f'<td class="number{" best" * best}">{escape(text)}{below}</td>'


def codes(texts: Sequence[str]) -> str:
    """Return pieces of code, each with its frame."""
    return " ".join(f"<code>{escape(text)}</code>" for text in texts)


def table(
    label: str,
    head: Sequence[str],
    rows: Sequence[str],
    numbers: Sequence[int] = (),
    kind: str = "",
) -> str:
    """Return a table in a box that scrolls, so that the page does not.

    Args:
      label: what it is, for those who cannot see it.
      head: HTML of the heads.
      rows: HTML of the cells of each row.
      numbers: columns of numbers.
      kind: class of the style sheet, besides that of all tables.
    """
    kinds = [' class="number"' if k in numbers else "" for k in range(len(head))]
    cells = (f'<th scope="col"{kind}>{text}</th>' for kind, text in zip(kinds, head, strict=True))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll {kind}" role="region" aria-label="{label}" tabindex="0"><table>\n'
        f"<thead><tr>{''.join(cells)}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> duration(4.24), duration(125), duration(7500)
    ('4.2 s', '2 min 5 s', '2 h 05 min')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest} s"
    )
