"""What is done to text before a model sees it: tokenise, clean, lowercase, byte-pair encode.

The files of a prepared folder, each line a sentence and line i of one language the translation of
line i of the other:

  train, valid, test .de .en   sub-words apart by blanks; "@@" ends those that go on
  code                         the merges, in subword-nmt's format
  work/                        what lies between; needed only to go on after an interruption
"""

import contextlib
import importlib.metadata
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llqr_experiments.data.translation.files import Stage, Track, read_lines, write_lines
from llqr_experiments.errors import DataError

LANGUAGES = ("de", "en")
SPLITS = ("train", "valid", "test")
PRODUCTS = ("code", *(f"{split}.{lang}" for split in SPLITS for lang in LANGUAGES))
_EXTRA = "install them with `pip install 'llqr[experiments,translation]'`"


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide what the files hold.

    Raises:
      DataError: one is not installed.
    """
    try:
        return {p: importlib.metadata.version(p) for p in ("sacremoses", "subword-nmt")}
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"preparing text needs sacremoses and subword-nmt, and {error.name} is not "
            f"installed; {_EXTRA}."
        ) from error


def tokenizer(language: str) -> Callable[[str], str]:
    """Return the Moses tokeniser of a language: a sentence -> its tokens, apart by blanks.

    Example:
      >>> tokenizer("en")("It's 5% more, isn't it?")
      'It &apos;s 5 % more , isn &apos;t it ?'
    """
    from sacremoses import MosesTokenizer

    moses = MosesTokenizer(lang=language)
    return lambda line: str(moses.tokenize(line, return_str=True))


def clean(
    pairs: Iterable[tuple[str, str]], *, ratio: float = 1.5, longest: int = 175
) -> Iterator[tuple[str, str]]:
    """Keep the pairs of 1 to `longest` tokens whose lengths differ by `ratio` at most.

    The rule of Moses' `clean-corpus-n`, which also makes every run of blanks one.

    Example:
      >>> list(clean([("ja  .", "yes ."), ("ja", "yes of"), ("", "")]))
      [('ja .', 'yes .')]
    """
    for pair in pairs:
        source, target = (side.split() for side in pair)
        short, long = sorted((len(source), len(target)))
        if short >= 1 and long <= longest and long / short <= ratio:
            yield " ".join(source), " ".join(target)


class _Counter(io.StringIO):
    """A text file that takes one tick for each line written to it."""

    def __init__(self, ticks: Iterator[Any]) -> None:
        super().__init__()
        self._ticks = ticks

    def write(self, text: str, /) -> int:
        next(self._ticks, None)
        return super().write(text)


def learn_bpe(lines: Sequence[str], merges: int, track: Track) -> list[str]:
    """Return the lines of the code file: a header, and one merge a line.

    Args:
      lines: tokenised sentences.
      merges: how many to learn; fewer if no pair of symbols is left that occurs twice.
      track: shows the progress.

    Raises:
      DataError: no word has two letters.
    """
    from subword_nmt.learn_bpe import learn_bpe as learn

    if all(len(word) < 2 for line in lines for word in line.split(" ")):
        raise DataError(
            f"byte-pair encoding: none of {len(lines)} sentences has a word of two letters."
        )
    ticks = iter(track(range(merges + 1), merges + 1, "byte pairs"))
    code = _Counter(ticks)
    # It draws a progress bar of its own on the error stream.
    with contextlib.redirect_stderr(io.StringIO()):
        learn(lines, code, merges)
    for _ in ticks:  # it may have stopped early
        pass
    return code.getvalue().removesuffix("\n").split("\n")


def segmenter(code: Sequence[str]) -> Callable[[str], str]:
    """Return the function that splits the words of a tokenised sentence into sub-words.

    Args:
      code: as `learn_bpe` returns it.

    Example:
      >>> segmenter(["#version: 0.2", "l o", "lo w</w>"])("low lower")
      'low lo@@ w@@ e@@ r'
    """
    from subword_nmt.apply_bpe import BPE

    return BPE(io.StringIO("\n".join(code) + "\n")).process_line


def bpe_stages(merges: int) -> list[Stage]:
    """Return the stages from `work/<split>.<language>` to the products.

    The merges are learned on both languages together, and on the training split alone.
    """

    def learn(inputs: Sequence[Path], outputs: Sequence[Path], track: Track) -> None:
        lines = [line for path in inputs for line in read_lines(path)]
        write_lines(outputs[0], learn_bpe(lines, merges, track))

    def apply(inputs: Sequence[Path], outputs: Sequence[Path], track: Track) -> None:
        split = segmenter(read_lines(inputs[0]))
        for source, path in zip(inputs[1:], outputs, strict=True):
            lines = read_lines(source)
            write_lines(path, map(split, track(lines, len(lines), source.name)))

    stages = [Stage("learn", tuple(f"work/train.{lang}" for lang in LANGUAGES), ("code",), learn)]
    for split in SPLITS:
        names = tuple(f"{split}.{lang}" for lang in LANGUAGES)
        work = tuple(f"work/{name}" for name in names)
        stages.append(Stage(f"apply-{split}", ("code", *work), names, apply))
    return stages
