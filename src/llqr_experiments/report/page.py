"""The page: for each kind of runs what came out, curves, options, and how to run them again."""

import base64
from collections.abc import Sequence
from typing import Any

from llqr_experiments.record.fields import FILE
from llqr_experiments.record.translations import Sample
from llqr_experiments.report import scores, tables
from llqr_experiments.report.canvas import Picture
from llqr_experiments.report.markup import PAGE, STYLE, escape, heading, key
from llqr_experiments.report.runs import ABSENT, Run, Translation
from llqr_experiments.report.sections import KINDS, Section

PROBLEMS = 3
"""Most problems that the title names."""
SENTENCE = 600
"""Most characters of a sentence: a model that repeats itself fills a page."""

Drawn = Sequence[tuple[Picture, bytes]]
"""Pictures, each with its PNG."""


def page(sections: Sequence[Section], drawn: Sequence[Drawn], left_out: Sequence[str] = ()) -> str:
    """Return the report as HTML.

    Args:
      sections: see `sections.sections`.
      drawn: the pictures of each.
      left_out: what is said of folders that could not be read.
    """
    runs = [run for section in sections for run in section.runs]
    what = list(dict.fromkeys(_problem(run) for run in runs))
    what[PROBLEMS:] = [f"and {len(what) - PROBLEMS} more"] * (len(what) > PROBLEMS)
    title = f"{len(runs)} runs compared" if len(runs) > 1 else runs[0].name
    joined = ", " if len(sections) == 1 else "; "
    parts = [_left_out(left_out)] if left_out else []
    for section, pictures in zip(sections, drawn, strict=True):
        parts.append(_section(section, pictures))
    lead = scores.lead(sections[0].kind, runs)
    if len(sections) > 1:
        lead = "Of several kinds, which have no measure in common: " + ", ".join(
            f"{KINDS[section.kind].lower()} ({len(section.runs)})" for section in sections
        ) + "."  # fmt: skip
    return PAGE.format(
        title=escape(f"{title}: {joined.join(what)}"),
        style=STYLE,
        lead=escape(lead),
        body="\n".join(parts),
    )


def _left_out(reasons: Sequence[str]) -> str:
    found = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f'<div class="warn">Left out: <ul>{found}</ul></div>'


def _problem(run: Run) -> str:
    if toy := run.options.get("toy.name") or run.options.get("comparison.name"):
        return str(toy)
    names = (run.options.get(f"{part}.name", ABSENT) for part in ("dataset", "architecture"))
    return ", ".join(str(name) for name in names)


def _section(section: Section, drawn: Drawn) -> str:
    """All about runs of one kind; below a heading of their own unless they are alone."""
    runs, level = section.runs, 2 if section.alone else 3
    several = len(runs) > 1
    parts = []
    if not section.alone:
        parts.append(heading(2, KINDS[section.kind]))
        parts.append(f'<p class="lead">{escape(scores.lead(section.kind, runs))}</p>')
    parts += [tables.summary(section), _signatures(runs)]
    if means := tables.seeds(section):
        parts += [heading(level, "Means over seeds"), means]
    parts += [heading(level, "Curves"), _figures(drawn, level + 1)]
    drawn_solutions = [(i, run) for i, run in enumerate(runs) if (run.folder / FILE).is_file()]
    if drawn_solutions:
        parts += [heading(level, "Solutions")]
        parts += [_solution(run, i, level + 1) for i, run in drawn_solutions]
    if any(run.translations for run in runs):
        parts += [heading(level, "Translations")]
        parts += [_translations(run, i, level + 1) for i, run in enumerate(runs)]
    if several:
        parts.append(heading(level, "Options that differ", f"{section.prefix}options"))
        parts.append(tables.options(runs))
    parts.append(heading(level, f"How to run {'them' if several else 'it'} again"))
    parts += [_origin(run, i, level + 1) for i, run in enumerate(runs)]
    body = "\n".join(filter(None, parts))
    return body if section.alone else f'<section class="kind">{body}</section>'


