"""Runs that stop and go on to the same bits; damaged, foreign and unwritable checkpoints."""

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr_experiments import data
from llqr_experiments.command import look
from llqr_experiments.errors import ConfigError, TrainingError
from llqr_experiments.record import run_folder
from llqr_experiments.record.console import Display
from llqr_experiments.run import checkpoint, phases, preemption
from llqr_experiments.run.checkpoint import BEST, LATEST, Checkpoints
from llqr_experiments.run.preemption import Interrupted
from tests.experiments import support
from tests.experiments.support import assert_same_end, final, interrupt

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "total_epochs=4",  # 44 steps
    "checkpoint_freq=10",
    "logging_freq=1",
    "test_eval_freq=15",
    "update_preconditioner_every=12",
    "precond_steps=3",
    "precond_batch_size=8",
    "block_structure=diagonal",
    "architecture.hidden=[16]",
    "sam_mode=base_fsam",
    "perturb_mode=ema_precond_grad",
    "main_optimizer=polyak",
    "learning_rate=0.02",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    support.run(out, *RUN)
    return out


@pytest.mark.parametrize("number", preemption.SIGNALS, ids=lambda s: s.name)
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(
    tmp_path, monkeypatch, capsys, whole, number
):
    with monkeypatch.context() as patch:
        interrupt(patch, 27, number)
        with pytest.raises(Interrupted, match=f"{number.name} ended the run at step 27") as caught:
            support.run(tmp_path / "run", *RUN)
    assert caught.value.code == 75
    assert signal.getsignal(number) not in (None, preemption.Interrupts._receive)
    support.run(tmp_path / "run", *RUN)
    assert "going on from the checkpoint of step 27" in capsys.readouterr().out
    assert_same_end(tmp_path / "run", whole)
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    assert len(meta["again"]) == 1
    assert "finished" in meta


def test_the_second_signal_ends_the_process(monkeypatch):
    """But not its echo: `uv run` passes on what the whole group was sent."""
    ended, now = [], [100.0]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    with preemption.Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested is signal.SIGTERM
        now[0] += 0.3
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended
        now[0] += 2.0
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


def test_what_a_kill_leaves_behind_the_checkpoint_is_made_again(tmp_path, monkeypatch, whole):
    """As after SIGKILL: rows and a half-written folder beyond the newest checkpoint."""
    with monkeypatch.context() as patch:
        interrupt(patch, 33)
        with pytest.raises(Interrupted):
            support.run(tmp_path / "run", *RUN)
    folder = tmp_path / "run" / "checkpoints" / LATEST
    (folder / "33").rename(folder / "33.orbax-checkpoint-tmp-7")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 34, "train lo')
    support.run(tmp_path / "run", *RUN)
    assert_same_end(tmp_path / "run", whole)
    assert '{"step": 34, "train lo' in (tmp_path / "run" / "metrics.jsonl.lost").read_text()


def test_a_record_that_is_gone_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys, whole):
    with monkeypatch.context() as patch:
        interrupt(patch, 27)
        with pytest.raises(Interrupted):
            support.run(tmp_path / "run", *RUN)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    rows = support.run(tmp_path / "run", *RUN)
    said = " ".join(capsys.readouterr().out.split())
    assert "metrics.jsonl has 0 of the" in said
    assert rows[0]["step"] == 28
    assert not {row["step"] for row in rows} - {row["step"] for row in support.rows(whole)}


def test_killed_before_the_first_checkpoint_it_starts_anew(tmp_path, whole):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "meta.json"):
        (run / name).write_text((whole / name).read_text())
    meta = json.loads((run / "meta.json").read_text())
    del meta["finished"]
    (run / "meta.json").write_text(json.dumps(meta))
    (run / "metrics.jsonl").write_text('{"step": 1, "train loss": 9.0, "seconds": 1.0}\n')
    support.run(run, *RUN)
    assert_same_end(run, whole)


