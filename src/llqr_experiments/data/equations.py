"""Differential equations as rows to fit: what an equation is, and the points where it is asked for.

A row asks for a combination of terms of the unknown functions at a point x: `operator` has their
coefficients, and `label` the value. The terms in d variables are

    u, du/dx_1 ... du/dx_d, d2u/dx_1^2 ... d2u/dx_d^2, and what the equation adds (`terms`)

of the first unknown u. Rows lie inside a box, on its faces, and where something is measured. A row
of the test split asks for the solution itself, so that its loss is the error of the solution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llqr_experiments.data.examples import Batch, Still

Function = Callable[[np.ndarray], np.ndarray]
"""Of points (n, d): n numbers."""

_TEST_SIDE, _TEST_POINTS = 65, 4096


@dataclass(frozen=True)
class Face:
    """A condition on a face of the box.

    Attributes:
      axis: the coordinate that is constant on it.
      end: 0 where it is lowest, 1 where it is highest.
      operator: coefficients of the terms.
      value: what they add up to.
    """

    axis: int
    end: int
    operator: tuple[float, ...]
    value: Function


@dataclass(frozen=True)
class Measurements:
    """Values of a function at random points, each with an error of its own.

    Attributes:
      operator: coefficients of the terms that are measured.
      value: what they add up to, without errors.
    """

    operator: tuple[float, ...]
    value: Function


@dataclass(frozen=True)
class Equation:
    """A differential equation with its conditions, on a box.

    Attributes:
      told: in words, for people.
      axes: names of the coordinates.
      box: lowest and highest value of each.
      operator: coefficients of the terms inside.
      value: what they add up to there.
      faces: conditions on the boundary.
      solution: what a row of the test split asks for,
      asked: by these coefficients.
      unknowns: functions that a network gives; the terms above are of the first.
      terms: of values (n, unknowns), gradients and second derivatives (n, unknowns, d), further
        columns (n, more); None: there are none.
      measured: what is known from measurements besides; None: nothing.
    """

    told: str
    axes: tuple[str, ...]
    box: tuple[tuple[float, float], ...]
    operator: tuple[float, ...]
    value: Function
    faces: tuple[Face, ...]
    solution: Function
    asked: tuple[float, ...]
    unknowns: int = 1
    terms: Callable[..., Any] | None = None
    measured: Measurements | None = None

    @property
    def lows(self) -> np.ndarray:
        """Lowest values of the coordinates, (d,)."""
        return np.array([low for low, _ in self.box])

    @property
    def lengths(self) -> np.ndarray:
        """Lengths of the box, (d,)."""
        return np.array([high - low for low, high in self.box])


@dataclass(frozen=True)
class Rows(Still):
    """Rows of an equation, as examples.

    Attributes:
      x: points, (n, d), float64.
      operator: coefficients of the terms in each row, (n, terms).
      label: (n,).
    """

    x: np.ndarray
    operator: np.ndarray
    label: np.ndarray

    def gather(self, index: np.ndarray) -> Batch:
        """Return "x", (B, d), "operator", (B, terms), and "label", (B,): all float64."""
        return {"x": self.x[index], "operator": self.operator[index], "label": self.label[index]}


@dataclass(frozen=True)
class FreshRows(Rows):
    """Rows whose points are others in every batch; `gather` always has the same.

    Attributes:
      low, length: of the box in which the point of each row lies, (n, d).
      part: number of the function in `values` that gives the label of each row, (n,); -1: it is
        always the same.
      values: functions of the points.
    """

    low: np.ndarray = field(kw_only=True)
    length: np.ndarray = field(kw_only=True)
    part: np.ndarray = field(kw_only=True)
    values: tuple[Function, ...] = field(kw_only=True)

    def draw(
        self, index: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None = None
    ) -> Batch:
        """Return the rows `index` at random points of their boxes."""
        share = rng.random((len(index), self.x.shape[1]))
        if rows is not None:
            index, share = index[rows], share[rows]
        x = self.low[index] + self.length[index] * share
        part, label = self.part[index], self.label[index]
        for i, value in enumerate(self.values):
            label = np.where(part == i, value(x), label)
        return {"x": x, "operator": self.operator[index], "label": label}


def grid(equation: Equation, sides: Sequence[int], along: Sequence[int]) -> Rows:
    """Return an equation in two variables in the middles of equal rectangles.

    Args:
      equation: to ask for.
      sides: rectangles along each coordinate.
      along: points on each face, in the middles of equal pieces.
    """
    middles = [
        low + length * _middles(n)
        for low, length, n in zip(equation.lows, equation.lengths, sides, strict=True)
    ]
    inside = np.stack(np.meshgrid(*middles, indexing="ij"), -1).reshape(-1, len(sides))
    parts = [_asked(inside, equation.operator, equation.value)]
    for face, n in zip(equation.faces, along, strict=True):
        x = equation.lows + equation.lengths * np.stack([_middles(n)] * 2, -1)
        x[:, face.axis] = equation.box[face.axis][face.end]
        parts.append(_asked(x, face.operator, face.value))
    return _together(parts)


def fresh(equation: Equation, inside: int, boundary: int, along: Rows | None = None) -> FreshRows:
    """Return an equation at points that are others in every batch.

    Args:
      equation: to ask for.
      inside: points.
      boundary: points, spread evenly over the faces.
      along: rows that stay as they are, such as measurements; None: there are none.
    """
    ends = spread(boundary, len(equation.faces))
    counts = [inside, *ends]
    n, d = inside + boundary, len(equation.box)
    low, length = np.tile(equation.lows, (n, 1)), np.tile(equation.lengths, (n, 1))
    part = np.repeat(np.arange(len(counts)), counts)
    for i, face in enumerate(equation.faces, 1):
        low[part == i, face.axis] = equation.box[face.axis][face.end]
        length[part == i, face.axis] = 0.0
    operators = [equation.operator, *(face.operator for face in equation.faces)]
    values = equation.value, *(face.value for face in equation.faces)
    x = low + length * np.random.default_rng(0).random((n, d))
    rows = _together(
        [_asked(x[part == i], operators[i], values[i]) for i in range(len(counts))]
        + ([] if along is None else [along])
    )
    if along is not None:
        low, length = np.concatenate([low, along.x]), np.concatenate([length, 0 * along.x])
        part = np.concatenate([part, np.full(len(along), -1)])
    return FreshRows(
        rows.x, rows.operator, rows.label, low=low, length=length, part=part, values=values
    )


def measurements(equation: Equation, count: int, noise: float) -> Rows:
    """Return measurements at random points, always the same.

    Args:
      equation: which has `measured`.
      count: of the points.
      noise: standard deviation of the errors, by the root mean square of the values.
    """
    assert equation.measured is not None
    rng = np.random.default_rng(1)
    x = equation.lows + equation.lengths * rng.random((count, len(equation.box)))
    rows = _asked(x, equation.measured.operator, equation.measured.value)
    errors = noise * np.sqrt(np.mean(rows.label**2)) * rng.standard_normal(count)
    return Rows(rows.x, rows.operator, rows.label + errors)


def joined(one: Rows, other: Rows) -> Rows:
    """Return the rows of both."""
    return _together([one, other])


def solution_rows(equation: Equation) -> Rows:
    """Return the solution on a grid of 65 x 65 points, boundary included.

    In more than two variables, at 4,096 random points that are always the same.
    """
    if len(equation.box) == 2:
        places = [np.linspace(low, high, _TEST_SIDE) for low, high in equation.box]
        x = np.stack(np.meshgrid(*places, indexing="ij"), -1).reshape(-1, 2)
    else:
        shares = np.random.default_rng(2).random((_TEST_POINTS, len(equation.box)))
        x = equation.lows + equation.lengths * shares
    return _asked(x, equation.asked, equation.solution)


def spread(count: int, parts: int) -> list[int]:
    """Return a count in parts that are as equal as can be.

    >>> spread(10, 4)
    [2, 3, 2, 3]
    """
    return [count * (i + 1) // parts - count * i // parts for i in range(parts)]


def _middles(n: int) -> np.ndarray:
    return (np.arange(n) + 0.5) / n


def _asked(x: np.ndarray, operator: Sequence[float], value: Function) -> Rows:
    return Rows(x, np.tile(np.asarray(operator, float), (len(x), 1)), value(x))


def _together(parts: Sequence[Rows]) -> Rows:
    return Rows(
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.operator for part in parts]),
        np.concatenate([part.label for part in parts]),
    )
