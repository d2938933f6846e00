"""The page that compares runs: what is on it, what it makes of broken runs, how wide it is."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llqr_experiments import report
from llqr_experiments.errors import ConfigError
from tests.experiments.run_folders import META, Page, rows, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def test_the_page_of_two_runs(tmp_path: Path) -> None:
    time = {"step": 20, "time training": 3.0, "time refit": 1.0, "seconds": 6.0}
    a = write_run(tmp_path / "a", [*rows(90.0), time])
    b = write_run(tmp_path / "b", rows(95.0, sam=True), options={"sam_mode": "base_sam"})
    out = report.write([a, b], tmp_path / "out" / "page.html")
    text = out.read_text()
    page = Page(text)
    assert "<h1>2 runs compared: digits, mlp</h1>" in text
    assert "Highest final test accuracy: 95 % (b). Lowest final test loss: 0.5 (a, b)." in text
    summary = page.cells[9:18]
    assert summary == [
        "a", "90.00 %", "91.00 %step 10", "0.5000", "0.4000step 10", "20", "6.0 s", "finished",
        "sam_mode=null",
    ]  # fmt: skip
    for fact in ("run.py experiment=quick", "0123456789abcdef", "jax 0.10.2", "cpu:0"):
        assert text.count(fact) == 2
    assert text.count("<details>") == 2
    assert "&quot;learning_rate&quot;: 0.1" in text
    names = {path.stem for path in (tmp_path / "out" / "page").iterdir()}
    curves = {f"{y}-over-{x}" for y in ("loss", "accuracy") for x in ("steps", "seconds")}
    assert names == {*curves, "refits", "sharpness", "time"} <= set(report.NAMES)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(names)
    assert all(image["alt"] and str(image["src"]).startswith("data:image/png") for image in images)
    assert not re.search(r"(src|href)=\"(?!data:|#)", text), "the page needs the network"


def test_only_options_that_differ_are_named(tmp_path: Path) -> None:
    runs = [
        report.read(write_run(tmp_path / name, [], options=options))
        for name, options in (
            ("a", {}),
            ("b", {"learning_rate": 0.2, "lr_scheduler": {"name": "cosine"}}),
        )
    ]
    assert report.differences(runs) == {
        "learning_rate": ["0.1", "0.2"],
        "lr_scheduler.name": [report.ABSENT, "cosine"],
    }
    assert report.differences(runs[:1]) == {}


def test_many_differences_are_listed_once(tmp_path: Path) -> None:
    more = {f"option_{k}": k for k in range(6)}
    a, b = write_run(tmp_path / "a", rows()), write_run(tmp_path / "b", rows(), options=more)
    text = report.write([a, b], tmp_path / "page.html").read_text()
    assert text.count('<a href="#options">and 2 more</a>') == 2
    assert text.count("option_5</code>") == 1


def test_one_run_by_default_is_reported_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "only", rows())
    assert report.main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "<h1>only: digits, mlp</h1>" in text
    assert "Options that differ" not in text
    assert str(run / "report.html") in capsys.readouterr().out
    assert not (run / "report" / "sharpness.png").exists()


def test_several_runs_by_default_are_reported_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [str(write_run(tmp_path / name, rows())) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert report.main(runs) == 0
    assert (tmp_path / "report.html").exists()


def test_names_are_escaped(tmp_path: Path) -> None:
    name = '_<img src=x onerror="alert(1)">&$x$'
    run = write_run(tmp_path / name, rows(), options={"command": "<b>"})
    meta = META | {"command": "<script>", "devices": ["<i>"], "commit": "<u>"}
    (run / "meta.json").write_text(json.dumps(meta))
    other = write_run(tmp_path / "b", rows(), options={"<s>": "<em>"})
    text = report.write([run, other], tmp_path / "page.html").read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "b", "i", "u", "s", "em"}
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert page.cells[9] == name


def test_a_killed_run_is_read_up_to_its_cut_off_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", rows()[:3], tail='{"step": 10, "test lo')
    found = report.read(run)
    assert (len(found.rows), found.unreadable) == (3, 1)
    assert report.status(found) == "not finished: step 10 of 20"
    text = report.write([run], tmp_path / "page.html").read_text()
    assert "not finished: step 10 of 20; 1 unreadable line skipped" in text


@pytest.mark.parametrize("line", ["3", "[]", "null", '{"step": 5}', '{"seconds": 1}', "\xff"])
def test_a_line_that_is_no_row_is_counted(tmp_path: Path, line: str) -> None:
    found = report.read(write_run(tmp_path / "a", rows(), tail=line + "\n"))
    assert (len(found.rows), found.unreadable) == (5, 1)


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    last = {"step": 12, "train loss": None, "train accuracy": None, "seconds": 5.0}
    run = write_run(tmp_path / "a", [*rows()[:3], last])
    assert report.status(report.read(run)) == "stopped: loss not finite at step 12"
    assert "not finite at step 12" in report.write([run], tmp_path / "page.html").read_text()


def test_a_run_that_has_logged_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [])
    text = report.write([run], tmp_path / "page.html").read_text()
    assert "nothing logged" in text
    assert "No run has logged anything that could be drawn." in text
    assert "Nothing was evaluated." in text


@pytest.mark.parametrize("clock", [0.0, 4.0], ids=["from zero", "goes on"])
def test_the_later_of_two_rows_of_a_step_wins(tmp_path: Path, clock: float) -> None:
    """Killed after step 15, resumed from 10: what came after 10 happened again."""

    def row(step: int, loss: float, seconds: float) -> dict[str, float]:
        return {"step": step, "train loss": loss, "seconds": seconds}

    lost = [row(12, 8.0, 5.0), row(15, 9.0, 6.0)]
    again = [row(10, 1.5, clock), row(14, 0.5, clock + 1.0)]
    found = report.read(write_run(tmp_path / "a", [*rows()[:3], *lost, *again]))
    assert found.series("train loss") == [
        report.Point(1, 3.0, 2.0),
        report.Point(10, 4.0, 1.5),
        report.Point(14, 5.0, 0.5),
    ]


def test_seconds_of_a_clock_that_starts_anew_are_added(tmp_path: Path) -> None:
    logged = [
        {"step": k, "test loss": 1.0, "seconds": s} for k, s in ((1, 5.0), (2, 1.0), (3, 2.0))
    ]
    points = report.read(write_run(tmp_path / "a", logged)).series("test loss")
    assert [point.seconds for point in points] == [5.0, 6.0, 7.0]


def test_time_by_phase(tmp_path: Path) -> None:
    time = {"step": 20, "time training": 3.0, "time refit": 0.0, "time data": None, "seconds": 5.0}
    assert report.read(write_run(tmp_path / "a", rows())).phases() == {}
    found = report.read(write_run(tmp_path / "b", [*rows()[:3], time])).phases()
    assert found == {"training": 3.0, "other": 2.0}


def test_what_a_finished_run_notes_in_its_meta(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", rows()[:3])
    noted = META | {"finished": "2026-01-02T03:05:00+00:00", "time": {"refit": 1.0, "setup": 2.5}}
    (run / "meta.json").write_text(json.dumps(noted))
    found = report.read(run)
    assert report.status(found) == "finished"
    assert found.phases() == {"refit": 1.0, "setup": 2.5, "other": 0.5}


def test_runs_of_one_name_are_told_apart_and_none_counts_twice(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name / "run", rows()) for name in ("a", "b"))
    text = report.write([a, b, a], tmp_path / "page.html").read_text()
    assert "2 runs compared" in text
    cells = Page(text).cells
    assert {"a/run", "b/run"} <= set(cells)


def test_a_run_looks_the_same_in_all_pictures() -> None:
    looks = [(report.color(i), report.dash(i)) for i in range(28)]
    assert len(set(looks)) == 28
    assert not set(report.COLORS) & set(report.PHASES)


@pytest.mark.parametrize("missing", report.FILES)
def test_a_folder_that_is_no_run(
    tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", rows())
    (run / missing).unlink()
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert f"is no run: it lacks {missing}." in error
    assert "Traceback" not in error
    assert not (run / "report.html").exists()


def test_a_folder_of_runs_says_which_to_give(tmp_path: Path) -> None:
    write_run(tmp_path / "a", rows())
    with pytest.raises(ConfigError, match="Folders in it are runs"):
        report.read(tmp_path)


def test_what_cannot_be_read_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", rows())
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert report.main([str(run), "--out", str(tmp_path / "page")]) == 2
    assert "must end with .html" in capsys.readouterr().err
    assert report.main([str(run), "--out", str(run / "meta.json" / "page.html")]) == 1
    assert "Error" in capsys.readouterr().err
    (run / "meta.json").write_text('{"steps": ')
    assert report.main([str(run)]) == 2
    assert f"{run} cannot be read" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        report.main(["--help"])
    assert "metrics.jsonl" in capsys.readouterr().out


MEASURE = """<!DOCTYPE html><meta charset="utf-8"><title>none</title>
<iframe src="{page}" style="width:{width}px;height:900px;border:0"></iframe>
<script>onload = () => {{
  const inside = document.querySelector("iframe").contentWindow;
  document.title = inside.innerWidth + " " + inside.document.documentElement.scrollWidth;
}}</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_never_scrolls_sideways(tmp_path: Path, width: int) -> None:
    """In a frame: a window has a least width of its own, a frame has not."""
    runs = [
        write_run(
            tmp_path / (f"run{k}_" + "x" * 80 * (k % 2)),
            rows(90 + k),
            options={"seed": k, "y" * 90: k},
        )
        for k in range(9)
    ]
    kinds = {"t": "numbers_de_en", "o": "mod_sum"}
    for k, (name, dataset) in enumerate(2 * [*kinds.items()]):
        options = {"dataset": {"name": dataset}, "init_key": k, "z" * 90: name * 90}
        runs.append(write_run(tmp_path / f"{name}{k}", rows(), options=options, finished="now"))
        sample = dict.fromkeys(("source", "hypothesis", "reference"), "w" * 500)
        said = {"step": 20, "split": "test", "signature": "s" * 200, "samples": [sample]}
        (runs[-1] / "translations.jsonl").write_text(json.dumps(said))
    out = report.write(runs, tmp_path / "page.html")
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(page=out.name, width=width))
    flags = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom"]
    done = subprocess.run(
        [*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout[:500]
    window, needed = map(int, found.groups())
    assert window == width
    assert needed <= window
