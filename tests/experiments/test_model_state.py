"""Running statistics and dropout of a model, from the training step to refits and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llqr_experiments import models
from llqr_experiments.models.staged import Staged, flat, log_softmax
from llqr_experiments.run import step, train
from llqr_experiments.run.preemption import Interrupted
from llqr_experiments.task import tasks
from tests.experiments import support

RATE, MOMENTUM = 0.1, 0.9


def tiny(shape, classes, *, dropout=0.0, rngs):
    """A dense layer, batch norm, dropout, and a head."""
    features = int(np.prod(shape))
    first = nnx.Linear(features, 8, rngs=rngs)
    norm = nnx.BatchNorm(8, momentum=MOMENTUM, rngs=rngs)
    drop = nnx.Dropout(dropout, rngs=rngs)
    return Staged(
        [[(first, flat), norm, nnx.relu, drop], [nnx.Linear(8, classes, rngs=rngs), log_softmax]]
    )


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch):
    monkeypatch.setitem(models.MODELS, "mlp", models.Model(tiny))


def prepared(*overrides):
    """A run, its state before the first step, and three batches."""
    job = train.prepare(
        support.config(
            "experiment=quick-local-test", "use_preconditioner=false", "batch_size=32", *overrides
        )
    )
    stream = job.task.material.streams.training(job.config)
    batches = [next(stream) for _ in range(3)]
    return job, step.init(job.recipe, job.task.params, job.task.statistics), batches


def follow(job, state, batches, active=False):
    for batch in batches:
        state, sums = train.train_step(job.task.training, job.recipe, active, state, batch)
    return state, sums


def statistics(x, old):
    """One update of running statistics, by numpy."""
    new = {"mean": x.mean(0), "var": x.var(0)}
    return {k: MOMENTUM * np.asarray(old[k]) + (1 - MOMENTUM) * new[k] for k in new}


def before_norm(params, batch):
    x = np.asarray(batch["image"]).reshape(len(batch["label"]), -1)
    return x @ np.asarray(params["layers_0"]["kernel"]) + np.asarray(params["layers_0"]["bias"])


def test_steps_are_those_of_a_loop_over_the_module():
    job, state, batches = prepared()
    model = models.make("mlp", (8, 8, 1), 10, seed=job.config.init_key, options={})
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)

    def loss(model, batch):
        picked = jnp.take_along_axis(model(batch["image"]), batch["label"][:, None], 1)
        return -jnp.mean(picked)

    model.train()
    for batch in batches:
        optimizer.update(model, nnx.grad(loss)(model, batch))
    state, _ = follow(job, state, batches)
    for found, kind in ((state.params, nnx.Param), (state.statistics, nnx.BatchStat)):
        expected = nnx.to_pure_dict(nnx.state(model, kind))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected
        )


def test_micro_batches_hand_their_statistics_on():
    job, state, (batch, *_) = prepared("batch_size=16", "grad_acc_steps=2")
    old, params = jax.device_get((state.statistics["layers_1"], state.params))
    state, sums = follow(job, state, [batch])
    expected = old
    for part in range(2):  # part i holds the examples i, i + 2, ...
        expected = statistics(before_norm(params, batch)[part::2], expected)
    for key, value in expected.items():
        np.testing.assert_allclose(state.statistics["layers_1"][key], value, rtol=1e-4, atol=1e-5)
    assert float(sums["rows"]) == 32


@pytest.mark.parametrize("groups", [1, 2])
def test_sam_keeps_the_statistics_of_the_perturbed_pass(groups):
    rho = 2.0
    job, state, (batch, *_) = prepared(
        "sam_mode=base_sam", f"perturbation_rho={rho}", f"sam_groups={groups}",
        "sam_use_preconditioner_on_update=false",
    )  # fmt: skip
    old, params = jax.device_get((state.statistics["layers_1"], state.params))
    carry = tasks.Carry(
        state.statistics, jax.random.key(0), dict.fromkeys(tasks.CLASSES, jnp.zeros(()))
    )
    expected = []
    for part in range(groups):
        own = jax.tree.map(lambda x, part=part: x[part::groups], batch)
        grads = jax.grad(lambda p, own=own: job.task.training(p, own, carry)[0])(params)
        scale = rho / float(optax.tree.norm(grads))
        there = jax.tree.map(lambda p, g, scale=scale: p + scale * g, params, grads)
        expected.append(statistics(before_norm(there, own), old))
    state, sums = follow(job, state, [batch], active=True)
    for key in ("mean", "var"):
        value = np.mean([part[key] for part in expected], 0)
        np.testing.assert_allclose(state.statistics["layers_1"][key], value, rtol=1e-3, atol=1e-4)
    assert float(sums["rows"]) == 32


def test_a_skipped_step_leaves_the_statistics():
    job, state, (batch, *_) = prepared("on_nonfinite=skip")
    old = jax.device_get(state.statistics)
    bad = {
        **batch,
        "image": np.where(np.arange(32)[:, None, None, None] == 3, np.nan, batch["image"]),
    }
    state, _ = follow(job, state, [bad])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.statistics), old)
    assert int(state.health.bad_steps) == 1


def test_dropout_differs_from_step_to_step_and_not_from_run_to_run():
    job, _, (batch, *_) = prepared("architecture.dropout=0.5", "learning_rate=1e-30")
    seen = []
    for _ in range(2):
        fresh = step.init(job.recipe, job.task.params, job.task.statistics)
        losses = []
        for _ in range(3):
            fresh, sums = follow(job, fresh, [batch])
            losses.append(float(sums["loss"]))
        seen.append(losses)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 3


def test_dropout_differs_from_micro_batch_to_micro_batch():
    job, state, (batch, *_) = prepared("architecture.dropout=0.5")
    sums = dict.fromkeys(tasks.sums_of(batch), jnp.zeros(()))
    carry, losses = tasks.Carry(state.statistics, jax.random.key(0), sums), []
    for _ in range(3):
        value, carry = job.task.training(state.params, batch, carry)
        losses.append(float(value))
    assert len(set(losses)) == 3


def test_refits_and_evaluation_see_the_running_statistics(tmp_path):
    """Inference on a batch is that of the module with the trained statistics."""
    job, state, batches = prepared("architecture.dropout=0.5")
    state, _ = follow(job, state, batches)
    bound = tasks.bound(job.task, batches[0], state.statistics)
    x = before_norm(state.params, batches[0])
    own = state.statistics["layers_1"]
    x = (x - np.asarray(own["mean"])) / np.sqrt(np.asarray(own["var"]) + 1e-5)
    x = np.maximum(x * state.params["layers_1"]["scale"] + state.params["layers_1"]["bias"], 0)
    logits = x @ state.params["layers_4"]["kernel"] + state.params["layers_4"]["bias"]
    np.testing.assert_allclose(
        bound.outputs(state.params), jax.nn.log_softmax(logits), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "extra",
    [
        (),
        pytest.param(("multibatch_training=true",), marks=pytest.mark.slow),
        pytest.param(("batch_solve_precond=false",), marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, extra):
    """With batch norm, dropout, SAM, micro-batches and refits."""
    overrides = (
        "architecture.dropout=0.3", "batch_size=32", "grad_acc_steps=2", "max_steps=8",
        "sam_mode=base_sam", "update_preconditioner_every=3", "precond_steps=3",
        "precond_batch_size=16", "checkpoint_freq=4", "logging_freq=1", *extra,
    )  # fmt: skip
    whole = support.run(tmp_path / "whole", *overrides)
    original, calls = train.train_step, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        support.run(tmp_path / "parts", *overrides)
    monkeypatch.setattr(train, "train_step", original)
    parts = support.run(tmp_path / "parts", *overrides)
    assert support.timeless(parts) == support.timeless(whole)


def test_init_from_brings_the_statistics_along(tmp_path):
    support.run(tmp_path / "a", "max_steps=4", "checkpoint_freq=4", "use_preconditioner=false")
    first = support.rows(tmp_path / "a")[-1]
    rows = support.run(
        tmp_path / "b", f"init_from={tmp_path / 'a'}", "max_steps=1", "learning_rate=1e-30",
        "use_preconditioner=false",
    )  # fmt: skip
    found = rows[-1]["test loss"]
    # One more update of the statistics moves it a little; fresh ones would by far more.
    assert abs(found - first["test loss"]) < 0.2 * first["test loss"]
