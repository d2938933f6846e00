"""Trackers record, and never end a run; the clock; the picture."""

import builtins
import json
import sys

import jax
import pytest

from llqr_experiments.record import plots
from llqr_experiments.record.clock import Clock
from llqr_experiments.record.trackers import Aim, Jsonl, Trackers
from tests.experiments import support


def test_jsonl_keeps_every_row_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = Jsonl(path)
    tracker.log(3, {"train loss": 0.5, "bad": float("nan")}, seconds=1.23456)
    assert json.loads(path.read_text()) == {
        "step": 3, "train loss": 0.5, "bad": None, "seconds": 1.235
    }  # fmt: skip
    tracker.close()


def test_a_missing_tracker_is_said_in_one_line(monkeypatch):
    original = builtins.__import__

    def without_aim(name, *args, **kwargs):
        if name == "aim":
            raise ModuleNotFoundError("No module named 'aim'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_aim)
    said = []
    assert not Trackers(said.append).add("Aim", lambda: Aim(None, "x", support.config()))
    assert said == ["Aim is not installed: metrics go to metrics.jsonl only."]


def test_a_failing_tracker_is_reported_once_and_dropped():
    class Broken:
        def log(self, step, values, seconds):
            raise OSError("disk full")

        def close(self):
            raise AssertionError("dropped trackers are not closed")

    said, rows = [], []

    class Good:
        def log(self, step, values, seconds):
            rows.append((step, values))

        def close(self):
            rows.append("closed")

    trackers = Trackers(said.append)
    trackers.add("broken", Broken)
    trackers.add("good", Good)
    trackers.log(1, {"a": 1.0}, 0.1)
    trackers.log(2, {"a": 2.0}, 0.2)
    trackers.close()
    assert said == ["Broken failed and is dropped: disk full"]
    assert rows == [(1, {"a": 1.0}), (2, {"a": 2.0}), "closed"]


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="aim has no wheels past Python 3.12")
@pytest.mark.filterwarnings("ignore")
def test_aim_holds_the_metrics(tmp_path):
    aim = pytest.importorskip("aim")
    tracker = Aim(str(tmp_path), "digits_mlp", support.config())
    tracker.log(0, {"train loss": 2.0}, seconds=0.5)
    tracker.log(50, {"train loss": 1.0}, seconds=1.5)
    tracker.close()
    repo = aim.Repo(str(tmp_path))
    repo._recreate_index()  # what `aim up` does
    (run,) = list(repo.iter_runs())
    points = {}
    for metric in run.metrics():
        steps, (values, *_) = metric.data.items_list()
        points[metric.name] = dict(zip(steps, values, strict=True))
    assert points == {"train loss": {0: 2.0, 50: 1.0}, "train loss|t": {50: 2.0, 150: 1.0}}
    assert run["config"]["batch_size"] == 128


def test_the_clock_takes_compilation_out_of_a_phase(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("llqr_experiments.record.clock.time.perf_counter", lambda: now[0])

    def compiled(event: str, ago: float, took: float) -> None:
        now[0] += ago
        jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}", took)

    with Clock() as clock:
        with clock.phase("work"):
            now[0] += 5.0
            # Tracing f took 3 s, and within them tracing g, which it calls, took 1.
            compiled("jaxpr_trace_duration", 2.0, 1.0)
            compiled("jaxpr_trace_duration", 1.0, 3.0)
            compiled("backend_compile_duration", 4.0, 4.0)
            now[0] += 2.0
        with clock.phase("work"):
            now[0] += 8.0
        elapsed = clock.elapsed()
    assert clock.seconds["compile"] == pytest.approx(7.0)
    assert clock.seconds["work"] == pytest.approx(15.0)
    assert elapsed == pytest.approx(22.0)


def test_curves_are_drawn(tmp_path):
    rows = [
        {"step": 0, "refit objective after": 1.0},
        {"step": 1, "train loss": 2.0, "train accuracy": 10.0},
        {"step": 5, "train loss": 1.0, "train accuracy": 60.0},
        {"step": 5, "test loss": 1.1, "test accuracy": 55.0},
        {"step": 6, "train loss": None, "train accuracy": None},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.curves(path, "title", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
