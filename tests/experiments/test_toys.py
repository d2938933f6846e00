"""Toy functions: values, two routes to one Newton step, whole runs of every preset."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llqr_experiments.command import cli
from llqr_experiments.errors import ConfigError
from llqr_experiments.study import courses, toys
from llqr_experiments.study.toy_functions import FUNCTIONS
from tests.experiments import support

PRESETS = {
    "toy-rosenbrock": "rosenbrock",
    "toy-split-rosenbrock": "split_rosenbrock",
    "toy-ackley": "ackley",
    "toy-goldstein-price": "goldstein_price",
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("name", "theta", "value"),
    [
        ("rosenbrock", (-1.2, 1.0), 24.2),
        ("rosenbrock", (0.0, 2.0), 401.0),
        ("split_rosenbrock", (-1.2, 1.0), 24.2),
        ("ackley", (1.0, 1.0, 1.0), 20 - 20 * math.exp(-0.2)),
        ("ackley", (0.5, 0.5, 0.5), 20 + math.e - 20 * math.exp(-0.1) - math.exp(-1)),
        ("goldstein_price", (0.0, 0.0), 600.0),
        ("goldstein_price", (-0.6, -0.4), 30.0),
        ("goldstein_price", (1.8, 0.2), 84.0),
        ("goldstein_price", (1.2, 0.8), 840.0),
    ],
)
def test_values(name, theta, value):
    np.testing.assert_allclose(FUNCTIONS[name](jnp.array(theta)), value, rtol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_minimum_is_one(name):
    toy = FUNCTIONS[name]
    np.testing.assert_allclose(toy(jnp.array(toy.minimum)), toy.value, atol=1e-14)
    near = np.random.default_rng(0).normal(size=(200, len(toy.minimum))) + toy.minimum
    assert jax.vmap(toy)(jnp.array(near)).min() > toy.value


def test_split_rosenbrock_is_rosenbrock():
    whole, split = FUNCTIONS["rosenbrock"], FUNCTIONS["split_rosenbrock"]
    for theta in jnp.array(np.random.default_rng(1).normal(size=(5, 2))):
        for derive in (lambda f: f, jax.grad, jax.hessian):
            np.testing.assert_allclose(derive(whole)(theta), derive(split)(theta), rtol=1e-11)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_routes_give_newtons_step(name):
    toy = FUNCTIONS[name]
    theta = jnp.array(toy.start)
    g, hessian = jax.grad(toy)(theta), jax.hessian(toy)(theta)
    damping = 1.0 + max(0.0, -float(jnp.linalg.eigvalsh(hessian)[0]))
    expected = -jnp.linalg.solve(hessian + damping * jnp.eye(theta.size), g)
    for step in (courses.newton_step, courses.lqr_step):
        np.testing.assert_allclose(step(toy, theta, damping), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["rosenbrock", "split_rosenbrock"])
def test_without_a_minimum_there_is_no_step(name):
    """H = [[-398, 0], [0, 200]] at (0, 1): both routes refuse until the damping exceeds 398."""
    for step in (courses.newton_step, courses.lqr_step):
        assert not np.isfinite(step(FUNCTIONS[name], jnp.array([0.0, 1.0]), 397.0)).any()
        assert np.isfinite(step(FUNCTIONS[name], jnp.array([0.0, 1.0]), 399.0)).all()


def test_damping_grows_until_the_value_decreases():
    toy = FUNCTIONS["rosenbrock"]
    damped = courses.Damped(toy, courses.newton_step, 1.0)
    theta = jnp.array([0.1, 1.0])  # indefinite: 1.0 * 4^k must exceed 386
    following = damped(theta, float(toy(theta)))
    assert damped.raised >= 5
    assert damped.damping == 4.0 ** (damped.raised - 1)  # lowered once, after success
    assert toy(following) < toy(theta)


def test_a_stationary_start_stalls():
    toy = FUNCTIONS["goldstein_price"]
    damped = courses.Damped(toy, courses.newton_step, 1.0)
    course = courses.follow(toy, damped, jnp.array([-0.6, -0.4]), iterations=50, tolerance=1e-8)
    assert course.outcome == "stalled"
    np.testing.assert_allclose(course.values[-1], 30.0)  # a local minimum


def test_divergence_is_told():
    toy = FUNCTIONS["rosenbrock"]
    course = courses.follow(
        toy, lambda theta, _: 100 * theta, jnp.array([-1.2, 1.0]), iterations=50, tolerance=1e-8
    )
    assert course.outcome == "diverged"


@pytest.mark.parametrize("preset", PRESETS)
def test_exact_methods_reach_the_minimum(preset, tmp_path, capsys):
    short = ("use_preconditioner=false", "toy.iterations=60", "logging.aim=false")
    config = support.config(f"experiment={preset}", *short)
    toy = FUNCTIONS[PRESETS[preset]]
    courses = toys.run(config, tmp_path, command="test")
    newton, exact = courses[toys.NEWTON], courses[toys.LQR]
    assert newton.outcome == exact.outcome == "converged"
    assert newton.values[-1] - toy.value <= config.toy.tolerance
    np.testing.assert_allclose(newton.thetas[-1], toy.minimum, atol=1e-4)
    assert toys.difference(newton, exact) < 1e-8
    assert newton.raised == exact.raised
    rows = support.rows(tmp_path)
    assert [r["Newton value"] for r in rows if "Newton value" in r] == newton.values
    assert rows[-1]["largest difference of Newton and exact LQR"] < 1e-8
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.yaml", "meta.json", "metrics.jsonl", "paths.png",
    }  # fmt: skip
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "meta.json").read_text())["toy"] == PRESETS[preset]
    assert "converged" in capsys.readouterr().out


def test_learned_steps_descend_and_count_their_refits(tmp_path):
    config = support.config(
        "experiment=toy-rosenbrock", "toy.iterations=40", "update_preconditioner_every=5"
    )
    learned = toys.run(config, tmp_path)[toys.LEARNED]
    assert learned.refits is not None
    assert learned.refits[0] == 8
    assert learned.values[-1] < learned.values[0]


def test_every_toy_preset_is_known():
    assert {p for p in cli.presets("experiment") if p.startswith("toy-")} == set(PRESETS)


def test_a_start_of_the_wrong_length(tmp_path):
    config = support.config("experiment=toy-ackley", "toy.start=[1.0,2.0]")
    with pytest.raises(ConfigError, match="ackley has 3 variables"):
        toys.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
