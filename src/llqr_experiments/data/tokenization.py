"""Tokenizers: from lines of text to numbers and back.

  char   a token per character of the training text, and one for all others
  bpe    byte pairs merged by frequency, learned on the training text
  gpt2   byte pairs of GPT-2, from its own files

Each line is encoded alone, its line end included, and so the tokens do not depend on how much text
is encoded at a time. Byte pairs encode every text without loss: bytes are in the vocabulary.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llqr.errors import unknown
from llqr_experiments.data.optional import require
from llqr_experiments.errors import DataError

KINDS = ("char", "bpe", "gpt2")
"""Names of the tokenizers."""

UNKNOWN = 0
"""The token of a character that the training text does not have."""

_CODE_POINTS = 0x110000
_BYTES = 256
# OpenAI's names of the two files come second.
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class Tokenizer(Protocol):
    """What encodes a split and decodes samples."""

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens: they are 0 .. vocabulary - 1."""
        ...

    def encode(self, lines: Sequence[str]) -> np.ndarray:
        """Return the tokens of all lines one after the other, (n,) int32."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of tokens, (n,) integers."""
        ...

    def to_json(self) -> str:
        """Return what `from_json` makes the same tokenizer of."""
        ...


@dataclasses.dataclass(frozen=True)
class Characters:
    """A token per character; `UNKNOWN` for those that it does not know.

    Attributes:
      characters: the known ones, sorted; the token of the first is 1.

    Example:
      >>> tokenizer = Characters("abn")
      >>> tokenizer.encode(["banana!"])
      array([2, 1, 3, 1, 3, 1, 0], dtype=int32)
      >>> tokenizer.decode(tokenizer.encode(["banana!"]))
      'banana�'
    """

    characters: str

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens."""
        return 1 + len(self.characters)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Token of every code point."""
        table = np.full(_CODE_POINTS, UNKNOWN, np.int32)
        table[_code_points(self.characters)] = np.arange(1, self.vocabulary)
        return table

    def encode(self, lines: Sequence[str]) -> np.ndarray:
        """Return the tokens of all lines one after the other, (n,) int32."""
        return self._table[_code_points("".join(lines))]

    def decode(self, ids: np.ndarray) -> str:
        """Return the text; a replacement character stands for the unknown."""
        alphabet = "\N{REPLACEMENT CHARACTER}" + self.characters
        return "".join(alphabet[i] for i in ids)

    def to_json(self) -> str:
        """Return what `from_json` makes the same tokenizer of."""
        return json.dumps({"characters": self.characters})


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """A tokenizer of the `tokenizers` package: byte-level BPE."""

    tokenizer: Any

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens."""
        return self.tokenizer.get_vocab_size()

    def encode(self, lines: Sequence[str]) -> np.ndarray:
        """Return the tokens of all lines one after the other, (n,) int32."""
        encoded = self.tokenizer.encode_batch_fast(list(lines), add_special_tokens=False)
        return np.fromiter((i for line in encoded for i in line.ids), np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Return the text; a replacement character stands for a part of a character."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def to_json(self) -> str:
        """Return what `from_json` makes the same tokenizer of."""
        return self.tokenizer.to_str()


def from_json(text: str) -> Tokenizer:
    """Return the tokenizer whose `to_json` is `text`."""
    content = json.loads(text)
    if "characters" in content:
        return Characters(content["characters"])
    return BytePairs(_package().Tokenizer.from_str(text))


def learn(kind: str, lines: Iterable[Sequence[str]], vocabulary: int) -> Tokenizer:
    """Learn a tokenizer from a training text.

    Args:
      kind: "char" or "bpe".
      lines: the text in groups of lines, read once.
      vocabulary: of "bpe", the most tokens: 256 bytes and merges. There are fewer when the text
        has no more pairs that occur twice.

    Raises:
      DataError: the vocabulary is too small.
    """
    if kind == "char":
        seen = np.zeros(_CODE_POINTS, bool)
        for group in lines:
            seen[_code_points("".join(group))] = True
        return Characters("".join(map(chr, np.flatnonzero(seen))))
    check_vocabulary(vocabulary)
    package = _package()
    tokenizer = _byte_level(package.models.BPE())
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        # In the order of their code points, and not of a hash.
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for group in lines for line in group), trainer)
    return BytePairs(tokenizer)


def check_vocabulary(vocabulary: int) -> None:
    """Raise `DataError` if byte pairs cannot have so few tokens."""
    if vocabulary < _BYTES:
        raise DataError(
            f"a bpe vocabulary of {vocabulary} tokens, expected {_BYTES} or more: each byte is one."
        )


def read_gpt2(folder: Path) -> Tokenizer:
    """Read GPT-2's tokenizer.

    Args:
      folder: with `vocab.json` and `merges.txt`, or under OpenAI's names `encoder.json` and
        `vocab.bpe`.

    Returns:
      The tokenizer. It adds no token of its own; `<|endoftext|>` in a text is text.

    Raises:
      DataError: a file is missing or broken, or a byte has no token.
    """
    for names in _GPT2_FILES:
        vocabulary, merges = (folder / name for name in names)
        if vocabulary.is_file() and merges.is_file():
            break
    else:
        pairs = " nor ".join(" and ".join(names) for names in _GPT2_FILES)
        raise DataError(
            f"{folder.absolute()} has neither {pairs}. Put GPT-2's tokenizer files there, or name "
            "the folder that has them with dataset.tokenizer_dir; or choose dataset.tokenizer=bpe."
        )
    package = _package()
    try:
        tokens, pairs = package.models.BPE.read_file(str(vocabulary), str(merges))
    except Exception as error:  # the package raises no other type
        fault = str(error)
    else:
        fault = _byte_level_fault(tokens, pairs, package.pre_tokenizers.ByteLevel.alphabet())
    if fault:
        raise DataError(
            f"{vocabulary.absolute()} and {merges.name} are no tokenizer of byte pairs: {fault}. "
            "Get both files again, from the same model."
        )
    return BytePairs(_byte_level(package.models.BPE(tokens, pairs)))


def _byte_level_fault(
    tokens: dict[str, int], merges: list[tuple[str, str]], alphabet: list[str]
) -> str:
    """Return what is wrong with a vocabulary and its merges, an empty string for nothing.

    The package itself drops bytes without a token, and crashes on merges without one.
    """
    if missing := set(alphabet) - set(tokens):
        return f"{len(missing)} of {_BYTES} bytes have no token"
    if set(tokens.values()) != set(range(len(tokens))):
        return f"the {len(tokens)} tokens are not numbered 0 to {len(tokens) - 1}"
    for line, (left, right) in enumerate(merges, 1):
        if not {left, right, left + right} <= tokens.keys():
            return f"merge {line}, {left!r} and {right!r}, is of or to something that is no token"
    return ""


def check_kind(kind: str) -> None:
    """Raise `DataError` if there is no such tokenizer."""
    if kind not in KINDS:
        raise DataError(unknown("tokenizer", kind, KINDS))


def _byte_level(model: Any) -> Any:
    """Return GPT-2's way from text to tokens and back around a model."""
    package = _package()
    tokenizer = package.Tokenizer(model)
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    return tokenizer


def _package() -> Any:
    return require("tokenizers", extra="text", reason="a byte-pair tokenizer")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
