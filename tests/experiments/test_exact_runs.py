"""Runs of exact steps: the library's loop, resumes to the same bits, classes, refusals."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import llqr
from llqr.trust import OUTCOMES
from llqr_experiments import report
from llqr_experiments.command import forecast
from llqr_experiments.errors import ConfigError, TrainingError
from llqr_experiments.report import diagnosis
from llqr_experiments.run import step, train
from llqr_experiments.run.job import prepare
from llqr_experiments.run.preemption import Interrupted
from llqr_experiments.run.session import check_health
from llqr_experiments.task import tasks
from llqr_experiments.task.small import shrink
from tests.experiments import support


def small(preset, *overrides):
    return shrink(support.config(f"experiment={preset}", "logging.aim=false", *overrides))


def losses(rows):
    return [row["train loss"] for row in rows if "train loss" in row]


def test_a_run_is_the_loop_of_the_library(tmp_path):
    config = replace(small("pinn-burgers-exact", "exact_start=1e-2"), batch_size=32, max_steps=6)
    train.run(config, tmp_path, command="test", quiet=True)
    rows = support.rows(tmp_path)
    with jax.enable_x64(True):
        job = prepare(config)
        tx = llqr.exact(damping=llqr.Trust(start=1e-2))
        params, stream = job.task.params, job.task.material.streams.training(config)
        state, found = tx.init(params), []
        for _ in range(6):
            bound = tasks.bound(job.task, next(stream), job.task.statistics)
            found.append(float(bound(params)))
            updates, state = tx.update(params, state, params, objective=bound)
            params = optax.apply_updates(params, updates)
        stream.close()
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float64")}
    np.testing.assert_allclose(losses(rows), found, rtol=1e-8)
    assert found[-1] < 0.2 * found[0]
    last = [row for row in rows if "exact/damping" in row][-1]
    assert last["exact/damping"] == pytest.approx(float(state.trust.damping), rel=1e-6)
    assert last["exact/refused"] == float(state.trust.refused) == 0
    assert {"exact/ratio", "exact/tries", "exact/rank", "exact/curvature"} <= last.keys()
    text = report.write([tmp_path], tmp_path / "page.html").read_text()
    assert "Solution, network and error of" in text
    assert diagnosis.diagnose(report.read(tmp_path)) == []


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """With fresh points, and a last step that is remembered."""
    config = replace(
        small("pinn-heat-exact", "exact_noisy=true", "exact_momentum=0.5"), max_steps=8
    )
    train.run(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        support.interrupt(patch, 5)
        with pytest.raises(Interrupted):
            train.run(config, tmp_path / "broken", quiet=True)
    train.run(config, tmp_path / "broken", quiet=True)
    support.assert_same_end(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize(
    "overrides",
    [
        ["exact_solver=primal"],
        ["exact_solver=cg", "exact_sketch=16"],
        ["exact_solver=riccati", "architecture.hidden=[4]"],
        ["exact_trust=false", "damping=0.1", "learning_rate=0.5"],
        ["precision=float32"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_classes_are_trained_by_exact_steps_too(tmp_path, overrides):
    options = ("method=exact", "architecture.hidden=[8]", "precision=float64", "max_steps=6")
    rows = support.run(tmp_path, *options, "batch_size=256", "logging_freq=1", *overrides)
    assert losses(rows)[-1] < 0.7 * losses(rows)[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("use_preconditioner=true", "exact steps have no P. Set use_preconditioner=false"),
        ("sam_mode=base_sam", "of the loss itself. Set sam_mode=null"),
        ("grad_acc_steps=2", "that of a whole batch"),
        ("normalize_conv_params=true", "Set normalize_conv_params=false"),
        ("precision=bf16", "float32 is the least"),
        ("divergence_reduction=unit", "divergence_reduction=mean"),
        ("main_optimizer=polyak", "main_optimizer=sgd, learning_rate=1"),
        ("learning_rate=0.1", "main_optimizer=sgd, learning_rate=1"),
        ("weight_decay=0.1", "without weight_decay"),
        ("lr_scheduler=cosine_annealing", "lr_scheduler=constant"),
        ("divergence=ngd", "divergence=ngd is for classes"),
        ("divergence=newton", "positive metric"),
        ("toy.name=ackley", "for training runs"),
    ],
)
def test_what_does_not_go_with_exact_steps_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        prepare(small("pinn-poisson-exact", override))


def test_a_loss_without_residuals_ends_the_run_in_words():
    """Inside a compiled step nothing can be raised: the run says why no step was ever taken."""
    with jax.enable_x64(True):
        job = prepare(small("pinn-poisson-exact"))
        state = step.init(job.recipe, job.task.params)
    known = state.opt_state.trust._replace(refused=2, outcome=OUTCOMES.index(WHY))
    state = state._replace(step=2, opt_state=state.opt_state._replace(trust=known))
    with pytest.raises(TrainingError, match=f"no exact step can be made: {WHY}"):
        check_health(job, state, None)  # type: ignore[arg-type]
    check_health(job, state._replace(step=3), None)  # type: ignore[arg-type]


WHY = "the loss couples rows of the outputs"


def test_a_forecast_says_how_steps_are_made(capsys):
    forecast.show(small("pinn-poisson-exact"))
    said = " ".join(capsys.readouterr().out.split())
    assert "steps by" in said
    assert "exact steps by dual, gaussian: 16 residuals in" in said


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=streaming", "learning_rate=2e-2"],
        ["method=published", "use_preconditioner=false", "main_optimizer=adamw",
         "weight_decay=0", "learning_rate=1e-2"],
    ],
    ids=["streaming", "adamw"],
)  # fmt: skip
def test_equations_by_other_methods(tmp_path, overrides):
    train.run(small("pinn-wave-exact", *overrides), tmp_path, quiet=True)
    assert np.isfinite(losses(support.rows(tmp_path))).all()