# Reads that fail leave futures behind whose errors nobody fetches, inside tensorstore.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    tmp_path, monkeypatch, capsys, whole, damage
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 25)
        with pytest.raises(Interrupted):
            support.run(run, *RUN)
    newest = run / "checkpoints" / LATEST / "25"
    for path in newest.rglob("d/*"):  # which of them hold arrays is orbax's affair
        content, middle = path.read_bytes(), path.stat().st_size // 2
        if damage == "truncated":
            path.write_bytes(content[:middle])
        elif damage == "altered":
            path.write_bytes(
                content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
            )
    if damage == "emptied":
        for path in newest.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    support.run(run, *RUN)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "the checkpoint of step 25 is damaged" in said
    assert "going on from the checkpoint of step 20" in said
    assert (run / "checkpoints" / "damaged" / "25").is_dir()
    assert_same_end(run, whole)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    import orbax.checkpoint as ocp

    save = ocp.CheckpointManager.save

    def full(self, step, *args, **kwargs):
        if step >= 20:
            raise OSError(28, "No space left on device")
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    rows = support.run(tmp_path / "run", *RUN)
    assert rows[-1]["step"] == 44
    said = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint of step 20 could not be written" in said
    assert "No space left on device); the last good one is of step 10" in said
    assert "step 10 could not" not in said
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [10]
    assert final(tmp_path / "run")


def test_a_full_disk_is_told_once_and_before_a_write_is_begun(tmp_path, monkeypatch, capsys):
    """What is cut off in the background comes back as tracebacks of others."""
    space = SimpleNamespace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: space)
    display = Display(1, 1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, display.say)
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.ones(2)}, {})
    display.say(f"no histograms: {os.strerror(errno.ENOSPC)}")
    space.free = 10**9
    checkpoints.save(3, {"w": jnp.ones(2)}, {})
    checkpoints.close()
    display.say("something else")
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count(os.strerror(errno.ENOSPC)) == 1
    assert "checkpoint of step 1 could not be written (No space left on device)" in said
    assert "something else" in said
    assert checkpoint.steps(tmp_path / "checkpoints") == [3]


def test_what_tensorstore_prints_of_it_is_left_out(capsys):
    error = RuntimeError("Event loop is closed")
    for one, thread in [(error, True), (error, False), (RuntimeError("other"), True)]:
        given = (sys.__excepthook__, RuntimeError, one, None)
        if thread:
            started = threading.Thread(target=checkpoint._but_tensorstores, args=given)
            started.start()
            started.join()
        else:
            checkpoint._but_tensorstores(*given)
    said = capsys.readouterr().err
    assert said.count("Event loop is closed") == 1
    assert said.count("other") == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written .*hydra\.run\.dir"):
        support.run(tmp_path / "file" / "run", *RUN)


def test_the_newest_and_the_best_are_kept(whole):
    folder = whole / "checkpoints"
    assert checkpoint.steps(folder) == [30, 40, 44]
    best = max(
        (row for row in support.rows(whole) if "test accuracy" in row),
        key=lambda row: row["test accuracy"],
    )
    assert checkpoint.steps(folder, BEST) == [best["step"]]
    meta = json.loads((whole / "meta.json").read_text())
    assert meta["best"] == {"value": best["test accuracy"], "step": best["step"]}


def test_going_on_in_another_folder_and_for_longer(tmp_path, whole, capsys):
    longer = [option for option in RUN if not option.startswith("total_epochs")]
    rows = support.run(tmp_path / "run", *longer, "total_epochs=5", f"resume={whole}")
    assert "going on from the checkpoint of step 44 of" in capsys.readouterr().out
    trained = [row["step"] for row in rows if "train loss" in row]
    assert trained == list(range(45, 57))


def test_initial_parameters_of_another_run(tmp_path, whole):
    options = [option for option in RUN if "polyak" not in option and "sam" not in option]
    options = [option for option in options if "perturb" not in option]
    fresh = support.run(tmp_path / "a", *options, "max_steps=2")
    warm = support.run(tmp_path / "b", *options, "max_steps=2", f"init_from={whole}")
    first, again = (
        next(r["train loss"] for r in rows if "train loss" in r) for rows in (fresh, warm)
    )
    assert again < 0.7 * first


