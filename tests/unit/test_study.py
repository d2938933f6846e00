"""The study's protocol: grids that extend, schedules, and when a difference counts."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    return pytest.importorskip("study")


@pytest.fixture
def training(study):
    return pytest.importorskip("training")


@pytest.fixture
def report(study):
    return pytest.importorskip("study_report")


def tuned(study, loss, first):
    rates = {}
    while (rate := study.next_rate(rates, first)) is not None:
        rates[f"{rate:g}"] = loss(rate)
    return sorted(map(float, rates)), float(study.best_rate(rates))


@pytest.mark.parametrize("first", [0.01, 0.08, 0.64])
def test_grid_extends_until_the_best_lies_inside(study, first):
    grid, best = tuned(study, lambda rate: abs(rate - 0.09), first)
    assert best == pytest.approx(0.08)
    assert grid[0] < best < grid[-1]


def test_grid_leaves_rates_that_diverge(study):
    def loss(rate):
        return float("inf") if rate > 0.05 else 1 - rate

    grid, best = tuned(study, loss, 0.32)
    assert (best, grid[-1]) == (0.04, 0.32)
    assert grid[0] < best


def test_schedule(training):
    found = [training.multiplier(step, 100) for step in range(100)]
    assert found[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert found[-1] == pytest.approx(1 / 95)
    assert max(found) == 1


def row(method, *losses):
    runs = {str(i): [{"loss": loss}] for i, loss in enumerate(losses)}
    return {"method": method, "runs": runs}


def test_a_win_needs_two_standard_errors(report):
    peers = [row("SOAP", 1.0, 1.2), row("Muon", 2.0, 2.2)]
    ours = row("LLQR", 0.8, 1.0)  # 0.2 below, the standard error is sqrt(0.02) = 0.1414
    assert report.margin(ours, peers[0]) == pytest.approx(2**0.5)
    assert report.verdict(ours, peers) == "level with SOAP"
    assert report.verdict(row("LLQR", 0.6, 0.8), peers) == "ahead of SOAP, 3 s.e."
    assert report.verdict(row("LLQR", 1.6, 1.8), peers) == "behind SOAP, 4 s.e."
