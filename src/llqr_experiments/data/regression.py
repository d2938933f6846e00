"""Tables of numbers: from columns to one number, half to train on and half to test on.

  diabetes   442 patients, 10 columns -> progress of the disease a year later (scikit-learn)
  lorentz    force on a charge, q (E + B v sin a), of five random columns: a formula without noise

Columns and numbers are standardised, by the training rows; the error is relative to the numbers.

Source of the formula: Udrescu and Tegmark, AI Feynman (arXiv 1905.11481), I.12.11.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llqr_experiments.data.examples import Batch, Still

_ROWS = 2000


@dataclass(frozen=True)
class Lines(Still):
    """Rows of a table, as examples.

    Attributes:
      x: (n, columns), float64.
      label: (n,), float64.
    """

    x: np.ndarray
    label: np.ndarray

    def gather(self, index: np.ndarray) -> Batch:
        """Return "x", (B, columns), and "label", (B,)."""
        return {"x": self.x[index], "label": self.label[index]}


@dataclass(frozen=True)
class Table:
    """A table in two halves.

    Attributes:
      name: of the table.
      train: every second row, of a random order that is always the same.
      test: the others.
    """

    name: str
    train: Lines
    test: Lines

    @property
    def columns(self) -> int:
        """How many there are, without the number that is to be told."""
        return self.train.x.shape[1]


def load(name: str) -> Table:
    """Return a table of `NAMES`.

    >>> table = load("lorentz")
    >>> len(table.train), len(table.test), table.columns
    (1000, 1000, 5)
    """
    x, y = _TABLES[name]()
    order = np.random.RandomState(0).permutation(len(y))
    train, test = order[::2], order[1::2]
    columns = (x - x[train].mean(0)) / x[train].std(0)
    numbers = (y - y[train].mean()) / y[train].std()
    return Table(name, *(Lines(columns[rows], numbers[rows]) for rows in (train, test)))


def _diabetes() -> tuple[np.ndarray, np.ndarray]:
    # Imported here because scikit-learn takes a second to import.
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    return np.asarray(x, float), np.asarray(y, float)


def _lorentz() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.RandomState(1).uniform(1.0, 5.0, (_ROWS, 5))
    charge, electric, magnetic, speed, angle = x.T
    return x, charge * (electric + magnetic * speed * np.sin(angle))


_TABLES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "diabetes": _diabetes,
    "lorentz": _lorentz,
}
NAMES = tuple(_TABLES)
"""Of the tables."""
