"""A run's folder: held by one process, entered by the same run only, damaged in every way."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llqr_experiments.config.options import Config
from llqr_experiments.errors import ConfigError, DataError
from llqr_experiments.record import lock, run_folder
from llqr_experiments.record.trackers import Jsonl
from llqr_experiments.run import job
from llqr_experiments.study import comparison, toys
from tests.experiments import support

HOLD = """
import sys, time
from pathlib import Path
from llqr_experiments.record.lock import hold
with hold(Path(sys.argv[1]), "run.py experiment=other"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_folder_and_a_killed_one_holds_nothing(tmp_path):
    run = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        told = rf"in use: process {other.pid} on \S+ since \S+ \(run.py experiment=other\)"
        with pytest.raises(ConfigError, match=told), lock.hold(run, ""):
            pass
        with pytest.raises(ConfigError, match=f"process {other.pid} on"):
            support.run(run)
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
    assert (run / lock.NAME).exists(), "as a kill leaves it"
    with lock.hold(run, ""):
        assert json.loads((run / lock.NAME).read_text())["pid"] == os.getpid()
    assert not run.exists(), "nothing was written"


def test_a_second_run_in_the_same_process_is_refused(tmp_path):
    with lock.hold(tmp_path, ""):
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"), lock.hold(tmp_path, ""):
            pass
        (tmp_path / "file").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without locks"])
@pytest.mark.parametrize("alive", [True, False])
def test_the_owner_on_another_machine_lives_as_long_as_it_gives_signs(
    tmp_path, monkeypatch, locks, alive
):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    if not locks:

        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock.fcntl, "lockf", none)
    path, said = tmp_path / lock.NAME, []
    path.write_text(json.dumps({"host": "far", "pid": 7, "since": "then", "command": "x"}))
    ended = threading.Event()
    if alive:
        threading.Thread(target=lock._beat, args=(path, ended), daemon=True).start()
    try:
        if alive:
            with pytest.raises(ConfigError, match="process 7 on far since then"):
                _hold_for_a_moment(tmp_path, said)
        else:
            _hold_for_a_moment(tmp_path, said)
    finally:
        ended.set()
    assert "process 7 on far" in said[0]


def _hold_for_a_moment(folder, said):
    with lock.hold(folder, "", said.append):
        before = (folder / lock.NAME).stat().st_mtime_ns
        time.sleep(4 * lock.BEAT)
        assert (folder / lock.NAME).stat().st_mtime_ns > before, "a sign of life"


# --- what is no run --------------------------------------------------------------------------


@pytest.fixture
def config() -> Config:
    return support.config("experiment=quick-local-test")


def leave(folder: Path, config: Config, *steps: int) -> Path:
    """What a run leaves that has logged these steps."""
    folder.mkdir()
    run_folder.enter(config, folder, "first", again=False)
    lines = "".join(json.dumps({"step": step, "seconds": 1.0}) + "\n" for step in steps)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def test_without_a_first_step_it_is_no_run(tmp_path, config):
    other = support.config("experiment=quick-local-test", "batch_size=64")
    for i, steps in enumerate([(), (0, 0)]):
        run = leave(tmp_path / str(i), other, *steps)
        assert not run_folder.look(config, run)
        run_folder.enter(config, run, "second", again=False)
        assert json.loads((run / "meta.json").read_text())["command"] == "second"
    with pytest.raises(ConfigError, match="batch_size=64 there, 128 here"):
        run_folder.look(config, leave(tmp_path / "run", other, 0, 1))


@pytest.mark.parametrize(
    "option", ["data_threads=0", "checkpoint_keep=9", "logging.tensorboard=true", "mesh.fsdp=2"]
)
def test_what_changes_no_number_may_be_another(tmp_path, config, option):
    other = support.config("experiment=quick-local-test", option)
    assert run_folder.look(other, leave(tmp_path / "run", config, 0, 1))


