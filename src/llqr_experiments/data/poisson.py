"""A differential equation as rows to fit: Poisson's on the unit square, whose solution is known.

    -Laplacian u = f  inside,   u = 0  on the boundary,   u(x, y) = sin(pi x) sin(pi y)

A row asks for a u(x) - b Laplacian u(x) at a point x: `operator` is (a, b) and `label` the value.
Inside, (a, b) = (0, 1) and the label is f; on the boundary, (a, b) = (`BOUNDARY`, 0) and it is 0.
A row of the test split asks for u itself, (1, 0), so that its loss is the error of the solution.
"""

from dataclasses import dataclass

import numpy as np

from llqr_experiments.data.examples import Batch

BOUNDARY = 10.0
"""What a residual on the boundary counts, next to one of f inside, which goes up to 20."""

_TEST_SIDE = 65


@dataclass(frozen=True)
class Rows:
    """Rows of an equation, as examples.

    Attributes:
      x: points, (n, 2), float64.
      operator: (a, b) of each row, (n, 2).
      label: (n,).
    """

    x: np.ndarray
    operator: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def gather(self, index: np.ndarray) -> Batch:
        """Return "x" and "operator", (B, 2), and "label", (B,): all float64."""
        return {"x": self.x[index], "operator": self.operator[index], "label": self.label[index]}

    def draw(
        self, index: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None = None
    ) -> Batch:
        """Return the rows `index`: nothing is random."""
        del rng
        return self.gather(index if rows is None else index[rows])


def solution(x: np.ndarray) -> np.ndarray:
    """Return u at points (n, 2)."""
    return np.sin(np.pi * x).prod(-1)


def equation_rows(side: int) -> Rows:
    """Return the equation in the middles of side x side squares, and 4 side boundary points.

    >>> len(equation_rows(4))
    32
    """
    middles = (np.arange(side) + 0.5) / side
    inside = _grid(middles)
    ends = (np.zeros(side), np.ones(side))
    edges = [np.stack(pair, -1) for end in ends for pair in ((middles, end), (end, middles))]
    f, zeros = 2 * np.pi**2 * solution(inside), np.zeros(4 * side)
    operator = np.repeat([[0.0, 1.0], [BOUNDARY, 0.0]], [len(inside), 4 * side], axis=0)
    return Rows(np.concatenate([inside, *edges]), operator, np.concatenate([f, zeros]))


def solution_rows() -> Rows:
    """Return the solution on a grid of 65 x 65 points, boundary included."""
    x = _grid(np.linspace(0, 1, _TEST_SIDE))
    return Rows(x, np.tile([1.0, 0.0], (len(x), 1)), solution(x))


def _grid(places: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(places, places, indexing="ij"), -1).reshape(-1, 2)
