"""Whole runs of the quick preset: what it reaches, writes, repeats and never does."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llqr_experiments import data
from llqr_experiments.config import build
from llqr_experiments.errors import ConfigError, TrainingError
from llqr_experiments.run import train
from llqr_experiments.run.step import init
from llqr_experiments.task import tasks
from tests.experiments import support

SHORT = ("total_epochs=10", "update_preconditioner_every=40", "test_eval_freq=30")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quick_run_reaches_96_percent(tmp_path, seed):
    metrics = support.run(tmp_path, f"init_key={seed}", f"rng_seed={seed}")
    assert metrics[-1]["test accuracy"] >= 96.0
    assert metrics[-1]["seconds"] < 60.0


def test_short_run_learns_and_writes_everything(tmp_path, capsys):
    metrics = support.run(tmp_path, *SHORT)
    assert metrics[-1]["step"] == int(10 * 1438 / 128)
    assert metrics[-1]["test accuracy"] > 85.0
    refits = [row for row in metrics if "refit objective after" in row]
    assert [row["step"] for row in refits] == [0, 40, 80]
    assert all(row["refit objective after"] < row["refit objective before"] for row in refits)
    assert [row["step"] for row in metrics if "test loss" in row] == [30, 60, 90, 112]
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.yaml",
        "meta.json",
        "metrics.jsonl",
        "curves.png",
    }
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["command"] == "test"
    assert meta["seeds"] == {"init_key": 42, "rng_seed": 123}
    assert meta["refits"] == 3
    assert meta["versions"]["jax"] == jax.__version__
    said = capsys.readouterr().out
    for part in ("39,810 parameters", "refit 1: objective", "0 of 6 blocks guarded", "compile",
                 "curves.png", "test accuracy"):  # fmt: skip
        assert part in said


def test_two_runs_with_the_same_seeds_agree_to_the_last_bit(tmp_path):
    first = support.run(tmp_path / "a", *SHORT, "logging_freq=1")
    second = support.run(tmp_path / "b", *SHORT, "logging_freq=1")
    other = support.run(tmp_path / "c", *SHORT, "logging_freq=1", "rng_seed=5")
    assert support.timeless(first) == support.timeless(second)
    assert support.timeless(first) != support.timeless(other)


def test_without_preconditioner_is_the_plain_optimizer(tmp_path):
    """Same numbers as a loop written here; no LLQR state, so no product with the identity."""
    overrides = ("use_preconditioner=false", "logging_freq=1", "total_epochs=2")
    config = support.config("experiment=quick-local-test", *overrides)
    job = train.prepare(config)
    assert jax.tree.leaves(job.recipe.tx.init(job.task.params)) == []
    metrics = [row for row in support.run(tmp_path, *overrides) if "train loss" in row]

    params, statistics = job.task.params, job.task.statistics
    stream = job.task.material.streams.training(config)
    for row in metrics:
        objective = tasks.bound(job.task, next(stream), statistics)
        loss, grads = jax.value_and_grad(objective)(params)
        np.testing.assert_allclose(row["train loss"], loss, rtol=1e-5)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def test_runs_with_and_without_llqr_see_the_same_training_data(tmp_path):
    """The first loss is measured before the first update, so it depends on the data alone."""
    plain = support.run(tmp_path / "a", "use_preconditioner=false", "total_epochs=1")
    llqr = support.run(tmp_path / "b", "total_epochs=1", "precond_steps=1")
    first = [next(row for row in rows if "train loss" in row) for rows in (plain, llqr)]
    assert first[0]["train loss"] == first[1]["train loss"]


def test_nothing_compiles_after_the_first_step_of_each_kind(tmp_path, monkeypatch):
    served, compiled = [], []
    original = data.train_stream

    def counted(*args, **kwargs):
        for batch in original(*args, **kwargs):
            served.append(None)
            yield batch

    def listen(event, duration_secs, **_):
        if event.startswith("/jax/core/compile"):
            compiled.append((len(served), event))

    monkeypatch.setattr(data, "train_stream", counted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        support.run(tmp_path, *SHORT)  # refits before steps 0, 40, 80; evaluations from 30
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled, "the listener hears nothing"
    assert [entry for entry in compiled if entry[0] > 30] == []


def test_no_host_sync_between_logged_steps(tmp_path, monkeypatch):
    """More steps, no more reads: device values are fetched at logged steps only."""
    from jax._src.array import ArrayImpl

    reads = []
    value = ArrayImpl._value

    def counted(self):
        reads.append(self.shape)
        return value.fget(self)

    monkeypatch.setattr(ArrayImpl, "_value", property(counted))
    ready = ArrayImpl.block_until_ready
    monkeypatch.setattr(
        ArrayImpl, "block_until_ready", lambda self: (reads.append("block"), ready(self))[1]
    )
    float(jnp.ones(()))
    jnp.ones(2).block_until_ready()
    assert len(reads) == 2, "the counter sees nothing"

    def count(epochs: int) -> int:
        reads.clear()
        support.run(tmp_path / str(epochs), f"total_epochs={epochs}", "logging_freq=100000")
        return len(reads)

    assert count(4) == count(12)


def test_the_training_step_calls_no_host_function():
    job = train.prepare(support.config("experiment=quick-local-test"))
    params = job.task.params
    batch = next(job.task.material.streams.training(job.config))
    ascent = build.ascent(support.config("sam_mode=base_sam"), build.Horizon(1.0, 1.0))
    assert ascent is not None
    for how in (None, ascent):
        recipe = dataclasses.replace(job.recipe, ascent=how)
        one = partial(train.train_step, job.task.training, recipe, how is not None)
        assert "callback" not in str(jax.make_jaxpr(one)(init(recipe, params), batch))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"gradient of .* is not finite at step 1; there is no .* Lower",
    ):
        support.run(tmp_path, "learning_rate=1e38", "use_preconditioner=false", "logging_freq=1")
    assert "train loss" in support.rows(tmp_path)[-1]  # the record is there


def test_a_folder_that_holds_a_run_is_not_written_to(tmp_path):
    support.run(tmp_path, "total_epochs=1")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a finished run"):
        support.run(tmp_path, "total_epochs=1")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_quality_before_and_after_training(tmp_path, capsys):
    metrics = support.run(
        tmp_path, "total_epochs=1", "quality=[diagonal]", "damping=0.1", "use_preconditioner=false"
    )
    rows = [row for row in metrics if "quality exact share" in row]
    assert [row["step"] for row in rows] == [0, 11]
    for row in rows:
        assert row["quality exact share"] == pytest.approx(1.0, abs=1e-4)
        assert row["quality exact cosine"] == pytest.approx(1.0, abs=1e-4)
        best = [row[f"quality {n} best share"] for n in ("gradient", "diagonal", "block-diagonal")]
        assert best[0] < best[1] < best[2] < 1.01
    assert "at best length" in capsys.readouterr().out
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_quality_of_a_metric_without_minimum(tmp_path):
    with pytest.raises(ConfigError, match=r"quality: .* no minimum"):
        support.run(tmp_path, "total_epochs=1", "quality=[diagonal]", "divergence=newton")


def test_label_smoothing_enters_the_training_loss():
    log_probs = jax.nn.log_softmax(jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]))
    labels = jnp.array([0, 2])
    target = 0.9 * np.eye(3)[[0, 2]] + 0.1 / 3
    expected = -(target * np.asarray(log_probs)).sum(-1)
    np.testing.assert_allclose(tasks.cross_entropy(log_probs, labels, 0.1), expected, rtol=1e-6)


def test_measure_leaves_masked_rows_out():
    outputs = jax.nn.log_softmax(jnp.array([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]]))
    batch = {"label": jnp.array([0, 0, 1]), "mask": jnp.array([True, True, False])}
    found = tasks.measure(outputs, batch)
    assert float(found["rows"]) == 2
    assert float(found["correct"]) == 1
    np.testing.assert_allclose(found["loss"], -(outputs[0, 0] + outputs[1, 0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["main_optimizer=sgd"], optax.sgd(0.1)),
        (["main_optimizer=polyak", "momentum=0.7"], optax.sgd(0.1, momentum=0.7)),
        (["main_optimizer=adam", "adam_betas=[0.8,0.95]"], optax.adam(0.1, 0.8, 0.95)),
        (
            ["main_optimizer=adamw", "weight_decay=0.3"],
            optax.adamw(0.1, weight_decay=0.3),
        ),
        (
            ["main_optimizer=adamw_b2-98", "weight_decay=0.3"],
            optax.adamw(0.1, 0.9, 0.98, weight_decay=0.3),
        ),
        (
            ["main_optimizer=polyak", "weight_decay=0.2"],
            optax.chain(optax.add_decayed_weights(0.2), optax.sgd(0.1, momentum=0.9)),
        ),
        (
            ["main_optimizer=sgd", "weight_decay=0.2", "wd_mask=[bias,scale]"],
            optax.chain(
                optax.add_decayed_weights(0.2, {"a": {"kernel": True, "bias": False}}),
                optax.sgd(0.1),
            ),
        ),
        (
            ["lr_scheduler=cosine_annealing", "lr_scheduler.t_max=2"],
            optax.sgd(lambda s: 0.05 * (1 + jnp.cos(jnp.pi * s / 20))),
        ),
    ],
)
def test_main_optimizers(overrides, expected):
    horizon = build.Horizon(10.0, 2.0)
    found = build.base_optimizer(support.config(*overrides), horizon)
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.full(2, 2.0)}}
    states = [tx.init(params) for tx in (found, expected)]
    for step in range(3):
        grads = jax.tree.map(lambda p, step=step: 0.1 * (step + 1) * p, params)
        updates = []
        for i, tx in enumerate((found, expected)):
            update, states[i] = tx.update(grads, states[i], params)
            updates.append(update)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *updates)


@pytest.mark.parametrize(
    ("overrides", "due"),
    [
        ([], lambda t: t % 1000 == 0),
        (["update_preconditioner_every=7"], lambda t: t % 7 == 0),
        (["update_preconditioner_every=7", "precond_start_step=5"],
         lambda t: t >= 5 and (t - 5) % 7 == 0),
        (["update_preconditioner_every=7", "update_preconditioner_until=30"],
         lambda t: t < 30 and t % 7 == 0),
        (["update_preconditioner_every=7", "update_preconditioner_until=0"],
         lambda t: t % 7 == 0),
        (["update_preconditioner_every=4", "precond_update_scheduler=piecewise_constant",
          "precond_update_scheduler.boundaries=[[5,10]]"],
         lambda t: t % (4 if t < 50 else 40) == 0),
        (["use_preconditioner=false"], lambda t: False),
    ],
)  # fmt: skip
def test_refit_steps(overrides, due):
    horizon = build.Horizon(10.0, 20.0)
    found = build.refit_steps(support.config(*overrides), horizon)
    assert found == {t for t in range(horizon.total_steps - 1) if due(t)}


def test_horizon_counts_steps_as_the_papers_do():
    assert build.Horizon(50_000 / 128, 200).total_steps == 78_126
    assert build.Horizon(60_000 / 128, 22).total_steps == 10_313