@pytest.mark.parametrize("bad", ["resume={run}", "quality=[foo]", "{mask}", "total_epochs=0.001"])
def test_a_start_that_fails_leaves_nothing(tmp_path, bad):
    run = tmp_path / "other" / "checkpoints" / "latest" / "3"
    run.mkdir(parents=True)  # looks like a checkpoint, and cannot be read
    mask = "wd_mask=[nothing] weight_decay=0.1"
    overrides = bad.format(run=tmp_path / "other", mask=mask).split()
    with pytest.raises(ConfigError):
        support.run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["total_epochs=0.001"], "total_epochs=0.001 is no step: .* 1,438 examples, 11.23 batches"),
        (["dataset.truncate=9", "total_epochs=1"], r"9 examples, 0\.07031 .* total_epochs=14\.2"),
        (["grad_acc_steps=99", "total_epochs=1"], "grad_acc_steps=99"),
        (["batch_size=2000", "partial_batch=drop"], "no full batch of 2000"),
    ],
)
def test_a_run_without_a_step_is_told_before_the_model_is_built(monkeypatch, overrides, message):
    monkeypatch.setattr(job.tasks, "build", lambda *_: pytest.fail("a model is built"))
    config = support.config("experiment=quick-local-test", *overrides)
    with pytest.raises((ConfigError, DataError), match=message):
        job.prepare(config)


def test_toys_and_comparisons_that_fail_leave_nothing(tmp_path):
    toy = support.config("toy.name=rosenbrock", "toy.start=[1]")
    with pytest.raises(ConfigError, match="variables"):
        toys.run(toy, tmp_path / "run")
    bad = support.config("experiment=sharpness-digits", "dataset=small_de_en")
    with pytest.raises(ConfigError, match=r"comparison\.name=training"):
        comparison.run(bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "batch_size: [1", r"config.yaml is damaged .* restore it, or give another"),
        ("config.yaml", "", r"config.yaml is damaged \(no options\)"),
        ("config.yaml", "\x00\x01", "config.yaml is damaged"),
        ("config.yaml", "batch_size: ${nothing", "config.yaml is damaged"),
        ("config.yaml", None, "holds a run without its config.yaml"),
        ("config.yaml", "later_option: 3", r"another version of llqr, .*\(later_option\)"),
        ("config.yaml", "dataset: {later: 3}", r"another version of llqr, .*\(dataset.later\)"),
        ("meta.json", '{"command": "ru', r"meta.json is damaged .*: move it away"),
        ("meta.json", "[]", "meta.json is damaged"),
        ("meta.json", "{}", None),
        ("meta.json", None, None),
        ("metrics.jsonl", {}, "metrics.jsonl is a folder"),
        ("checkpoints", "", "checkpoints is a file"),
    ],
)
def test_a_damaged_folder_is_told_with_the_way_on(tmp_path, config, name, content, message):
    run = leave(tmp_path / "run", config, 1)
    (run / name).unlink(missing_ok=True)
    if isinstance(content, str):
        (run / name).write_text(content)
    elif content is not None:
        (run / name).mkdir()
    if message is None:
        assert run_folder.look(config, run)
        run_folder.enter(config, run, "second", again=True)
        assert json.loads((run / "meta.json").read_text())["again"][0]["command"] == "second"
        return
    with pytest.raises(ConfigError, match=message) as told:
        run_folder.look(config, run)
    assert "resume=" not in str(told.value), "there is no checkpoint"


def test_resume_is_the_way_on_where_there_is_a_checkpoint(tmp_path, config):
    run = leave(tmp_path / "run", config)
    (run / "checkpoints" / "latest" / "7").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=f"resume={run} goes on from its newest checkpoint"):
        run_folder.look(config, run)


@pytest.mark.parametrize(
    ("content", "position", "kept", "lost", "short"),
    [
        ("aa\nbb\ncc\n", 6, "aa\nbb\n", "cc\n", False),
        ("aa\nbb\n", 6, "aa\nbb\n", None, False),
        ("aa\nb", 6, "aa\n", "b", True),
        ("aa\n", 6, "aa\n", None, True),
        ("", 6, "", None, True),
        (None, 6, None, None, True),
        ("aa\nb", None, "aa\n", "b", False),
        ("aaaaaaaa\n", 6, "", "aaaaaaaa\n", True),
    ],
)
def test_a_record_goes_on_after_a_whole_line(tmp_path, content, position, kept, lost, short):
    path, said = tmp_path / "metrics.jsonl", []
    if content is not None:
        path.write_text(content)
    record = Jsonl(path, position, said.append)
    record.log(3, {"x": 1.0}, 2.0)
    record.close()
    assert path.read_text() == (kept or "") + '{"step": 3, "x": 1.0, "seconds": 2.0}\n'
    aside = path.with_name("metrics.jsonl.lost")
    assert (aside.read_text() if aside.exists() else None) == lost
    assert bool(said) == short
