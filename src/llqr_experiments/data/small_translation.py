"""A small real German-English corpus: the help pages of LibreOffice, of which both exist.

    apt-get download libreoffice-help-de libreoffice-help-en-us
    for f in libreoffice-help-*.deb; do dpkg-deb -x $f libreoffice-help; done
    python -m llqr_experiments.data.small_translation prepare libreoffice-help

The two packages (5 MB, Mozilla Public License 2.0) hold the same pages in both languages, and
each paragraph has the number of the one it translates. What is kept:

  pairs     paragraphs with the same number on the same page, in sentences if there are as many on
            both sides; tokenised, lowercased and cleaned as IWSLT'14, 2 to 40 tokens a side
  once      a pair is dropped if its German or its English was there before, so no sentence of a
            held-out split is in train
  splits    whole pages: one in 20 is valid, one in 20 is test
"""

import hashlib
import html.parser
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llqr_experiments.data.translation.command import Command
from llqr_experiments.data.translation.files import (
    Stage,
    Track,
    read_lines,
    run_stages,
    untracked,
    write_lines,
)
from llqr_experiments.data.translation.recipe import (
    LANGUAGES,
    PRODUCTS,
    SPLITS,
    bpe_stages,
    clean,
    tokenizer,
    versions,
)
from llqr_experiments.errors import DataError
from llqr_experiments.files import sha256

FOLDER = "data/small.tokenized.de-en"
MERGES = 3000
LONGEST = 40

_FOLDERS = {"de": "de", "en": "en-US"}
_BLOCKS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-ZÄÖÜ])")
_HELD_OUT = 20


def prepare(
    source: Path, out: Path, *, merges: int = MERGES, track: Track = untracked
) -> list[str]:
    """Prepare the corpus; a call after an interruption goes on where it stopped.

    Args:
      source: folder below which the two packages were unpacked, or installed.
      out: where to; see `llqr_experiments.data.translation.recipe` for what it will hold.
      merges: byte pairs to merge.
      track: shows the progress.

    Returns:
      The names of the stages that were run: none if all was there.

    Raises:
      DataError: the folder has no such pages, or one is not UTF-8.
    """
    root = _find(source)
    pages = _pages(root)
    recipe = {
        "corpus": "small_de_en",
        "merges": merges,
        "inputs": _checksum(root, pages),
        "packages": versions(),
    }

    def extract(inputs: Sequence[Path], outputs: Sequence[Path], track: Track) -> None:
        del inputs
        rows = [(p, *pair) for p in track(pages, len(pages), "pages") for pair in _pairs(root, p)]
        for path, column in zip(outputs, zip(*rows, strict=True), strict=True):
            write_lines(path, column)

    raw = tuple(f"work/raw.{column}" for column in ("page", *LANGUAGES))
    text = tuple(f"work/{split}.{lang}" for split in SPLITS for lang in LANGUAGES)
    stages = [Stage("extract", (), raw, extract), Stage("clean", raw, text, _clean)]
    return run_stages(out, [*stages, *bpe_stages(merges)], PRODUCTS, recipe, track)


def paragraphs(page: str) -> dict[str, str]:
    """Return number -> text of the headings and paragraphs of a page.

    Example:
      >>> paragraphs('<p id="a" class="c">One <b>two</b>.</p><p>three</p>')
      {'a': 'One two.'}
    """
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    return parser.found


class _Paragraphs(html.parser.HTMLParser):
    """Collects the text of the elements that have a number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._open: tuple[str, str] | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a block, or part two words that only a tag parts."""
        values = dict(attrs)
        number = values.get("id")
        if tag in _BLOCKS:
            # Program text is no language.
            code = "code" in (values.get("class") or "")
            self._open = (tag, number) if number and not code else None
            self._text = []
        elif tag in ("br", "img"):
            self._text.append(" ")

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        """Close a block."""
        if self._open and self._open[0] == tag:
            # A page may repeat a paragraph that it includes twice.
            self.found.setdefault(self._open[1], " ".join("".join(self._text).split()))
            self._open = None


