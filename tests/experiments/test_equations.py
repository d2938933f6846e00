"""A differential equation in the runner: its rows, its network, its runs in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr_experiments import models
from llqr_experiments.config.options import Dataset
from llqr_experiments.data import equations, kinds, problems, regression
from llqr_experiments.data.material import error_rates
from llqr_experiments.errors import ConfigError
from llqr_experiments.record import fields
from llqr_experiments.run import train
from llqr_experiments.run.job import prepare
from llqr_experiments.task import tasks
from llqr_experiments.task.small import shrink
from tests.experiments import support


def small(*overrides, preset="pinn-poisson-streaming"):
    return shrink(support.config(f"experiment={preset}", "logging.aim=false", *overrides))


# --- equations ----------------------------------------------------------------------------------

NAMES = list(problems.EQUATIONS)
STEP = 2e-3


def rows_of(name, fresh=None):
    """Training rows, without errors of measurements."""
    noise = 0.0 if name == "diffusion" else 0.01
    config = Dataset(name=name, points=6, fresh=fresh, noise=noise)
    return kinds.make(config).streams


def unknowns(name):
    """The exact unknown functions."""
    if name == "diffusion":
        exact = problems.DIFFUSION
        u = lambda x: exact.measured.value(x) / problems.BOUNDARY  # noqa: E731
        return [u, lambda x: np.log(exact.solution(x))]
    return [problems.EQUATIONS[name].solution]


def terms_of(name, x):
    """All terms of the solution at points, by differences of the fourth order."""
    value, first, second = [], [], []
    for u in unknowns(name):
        near = {s: [u(x + s * STEP * e) for e in np.eye(x.shape[1])] for s in (-2, -1, 1, 2)}
        far, close = zip(near[-2], near[2], strict=True), zip(near[-1], near[1], strict=True)
        pairs = list(zip(far, close, strict=True))
        value.append(u(x))
        first.append([(a - b + 8 * (d - c)) / (12 * STEP) for (a, b), (c, d) in pairs])
        second.append(
            [(16 * (c + d) - a - b - 30 * u(x)) / (12 * STEP**2) for (a, b), (c, d) in pairs]
        )
    value, first, second = np.array(value).T, np.array(first), np.array(second)
    first, second = np.moveaxis(first, -1, 0), np.moveaxis(second, -1, 0)
    found = [value[:, :1], first[:, 0], second[:, 0]]
    more = problems.EQUATIONS[name].terms
    return np.concatenate(found + ([np.asarray(more(value, first, second))] if more else []), -1)


GRIDS = [(name, None) for name in NAMES if len(problems.EQUATIONS[name].box) == 2]


@pytest.mark.parametrize(("name", "fresh"), [*GRIDS, *((name, 24) for name in NAMES)])
@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt")
def test_the_solution_solves_every_row(name, fresh):
    """Of training and of the test, inside and on the boundary."""
    config = support.config("experiment=pinn-poisson", "batch_size=40", "data_threads=0")
    streams = rows_of(name, fresh)
    stream = streams.training(config)
    batches = [next(stream), next(stream), next(streams.evaluation("test", 40))]
    stream.close()
    for batch in batches:
        x, operator, label = batch["x"], batch["operator"], batch["label"]
        box = np.array(problems.EQUATIONS[name].box)
        assert ((x >= box[:, 0]) & (x <= box[:, 1])).all()
        # What is not asked for need not be there: Burgers' solution before time 0.
        found = np.where(operator == 0, 0, operator * terms_of(name, x)).sum(-1)
        there = np.isfinite(found)
        assert there.mean() > 0.9
        scale = 1 + np.abs(operator).max() + np.abs(label).max()
        np.testing.assert_allclose(found[there], label[there], atol=2e-5 * scale)
    parts = np.unique(batches[0]["operator"], axis=0)
    assert len(parts) > 1


@pytest.mark.parametrize("name", NAMES)
def test_fresh_points_are_others_in_every_batch_and_the_same_after_a_resume(name):
    config = support.config("experiment=pinn-poisson", "batch_size=20", "rng_seed=3")
    streams = rows_of(name, 16)
    stream, again = streams.training(config), streams.training(config)
    first, state = next(stream), stream.get_state()
    second, third = next(stream), next(stream)
    again.set_state(state)
    for old, new in ((second, next(again)), (third, next(again))):
        for key, array in old.items():
            np.testing.assert_array_equal(array, new[key])
    measured = 0.9 if name == "diffusion" else 0.0  # these stay, and many are in no two batches
    known = {tuple(x) for x in first["x"]}
    assert sum(tuple(x) in known for x in second["x"]) <= measured * len(known)
    stream.close()
    again.close()
    fixed = [next(streams.evaluation("train", 20)) for _ in range(2)]
    np.testing.assert_array_equal(fixed[0]["x"], fixed[1]["x"])


def test_a_share_of_fresh_points_is_as_in_the_whole():
    rows = equations.fresh(problems.HEAT, 8, 4)
    index, own = np.arange(12), np.array([1, 5, 11])
    whole = rows.draw(index, np.random.default_rng(0))
    part = rows.draw(index, np.random.default_rng(0), own)
    for name, array in whole.items():
        np.testing.assert_array_equal(array[own], part[name])


def test_a_grid_of_poissons_equation():
    rows = equations.grid(problems.POISSON, (6, 6), (6,) * 4)
    inside = rows.operator[:, 0] == 0
    assert inside.sum() == 36
    assert (rows.operator[~inside] == [problems.BOUNDARY, 0, 0, 0, 0]).all()
    on_edge = rows.x[~inside]
    assert np.isin(on_edge, (0.0, 1.0)).any(-1).all()
    assert len(np.unique(on_edge, axis=0)) == 24


def test_measurements_have_errors_of_their_size():
    exact, measured = (
        equations.measurements(problems.DIFFUSION, 4000, noise).label for noise in (0.0, 0.1)
    )
    assert np.std(measured - exact) / np.sqrt(np.mean(exact**2)) == pytest.approx(0.1, rel=0.05)
    with pytest.raises(ConfigError, match="nothing of wave is measured"):
        kinds.make(Dataset(name="wave", noise=0.1))


@pytest.mark.parametrize("outputs", [1, 2])
def test_jets_are_those_of_automatic_differentiation(outputs):
    """Values, gradients and second derivatives of every output; and the terms of an equation."""
    terms = problems.DIFFUSION.terms if outputs == 2 else problems.BURGERS.terms
    with jax.enable_x64(True):
        options = {"hidden": [5, 4], "terms": terms}
        made = models.network(models.make("pinn", (2,), outputs, seed=0, options=options))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), made.params)

        def plain(x):
            for layer in ("layers_1", "layers_3", "layers_5"):
                x = x @ params[layer]["kernel"] + params[layer]["bias"]
                x = jnp.tanh(x) if layer != "layers_5" else x
            return x

        rng = np.random.default_rng(0)
        x = rng.normal(size=(6, 2))
        value, first = jax.vmap(plain)(x), jax.vmap(jax.jacobian(plain))(x)
        second = jnp.einsum("nkii->nki", jax.vmap(jax.hessian(plain))(x))
        expected = jnp.concatenate(
            [value[:, :1], first[:, 0], second[:, 0], terms(value, first, second)], -1
        )
        operator = rng.normal(size=expected.shape)
        rows = made.model.bind({})(params, (x, operator))
        np.testing.assert_allclose(rows, jnp.sum(operator * expected, -1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["lorentz", "diabetes"])
def test_a_table_is_standardised_by_its_training_rows(name):
    table = regression.load(name)
    assert abs(len(table.train) - len(table.test)) <= 1
    np.testing.assert_allclose(table.train.x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(table.train.x.std(0), 1)
    assert table.train.label.std() == pytest.approx(1)
    assert abs(table.test.label.mean()) < 0.2


# --- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_the_picture_of_a_solution_has_each_value_at_its_place(wrong, tmp_path):
    rows = equations.solution_rows(problems.WAVE)
    order = np.random.default_rng(0).permutation(len(rows))
    x, exact = rows.x[order], rows.label[order]
    figure = fields.draw(x, exact, exact + wrong * x[:, 1], ("x", "t"), "waves")
    solution, network, error = (
        np.asarray(axes.collections[0].get_array()).reshape(65, 65) for axes in figure.axes[:3]
    )
    np.testing.assert_array_equal(solution, rows.label.reshape(65, 65).T)  # t upwards
    np.testing.assert_allclose(
        network - solution, wrong * np.linspace(0, 1, 65)[:, None] + 0 * error, atol=1e-12
    )
    assert error.max() == pytest.approx(wrong)
    fields.write(figure, tmp_path)
    assert (tmp_path / fields.FILE).stat().st_size > 10_000


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