def test_another_run_in_the_folder_is_refused(whole):
    with pytest.raises(ConfigError, match=r"other options \(batch_size=128 there, 64 here\)"):
        support.run(whole, *RUN, "batch_size=64")


def test_another_model_is_refused(tmp_path, whole):
    with pytest.raises(
        ConfigError, match=r"of another model or optimizer: .*\[16\] there, .*\[8\]"
    ):
        support.run(tmp_path / "a", *RUN, "architecture.hidden=[8]", f"resume={whole}")
    with pytest.raises(ConfigError, match=r"of another model: params\.layers_0\.bias"):
        support.run(tmp_path / "b", *RUN, "architecture.hidden=[8]", f"init_from={whole}")
    for option in ("resume", "init_from"):
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            support.run(tmp_path / "c", *RUN, f"{option}={tmp_path / 'nowhere'}")
    assert not (tmp_path / "c").exists(), "told before anything is written"


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 1, print)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        checkpoints.save(1, {"w": jnp.ones(2)}, {})
        checkpoints.close()
    with pytest.raises(ConfigError, match="format 99, and this version of llqr reads up to 2"):
        checkpoints.restore({"w": jnp.ones(2)})


def test_an_array_that_reads_well_and_is_another_is_told_by_its_checksum(tmp_path, monkeypatch):
    """Storage has checks of its own; ours does not depend on them."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 1, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checksum", lambda array: 1)
        checkpoints.save(1, {"w": jnp.ones(2)}, {})
        checkpoints.close()
    assert checkpoints.restore({"w": jnp.ones(2)}) is None
    assert "the checkpoint of step 1 is damaged (0000.w is not what was written.)" in said[0]


def test_an_array_of_which_a_part_has_no_checksum_is_damaged(tmp_path, monkeypatch):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 1, said.append)
    with monkeypatch.context() as patch:
        half = {"0:1": checkpoint._checksum(np.ones(1))}
        patch.setattr(checkpoint, "_checksums", lambda arrays: dict.fromkeys(arrays, half))
        checkpoints.save(1, {"w": np.ones(2)}, {})
        checkpoints.close()
    assert checkpoints.restore({"w": np.ones(2)}) is None
    assert "(0000.w: not all of it has a checksum.)" in said[0]


def test_initial_parameters_are_the_latest_where_there_is_a_best_too(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, print)
    for step, kind in ((3, BEST), (5, LATEST)):
        checkpoints.save(step, {"w": jnp.full(2, float(step))}, {}, kind=kind)
    checkpoints.close()
    for kind, expected in ((None, 5), (BEST, 3)):
        found, step = checkpoint.load_fields(tmp_path, {"w": jnp.ones(2)}, print, kind=kind)
        assert step == expected
        np.testing.assert_array_equal(found["w"], expected)


def test_every_dtype_comes_back(tmp_path):
    state = {
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "bits": jnp.array([True, False]),
        "count": jnp.int32(7),
        "nan": jnp.array([jnp.nan, -0.0]),
        "none": None,
        "empty": (),
    }
    checkpoints = Checkpoints(tmp_path, 1, print)
    checkpoints.save(3, state, {"note": "x"})
    checkpoints.close()
    found = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert found is not None
    assert found.step == 3
    assert found.meta["note"] == "x"
    for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_preemptible_jobs_write_to_scratch(tmp_path, monkeypatch, whole):
    options = (*RUN, "preempt_handling=true")
    monkeypatch.delenv("SCRATCH", raising=False)
    with pytest.raises(ConfigError, match="SCRATCH is not set"):
        support.run(tmp_path / "a", *options)
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("SLURM_JOBID", raising=False)
    with pytest.raises(ConfigError, match="give jobid, or set SLURM_JOBID"):
        support.run(tmp_path / "b", *options)
    monkeypatch.setenv("SLURM_JOBID", "77")
    with monkeypatch.context() as patch:
        interrupt(patch, 27)
        with pytest.raises(Interrupted):
            support.run(tmp_path / "c", *options)
    place = tmp_path / "scratch" / "digits_mlp" / "77"
    assert checkpoint.steps(place)[-1] == 27
    support.run(tmp_path / "d", *options)  # the job comes back in a new folder
    mine, theirs = checkpoint.read(place, 44)[0], final(whole)
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    with pytest.raises(ConfigError, match=r"other options \(init_key=42 there, 1 here\)"):
        support.run(tmp_path / "e", *options, "init_key=1")


def test_a_look_into_a_checkpoint(whole, capsys):
    look.main([str(whole)])
    said = capsys.readouterr().out
    assert "params.layers_0.kernel" in said
    assert re.search(r"step 44", said)
    assert "arrays" in said
    look.main([str(whole), "--step", "40"])
    with pytest.raises(SystemExit) as ended:
        look.main([str(whole), "--step", "41"])
    assert ended.value.code == 2
    assert "has the steps [30, 40, 44], not 41" in capsys.readouterr().err


def test_a_failure_in_the_background_is_told_for_its_own_step(tmp_path, monkeypatch):
    """It shows when the next one begins, which is written all the same."""
    import orbax.checkpoint as ocp

    wait, failed = ocp.CheckpointManager.wait_until_finished, []

    def broken(self):
        wait(self)
        if checkpoint.steps(tmp_path) == [2] and not failed:
            failed.append(None)
            checkpoint.shutil.rmtree(tmp_path / LATEST / "2")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", broken)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 3, said.append)
    for step in (2, 4):
        checkpoints.save(step, {"w": jnp.ones(2)}, {})
    checkpoints.close()
    assert len(said) == 1
    assert "checkpoint of step 2 could not be written" in said[0]
    assert checkpoints.newest == 4


def test_what_the_run_changes_while_a_checkpoint_is_written_is_not_in_it(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    save, facts = ocp.CheckpointManager.save, {"reached": {"95 %": 3}}

    def slow(self, step, args):
        facts["reached"]["99 %"] = 4  # as if the next evaluation came before the file
        return save(self, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "save", slow)
    checkpoints = Checkpoints(tmp_path, 1, print)
    checkpoints.save(3, {"w": jnp.ones(2)}, facts)
    checkpoints.close()
    assert checkpoint.read(tmp_path, 3)[1]["reached"] == {"95 %": 3}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_initial_parameters_skip_a_damaged_checkpoint(tmp_path, whole, capsys):
    copy = tmp_path / "copy"
    checkpoint.shutil.copytree(whole, copy)
    for path in (copy / "checkpoints" / LATEST / "44").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    support.run(tmp_path / "run", "max_steps=1", "architecture.hidden=[16]", f"init_from={copy}")
    said = capsys.readouterr().out
    assert "parameters of step 40 of" in said
    assert (copy / "checkpoints" / LATEST / "44").is_dir(), "another run's stays where it is"


def test_other_batches_start_the_data_anew(tmp_path, whole, capsys):
    options = [option for option in RUN if "epochs" not in option]
    support.run(tmp_path, *options, "total_epochs=9", "batch_size=256", f"resume={whole}")
    assert "the streams start anew" in capsys.readouterr().out


def test_checkpoints_switched_off_still_go_on(tmp_path, monkeypatch, capsys, whole):
    with monkeypatch.context() as patch:
        interrupt(patch, 27)
        with pytest.raises(Interrupted):
            support.run(tmp_path / "run", *RUN)
    support.run(tmp_path / "run", *RUN, "checkpoint_freq=null")
    assert "going on from the checkpoint of step 27" in capsys.readouterr().out
    assert support.timeless(support.rows(tmp_path / "run")) == support.timeless(support.rows(whole))


def test_histograms_are_not_doubled(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        interrupt(patch, 33)
        with pytest.raises(Interrupted):
            support.run(tmp_path / "run", *RUN, "record_histograms=true")
    folder = tmp_path / "run" / "checkpoints" / LATEST
    checkpoint.shutil.rmtree(folder / "33")
    checkpoint.shutil.rmtree(folder / "30")  # as if killed at 29: the evaluation at 30 comes again
    support.run(tmp_path / "run", *RUN, "record_histograms=true")
    lines = (tmp_path / "run" / "histograms.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [15, 15, 30, 30, 44, 44]


# --- losses that are not finite ------------------------------------------------------------

IN_ORDER = ("data_threads=0",)
"""Two threads draw a batch now and then before the one that training sees first."""


def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(tmp_path, monkeypatch):
    """The data of one batch turn into NaN: the leaf is named, the checkpoint before is whole."""
    poison(monkeypatch, 23)
    with pytest.raises(
        TrainingError,
        match=r"gradient of layers_0/kernel is not finite at step 23; the last good checkpoint is "
        r"of step 20, in .*on_nonfinite=skip",
    ):
        support.run(tmp_path / "run", *RUN, *IN_ORDER, "sam_mode=null")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 20
    assert all(
        np.isfinite(array).all() for n, array in final(tmp_path / "run").items() if "params" in n
    )


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 23)
    rows = support.run(tmp_path / "run", *RUN, *IN_ORDER, "on_nonfinite=skip")
    assert [row["skipped steps"] for row in rows if "skipped steps" in row][-1] == 1
    assert all(np.isfinite(row["test loss"]) for row in rows if "test loss" in row)
    assert "1 steps whose loss or gradient was not finite" in capsys.readouterr().out
    assert all(
        np.isfinite(array).all() for n, array in final(tmp_path / "run").items() if "params" in n
    )


def test_parameters_that_overflow_are_not_saved(tmp_path, monkeypatch):
    """The step before one whose loss is not finite has already broken the parameters."""
    from llqr_experiments.config import build

    huge = optax.with_extra_args_support(optax.chain(optax.sgd(1e30), optax.scale(1e30)))
    monkeypatch.setattr(build, "optimizer", lambda *_: huge)
    plain = ("sam_mode=null", "use_preconditioner=false", "perturb_mode=ema_grad")
    with pytest.raises(TrainingError, match=r"updated parameter layers_0/bias .* at step 0; there"):
        support.run(tmp_path, *RUN, *plain, "checkpoint_freq=1")
    assert checkpoint.steps(tmp_path / "checkpoints") == []


def test_an_evaluation_that_is_not_finite_is_not_the_best(tmp_path, monkeypatch):
    evaluate, calls = phases.evaluate, []

    def spoilt(*args):
        calls.append(None)
        found = evaluate(*args)
        return found | {"loss": float("nan")} if len(calls) == 3 else found

    monkeypatch.setattr(phases, "evaluate", spoilt)
    support.run(tmp_path, *RUN, 'checkpoint_metric="test loss"', "maximize_checkpoint_metric=false")
    best = json.loads((tmp_path / "meta.json").read_text())["best"]
    assert best["step"] == 30
    assert checkpoint.steps(tmp_path / "checkpoints", BEST) == [30]


def poison(monkeypatch, at: int) -> None:
    """Put a NaN into training batch `at`, of a run whose batches are drawn `IN_ORDER`."""
    draw = data.Source.draw
    served = []

    def poisoned(self, index, rng):
        batch = draw(self, index, rng)
        if len(index) == 128:
            served.append(None)
            if len(served) == at + 1:
                batch["image"][3, 2, 2] = np.nan
        return batch

    monkeypatch.setattr(data.Source, "draw", poisoned)


# --- killed at random ----------------------------------------------------------------------


@pytest.mark.slow
def test_thirty_runs_killed_at_random_moments_end_alike(tmp_path):
    """SIGKILL, also during a refit or while a checkpoint is written; then the same command."""
    options = [
        "experiment=quick-local-test", "logging.aim=false", "total_epochs=20", "logging_freq=5",
        "checkpoint_freq=7", "update_preconditioner_every=10", "precond_steps=20",
        "test_eval_freq=50", "block_structure=kfac",
    ]  # fmt: skip
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

    def command(out: Path) -> list[str]:
        return [sys.executable, "run.py", *options, f"hydra.run.dir={out}"]

    def start(out: Path) -> subprocess.Popen[str]:
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command(out), cwd=ROOT, env=environment, **quiet)

    def finish(process: subprocess.Popen[str]) -> None:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said

    whole = tmp_path / "whole"
    finish(start(whole))
    random, kills = np.random.default_rng(0), []
    for trial in range(30):
        out = tmp_path / f"run{trial}"
        process = start(out)
        _wait_for(out, random.uniform(0.0, 1.0), process)
        process.kill()
        process.communicate()
        kills.append((process.returncode, len(checkpoint.steps(out / "checkpoints"))))
        finish(start(out))
        assert_same_end(out, whole)
    assert sum(code == -signal.SIGKILL for code, _ in kills) >= 25, kills
    assert sum(count > 0 for _, count in kills) >= 15, "most had something to go on from"


def _wait_for(out: Path, share: float, process: subprocess.Popen[str]) -> None:
    """Return when a random share of the run's rows is written, at a random moment after."""
    import time

    rows = int(share * 70)
    while process.poll() is None:
        path = out / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= rows:
            time.sleep(np.random.default_rng(rows).uniform(0, 0.05))
            return
        time.sleep(0.005)


