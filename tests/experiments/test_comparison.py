"""Sharpness is measured right, and the comparisons run and show what they claim."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llqr
from llqr_experiments.command import cli
from llqr_experiments.study import comparison, landscape, potholes
from tests.experiments import support


def quadratic(size, lowest=0.5):
    """w.A w / 2 as a loss with data, and A's eigenvalues."""
    random = np.random.default_rng(0)
    rotation = np.linalg.qr(random.normal(size=(size, size)))[0]
    values = np.linspace(lowest, 8.0, size)
    a = jnp.asarray(rotation @ np.diag(values) @ rotation.T, jnp.float32)
    objective = llqr.Objective(lambda w, a: w["w"] @ a @ w["w"], lambda y, _: 0.5 * y)
    return objective.bind(a), values


@pytest.mark.parametrize("size", [10, 60])  # as a matrix, and by Lanczos iterations
@pytest.mark.parametrize("lowest", [0.5, -20.0])
def test_top_eigenvalue(size, lowest):
    """The largest, and not the one of largest absolute value."""
    loss, values = quadratic(size, lowest)
    found = landscape.top_eigenvalue(loss, {"w": jnp.zeros(size)})
    np.testing.assert_allclose(found, values[-1], rtol=1e-3)


def test_rises_of_a_quadratic_at_its_minimum():
    """Worst: r^2 times the largest eigenvalue / 2; mean: r^2 trace / (2 n)."""
    loss, values = quadratic(10)
    found = landscape.measure(loss, {"w": jnp.zeros(10)}, [0.1, 2.0], steps=100, draws=2000)
    assert found.loss == 0.0
    for radius, (worst, mean) in found.rises.items():
        np.testing.assert_allclose(worst, radius**2 * values[-1] / 2, rtol=1e-2)
        np.testing.assert_allclose(mean, radius**2 * values.mean() / 2, rtol=3e-2)


def test_a_slope_rises_by_its_gradient():
    slope = jnp.array([3.0, 4.0])
    objective = llqr.Objective(lambda w, s: w @ s, lambda y, _: y).bind(slope)
    np.testing.assert_allclose(landscape.worst_rise(objective, jnp.ones(2), 0.5), 2.5, rtol=1e-5)
    assert landscape.worst_rise(objective, jnp.ones(2), 0.0) == 0.0


def test_potholes_are_sharp_minima_on_a_bowl():
    centres = potholes.centres()
    assert len(centres) > 30
    hessian = jax.hessian(lambda w: potholes.OBJECTIVE({"w": w}, None))
    for centre in centres[:5] / np.array(potholes.STRETCH):
        assert np.linalg.eigvalsh(hessian(jnp.asarray(centre)))[0] > 10
    z = np.array(potholes.STRETCH) * potholes.starts(20, seed=1)
    assert float(potholes.depth(jnp.asarray(z)).max()) < potholes.TRAPPED


def test_sam_leaves_the_potholes(tmp_path, capsys):
    config = support.config(
        "experiment=sharpness-potholes", "comparison.runs=16", "comparison.radii=[0.1]"
    )
    comparison.run(config, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "comparison.json").read_text())
    share = {n: np.mean([r["figures"]["in a pothole, %"] for r in rows[n]]) for n in rows}
    assert list(share) == ["sgd", "SAM", "LLQR", "LLQR+SAM"]
    assert min(share["sgd"], share["LLQR"]) > 60
    assert max(share["SAM"], share["LLQR+SAM"]) < 20
    bowl = {n: np.median([r["figures"]["bowl"] for r in rows[n]]) for n in rows}
    assert bowl["LLQR+SAM"] < 0.5 * bowl["SAM"], "the stretched axis is learned"
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "comparison.json", "config.yaml", "meta.json", "metrics.jsonl", "paths.png",
        "sharpness.png",
    }  # fmt: skip
    assert "top eigenvalue" in capsys.readouterr().out


def test_training_is_compared(tmp_path, capsys):
    config = support.config(
        "experiment=sharpness-digits", "comparison.runs=1", "total_epochs=1", "precond_steps=2",
        "comparison.radii=[0.1]", "method=published", "block_structure=diagonal",
        "architecture.hidden=[24]",
    )  # fmt: skip
    found = comparison.run(config, tmp_path / "run")
    assert list(found) == ["sgd", "SAM", "LLQR", "LLQR+SAM"]
    for (ending,) in found.values():
        assert ending.sharpness.eigenvalue > 0
        assert 0 < ending.sharpness.rises[0.1][0] < 1
        assert ending.figures["test accuracy"] > 50
    assert (tmp_path / "run" / "LLQR+SAM 0" / "metrics.jsonl").exists()
    assert "rise within 0.1" in capsys.readouterr().out


def test_a_toy_and_a_comparison_exclude_each_other():
    with pytest.raises(cli.ConfigError, match="choose one of them"):
        support.config("experiment=toy-ackley", "comparison.name=potholes")
    with pytest.raises(cli.ConfigError, match=r"radii=.*a list, not empty: a number > 0"):
        support.config("comparison.radii=[]")
