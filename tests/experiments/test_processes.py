"""Runs of two processes over gloo: one record, one checkpoint at a signal, an end when one is lost.

Each test starts real processes, with a limit on their time, and ends what is left of them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llqr_experiments import devices
from tests.experiments import support
from tests.experiments.test_devices import assert_alike

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "experiment=quick-local-test", "logging.aim=false", "precision=float64",
    "architecture.hidden=[16]", "max_steps=300", "logging_freq=10", "test_eval_freq=150",
    "checkpoint_freq=50", "update_preconditioner_every=120", "precond_steps=2", "mesh.fsdp=2",
)  # fmt: skip
LIMIT = 240


@contextmanager
def processes(out: Path, *options: str, count: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
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
    with processes(out) as started:
        (code, said), (other, quiet) = ends(started)
    assert (code, other) == (0, 0), said + quiet
    assert "2 devices of 2 process(es): data 1, fsdp 2, tensor 1" in said
    assert "step" not in quiet, "only the first one prints"
    assert not out.with_name("other").exists(), "and only it writes"
    return out


def test_two_processes_have_the_numbers_of_one(tmp_path, whole):
    options = [option for option in RUN if not option.startswith(("experiment", "mesh"))]
    assert_alike(support.rows(whole), support.run(tmp_path / "one", *options), 1e-10)


def test_a_signal_to_one_saves_once_and_both_go_on_to_the_same_bits(tmp_path, whole):
    out = tmp_path / "run"
    with processes(out) as started:
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
    with processes(out) as started:
        (code, said), (other, _) = ends(started)
    assert code == other == 0, said
    assert f"going on from the checkpoint of step {step}" in said
    support.assert_same_end(out, whole)


def test_one_that_is_lost_ends_the_other_and_one_process_goes_on(tmp_path, whole):
    out = tmp_path / "run"
    with processes(out) as started:
        reach(out, 130)
        started[1].kill()
        said = started[0].communicate(timeout=2 * devices.HEARTBEAT)[0]
    assert started[0].returncode == 75, said
    assert "process 0 has lost another one" in said
    with processes(out, "mesh.fsdp=1", count=1) as started:
        ((code, said),) = ends(started)
    assert code == 0, said
    assert "going on from the checkpoint of step 100" in said
    assert_alike(support.rows(out), support.rows(whole), 1e-9)
    assert "again" in json.loads((out / "meta.json").read_text())


def test_what_one_process_refuses_all_refuse(tmp_path):
    with processes(tmp_path / "run", "batch_size=33") as started:
        (code, said), (other, quiet) = ends(started)
    assert code == other == 2
    assert "batch_size=33 does not divide over 2 devices" in said
    assert "batch_size=33" in quiet
