"""Processes: who they are; and runs of two over gloo, with one record and one checkpoint.

The slow tests start real processes, with a limit on their time, and end what is left of them.
"""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llqr_experiments import processes
from llqr_experiments.command import cli
from llqr_experiments.errors import ConfigError
from tests.experiments import support
from tests.experiments.test_layout import assert_alike


@pytest.mark.parametrize(
    ("given", "environment", "why"),
    [
        ((None, 2, None), {}, "no launcher says which of them this one is; give distributed.index"),
        ((None, 2, 0), {}, "give distributed.coordinator=HOST:PORT"),
        ((None, None, None), {"PMI_SIZE": "3", "PMI_RANK": "1"}, "distributed.processes=3: how"),
        (("here:1", 2, 2), {}, "distributed.index=2 is none of distributed.processes=2"),
    ],
)
def test_what_is_not_known_of_the_processes_is_asked_for(monkeypatch, given, environment, why):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=why):
        processes.connect(*given)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, (4, 3)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, (2, 0)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script, before srun
    ],
)
def test_launchers_say_how_many_there_are(environment, expected):
    assert processes._launched(environment) == expected


def test_one_process_decides_by_itself():
    assert processes.decide(lambda: 3) == 3
    assert processes.gather("x") == ["x"]
    assert processes.Common().any(15) == 15
    assert processes.first()
    assert not processes.several()
    assert (processes.count(), processes.index()) == (1, 0)


@pytest.mark.parametrize("writes", [True, False], ids=["first", "other"])
def test_an_error_of_the_first_process_is_that_of_all(monkeypatch, capsys, writes):
    """One tells it: in the others it is marked as known."""
    sent = []

    def broadcast(content):  # from the first process, in which it is the same
        sent.append(content if writes else pickle.dumps((False, ConfigError("no such folder"))))
        return sent[-1]

    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "first", lambda: writes)
    monkeypatch.setattr(processes, "_broadcast", broadcast)

    def look():
        assert writes, "only the first one looks"
        raise ConfigError("no such folder")

    with pytest.raises(ConfigError, match="no such folder") as caught:
        processes.decide(look)
    cli.show(caught.value)
    assert ("no such folder" in capsys.readouterr().err) == writes
    cli.show(ConfigError("mine alone"))
    assert "mine alone" in capsys.readouterr().err


# --- runs of two ------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "experiment=quick-local-test", "logging.aim=false", "precision=float64",
    "architecture.hidden=[16]", "max_steps=300", "logging_freq=10", "test_eval_freq=150",
    "checkpoint_freq=50", "update_preconditioner_every=120", "precond_steps=2", "mesh.fsdp=2",
)  # fmt: skip
LIMIT = 240


@contextmanager
def launched(out: Path, *options: str, count: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of one run, each with one device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 // count}"
    several = (f"distributed.coordinator={address}", f"distributed.processes={count}")
    started = []
    try:
        for i in range(count):
            mine = (*several, f"distributed.index={i}") if count > 1 else ()
            command = [sys.executable, "run.py", *RUN, *options, *mine]
            started.append(
                subprocess.Popen(
                    [*command, f"hydra.run.dir={out if i == 0 else out.with_name('other')}"],
                    cwd=ROOT, env=environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def ends(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    found = [process.communicate(timeout=LIMIT)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, found, strict=True)]


def reach(out: Path, step: int) -> None:
    """Wait until a step is recorded."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        if (out / "metrics.jsonl").is_file() and f'"step": {step},' in (
            out / "metrics.jsonl"
        ).read_text():
            return
        time.sleep(0.1)
    raise TimeoutError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two processes that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with launched(out) as started:
        (code, said), (other, quiet) = ends(started)
    assert (code, other) == (0, 0), said + quiet
    assert "2 devices of 2 process(es): data 1, fsdp 2, tensor 1" in said
    assert "step" not in quiet, "only the first one prints"
    assert not out.with_name("other").exists(), "and only it writes"
    return out


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(tmp_path, whole):
    options = [option for option in RUN if not option.startswith(("experiment", "mesh"))]
    assert_alike(support.rows(whole), support.run(tmp_path / "one", *options), 1e-10)


@pytest.mark.slow
def test_a_signal_to_one_saves_once_and_both_go_on_to_the_same_bits(tmp_path, whole):
    out = tmp_path / "run"
    with launched(out) as started:
        reach(out, 80)
        started[1].send_signal(signal.SIGTERM)
        (code, said), (other, _) = ends(started)
    assert code == other == 75, said
    saved = [int(path.name) for path in (out / "checkpoints" / "latest").iterdir()]
    step = max(saved)
    assert f"SIGTERM ended the run at step {step}. It is saved up to step {step}" in " ".join(
        said.split()
    )
    assert step >= 80
    with launched(out) as started:
        (code, said), (other, _) = ends(started)
    assert code == other == 0, said
    assert f"going on from the checkpoint of step {step}" in said
    support.assert_same_end(out, whole)


@pytest.mark.slow
def test_one_that_is_lost_ends_the_other_and_one_process_goes_on(tmp_path, whole):
    out = tmp_path / "run"
    with launched(out) as started:
        reach(out, 130)
        started[1].kill()
        said = started[0].communicate(timeout=2 * processes.HEARTBEAT)[0]
    assert started[0].returncode == 75, said
    assert "process 0 has lost another one" in said
    with launched(out, "mesh.fsdp=1", count=1) as started:
        ((code, said),) = ends(started)
    assert code == 0, said
    assert "going on from the checkpoint of step 100" in said
    assert_alike(support.rows(out), support.rows(whole), 1e-9)
    assert "again" in json.loads((out / "meta.json").read_text())


@pytest.mark.slow
def test_what_one_process_refuses_all_refuse(tmp_path):
    with launched(tmp_path / "run", "batch_size=33") as started:
        (code, said), (other, quiet) = ends(started)
    assert code == other == 2
    assert "batch_size=33 does not divide over 2 devices" in said
    assert "batch_size=33" in quiet
