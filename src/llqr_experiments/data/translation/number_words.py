"""German and English number words: a parallel corpus that is made and not fetched.

It is small and exact, and not trivial: the two languages order tens and units differently
(`dreiundvierzig`, `forty-three`), and German writes a number as one word. The words come split
into their parts as byte pairs would be, so that no merges need to be learned.
"""

import numpy as np

from llqr_experiments.data.translation.recipe import LANGUAGES, SPLITS

LIMIT = 1_000_000
"""Numbers from 0 to one less."""

SIZES = {"train": 8000, "valid": 500, "test": 500}

_ONES = {
    "de": "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn",
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen",
}
_TENS = {
    "de": "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    "en": "twenty thirty forty fifty sixty seventy eighty ninety",
}
_SMALL = {language: tuple(words.split()) for language, words in _ONES.items()}
_TENFOLD = {language: ("", "", *words.split()) for language, words in _TENS.items()}


def german(number: int) -> list[str]:
    """Return the parts of the German word for a number.

    Args:
      number: in [0, 999999].

    Raises:
      ValueError: it is not.

    Example:
      >>> "".join(german(43_701))
      'dreiundvierzigtausendsiebenhunderteins'
    """
    _check(number)
    thousands, rest = divmod(number, 1000)
    parts = [*_german_below_thousand(thousands), "tausend"] if thousands else []
    if rest or not thousands:
        parts += _german_below_thousand(rest)
    # Counting ends in "eins"; inside a word, one is "ein".
    return [*parts[:-1], "eins"] if parts[-1] == "ein" else parts


def _german_below_thousand(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    parts = [_SMALL["de"][hundreds], "hundert"] if hundreds else []
    if hundreds and not rest:
        return parts
    if rest < 20:
        return [*parts, _SMALL["de"][rest]]
    tens, ones = divmod(rest, 10)
    return [*parts, *([_SMALL["de"][ones], "und"] if ones else []), _TENFOLD["de"][tens]]


def english(number: int) -> list[str]:
    """Return the words of a number in British English; a hyphen is one of them.

    Args:
      number: in [0, 999999].

    Raises:
      ValueError: it is not.

    Example:
      >>> " ".join(english(43_701)).replace(" - ", "-")
      'forty-three thousand seven hundred and one'
    """
    _check(number)
    thousands, rest = divmod(number, 1000)
    words = [*_english_below_thousand(thousands), "thousand"] if thousands else []
    if thousands and 0 < rest < 100:
        words.append("and")
    if rest or not thousands:
        words += _english_below_thousand(rest)
    return words


def _english_below_thousand(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    words = [_SMALL["en"][hundreds], "hundred"] if hundreds else []
    if hundreds and not rest:
        return words
    if hundreds:
        words.append("and")
    if rest < 20:
        return [*words, _SMALL["en"][rest]]
    tens, ones = divmod(rest, 10)
    return [*words, _TENFOLD["en"][tens], *(["-", _SMALL["en"][ones]] if ones else [])]


def corpus() -> dict[str, dict[str, list[str]]]:
    """Return split -> language -> sentences, sub-words apart by blanks.

    Every number occurs once at most in all splits together. Numbers of one to six digits are
    about equally many, as far as there are any. It is the same on every machine for ever.
    """
    # RandomState is the generator whose stream numpy has frozen.
    random = np.random.RandomState(0)
    total = sum(SIZES.values())
    drawn: dict[int, None] = {}
    while len(drawn) < total:
        drawn[int(random.randint(10 ** random.randint(1, 7)))] = None
    order = np.array(list(drawn))[random.permutation(total)]
    text, start = {}, 0
    for split in SPLITS:
        numbers = [int(number) for number in order[start : start + SIZES[split]]]
        start += SIZES[split]
        sides = [[_line(number, la) for number in numbers] for la in LANGUAGES]
        text[split] = dict(zip(LANGUAGES, sides, strict=True))
    return text


def _line(number: int, language: str) -> str:
    """Return the sub-words of a number, those that go on with `@@`."""
    if language == "de":
        return "@@ ".join(german(number))
    return " ".join(english(number)).replace(" - ", "@@ -@@ ")


def _check(number: int) -> None:
    if not 0 <= number < LIMIT:
        raise ValueError(f"number is {number}, expected 0 to {LIMIT - 1}.")
