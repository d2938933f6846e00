"""A differential equation in the runner: its rows, its network, its runs in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr_experiments import models
from llqr_experiments.data import poisson
from llqr_experiments.data.material import error_rates
from llqr_experiments.errors import ConfigError
from llqr_experiments.run import train
from llqr_experiments.run.job import prepare
from llqr_experiments.task import tasks
from llqr_experiments.task.small import shrink
from tests.experiments import support


def small(*overrides, preset="pinn-poisson-streaming"):
    return shrink(support.config(f"experiment={preset}", "logging.aim=false", *overrides))


@pytest.fixture
def network():
    """Model and parameters in float64, and the network as a plain function of one point."""
    with jax.enable_x64(True):
        made = models.network(models.make("pinn", (2,), 1, seed=0, options={"hidden": [5, 4]}))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), made.params)

        def plain(x):
            for layer in ("layers_1", "layers_3", "layers_5"):
                x = x @ params[layer]["kernel"] + params[layer]["bias"]
                x = jnp.tanh(x) if layer != "layers_5" else x
            return x[0]

        yield made.model.bind({}), params, plain


def test_network_and_laplacian_are_those_of_automatic_differentiation(network):
    model, params, plain = network
    x = np.random.default_rng(0).normal(size=(6, 2))
    value = jax.vmap(plain)(x)
    laplacian = jax.vmap(lambda p: jnp.trace(jax.hessian(plain)(p)))(x)
    for a, b in ((1.0, 0.0), (0.0, 1.0), (2.0, 0.5)):
        rows = model(params, (x, np.tile([a, b], (6, 1))))
        np.testing.assert_allclose(rows, a * value - b * laplacian, rtol=1e-12, atol=1e-12)


def test_rows_are_those_of_the_solution():
    """The right side is minus the Laplacian of u, by differences; u is 0 on the boundary."""
    rows = poisson.equation_rows(6)
    inside = rows.operator[:, 0] == 0
    assert inside.sum() == 36
    assert (rows.operator[~inside] == [poisson.BOUNDARY, 0]).all()
    x, h = rows.x[inside], 1e-4
    around = sum(poisson.solution(x + s * e) for s in (h, -h) for e in np.eye(2))
    expected = (4 * poisson.solution(x) - around) / h**2
    np.testing.assert_allclose(rows.label[inside], expected, rtol=1e-6)
    on_edge = rows.x[~inside]
    assert np.isin(on_edge, (0.0, 1.0)).any(-1).all()
    assert len(np.unique(on_edge, axis=0)) == 24
    np.testing.assert_allclose(poisson.solution(on_edge), rows.label[~inside], atol=1e-12)
    test = poisson.solution_rows()
    np.testing.assert_array_equal(test.label, poisson.solution(test.x))


def test_loss_and_error_are_those_of_the_rows():
    outputs, batch = jnp.array([1.0, 2.0, 4.0]), {"label": jnp.array([1.0, 4.0, 0.0])}
    totals = {k: float(v) for k, v in tasks.measure(outputs, batch).items()}
    assert totals == {"loss": 10.0, "squares": 17.0, "rows": 3.0}
    found = error_rates("test", totals)
    assert found["test loss"] == pytest.approx(10 / 3)
    assert found["test relative error"] == pytest.approx((20 / 17) ** 0.5)
    assert list(tasks.examples(outputs, batch)) == ["nll"]


def test_gauss_newton_is_the_metric_that_labels_are_drawn_from():
    with jax.enable_x64(True):
        job = prepare(small())
        batch = next(job.task.material.streams.evaluation("train", 32))
        bound = tasks.bound(job.task, batch, job.task.statistics)
        one, other = (
            llqr.linearize(bound, job.task.params, metric, divergence_reduction="mean")
            for metric in ("gauss_newton", "gaussian")
        )
        for a, b in zip(
            *(jax.tree.leaves(m.product(job.task.params)) for m in (one, other)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_run_in_float64_is_the_loop_of_the_library(tmp_path):
    """Loss by loss, to rounding of float64: nothing on the way is float32.

    Widths are such that no side has a null space, whose basis would follow from rounding.
    """
    config = small("learning_rate=0.01", "lr_scheduler=constant")
    config = replace(config, architecture=replace(config.architecture, hidden=[2, 2]))
    train.run(config, tmp_path, command="test", quiet=True)
    logged = [row["train loss"] for row in support.rows(tmp_path) if "train loss" in row]
    with jax.enable_x64(True):
        job = prepare(config)
        options = llqr.Streaming(every=2, warmup=1, seed=config.rng_seed)
        tx = llqr.llqr(
            optax.sgd(0.01), metric="gaussian", structure="e-kfac", refit=options, damping=1e-4,
            divergence_reduction="unit", graft="rms",
        )  # fmt: skip
        params, stream = job.task.params, job.task.material.streams.training(config)
        state, losses = tx.init(params), []
        for _ in range(4):
            bound = tasks.bound(job.task, next(stream), job.task.statistics)
            loss, grads = jax.value_and_grad(bound)(params)
            updates, state = tx.update(grads, state, params, objective=bound)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
        stream.close()
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float64")}
    np.testing.assert_allclose(logged, losses, rtol=1e-10)


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("pinn-poisson", ["divergence=ngd"], "divergence=ngd is for classes"),
        ("pinn-poisson", ["label_smoothing=0.1"], "label_smoothing=0.1 is for classes"),
        ("pinn-poisson-streaming", ["divergence=gauss_newton"], "labels can be drawn"),
    ],
)
def test_what_is_for_classes_is_refused(preset, overrides, message):
    with pytest.raises(ConfigError, match=message):
        prepare(small(*overrides, preset=preset))


def test_a_comparison_needs_accuracies(tmp_path):
    from llqr_experiments.study import comparison

    config = small("comparison.name=training", preset="pinn-poisson")
    with pytest.raises(ConfigError, match="compares accuracies"):
        comparison.run(config, tmp_path, command="test")


def test_any_run_can_be_in_float64(tmp_path):
    """Of images too: parameters, statistics and losses are wide, and a checkpoint keeps them."""
    config = small("precision=float64", "max_steps=2", preset="quick-local-test-streaming")
    done = train.run(config, tmp_path, command="test", quiet=True)
    assert {x.dtype for x in jax.tree.leaves(done.params)} == {np.dtype("float64")}
