"""A folder of tokenised sentence pairs, read, checked, numbered, and cached as numbers.

  n   number of pairs of a split
  m   number of words of one language in it, ends of sentences included

A split is two flat arrays with offsets: a million short lists would take ten times the memory.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llqr_experiments.data.translation.files import (
    METADATA,
    check_complete,
    read_lines,
    write_json,
    write_lines,
)
from llqr_experiments.data.translation.recipe import LANGUAGES, SPLITS
from llqr_experiments.data.translation.vocabulary import Vocabulary
from llqr_experiments.errors import DataError
from llqr_experiments.files import sha256

_log = logging.getLogger(__name__)
_FORMAT = 1
CACHE = ".llqr_numeric_cache"


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The sentences of one language.

    Attributes:
      words: (m,) int32, one sentence after the other, each with its end.
      offsets: (n + 1,) int64; sentence i is `words[offsets[i]:offsets[i + 1]]`.
    """

    words: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sentences: Sequence[Sequence[int]]) -> "Sentences":
        """Return sentences given as lists."""
        lengths = [len(sentence) for sentence in sentences]
        flat = [word for sentence in sentences for word in sentence]
        return cls(np.asarray(flat, np.int32), np.cumsum([0, *lengths], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.words[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, words of each sentence and its end."""
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One split.

    Attributes:
      source: n sentences.
      target: their translations.
      lines: (n,) int32, the line of the files that each pair stood on, from 0.
      dropped: how many lines were left out, because a sentence was empty.
    """

    source: Sentences
    target: Sentences
    lines: np.ndarray
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.source)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Three splits and the vocabularies that number their words.

    Attributes:
      splits: "train", "valid" and "test".
      source: vocabulary of the source sentences, from the training split alone.
      target: vocabulary of the target sentences, likewise.
    """

    splits: Mapping[str, Pairs]
    source: Vocabulary
    target: Vocabulary


def read(folder: Path, cache_dir: Path | None = None) -> Corpus:
    """Read `{train,valid,test}.{de,en}`: a pair of sentences a line, words apart by blanks.

    The numbers are cached, so that the next call takes a fraction of the time: in
    `<folder>/.llqr_numeric_cache`, or where that cannot be written in the system's temporary
    folder. The cache belongs to the content of the files; a damaged one is made anew.

    Args:
      folder: where the files are.
      cache_dir: where the cache goes instead.

    Returns:
      The corpus. A pair with an empty sentence is dropped, which is logged.

    Raises:
      DataError: a file is missing or not UTF-8, a pair of files differs in its number of lines, a
        split is empty, or the folder's preparation was interrupted.
    """
    _check_files(folder)
    key = _key(folder)
    places = [cache_dir] if cache_dir else [folder / CACHE, _temporary_cache()]
    corpus = next(filter(None, (_load(place / key) for place in places)), None)
    if corpus is None:
        text = {s: {la: read_lines(folder / f"{s}.{la}") for la in LANGUAGES} for s in SPLITS}
        corpus = number(text, where=str(folder))
        _save(corpus, places, key)
    for split, pairs in corpus.splits.items():
        if pairs.dropped:
            gaps = np.flatnonzero(pairs.lines != np.arange(len(pairs)))
            _log.warning(
                "%s: dropped %d of %d %s pairs, in which a sentence is empty; the first is line %d",
                folder,
                pairs.dropped,
                pairs.dropped + len(pairs),
                split,
                1 + (gaps[0] if len(gaps) else len(pairs)),
            )
    return corpus


def number(text: Mapping[str, Mapping[str, Sequence[str]]], where: str) -> Corpus:
    """Return the corpus of some text.

    Args:
      text: split -> language -> sentences, words apart by blanks.
      where: what errors and the log call it.

    Returns:
      As `read`.

    Raises:
      DataError: as `read`.
    """
    words, lines = {}, {}
    for split in SPLITS:
        words[split], lines[split] = _split_words(split, text[split], where)
    dropped = {split: len(text[split][LANGUAGES[0]]) - len(lines[split]) for split in SPLITS}
    source, target = (
        Vocabulary.of(collections.Counter(w for sentence in words["train"][la] for w in sentence))
        for la in LANGUAGES
    )
    german, english = LANGUAGES
    splits = {
        split: Pairs(
            Sentences.of([source.encode(sentence) for sentence in words[split][german]]),
            Sentences.of([target.encode(sentence) for sentence in words[split][english]]),
            lines[split],
            dropped[split],
        )
        for split in SPLITS
    }
    return Corpus(splits, source, target)


def _split_words(
    split: str, text: Mapping[str, Sequence[str]], where: str
) -> tuple[dict[str, list[list[str]]], np.ndarray]:
    """Return the words of a split by language, without pairs that lack a side, and their lines."""
    counts = {la: len(text[la]) for la in LANGUAGES}
    if len(set(counts.values())) > 1:
        found = " and ".join(f"{split}.{la} has {count}" for la, count in counts.items())
        raise DataError(
            f"{where}: {found} lines, expected as many: line i of one is the translation of line i "
            "of the other. Prepare the corpus again."
        )
    # By blanks only: other white space is part of a word, as it is for subword-nmt.
    sides = [[line.strip(" \r").split(" ") for line in text[la]] for la in LANGUAGES]
    sides = [[[word for word in line if word] for line in side] for side in sides]
    kept = [i for i, pair in enumerate(zip(*sides, strict=True)) if all(pair)]
    dropped = counts[LANGUAGES[0]] - len(kept)
    if not kept:
        raise DataError(
            f"{where}: the {split} split is empty ({dropped} pairs with an empty sentence), "
            "expected at least one pair. Prepare the corpus again."
        )
    words = {la: [side[i] for i in kept] for la, side in zip(LANGUAGES, sides, strict=True)}
    return words, np.asarray(kept, np.int32)


def _check_files(folder: Path) -> None:
    """Raise `DataError` if a file is missing, or the folder is half-prepared."""
    missing = [
        f"{split}.{la}"
        for split in SPLITS
        for la in LANGUAGES
        if not (folder / f"{split}.{la}").is_file()
    ]
    if missing:
        raise DataError(
            f"{folder.absolute()}: lacks {', '.join(missing)}; expected train, valid and test, "
            f"each with .{LANGUAGES[0]} and .{LANGUAGES[1]}. Prepare the corpus again, or set "
            "dataset.dataset_dir to the folder that has them."
        )
    check_complete(folder)


def _key(folder: Path) -> str:
    """Return the name of the cache of a folder's content."""
    names = [f"{split}.{la}" for split in SPLITS for la in LANGUAGES]
    digests = [sha256(folder / name) for name in names]
    return hashlib.sha256("\n".join([str(_FORMAT), *digests]).encode()).hexdigest()[:32]


def _temporary_cache() -> Path:
    # With the user's number: a temporary folder is shared.
    return Path(tempfile.gettempdir(), f"{CACHE.lstrip('.')}_{os.getuid()}")


def _arrays(pairs: Pairs, split: str) -> dict[str, np.ndarray]:
    """Return the arrays of a split by the names of their files."""
    arrays = {f"{split}.lines.npy": pairs.lines}
    for la, side in zip(LANGUAGES, (pairs.source, pairs.target), strict=True):
        arrays[f"{split}.{la}.words.npy"] = side.words
        arrays[f"{split}.{la}.offsets.npy"] = side.offsets
    return arrays


def _save(corpus: Corpus, places: Sequence[Path], key: str) -> None:
    """Write a cache into the first place that can be written; whole, or not at all."""
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o755)
            temporary = Path(tempfile.mkdtemp(dir=place, prefix=f".{key}."))
        except OSError as error:
            _log.warning("%s: no cache can be written here (%s)", place, error)
            continue
        try:
            _write(corpus, temporary)
            # A damaged one is in the way, or that of a process that was faster.
            shutil.rmtree(place / key, ignore_errors=True)
            os.replace(temporary, place / key)
            return
        except OSError as error:
            _log.warning("%s: no cache can be written here (%s)", place, error)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(corpus: Corpus, folder: Path) -> None:
    for split, pairs in corpus.splits.items():
        for name, array in _arrays(pairs, split).items():
            np.save(folder / name, array, allow_pickle=False)
    for la, vocabulary in zip(LANGUAGES, (corpus.source, corpus.target), strict=True):
        write_lines(folder / f"dict.{la}.txt", vocabulary.words)
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    dropped = {split: pairs.dropped for split, pairs in corpus.splits.items()}
    write_json(folder / METADATA, {"format": _FORMAT, "files": files, "dropped": dropped})
    folder.chmod(0o755)


def _load(folder: Path) -> Corpus | None:
    """Return the corpus of a cache, or None if there is none that is whole."""
    if not folder.exists():
        return None
    try:
        metadata = json.loads((folder / METADATA).read_text("utf-8"))
        files: dict[str, str] = metadata["files"]
        damaged = [name for name, digest in files.items() if sha256(folder / name) != digest]
        if damaged:
            raise ValueError(f"{damaged[0]} has another checksum")
        arrays = {name: np.load(folder / name) for name in files if name.endswith(".npy")}
        source, target = (
            Vocabulary(tuple(read_lines(folder / f"dict.{la}.txt"))) for la in LANGUAGES
        )
        splits = {split: _pairs(arrays, split, metadata["dropped"][split]) for split in SPLITS}
    except (OSError, KeyError, TypeError, ValueError) as error:
        _log.warning("%s: the cache is damaged (%s) and will be made anew", folder, error)
        return None
    return Corpus(splits, source, target)


def _pairs(arrays: Mapping[str, np.ndarray], split: str, dropped: int) -> Pairs:
    """Return a split from what `_arrays` made of it."""
    source, target = (
        Sentences(arrays[f"{split}.{la}.words.npy"], arrays[f"{split}.{la}.offsets.npy"])
        for la in LANGUAGES
    )
    return Pairs(source, target, arrays[f"{split}.lines.npy"], dropped)
