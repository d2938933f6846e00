"""The words of one language: four special ones, and then the commonest first."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

BOS, PAD, EOS, UNK = range(4)
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Words and their numbers.

    Attributes:
      words: number -> word: the four of `SPECIALS`, the words of the corpus, and filler words
        that make the size a multiple of 8, which suits matrix units.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> "Vocabulary":
        """Return the vocabulary of a corpus: the commonest word first, ties by code points.

        Args:
          counts: word -> how often it occurs. A word that is spelt like a special one is none of
            the vocabulary.

        Example:
          >>> Vocabulary.of({"b": 2, "a": 2, "c": 3}).words[4:]
          ('c', 'a', 'b', 'madeupword0000')
        """
        known = sorted(counts.keys() - set(SPECIALS), key=lambda word: (-counts[word], word))
        words = [*SPECIALS, *known]
        fillers = range(-len(words) % _MULTIPLE)
        return cls((*words, *(f"madeupword{i:04d}" for i in fillers)))

    def __len__(self) -> int:
        return len(self.words)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Word -> number, without the special ones: text cannot end a sentence, or hide in one."""
        return {word: i for i, word in enumerate(self.words) if i >= len(SPECIALS)}

    def encode(self, words: Iterable[str]) -> list[int]:
        """Return the numbers of the words of a sentence, and of its end.

        Example:
          >>> Vocabulary.of({"a": 1}).encode(["a", "zebra"])
          [4, 3, 2]
        """
        return [*(self.numbers.get(word, UNK) for word in words), EOS]

    def decode(self, numbers: Sequence[int] | np.ndarray) -> list[str]:
        """Return the words up to the first end of sentence, without `<s>` and `<pad>`.

        Raises:
          IndexError: a number is not in the vocabulary.
        """
        words = []
        for number in map(int, numbers):
            if number == EOS:
                break
            if not 0 <= number < len(self):
                raise IndexError(f"word {number} is not in a vocabulary of {len(self)}.")
            if number not in (BOS, PAD):
                words.append(self.words[number])
        return words