@pytest.mark.parametrize("structure", ["sds-sym-kfac", "rms_norm-e-kfac", "scaled-max_norm-e-kfac"])
def test_a_checkpoint_from_before_slots_were_renamed_is_read(structure, tmp_path, monkeypatch):
    """Names alone have changed: the numbers and their order are the same."""
    params = {"norm": {"scale": jnp.ones(3)}, "kernel": jnp.ones((3, 2))}
    tx = llqr.llqr(optax.sgd(0.1), structure=structure, identity_scaling=2.0)
    state = tx.init(params)
    old = {new: slot for slot, new in checkpoint._RENAMED.items()}
    names = checkpoint._names

    def before(tree):
        return [
            ".".join(old.get(p, p) if q == "blocks" else p for q, p in itertools.pairwise(parts))
            for name in names(tree)
            for parts in [["", *name.split(".")]]
        ]

    monkeypatch.setattr(checkpoint, "_names", before)
    assert before(state) != names(state)
    kept = checkpoint.Checkpoints(tmp_path, 1, print)
    kept.save(3, state, {})
    kept.close()
    monkeypatch.undo()
    found = checkpoint.Checkpoints(tmp_path, 1, print).restore(state)
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found.state, state)


def test_a_run_from_before_an_option_existed_goes_on():
    """It had the default of every option that is younger; any other value is refused."""
    here = run_folder.options(support.config("experiment=quick-local-test"))
    there = {name: value for name, value in here.items() if not name.startswith("precond_stream")}
    run_folder.check_same(there, here, ROOT)
    with pytest.raises(ConfigError, match="precond_stream_every=10 there, 5 here"):
        run_folder.check_same(there, here | {"precond_stream_every": 5}, ROOT)


