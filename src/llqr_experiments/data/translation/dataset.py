"""The translation datasets by name.

iwslt14_de_en   IWSLT'14, prepared by `python -m llqr_experiments.data.iwslt14`
small_de_en     LibreOffice's help, prepared by `python -m llqr_experiments.data.small_translation`
numbers_de_en   number words; made, needs no file
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from llqr.errors import unknown
from llqr_experiments.data.translation import number_words
from llqr_experiments.data.translation.batching import Bucketing, check_lengths
from llqr_experiments.data.translation.corpus import Corpus, Pairs, number, read
from llqr_experiments.data.translation.vocabulary import Vocabulary
from llqr_experiments.errors import DataError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A dataset that a command prepares.

    Attributes:
      folder: where it is looked for.
      variable: environment variable that names another folder; "" for none.
      remedy: the commands that make the folder.
    """

    folder: str
    variable: str
    remedy: str


_PREPARED: Mapping[str, _Prepared] = MappingProxyType(
    {
        "iwslt14_de_en": _Prepared(
            "data/iwslt14.tokenized.de-en",
            "IWSLT14_DATA_DIR",
            "python -m llqr_experiments.data.iwslt14 download --out data\n"
            "  python -m llqr_experiments.data.iwslt14 prepare data/de-en.tgz",
        ),
        "small_de_en": _Prepared(
            "data/small.tokenized.de-en",
            "",
            "apt-get download libreoffice-help-de libreoffice-help-en-us\n"
            "  for f in libreoffice-help-*.deb; do dpkg-deb -x $f libreoffice-help; done\n"
            "  python -m llqr_experiments.data.small_translation prepare libreoffice-help",
        ),
    }
)
NUMBERS = "numbers_de_en"


@dataclasses.dataclass(frozen=True)
class Translation:
    """Sentence pairs, German to English.

    Attributes:
      name: the name it is loaded by.
      train: the split to fit.
      valid: the split to choose by.
      test: the split to report.
      source: vocabulary of the source sentences.
      target: vocabulary of the target sentences.
      bucketing: how batches are made of them.
      origin: where the data came from, for logs and reports.
    """

    name: str
    train: Pairs
    valid: Pairs
    test: Pairs
    source: Vocabulary
    target: Vocabulary
    bucketing: Bucketing
    origin: str = ""


def names() -> tuple[str, ...]:
    """Return the names that `load` knows."""
    return (*sorted(_PREPARED), NUMBERS)


def load(
    name: str,
    dataset_dir: str | Path | None = None,
    *,
    bucketing: Bucketing | None = None,
    max_length: int = 1024,
    cache_dir: str | Path | None = None,
) -> Translation:
    """Load a dataset by name.

    The files are taken from `dataset_dir` if it is given, and from nowhere else. Otherwise from the
    folder that the environment variable IWSLT14_DATA_DIR names (iwslt14_de_en), or else from
    `./data/iwslt14.tokenized.de-en` or `./data/small.tokenized.de-en`.

    Args:
      name: one of `names()`.
      dataset_dir: folder with {train,valid,test}.{de,en}.
      bucketing: how batches are made; None for the defaults.
      max_length: most words of a sentence that the model takes, its end included.
      cache_dir: where the numbered words are kept; None for the folder of the files.

    Returns:
      The dataset; no split is empty.

    Raises:
      DataError: the name is unknown, a file is missing or broken, or a sentence is too long.

    Example:
      >>> data = load("numbers_de_en")
      >>> len(data.train), len(data.source), len(data.target)
      (8000, 64, 48)
    """
    if name == NUMBERS:
        if dataset_dir is not None:
            raise DataError(
                f"dataset.dataset_dir={str(dataset_dir)!r}: number words are made, and read from "
                "no folder. Leave dataset.dataset_dir unset."
            )
        corpus, origin = number(number_words.corpus(), where=name), "made"
    elif name in _PREPARED:
        folder = _locate(name, dataset_dir)
        cache = Path(cache_dir).expanduser() if cache_dir is not None else None
        corpus, origin = read(folder, cache), str(folder.absolute())
    else:
        raise DataError(unknown("dataset", name, names()))
    return _checked(name, corpus, bucketing or Bucketing(), max_length, origin)


def _checked(
    name: str, corpus: Corpus, bucketing: Bucketing, max_length: int, origin: str
) -> Translation:
    """Return a corpus as a dataset, if the model can take it."""
    for split, pairs in corpus.splits.items():
        check_lengths(pairs, split, max_length)
    _log.info(
        "%s: %s pairs, %d and %d words, from %s",
        name,
        ", ".join(f"{len(pairs)} {split}" for split, pairs in corpus.splits.items()),
        len(corpus.source),
        len(corpus.target),
        origin,
    )
    return Translation(
        name,
        **corpus.splits,
        source=corpus.source,
        target=corpus.target,
        bucketing=bucketing,
        origin=origin,
    )


def _locate(name: str, dataset_dir: str | Path | None) -> Path:
    """Return the folder of a prepared dataset."""
    known = _PREPARED[name]
    if dataset_dir is not None:
        folder, why = Path(dataset_dir).expanduser(), "dataset.dataset_dir"
    elif os.environ.get(known.variable):
        folder, why = Path(os.environ[known.variable]).expanduser(), known.variable
    else:
        folder, why = Path(known.folder), "the default"
    if not folder.is_dir():
        raise DataError(
            f"{name} was not found: {folder.absolute()} ({why}) is no folder. Set "
            f"dataset.dataset_dir to the folder that has it, or make it:\n  {known.remedy}"
        )
    return folder
