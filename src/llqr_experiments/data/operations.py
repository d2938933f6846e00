"""The grokking sets: a binary operation on a small group, of which a part is seen.

  p          prime, the size of the modular groups
  k          what the permutations permute; their group has k! elements
  G          size of the group, p or k!
  tokens     0 is the operation, 1 is "=", 2 + i is element i
  example    (a, operation, b, "=") -> i, the result

  mod_sum        a + b mod p                every a, b
  mod_subtract   a - b mod p                every a, b
  mod_mul        a b mod p                  every a, b
  mod_division   a b^(p - 2) mod p          b from 1; it is the c with c b = a mod p
  mod_exp        a^b mod p                  b from 1, an integer and no element of the group
  permutation    x -> a(b(x))               every a, b, numbered in lexicographic order

Every element is the result of some pair, and so the classes are the G elements.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from llqr.errors import unknown
from llqr_experiments.errors import DataError

LENGTH = 4
"""Tokens of an example."""

_LARGEST_P = 5000
_LARGEST_K = 6


@dataclasses.dataclass(frozen=True)
class Equations:
    """Some of the pairs with their results: `Examples` for the pipeline.

    The original draws every batch anew, B distinct examples of all. Here the pipeline shuffles
    epochs as for any other set, so that each example is seen equally often.

    Attributes:
      tokens: (n, 4) int32.
      labels: (n,) int32, in [0, G).
    """

    tokens: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples `index`, (B,) integers.

        Returns:
          "tokens": (B, 4) int32; "label": (B,) int32.
        """
        return {"tokens": self.tokens[index], "label": self.labels[index]}

    def draw(
        self, index: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return what `gather` does: nothing about these examples is random."""
        del rng
        return self.gather(index if rows is None else index[rows])


@dataclasses.dataclass(frozen=True)
class Grokking:
    """A training and a test split of all equations of an operation.

    Attributes:
      name: the operation.
      train: the equations to fit.
      test: all others.
      num_classes: G.
      vocabulary: 2 + G, how many tokens there are.
      length: 4, tokens of an example.
      origin: how the set was made, for logs and reports.
    """

    name: str
    train: Equations
    test: Equations
    num_classes: int
    vocabulary: int
    length: int = LENGTH
    origin: str = ""


def grokking(
    operation: str, *, p: int = 97, k: int = 5, train_fraction: float = 0.6, seed: int = 0
) -> Grokking:
    """Return all equations of an operation, split at random.

    Args:
      operation: one of `OPERATIONS`.
      p: size of the modular groups, a prime of at most 5,000; `permutation` has no use for it.
      k: what is permuted, 2 to 6; only `permutation` uses it.
      train_fraction: share of the equations to train on, rounded down to a whole number of them.
      seed: of the split. Frozen: it is the same with every version of numpy.

    Returns:
      The two splits; together they have every equation once.

    Raises:
      DataError: the operation is unknown, `p` or `k` is not legal, or a split would be empty.

    Example:
      >>> data = grokking("mod_division", p=5)
      >>> len(data.train), len(data.test), data.num_classes, data.vocabulary
      (12, 8, 5, 7)
      >>> data.train.gather(np.array([0]))  # 4 / 3 = 3 modulo 5
      {'tokens': array([[6, 0, 5, 1]], dtype=int32), 'label': array([3], dtype=int32)}
    """
    if operation not in OPERATIONS:
        raise DataError(unknown("operation", operation, OPERATIONS))
    if operation == "permutation":
        group, where = _factorial(k), f"permutations of {k}"
        a, b = _pairs(group, 0)
        result = _compose(a, b, k)
    else:
        first, compute = _MODULAR[operation]
        group, where = _prime(p), f"integers modulo {p}"
        a, b = _pairs(p, first)
        result = compute(a, b, p)
    tokens = np.stack([2 + a, np.zeros_like(a), 2 + b, np.ones_like(a)], axis=1).astype(np.int32)
    labels = result.astype(np.int32)
    shown, hidden = _split(len(labels), train_fraction, seed)
    return Grokking(
        name=operation,
        train=Equations(tokens[shown], labels[shown]),
        test=Equations(tokens[hidden], labels[hidden]),
        num_classes=group,
        vocabulary=2 + group,
        origin=f"{len(labels)} equations of {where}, generated, split with seed {seed}",
    )


def _pairs(group: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all (a, b) with b >= first in lexicographic order, two (n,) int64."""
    a, b = np.meshgrid(np.arange(group), np.arange(first, group), indexing="ij")
    return a.ravel(), b.ravel()


def _split(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples of the training and of the test split."""
    if seed < 0:
        raise DataError(f"seed is {seed}, expected 0 or more.")
    if not 0 < fraction < 1:
        raise DataError(f"train_fraction is {fraction}, expected more than 0 and less than 1.")
    # Of the decimal fraction: 0.29 of 100 is 29, and 28.999999999999996 in floating point.
    count = math.floor(Fraction(str(fraction)) * n)
    if count == 0:
        raise DataError(
            f"train_fraction is {fraction}: it leaves none of {n} equations to train on, expected "
            f"{1 / n:.2g} or more."
        )
    # RandomState is the generator whose stream numpy has frozen.
    order = np.random.RandomState(seed).permutation(n)
    return order[:count], order[count:]


def _prime(p: int) -> int:
    """Return `p` if it is a prime that is not too large."""
    if not 2 <= p <= _LARGEST_P:
        raise DataError(f"p is {p}, expected a prime from 2 to {_LARGEST_P}.")
    if factor := _factor(p):
        near = min(
            (q for q in range(2, _LARGEST_P) if not _factor(q)), key=lambda q: (abs(q - p), q)
        )
        raise DataError(
            f"p is {p} = {factor} x {p // factor}, expected a prime: division needs one. The "
            f"nearest is {near}."
        )
    return p


def _factor(number: int) -> int | None:
    """Return the smallest factor of a number above 1, None for a prime."""
    return next((d for d in range(2, math.isqrt(number) + 1) if number % d == 0), None)


def _factorial(k: int) -> int:
    """Return k!, the number of permutations, if they are not too many."""
    if not 2 <= k <= _LARGEST_K:
        raise DataError(f"k is {k}, expected 2 to {_LARGEST_K}.")
    return math.factorial(k)


def _power(base: np.ndarray, exponent: np.ndarray, p: int) -> np.ndarray:
    """Return base^exponent mod p, by squaring: a step per bit of the largest exponent."""
    result = np.ones_like(base)
    exponent = np.broadcast_to(exponent, base.shape).copy()
    while exponent.any():
        result = np.where(exponent & 1, result * base % p, result)
        base, exponent = base * base % p, exponent >> 1
    return result


def _compose(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Return the numbers of the permutations x -> a(b(x)), (n,), for numbers (n,)."""
    permutations = np.array(list(itertools.permutations(range(k))))
    composed = permutations[a[:, None], permutations[b]]
    # Read as numbers in base k, permutations in lexicographic order are sorted.
    weights = k ** np.arange(k - 1, -1, -1)
    return np.searchsorted(permutations @ weights, composed @ weights)


_Modular = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
# Name -> the first b, and the results of pairs (n,), (n,).
_MODULAR: dict[str, tuple[int, _Modular]] = {
    "mod_sum": (0, lambda a, b, p: (a + b) % p),
    "mod_subtract": (0, lambda a, b, p: (a - b) % p),
    "mod_mul": (0, lambda a, b, p: a * b % p),
    "mod_division": (1, lambda a, b, p: a * _power(b, np.asarray(p - 2), p) % p),
    "mod_exp": (1, _power),
}
OPERATIONS = (*_MODULAR, "permutation")
"""Names of the operations."""