def sentences(german: str, english: str) -> list[tuple[str, str]]:
    """Return a paragraph in sentences, if both languages have as many; otherwise as it is.

    Example:
      >>> sentences("Ja. Nein.", "Yes. No.")
      [('Ja.', 'Yes.'), ('Nein.', 'No.')]
    """
    sides = [_SENTENCE_END.split(text) for text in (german, english)]
    if len(sides[0]) != len(sides[1]):
        return [(german, english)]
    return list(zip(*sides, strict=True))


def split_of(page: str) -> str:
    """Return the split of a page: a function of its name, so that other pages change nothing."""
    draw = int.from_bytes(hashlib.sha256(page.encode()).digest()[:4]) % _HELD_OUT
    return {0: "test", 1: "valid"}.get(draw, "train")


def _pairs(root: Path, page: str) -> Iterator[tuple[str, str]]:
    """Return the sentence pairs of a page that differ and have words."""
    german, english = (
        paragraphs("\n".join(read_lines(root / _FOLDERS[la] / page))) for la in LANGUAGES
    )
    for number, text in german.items():
        for pair in sentences(text, english.get(number, "")):
            if pair[0] != pair[1] and all(any(c.isalpha() for c in side) for side in pair):
                yield pair


def _clean(inputs: Sequence[Path], outputs: Sequence[Path], track: Track) -> None:
    pages, *sides = (read_lines(path) for path in inputs)
    tokenisers = [tokenizer(la) for la in LANGUAGES]
    texts: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    seen: tuple[set[str], set[str]] = set(), set()
    rows = track(zip(pages, *sides, strict=True), len(pages), "tokenise")
    for page, *pair in rows:
        german, english = (f(side).lower() for f, side in zip(tokenisers, pair, strict=True))
        for kept in clean([(german, english)], longest=LONGEST):
            new = kept[0] not in seen[0] and kept[1] not in seen[1]
            if new and min(len(side.split(" ")) for side in kept) > 1:
                texts[split_of(page)].append(kept)
            for side, known in zip(kept, seen, strict=True):
                known.add(side)
    columns = [(texts[split], i) for split in SPLITS for i in range(len(LANGUAGES))]
    for path, (pairs, i) in zip(outputs, columns, strict=True):
        write_lines(path, (pair[i] for pair in pairs))


def _find(source: Path) -> Path:
    """Return the folder that has a folder of pages for each language."""
    for path in (source, *sorted(p for p in source.rglob("*") if p.is_dir())):
        if all((path / folder / "text").is_dir() for folder in _FOLDERS.values()):
            return path
    raise DataError(
        f"{source.absolute()}: has no folder with {' and '.join(_FOLDERS.values())} in it, each "
        "with LibreOffice's help pages in text/. Unpack both packages into one folder:\n"
        "  apt-get download libreoffice-help-de libreoffice-help-en-us\n"
        "  for f in libreoffice-help-*.deb; do dpkg-deb -x $f libreoffice-help; done"
    )


def _pages(root: Path) -> list[str]:
    """Return the pages that both languages have, relative to the folder of a language."""
    german, english = (
        {str(path.relative_to(root / folder)) for path in (root / folder).rglob("*.html")}
        for folder in _FOLDERS.values()
    )
    return sorted(german & english)


def _checksum(root: Path, pages: Iterable[str]) -> str:
    """Return the SHA-256 of the checksums of all pages."""
    digest = hashlib.sha256()
    for page in pages:
        for folder in _FOLDERS.values():
            digest.update(f"{folder}/{page} {sha256(root / folder / page)}\n".encode())
    return digest.hexdigest()


main = Command(
    "llqr_experiments.data.small_translation",
    "Prepare a small German-English corpus from the help pages of LibreOffice.",
    prepare,
    "folder of the packages",
    FOLDER,
    MERGES,
    "pair, tokenise, split and encode",
).main


if __name__ == "__main__":
    sys.exit(main())
