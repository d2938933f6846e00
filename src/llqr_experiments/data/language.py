"""Text for language models: a corpus, a tokenizer, and windows of its tokens.

text(name)   one of `TEXTS`: python_topics, wikitext103, local
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import Progress

from llqr.errors import unknown
from llqr_experiments.data import corpus, token_cache, tokenization
from llqr_experiments.data.corpus import SPLITS, Corpus
from llqr_experiments.data.lines import Lines
from llqr_experiments.data.tokenization import Tokenizer
from llqr_experiments.data.windows import Windows
from llqr_experiments.errors import DataError

_log = logging.getLogger(__name__)

# Part of every key of the cache: another number for other tokens of the same text.
_FORMAT = 1
_PATIENCE_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class _Defaults:
    """What a text is read with unless the caller says otherwise."""

    tokenizer: str
    target_len: int


_TEXTS = {
    "python_topics": _Defaults("char", 256),
    "wikitext103": _Defaults("gpt2", 1024),
    "local": _Defaults("char", 256),
}
TEXTS = tuple(_TEXTS)
"""Names of the texts."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A text in windows of tokens.

    Attributes:
      name: the name it is loaded by.
      train: full windows, to fit.
      valid: windows that cover the split, to choose by.
      test: windows that cover the split, to report.
      tokenizer: what made the tokens.
      length: L, tokens of a window.
      origin: where the text came from, for logs and reports.
    """

    name: str
    train: Windows
    valid: Windows
    test: Windows
    tokenizer: Tokenizer
    length: int
    origin: str = ""

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens, which is the number of classes too."""
        return self.tokenizer.vocabulary

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of tokens, (n,) integers; those below 0 (`IGNORE`) are left out."""
        ids = np.asarray(ids)
        return self.tokenizer.decode(ids[ids >= 0])


def text(
    name: str,
    dataset_dir: str | Path | None = None,
    *,
    tokenizer: str | None = None,
    tokenizer_dir: str | Path | None = None,
    vocabulary: int = 8192,
    target_len: int | None = None,
    held_out: Sequence[float] = (0.1, 0.1),
    download: bool = True,
    cache_dir: str | Path | None = None,
) -> Text:
    """Load a text, tokenised.

    The tokens are made once, kept in `cache_dir` and mapped into memory; their name there depends
    on the content of the text and of the tokenizer, so that a change of either makes others.

    Args:
      name: `python_topics`, which comes with Python; `wikitext103`; or `local`, any other text.
      dataset_dir: folder or file of the text, see `llqr_experiments.data.corpus` for the layouts.
        `wikitext103` is looked for in `./data/wikitext103` without it; `local` needs it.
      tokenizer: "char", "bpe" or "gpt2", see `llqr_experiments.data.tokenization`; None is
        "gpt2" for wikitext103 and "char" for the others.
      tokenizer_dir: folder of GPT-2's files; None is that of the text.
      vocabulary: most tokens of "bpe".
      target_len: L, tokens of a window; None is 1024 for wikitext103 and 256 for the others.
      held_out: shares of valid and test, for a text that has no splits of its own.
      download: whether `wikitext103` may be downloaded, which needs the package `datasets`.
      cache_dir: where tokens are kept; None is `./data/tokens`.

    Returns:
      The three splits in windows.

    Raises:
      DataError: the name, the tokenizer or a number is not legal; the text is missing, broken or
        not UTF-8; a split is too short; the cache cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as cache:
      ...     data = text("python_topics", target_len=64, cache_dir=cache)
      >>> data.decode(data.train.gather(np.array([0]))["tokens"][0][:22])
      'The "assert" statement'
    """
    if name not in _TEXTS:
        raise DataError(unknown("text", name, _TEXTS))
    kind = tokenizer or _TEXTS[name].tokenizer
    length = _TEXTS[name].target_len if target_len is None else target_len
    tokenization.check_kind(kind)
    if length < 1:
        raise DataError(f"dataset.target_len is {length}, expected 1 or more.")
    if kind == "bpe":
        tokenization.check_vocabulary(vocabulary)
    found = _find(name, dataset_dir, held_out, download)
    cache = Path(cache_dir).expanduser() if cache_dir else Path("data", "tokens")
    if kind == "gpt2":
        made = tokenization.read_gpt2(_gpt2_folder(name, dataset_dir, tokenizer_dir))
    else:
        made = _learned(name, kind, vocabulary, found.train, cache)
    return _windowed(name, found, made, length, cache)


def _windowed(name: str, found: Corpus, made: Tokenizer, length: int, cache: Path) -> Text:
    """A text that was found, in tokens and windows."""
    tokens = {split: _tokens(name, split, getattr(found, split), made, cache) for split in SPLITS}
    windows = {split: Windows(tokens[split], length, whole=split == "train") for split in SPLITS}
    _check(name, windows)
    sizes = ", ".join(f"{len(tokens[split])} {split}" for split in SPLITS)
    _log.info("%s: %s tokens of %d from %s", name, sizes, made.vocabulary, found.origin)
    return Text(name, **windows, tokenizer=made, length=length, origin=found.origin)


def _find(
    name: str, dataset_dir: str | Path | None, held_out: Sequence[float], download: bool
) -> Corpus:
    """Return the corpus of a name."""
    if name == "python_topics":
        if dataset_dir:
            raise DataError(
                f"dataset.dataset_dir={str(dataset_dir)!r}: python_topics comes with Python and is "
                "read from no folder. Leave dataset.dataset_dir unset, or choose "
                "dataset.name=local."
            )
        return corpus.python_topics()
    folder = _folder(name, dataset_dir)
    if found := corpus.find(folder, held_out):
        return found
    if dataset_dir:
        state = "has no text" if folder.is_dir() else "does not exist"
        raise DataError(
            f"dataset.dataset_dir={str(dataset_dir)!r} {state} ({folder.absolute()}). Name a file, "
            f"or a folder with one of: {corpus.LAYOUTS}."
        )
    return _downloaded(name, folder, held_out, download)


def _folder(name: str, dataset_dir: str | Path | None) -> Path:
    """Return where the text is, or the file that it is."""
    if dataset_dir:
        return Path(dataset_dir).expanduser()
    if name == "local":
        raise DataError(
            "dataset.name=local needs dataset.dataset_dir, the folder or file with the text."
        )
    return Path("data", name)


def _downloaded(name: str, folder: Path, held_out: Sequence[float], download: bool) -> Corpus:
    """Return WikiText-103 after a download into `folder`.

    Raises:
      DataError: there is none; the message lists the ways to get the text.
    """
    reason = "A download was not tried, because dataset.download=false."
    if download:
        try:
            corpus.download_wikitext(folder)
        except DataError as error:
            reason = str(error)
    if found := corpus.find(folder, held_out):
        return found
    raise DataError(
        f"{name} was not found in {folder.absolute()}. {reason}\nGet it in one of two ways:\n"
        "  1. dataset.dataset_dir=FOLDER, with wiki.train.raw, wiki.valid.raw and wiki.test.raw, "
        "with wikitext-103-raw-v1.zip, or with its Parquet files;\n"
        f"  2. a network and `uv sync --extra hub`: it is downloaded into {folder.absolute()}."
    )


def _gpt2_folder(
    name: str, dataset_dir: str | Path | None, tokenizer_dir: str | Path | None
) -> Path:
    """Return where GPT-2's files are: with the text unless they have a folder of their own."""
    if tokenizer_dir:
        return Path(tokenizer_dir).expanduser()
    folder = Path("data", name) if name == "python_topics" else _folder(name, dataset_dir)
    return folder.parent if folder.is_file() else folder