def test_a_checkpoint_with_placeholders_from_before_goes_on(tmp_path):
    """What no refit had reported yet was NaN once, and is 0 today: the first one overwrites it."""
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    bound = llqr.Objective(
        lambda p, x: x @ p["kernel"] + p["bias"], lambda z, x: jnp.mean((z - 1) ** 2)
    ).bind(jnp.ones((4, 3)))
    tx = llqr.llqr(optax.sgd(0.1), metric="gauss_newton", refit=llqr.Refit(steps=2))
    today = tx.init(params)
    nan = {name: jnp.full_like(today.preconditioner.refit._asdict()[name], jnp.nan)
           for name in ("objective_before", "objective_after", "cosine", "cosines")}  # fmt: skip
    ours = today.preconditioner
    kept = checkpoint.Checkpoints(tmp_path, 1, print)
    kept.save(3, today._replace(preconditioner=ours._replace(refit=ours.refit._replace(**nan))), {})
    kept.close()
    found = checkpoint.Checkpoints(tmp_path, 1, print).restore(today)
    assert found is not None
    assert np.isnan(found.state.preconditioner.refit.objective_before)
    assert llqr.inspect(tx, found.state, params).refits == 0
    grads = jax.grad(bound)(params)
    ends = [tx.update(grads, state, params, objective=bound) for state in (found.state, today)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert int(ends[0][1].preconditioner.refit.refits) == 1
