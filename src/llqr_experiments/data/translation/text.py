"""From numbers back to text, and how good a text is."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from llqr.errors import check_choice
from llqr_experiments.data.translation.vocabulary import UNK, Vocabulary
from llqr_experiments.errors import DataError

UNKNOWN_HYPOTHESIS = "UNKNOWNTOKENINHYP"
UNKNOWN_REFERENCE = "UNKNOWNTOKENINREF"
"""Two, so that a word that is unknown to both sides is no match."""

Detokeniser = Literal["moses", "space"]


def join_subwords(words: Sequence[str]) -> str:
    """Return the tokens of a sentence, apart by blanks, from its sub-words.

    Example:
      >>> join_subwords(["low@@", "er", "prices", "."])
      'lower prices .'
    """
    # A sentence that was cut short may end in a part of a word.
    return " ".join(words).replace("@@ ", "").removesuffix("@@")


def detokenise(
    numbers: Sequence[int] | np.ndarray,
    vocabulary: Vocabulary,
    *,
    unknown: str = UNKNOWN_HYPOTHESIS,
    detokeniser: Detokeniser = "moses",
    language: str = "en",
) -> str:
    """Return the text that numbers stand for.

    Args:
      numbers: (m,) integers; those after the first end of sentence do not count, nor do the other
        special ones.
      vocabulary: what the numbers are of.
      unknown: stands for an unknown word; `UNKNOWN_HYPOTHESIS` or `UNKNOWN_REFERENCE`.
      detokeniser: "moses" joins punctuation to its word; "space" leaves the tokens apart.
      language: of the text, for Moses' rules.

    Raises:
      DataError: sacremoses is not installed.
      IndexError: a number is not in the vocabulary.
      ValueError: the detokeniser is unknown.

    Example:
      >>> vocabulary = Vocabulary.of({"hel@@": 2, "lo": 2, ",": 1, "you": 1, ".": 1})
      >>> detokenise(vocabulary.encode("hel@@ lo , you .".split()), vocabulary)
      'hello, you.'
    """
    check_choice("detokeniser", detokeniser, ("moses", "space"))
    replaced = vocabulary.words[UNK]
    words = [unknown if word == replaced else word for word in vocabulary.decode(numbers)]
    text = join_subwords(words)
    return text if detokeniser == "space" else _moses(language)(text.split())


@functools.cache
def _moses(language: str) -> Callable[[Sequence[str]], str]:
    """Return Moses' detokeniser; it takes a while to make."""
    try:
        from sacremoses import MosesDetokenizer
    except ImportError as error:
        raise DataError(
            "detokenising as Moses does needs sacremoses: `pip install "
            "'llqr[experiments,translation]'`. detokeniser='space' needs nothing."
        ) from error
    return MosesDetokenizer(lang=language).detokenize


@dataclasses.dataclass(frozen=True)
class Bleu:
    """Corpus BLEU, by sacrebleu.

    Attributes:
      score: in [0, 100].
      counts: matched n-grams for n = 1 to 4.
      totals: n-grams of the hypotheses, likewise.
      hypothesis_length: words of the hypotheses, as sacrebleu tokenises them.
      reference_length: words of the references.
      signature: how it was computed, to be quoted with the score.
    """

    score: float
    counts: tuple[int, ...]
    totals: tuple[int, ...]
    hypothesis_length: int
    reference_length: int
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """Return the BLEU of a corpus, one reference a hypothesis.

    Args:
      hypotheses: sentences, detokenised.
      references: as many.

    Raises:
      DataError: sacrebleu is not installed.
      ValueError: there is no sentence, or not as many of one as of the other.

    Example:
      >>> bleu(["the cat sat on the mat."], ["the cat sat on the mat."]).score.__round__(6)
      100.0
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} hypotheses and {len(references)} references, expected as many, and "
            "at least one."
        )
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise DataError(
            "BLEU needs sacrebleu: `pip install 'llqr[experiments,translation]'`."
        ) from error
    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return Bleu(
        float(score.score),
        tuple(map(int, score.counts)),
        tuple(map(int, score.totals)),
        int(score.sys_len),
        int(score.ref_len),
        str(metric.get_signature()),
    )