def _figures(drawn: Drawn, level: int) -> str:
    if not drawn:
        return "<p>No run has logged anything that could be drawn.</p>"
    figures = (
        f"<figure>{heading(level, picture.title)}"
        f'<img alt="{escape(picture.alt)}" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}"><figcaption>{escape(picture.caption)}</figcaption>'
        "</figure>"
        for picture, png in drawn
    )
    return '<div class="pictures">\n' + "\n".join(figures) + "\n</div>"


def _solution(run: Run, i: int, level: int) -> str:
    """The picture that a run has drawn of its solution."""
    png = base64.b64encode((run.folder / FILE).read_bytes()).decode()
    return (
        f'<section class="run"><h{level}>{key(i)}{escape(run.name)}</h{level}>'
        f'<img alt="Solution, network and error of {escape(run.name)} as colours over the plane" '
        f'src="data:image/png;base64,{png}"></section>'
    )


# --- translations -----------------------------------------------------------------------------


def _signatures(runs: Sequence[Run]) -> str:
    """How BLEU was computed: numbers of different signatures do not compare."""
    said = [t.signature for run in runs for t in run.translations if t.signature]
    found = list(dict.fromkeys(said))
    if not found:
        return ""
    codes = ", ".join(f"<code>{escape(signature)}</code>" for signature in found)
    if len(found) == 1:
        return f'<p class="note">BLEU: {codes}</p>'
    return f'<p class="warn">BLEU was computed in several ways, which do not compare: {codes}</p>'


def _translations(run: Run, i: int, level: int) -> str:
    """The last that a run wrote of each split, the newest open."""
    last = {found.split: found for found in run.translations}
    if not last:
        return ""
    newest = run.translations[-1]
    blocks = (
        f"<details{' open' if found is newest else ''}><summary>{escape(_scored(found))}</summary>"
        + "".join(_sample(sample) for sample in found.samples)
        + "</details>"
        for found in last.values()
    )
    name = f"<h{level}>{key(i)}{escape(run.name)}</h{level}>"
    return f'<section class="run">{name}{"".join(blocks)}</section>'


def _scored(found: Translation) -> str:
    bleu = ABSENT if found.bleu is None else f"{found.bleu:.2f}"
    return f"{found.split}, step {found.step:,}: BLEU {bleu}; {found.signature or 'no signature'}"


def _sample(sample: Sample) -> str:
    """Text in any script: each sentence runs in its own direction."""
    words = {"source": sample.source, "translation": sample.hypothesis,
             "reference": sample.reference}  # fmt: skip
    terms = "".join(
        f'<dt>{name}</dt><dd dir="auto">{escape(_clip(text)) or ABSENT}</dd>'
        for name, text in words.items()
    )
    return f'<dl class="sample">{terms}</dl>'


def _clip(text: str) -> str:
    return text if len(text) <= SENTENCE else text[: SENTENCE - 1] + "…"


# --- how to run it again ------------------------------------------------------------------------


def _origin(run: Run, i: int, level: int) -> str:
    versions = run.meta.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    devices = run.meta.get("devices")
    facts = {
        "command": f"<code>{escape(str(run.meta.get('command') or ABSENT))}</code>",
        "commit": _commit(run.meta.get("commit")),
        "started": escape(str(run.meta.get("started") or ABSENT)),
        "versions": escape(
            ", ".join(f"{name} {version}" for name, version in versions.items() if version)
            + (f", Python {run.meta['python']}" if "python" in run.meta else "")
        ),
        "devices": escape(", ".join(map(str, devices)) if isinstance(devices, list) else ABSENT),
        "platform": escape(str(run.meta.get("platform") or ABSENT)),
        "folder": f"<code>{escape(str(run.folder))}</code>",
    }
    terms = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return (
        f'<section class="run"><h{level}>{key(i)}{escape(run.name)}</h{level}><dl>{terms}</dl>'
        f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details></section>"
    )


def _commit(commit: Any) -> str:
    if not isinstance(commit, str):
        return ABSENT
    changed = " with changes that were not committed" if commit.endswith("+") else ""
    return f"<code>{escape(commit.removesuffix('+'))}</code>{changed}"
