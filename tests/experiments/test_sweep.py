"""The summary of a sweep over runs of every kind."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console

from llqr_experiments.command import cli, sweep
from llqr_experiments.config.options import Config
from llqr_experiments.errors import DataError

GROKKED = "first step with test accuracy of 95 %"


def write(folder: Path, **metas: dict[str, Any]) -> None:
    """Runs of a sweep over `seed`, with these meta.json."""
    for seed, meta in metas.items():
        (folder / f"seed={seed}").mkdir(parents=True)
        (folder / f"seed={seed}" / "meta.json").write_text(json.dumps(meta))


def done(**results: float) -> dict[str, Any]:
    names = {name.replace("__", " "): value for name, value in results.items()}
    return {"results": names, "time": {"training": 2.0}, "finished": "now"}


def read(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))


def summarise(folder: Path) -> list[dict[str, str]]:
    """Rows of the summary.csv."""
    sweep.Summary().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    return read(folder)


def test_milestones_are_columns_and_blank_where_not_reached(tmp_path: Path) -> None:
    late = done(test__accuracy=40.0)
    early = done(test__accuracy=99.0, **{GROKKED: 1200.0})
    write(tmp_path, a=late, b=early)
    rows = summarise(tmp_path)
    assert list(rows[0]) == ["seed", "test accuracy", GROKKED, "seconds", "status"]
    assert [row[GROKKED] for row in rows] == ["", "1200.0"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_metrics_of_all_evaluated_splits_are_columns(tmp_path: Path) -> None:
    meta = done(valid_ppl=7.5, valid__bleu=20.0, best__valid__bleu=21.0, test__bleu=19.0,
                valid___bleu_counts_0=5.0, test__bleu__examples=500.0, train__loss=1.0,
                train_eval__loss=2.0)  # fmt: skip
    write(tmp_path, a=meta | {"best": {"value": 21.0, "step": 4.0}})
    (row,) = summarise(tmp_path)
    assert row == {
        "seed": "a", "valid_ppl": "7.5", "valid bleu": "20.0", "best valid bleu": "21.0",
        "test bleu": "19.0", "train_eval loss": "2.0", "best": "21.0", "seconds": "2.0",
        "status": "finished",
    }  # fmt: skip


def test_a_meta_that_is_cut_off_costs_its_row_only(tmp_path: Path) -> None:
    write(tmp_path, a=done(test__accuracy=40.0), b={})
    (tmp_path / "seed=b" / "meta.json").write_text('{"results": {"test')
    with pytest.raises(SystemExit):
        summarise(tmp_path)
    rows = read(tmp_path)
    assert [row["status"] for row in rows] == ["finished", "meta.json cannot be read"]


def test_the_table_shows_results_that_are_the_same_for_all(tmp_path: Path) -> None:
    write(tmp_path, a=done(valid__loss=1.5), b=done(valid__loss=1.5))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sweep.table(sweep.collect(tmp_path)))
    text = console.export_text()
    assert re.search(r"seed\s+valid loss", text)
    assert "status" not in text


def job(folder: Path, number: int, name: str, *, why: str | None = None, ended: bool = True):
    """What the callback notes of a job."""
    names = {"num": number, "override_dirname": name}
    sweep_dir = {"dir": str(folder)}
    mode = {"mode": RunMode.MULTIRUN, "job": names, "sweep": sweep_dir}
    config = OmegaConf.create({"dry_run": False, "hydra": mode})
    summary = sweep.Summary()
    summary._total = 3
    summary.on_job_start(config, task_function=None)
    if ended:
        summary.on_job_end(config, JobReturn(_return_value=why))


def test_every_job_is_a_row_and_says_why_it_failed(tmp_path, capsys):
    write(tmp_path, a=done(test__accuracy=40.0))
    job(tmp_path, 0, "seed=a")
    job(tmp_path, 10, "seed=c", ended=False)
    job(tmp_path, 2, "seed=b", why="no batch\nof 3")
    assert "job 3 of 3   seed=b" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        summarise(tmp_path)
    rows = read(tmp_path)
    assert [(row["seed"], row["status"], row["why"]) for row in rows] == [
        ("a", "finished", ""), ("b", "failed", "no batch of 3"), ("c", "not finished", ""),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "3 runs: 1 finished, 1 failed, 1 not finished" in said
    assert "seed=b failed: no batch of 3" in said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_runs_of_a_comparison_are_no_jobs(tmp_path):
    write(tmp_path, a=done())
    write(tmp_path / "seed=a", b=done())
    assert [row["seed"] for row in sweep.collect(tmp_path)] == ["a"]


def test_jobs_are_counted():
    assert sweep._count(["a=1,2,3", "b=x", "c=range(2)", "d=choice(1,2)"]) == 12


def test_a_job_of_a_sweep_that_fails_returns_why(tmp_path, monkeypatch, capsys):
    """Whatever it is: the other jobs go on."""
    monkeypatch.setattr(cli, "_in_sweep", lambda: True)
    for error, told in [(DataError("no file"), "no file"), (KeyError("x"), "KeyError: 'x'")]:

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(cli, "_run", fail)
        config = OmegaConf.structured(Config)
        assert cli.execute(config, tmp_path / "run") == told
    assert "Error: no file" in capsys.readouterr().err