def _learned(name: str, kind: str, vocabulary: int, train: Lines, cache: Path) -> Tokenizer:
    """Return the tokenizer learned on a training split, from the cache if it is there."""
    options = {"vocabulary": vocabulary} if kind == "bpe" else {}
    key = token_cache.key(format=_FORMAT, kind=kind, train=train.digest, **options)

    def write(file: BinaryIO) -> None:
        groups = _watched(train, f"learning {kind} tokens")
        file.write(tokenization.learn(kind, groups, vocabulary).to_json().encode())

    path = token_cache.entry(cache / f"{name}-{kind}-{key}.tokenizer", write, kind=kind, **options)
    return tokenization.from_json(path.read_text(encoding="utf-8-sig"))


def _tokens(name: str, split: str, part: Lines, made: Tokenizer, cache: Path) -> np.ndarray:
    """Return the tokens of a split, from the cache if they are there."""
    identity = hashlib.sha256(made.to_json().encode()).hexdigest()
    key = token_cache.key(format=_FORMAT, tokenizer=identity, text=part.digest)
    dtype = np.dtype(np.uint16 if made.vocabulary <= 1 << 16 else np.int32)
    return token_cache.tokens(
        cache / f"{name}-{split}-{key}.npy",
        lambda: map(made.encode, _watched(part, f"tokenising {split}")),
        dtype,
        text=part.digest,
        tokenizer=identity,
        vocabulary=made.vocabulary,
    )


def _watched(part: Lines, what: str) -> Iterator[list[str]]:
    """Return the lines in groups, with a bar on a terminal when that takes long."""
    start = time.monotonic()
    console = Console()
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=part.size)
    try:
        for group in part.groups():
            yield group
            bar.advance(task, sum(len(line.encode()) for line in group))
            if time.monotonic() - start > _PATIENCE_SECONDS:
                bar.start()  # does nothing the second time
    finally:
        bar.stop()
    _log.info("%s: %d bytes, %.1f s", what, part.size, time.monotonic() - start)


def _check(name: str, windows: dict[str, Windows]) -> None:
    """Raise `DataError` for the first split without a window."""
    for split, part in windows.items():
        if len(part):
            continue
        found = len(part.tokens)
        least = part.length + 1 if part.whole else 2
        remedy = (
            f"Set dataset.target_len to {found - 1} or less, or give more text."
            if found > 1
            else "Give more text: the first token of a split is no target."
        )
        raise DataError(
            f"{name}, {split} split: {found} tokens, expected {least} or more for one window of "
            f"target_len {part.length}. {remedy}"
        )
