"""The picture of a run: which panels, lines and marks each kind of record gets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from llqr_experiments.record import measures, plots

MILESTONE = "first step with test accuracy of 95 %"


def row(step: int, **values: float) -> dict[str, Any]:
    """A row; "test_accuracy" stands for "test accuracy"."""
    return {"step": step, **{k.replace("__", " "): v for k, v in values.items()}, "seconds": 1.0}


def lines(figure: Figure, panel: int) -> dict[str, list[tuple[float, float]]]:
    """Lines of a panel by label, as points."""
    found = figure.axes[panel].get_lines()
    return {str(x.get_label()): [(float(a), float(b)) for a, b in x.get_xydata()] for x in found}  # pyright: ignore


def test_every_split_has_a_line() -> None:
    rows = [
        row(1, train__loss=4.0, train__accuracy=10.0),
        row(
            2, test__loss=3.0, test__accuracy=40.0, train_eval__loss=2.0, train_eval__accuracy=50.0
        ),
        row(4, test__loss=2.5, test__accuracy=60.0),
    ]
    figure = plots.draw(rows, "title")
    assert len(figure.axes) == 2
    assert lines(figure, 0) == {
        "training batch": [(1, 4)],
        "training set": [(2, 2)],
        "test set": [(2, 3), (4, 2.5)],
    }
    assert lines(figure, 1)["test set"] == [(2, 40), (4, 60)]
    assert figure.axes[0].get_xscale() == "linear"


def test_text_gets_perplexity() -> None:
    rows = [row(k, valid__perplexity=50.0 / k, test__perplexity=60.0 / k) for k in (1, 2)]
    figure = plots.draw(rows, "title", "text")
    assert figure.axes[2].get_ylabel() == "perplexity"
    assert lines(figure, 2) == {"valid set": [(1, 50), (2, 25)], "test set": [(1, 60), (2, 30)]}


def test_translation_gets_bleu_by_its_own_names() -> None:
    rows = [
        row(1, train__token_accuracy=20.0, train_ppl=9.0),
        row(2, valid__token_accuracy=30.0, valid_ppl=8.0),
        row(2, valid__bleu_sampled=11.0),
        row(4, valid__bleu=12.0),
        row(4, test__bleu=13.0),
    ]
    figure = plots.draw(rows, "title", "translation")
    assert lines(figure, 1) == {"training batch": [(1, 20)], "valid set": [(2, 30)]}
    assert [axes.get_ylabel() for axes in figure.axes][2:] == ["BLEU"], "no panel of perplexity"
    assert lines(figure, 2) == {
        "valid set, a sample of it": [(2, 11)],
        "valid set": [(4, 12)],
        "test set": [(4, 13)],
    }


def test_operations_have_logarithmic_steps_and_marks() -> None:
    rows = [
        row(0, **{"refit objective after": 1.0}),
        row(10, train__loss=3.0, train__accuracy=99.0),
        row(500, **{"refit objective after": 1.0}),
        row(1000, test__loss=1.0, test__accuracy=96.0, **{MILESTONE: 1000}),
        row(2000, test__loss=0.1, test__accuracy=97.0, **{MILESTONE: 1000}),
    ]
    figure = plots.draw(rows, "title", "operations")
    for panel in (0, 1):
        assert figure.axes[panel].get_xscale() == "log"
        found = lines(figure, panel)
        assert found["refit"][0][0] == 500, "an axis of logarithms has no step 0"
        assert {x for x, _ in found["test accuracy of 95 %: step 1,000"]} == {1000}
    refits = lines(plots.draw(rows, "title", "images"), 0)["refit"]
    assert refits[0][0] == 0


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1.0, 9.0], "linear"), ([1.0, 10.0], "log"), ([0.0, 10.0], "linear"), ([], "linear")],
)
def test_an_axis_is_logarithmic_from_a_decade_on(values: list[float], scale: str) -> None:
    axes = Figure().subplots()
    assert plots.logarithmic(axes, "y", values) == (scale == "log")
    assert (axes.get_yscale(), axes.get_xscale()) == (scale, "linear")


def test_ticks_are_plain_numbers() -> None:
    axes = Figure().subplots()
    axes.plot([1, 2000], [0.02, 3])
    plots.logarithmic(axes, "x", [1, 2000])
    plots.logarithmic(axes, "y", [0.02, 3])
    assert axes.xaxis.get_major_formatter()(1000) == "1,000"
    assert axes.yaxis.get_major_formatter()(0.05) == "0.05"


def test_the_file_is_a_picture_and_nothing_else_is_left(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps(row(1, train__loss=None)) + "\n")  # pyright: ignore
    plots.curves(metrics, "cost in $: 5$", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_names_of_the_record() -> None:
    from llqr_experiments.data import material

    totals = {"loss": 2.0, "correct": 1.0, "rows": 2.0}
    for rates in (material.rates, material.text_rates, material.translation_rates):
        names = [name for split in ("train", "valid") for name in rates(split, totals)]
        for quantity in (measures.LOSS, measures.ACCURACY):
            assert list(measures.splits(quantity, names)) == ["train", "valid"]
        assert all(measures.is_result(name) == name.startswith("valid") for name in names)
    found = measures.splits(measures.PERPLEXITY, material.translation_rates("valid", totals))
    value = material.translation_rates("valid", totals)[found["valid"]]
    np.testing.assert_allclose(value, np.e)
