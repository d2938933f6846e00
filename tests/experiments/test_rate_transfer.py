"""Grids of rates that extend, and the vertex between them."""

import pytest

from benchmarks import rate_transfer


def tuned(loss, first):
    rates = {}
    while (rate := rate_transfer.next_rate(rates, first)) is not None:
        rates[f"{rate:g}"] = loss(rate)
    return sorted(map(float, rates)), float(rate_transfer.best_rate(rates))


@pytest.mark.parametrize("first", [0.01, 0.08, 0.64])
def test_grid_extends_until_the_best_lies_inside(first):
    grid, best = tuned(lambda rate: abs(rate - 0.09), first)
    assert best == pytest.approx(0.08)
    assert grid[0] < best < grid[-1]


def test_grid_leaves_rates_that_diverge():
    grid, best = tuned(lambda rate: float("inf") if rate > 0.05 else 1 - rate, 0.32)
    assert (best, grid[-1]) == (0.04, 0.32)
    assert grid[0] < best


def test_vertex_of_a_parabola():
    losses = {f"{2.0**k:g}": 3 + (k - 0.25) ** 2 for k in (-1, 0, 1)}
    assert rate_transfer.vertex(losses) == pytest.approx(2**0.25)
