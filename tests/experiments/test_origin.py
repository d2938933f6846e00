"""Where a run begins: each of its sources, and what comes along from there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llqr_experiments.errors import ConfigError
from llqr_experiments.record import run_folder
from llqr_experiments.run import train
from llqr_experiments.run.checkpoint import Checkpoints
from llqr_experiments.run.job import prepare
from llqr_experiments.run.origin import Origin, origin
from llqr_experiments.run.session import begin
from llqr_experiments.run.step import init
from tests.experiments import support

TINY = ("experiment=quick-local-test", "architecture.hidden=[4]", "logging.aim=false")


@pytest.fixture
def said():
    return []


def job_of(*overrides):
    return prepare(support.config(*TINY, *overrides))


def started(job, folder, said, *, entered=False):
    """The origin and the session of a run in a folder."""
    start = origin(job, entered, folder, Checkpoints(folder / "checkpoints", 1, print), said.append)
    return start, begin(job, start, folder, said.append)


def save(job, run, step):
    """Leave a checkpoint whose parameters are all 3, and whose streams are 5 and 2 batches on."""
    state = init(job.recipe, job.task.params, job.task.statistics)
    state = state._replace(
        params=jax.tree.map(lambda x: jnp.full_like(x, 3.0), state.params),
        health=state.health._replace(bad_step=jnp.int32(1), bad_steps=jnp.int32(4)),
    )
    streams = job.task.material.streams
    training, refits = streams.training(job.config), streams.refits(job.config)
    for _ in range(5):
        next(training)
    for _ in range(2):
        next(refits)
    meta = {
        "options": run_folder.options(job.config),
        "best": {"value": 90.0, "step": 4.0},
        "reached": {"first step with test accuracy of 80 %": 3},
        "stream": training.get_state(),
        "refits": refits.get_state(),
        "seconds": {"training": 7.0, "total": 9.0},
        "trackers": {"Jsonl": 11},
    }
    following = next(training), next(refits)
    checkpoints = Checkpoints(run / "checkpoints", 1, print)
    checkpoints.save(step, state, meta)
    for open_one in (checkpoints, training, refits):
        open_one.close()
    return following


def is_new(state, job) -> bool:
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(job.task.params), strict=True)
    return all(bool(jnp.all(a == b)) for a, b in pairs)


def is_saved(state) -> bool:
    return all(bool(jnp.all(x == 3.0)) for x in jax.tree.leaves(state.params))


def test_anew(tmp_path, said):
    job = job_of()
    start, session = started(job, tmp_path, said)
    assert is_new(start.state, job)
    assert (start.step, start.meta, start.seconds, start.trackers) == (0, {}, {}, None)
    assert (session.step, session.best, session.reached, said) == (0, {}, {}, [])


@pytest.mark.parametrize("skip", [False, True])
def test_its_own_checkpoint_brings_everything_along(tmp_path, said, skip):
    job = job_of(*["on_nonfinite=skip"] * skip)
    training, refits = save(job, tmp_path, 6)
    start, session = started(job, tmp_path, said, entered=True)
    assert is_saved(start.state)
    assert start.own
    assert session.step == 6
    assert start.seconds == {"training": 7.0, "total": 9.0}
    assert start.trackers == {"Jsonl": 11}
    assert session.best == {"value": 90.0, "step": 4.0}
    assert list(session.reached.values()) == [3]
    np.testing.assert_array_equal(next(session.stream)["label"], training["label"])
    np.testing.assert_array_equal(next(session.refits)["label"], refits["label"])
    assert said == ["going on from the checkpoint of step 6\n"]
    # What was skipped before is counted on; of a run that would have stopped there is nothing.
    assert int(start.state.health.bad_steps) == (4 if skip else 0)
    assert int(start.state.health.bad_step) == (1 if skip else -1)


def test_its_own_checkpoint_is_looked_for_where_it_was_before(tmp_path, said):
    job = job_of()
    save(job, tmp_path, 6)
    start, _ = started(job, tmp_path, said, entered=False)
    assert is_new(start.state, job), "a new folder has none"


def test_the_checkpoint_of_another_run_leaves_its_record_there(tmp_path, said):
    save(job_of(), tmp_path / "first", 6)
    job = job_of(f"resume={tmp_path / 'first'}")
    histograms = tmp_path / "second" / "histograms.jsonl"
    histograms.parent.mkdir()
    histograms.write_text(json.dumps({"step": 9}) + "\n")
    start, session = started(job, tmp_path / "second", said)
    assert is_saved(start.state)
    assert (session.step, start.own, start.trackers) == (6, False, None)
    assert start.seconds["training"] == 7.0
    assert session.best["value"] == 90.0
    assert said[0].startswith(f"going on from the checkpoint of step 6 of {tmp_path / 'first'}")
    assert histograms.read_text(), "only of its own record a run forgets"


def test_its_own_checkpoint_comes_before_that_of_another(tmp_path, said):
    save(job_of(), tmp_path / "first", 6)
    job = job_of(f"resume={tmp_path / 'first'}")
    save(job, tmp_path / "second", 8)
    start, _ = started(job, tmp_path / "second", said, entered=True)
    assert (start.step, start.own) == (8, True)


def test_parameters_of_another_run(tmp_path, said):
    save(job_of(), tmp_path / "first", 6)
    job = job_of(f"init_from={tmp_path / 'first'}")
    start, session = started(job, tmp_path / "second", said)
    assert is_saved(start.state)
    assert (session.step, start.meta, session.best, start.trackers) == (0, {}, {}, None)
    assert said == [f"parameters of step 6 of {tmp_path / 'first'}\n"]


@pytest.mark.parametrize("option", ["rng_seed=9", "grad_acc_steps=2"])
def test_other_options_of_the_data_start_the_streams_anew(tmp_path, said, option):
    save(job_of(), tmp_path / "first", 6)
    job = job_of(f"resume={tmp_path / 'first'}", option)
    _, session = started(job, tmp_path / "second", said)
    first = next(job.task.material.streams.training(job.config))
    np.testing.assert_array_equal(next(session.stream)["label"], first["label"])
    assert "the streams start anew" in said[1]


def test_in_scratch_the_checkpoint_of_another_run_is_refused(tmp_path, said):
    save(job_of(), tmp_path, 6)
    other = job_of("learning_rate=0.5")
    with pytest.raises(ConfigError, match=r"learning_rate=0\.1 there, 0\.5 here"):
        started(other, tmp_path, said, entered=True)


def test_a_checkpoint_past_the_end_is_refused(tmp_path, said):
    save(job_of(), tmp_path / "first", 60)
    with pytest.raises(ConfigError, match="of step 60, and this run ends at 50"):
        started(job_of(f"resume={tmp_path / 'first'}", "max_steps=50"), tmp_path, said)


def test_a_finished_run_without_a_checkpoint_is_not_begun_again(tmp_path, said):
    job = job_of()
    (tmp_path / "meta.json").write_text("{}")
    assert isinstance(started(job, tmp_path, said, entered=True)[0], Origin)
    (tmp_path / "meta.json").write_text('{"finished": "yesterday"}')
    with pytest.raises(ConfigError, match="already holds a finished run"):
        started(job, tmp_path, said, entered=True)


def test_what_its_own_record_says_from_the_checkpoint_on_comes_again(tmp_path, said):
    """A checkpoint is written before the evaluation of its step."""
    job = job_of()
    save(job, tmp_path, 6)
    lines = [
        json.dumps({"step": step, "split": split}) + "\n"
        for step, split in ((5, "valid"), (5, "test"), (6, "valid"), (7, "valid"))
    ]
    for name in ("histograms.jsonl", "translations.jsonl"):
        (tmp_path / name).write_text("".join(lines) + '{"step": 5, "cut')
    started(job, tmp_path, said, entered=True)
    for name in ("histograms.jsonl", "translations.jsonl"):
        assert (tmp_path / name).read_text() == lines[0]


def test_the_time_before_the_checkpoint_counts(tmp_path):
    save(job_of(), tmp_path / "first", 6)
    short = support.config(*TINY, f"resume={tmp_path / 'first'}", "max_steps=7")
    train.run(short, tmp_path / "second", quiet=True)
    meta = json.loads((tmp_path / "second" / "meta.json").read_text())
    assert meta["time"]["training"] >= 7.0
    assert support.rows(tmp_path / "second")[-1]["seconds"] >= 9.0
