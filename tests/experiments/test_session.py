"""What is saved of a run, and when: at each step of a session, without training in between."""

import signal
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from llqr_experiments.data import kinds
from llqr_experiments.errors import ConfigError, TrainingError
from llqr_experiments.record.clock import Clock
from llqr_experiments.record.console import Display
from llqr_experiments.record.trackers import Trackers
from llqr_experiments.run import phases
from llqr_experiments.run.checkpoint import BEST, Checkpoints, steps
from llqr_experiments.run.goal import Goal, goal
from llqr_experiments.run.job import prepare
from llqr_experiments.run.origin import origin
from llqr_experiments.run.preemption import Interrupted, Interrupts
from llqr_experiments.run.session import Desk, begin, checkpoint, keep_best
from tests.experiments import support

TINY = (
    "experiment=quick-local-test", "architecture.hidden=[4]", "logging.aim=false",
    "checkpoint_freq=3", "checkpoint_keep=9", "max_steps=7",
)  # fmt: skip


@pytest.fixture
def at_desk(tmp_path):
    """(overrides) -> job, session and desk of a run that begins."""
    opened = []

    def make(*overrides):
        job = prepare(support.config(*TINY, *overrides))
        checkpoints = Checkpoints(tmp_path / "checkpoints", job.config.checkpoint_keep, print)
        session = begin(job, origin(job, False, tmp_path, checkpoints, print), tmp_path, print)
        desk = Desk(
            Display(1, 1, quiet=True), Trackers(print), Clock(), checkpoints, Interrupts(), tmp_path
        )
        opened.extend([checkpoints, session.stream, session.refits])
        return job, session, desk

    yield make
    for one in opened:
        one.close()


def saved(desk: Desk, kind: str = "latest") -> list[int]:
    desk.checkpoints.wait()
    return steps(Path(desk.checkpoints.folder), kind)


def test_checkpoints_are_of_the_steps_that_are_due_and_of_the_last(at_desk):
    job, session, desk = at_desk()
    for session.step in range(job.last + 1):
        checkpoint(job, session, desk)
    assert saved(desk) == [3, 6, 7]


def test_without_checkpoints_none_is_written(at_desk):
    job, session, desk = at_desk("checkpoint_freq=null")
    for session.step in range(job.last + 1):
        checkpoint(job, session, desk)
    assert saved(desk) == []


def test_a_signal_saves_whatever_step_it_is(at_desk):
    job, session, desk = at_desk()
    session.step, desk.interrupts.requested = 4, signal.SIGTERM
    with pytest.raises(Interrupted, match="SIGTERM ended the run at step 4"):
        checkpoint(job, session, desk)
    assert saved(desk) == [4]


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_what_is_not_finite_is_not_saved(at_desk, on_nonfinite):
    job, session, desk = at_desk(f"on_nonfinite={on_nonfinite}")
    health = session.state.health._replace(bad_step=jnp.int32(2), bad_steps=jnp.int32(1))
    session.step, session.state = 3, session.state._replace(health=health)
    if on_nonfinite == "skip":  # such a step has changed nothing
        checkpoint(job, session, desk)
        assert saved(desk) == [3]
        return
    with pytest.raises(TrainingError, match="the training loss is not finite at step 2; there is"):
        checkpoint(job, session, desk)
    assert saved(desk) == []


def test_the_best_is_the_first_of_equals(at_desk):
    job, session, desk = at_desk()
    assert job.goal == Goal("test accuracy", True)
    kept = []
    for session.step, value in enumerate([80.0, 80.0, float("nan"), 79.0, 81.0]):
        keep_best(job, session, {"test accuracy": value, "test loss": 0.0}, desk)
        kept.append(session.best["step"])
    assert kept == [0, 0, 0, 0, 4]
    assert session.best["value"] == 81.0
    assert saved(desk, BEST) == [4], "the one before is gone"
    keep_best(job, session, {"train_eval accuracy": 99.0}, desk)
    assert session.best["value"] == 81.0, "another metric says nothing"


def test_a_milestone_is_the_first_step_that_reaches_it():
    """Grokking's, 95 and 99 %: the very number is enough, and later ones change nothing."""
    made = kinds.make(support.config("dataset.name=mod_sum", "dataset.p=5").dataset)
    job, session = (SimpleNamespace(task=SimpleNamespace(material=made)), SimpleNamespace())
    session.reached = {}
    for session.step, accuracy in ((2, 94.9), (3, 95.0), (4, 80.0), (5, 99.5), (6, 99.9)):
        phases._reached(job, session, {"test accuracy": accuracy})  # type: ignore[arg-type]
    assert session.reached == {
        f"first step with test accuracy of {share} %": step for share, step in ((95, 3), (99, 5))
    }


def test_every_inner_step_of_a_refit_has_a_batch_of_its_own(at_desk):
    job, session, _ = at_desk("multibatch_training=true", "precond_steps=3")
    expected = [next(session.refits) for _ in range(3)]
    again = job.task.material.streams.refits(job.config)
    batch, objective = phases.refit_objective(job, again, session.state.statistics)
    again.close()
    for i, one in enumerate(expected):
        np.testing.assert_array_equal(objective.batch["label"][i], one["label"])
    np.testing.assert_array_equal(batch["label"], expected[0]["label"])
    assert not np.array_equal(expected[0]["label"], expected[1]["label"])


def test_four_options_and_one_goal():
    """Its own metric comes before that of translation, and that before the data's."""

    def of(*overrides):
        config = support.config("dataset.name=numbers_de_en", *overrides)
        return goal(config, made)

    made = kinds.make(support.config("dataset.name=numbers_de_en").dataset)

    on = "translation_eval.enabled=true"
    assert of() == Goal("valid loss", False)
    assert of("maximize_checkpoint_metric=true") == Goal("valid loss", True)
    assert of("translation_eval.checkpoint_metric=bleu") == Goal("valid loss", False), "not enabled"
    assert of(on) == Goal("valid bleu", True)
    assert of(on, "translation_eval.maximize_checkpoint_metric=false").maximize is False
    assert of(on, "translation_eval.checkpoint_metric=loss") == Goal("valid loss", False)
    own = 'checkpoint_metric="valid token_accuracy"'
    assert of(on, own) == Goal("valid token_accuracy", True)
    assert of(on, own, "maximize_checkpoint_metric=false") == Goal("valid token_accuracy", False)
    with pytest.raises(ConfigError, match=r"checkpoint_metric .* did you mean 'valid loss'"):
        of('checkpoint_metric="valid los"')
    with pytest.raises(ConfigError, match="needs add_train_eval=true"):
        of('checkpoint_metric="train_eval loss"')
