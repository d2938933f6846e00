"""Corpora: where the three splits of a text are found.

A folder or a file in one of these layouts, the first that fits:

  *.zip                            WikiText's archive
  any other file                   one text, cut into splits
  dataset_dict.json                a dataset that Hugging Face's `datasets` saved
  <split>-*-of-*.parquet           the Parquet files of one
  wiki.{train,valid,test}.raw      WikiText, or with the suffix .tokens
  wikitext-103-raw-v1.zip          its archive, or wikitext-103-v1.zip
  {train,valid,test}.txt           a text per split
  *.txt                            one text, cut into splits
"""

import dataclasses
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from llqr_experiments.data import lines, tables
from llqr_experiments.data.lines import Lines, TextFile
from llqr_experiments.data.optional import require
from llqr_experiments.errors import DataError

T = TypeVar("T")

SPLITS = ("train", "valid", "test")
_SYNONYMS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
_WIKITEXT_MEMBER = re.compile(r"(?:.*/)?wiki\.(train|valid|test)\.(raw|tokens)")
# Folders in which archives and downloads lay their files.
_WIKITEXT_FOLDERS = ("", "wikitext-103-raw", "wikitext-103", "wikitext-103-raw-v1")
_WIKITEXT_ARCHIVES = ("wikitext-103-raw-v1.zip", "wikitext-103-v1.zip")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text in three splits.

    Attributes:
      train: the split to fit.
      valid: the split to choose by.
      test: the split to report.
      origin: where they came from, for logs and reports.
    """

    train: Lines
    valid: Lines
    test: Lines
    origin: str


LAYOUTS = (
    "wiki.train.raw, wiki.valid.raw and wiki.test.raw (or .tokens, or their zip archive); a "
    "dataset saved by `datasets`; train-*-of-*.parquet and so on; train.txt, valid.txt and "
    "test.txt; or any other *.txt, which are cut into splits"
)
"""The layouts of a folder, for messages."""


def find(path: Path, held_out: Sequence[float]) -> Corpus | None:
    """Return the corpus at a path, None if it is no file and no folder in a known layout.

    Args:
      path: a folder or a file, see the table of this module.
      held_out: shares of valid and test where one text is cut into splits: the first part is to
        train, the next is valid, the last is test.

    Raises:
      DataError: it lacks a split, or cannot be read.
    """
    if path.is_file():
        texts = _archive(path) if path.suffix == ".zip" else _cut([path], held_out)
        return Corpus(**texts, origin=str(path.absolute()))
    for folder in (path / name for name in _WIKITEXT_FOLDERS):
        if texts := _splits_in(folder):
            return Corpus(**texts, origin=str(folder.absolute()))
    for archive in (path / name for name in _WIKITEXT_ARCHIVES):
        if archive.is_file():
            return Corpus(**_archive(archive), origin=str(archive.absolute()))
    if texts := _text_files(path, held_out):
        return Corpus(**texts, origin=str(path.absolute()))
    return None


def python_topics() -> Corpus:
    r"""Return the chapters of Python's language reference that `help()` shows, about 370 kB.

    They come with Python (`pydoc_data.topics`, PSF licence), in other words with each version.
    Chapters quote each other, so that a paragraph counts where it comes first, and no other time:
    else what is held out would be known from training. The last two tenths are valid and test.

    Raises:
      DataError: this Python was packaged without them.

    Example:
      >>> corpus = python_topics()
      >>> next(corpus.train.read())
      'The "assert" statement\n'
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise DataError(
            "python_topics is part of Python's standard library (pydoc_data.topics), and this "
            "Python was packaged without it. Use another Python, or dataset.name=local."
        ) from error
    seen, paragraphs = set(), []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name].strip()):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
    ends = np.cumsum([len(paragraph) for paragraph in paragraphs])
    first, second = np.searchsorted(ends, [0.8 * ends[-1], 0.9 * ends[-1]])
    parts = paragraphs[:first], paragraphs[first:second], paragraphs[second:]
    texts = ["\n\n".join(part) + "\n" for part in parts]
    return Corpus(*map(lines.of_text, texts), origin="pydoc_data.topics")


def download_wikitext(folder: Path) -> None:
    """Download WikiText-103 (raw) with Hugging Face's `datasets`, for `find`.

    Args:
      folder: where to put it; it gets a folder `wikitext-103-raw-v1`, whole or not at all.

    Raises:
      DataError: the package is not installed, or the download fails.
    """
    datasets = require("datasets", extra="hub", reason="a download of WikiText-103")
    target = folder / "wikitext-103-raw-v1"
    try:
        loaded = datasets.load_dataset("Salesforce/wikitext", target.name)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            loaded.save_to_disk(f"{temporary}/{target.name}")
            os.replace(f"{temporary}/{target.name}", target)
    except Exception as error:  # the network, the hub and the disk raise dozens of types
        raise DataError(f"WikiText-103 could not be downloaded ({error}).") from error


def _splits_in(folder: Path) -> dict[str, Lines]:
    """Return the splits that a folder has in one file or more each; empty if it has none."""
    if (folder / "dataset_dict.json").is_file():
        return _three(tables.saved(folder), folder)
    if found := tables.parquet(folder):
        return _three(found, folder)
    for suffix in ("raw", "tokens"):
        files = {split: folder / f"wiki.{split}.{suffix}" for split in SPLITS}
        present = {split: file for split, file in files.items() if file.is_file()}
        if present:
            return {k: lines.of_file(TextFile(v)) for k, v in _three(present, folder).items()}
    return {}


def _text_files(folder: Path, held_out: Sequence[float]) -> dict[str, Lines]:
    """Return the splits in the text files of a folder; empty if it has none."""
    files = sorted(folder.glob("*.txt"))
    named = {file.stem: file for file in files}
    if any(name in named for names in _SYNONYMS.values() for name in names):
        return {k: lines.of_file(TextFile(v)) for k, v in _three(named, folder).items()}
    return _cut(files, held_out) if files else {}


def _archive(path: Path) -> dict[str, Lines]:
    """Return the splits in a zip archive of WikiText."""
    with TextFile(path).open(), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    found = {}
    for suffix in ("tokens", "raw"):  # the raw ones replace the others
        for name in names:
            if (match := _WIKITEXT_MEMBER.fullmatch(name)) and match[2] == suffix:
                found[match[1]] = TextFile(path, name)
    return {split: lines.of_file(file) for split, file in _three(found, path).items()}


def _three(found: Mapping[str, T], where: Path) -> dict[str, T]:
    """Return what was found of each split, under our names.

    Raises:
      DataError: there is nothing for one of them.
    """
    chosen = {}
    for split, names in _SYNONYMS.items():
        name = next((name for name in names if name in found), None)
        if name is None:
            raise DataError(
                f"{where.absolute()}: no {split} split, there are {', '.join(found) or 'none'}. "
                f"Add it, as {' or '.join(names)}."
            )
        chosen[split] = found[name]
    return chosen


def _cut(files: Sequence[Path], held_out: Sequence[float]) -> dict[str, Lines]:
    """Return one text as three."""
    if len(held_out) != 2 or not all(share > 0 for share in held_out) or sum(held_out) >= 1:
        raise DataError(
            f"dataset.held_out={list(held_out)}: expected two shares above 0, of valid and test, "
            "with a sum below 1."
        )
    shares = (1 - sum(held_out), *held_out)
    return dict(zip(SPLITS, lines.of_files(files, shares), strict=True))
