"""What a page says of grokking, text and translation, of seeds, and of kinds side by side."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llqr_experiments import data, report
from llqr_experiments.data import translation
from llqr_experiments.errors import ConfigError
from tests.experiments.run_folders import Page, rows, write_run

OPERATIONS = {"dataset": {"name": "mod_sum"}, "architecture": {"name": "grok-transformer"}}
TEXT = {"dataset": {"name": "python_topics"}, "architecture": {"name": "gpt2-small"}}
TRANSLATION = {"dataset": {"name": "numbers_de_en"}, "architecture": {"name": "transformer"}}
FIRST = "first step with test accuracy of {} %"
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"


def grokking(at: int | None, start: float = 0.0) -> list[dict[str, Any]]:
    """What a run logs that reaches 95 % at step `at`, a second for 100 steps."""
    found, reached = [], {}
    for step in range(100, 2100, 100):
        seconds = start + step / 100
        found.append({"step": step, "train loss": 0.1, "train accuracy": 99.0, "seconds": seconds})
        if at is not None and step >= at:
            reached.setdefault(FIRST.format(95), float(at))
        test = {"test loss": 1.0, "test accuracy": 96.0 if reached else 5.0, **reached}
        found.append({"step": step, **test, "seconds": seconds + 0.5})
    return found


def table(text: str, label: str) -> list[list[str]]:
    """Cells of the table with a label, row by row."""
    inside = text.split(f'aria-label="{label}"')[1].split("</table>")[0]
    return [Page(row).cells for row in inside.split("<tr>")[1:]]


def column(text: str, label: str, title: str) -> list[str]:
    head, *body = table(text, label)
    return [cells[head.index(title)] for cells in body]


def write(out: Path, *runs: Path) -> str:
    return report.write(runs, out).read_text()


# --- kinds ------------------------------------------------------------------------------------


def test_every_dataset_is_of_a_kind(tmp_path: Path) -> None:
    kinds = {
        "images": data.image_names(),
        "operations": data.OPERATIONS,
        "text": data.TEXTS,
        "translation": translation.names(),
    }
    runs = [
        report.read(write_run(tmp_path / kind / name, [], options={"dataset": {"name": name}}))
        for kind, names in kinds.items()
        for name in names
    ]
    toy = {"toy": {"name": "ackley"}, "dataset": {"name": "mnist"}}
    runs.append(report.read(write_run(tmp_path / "other" / "toy", [], options=toy)))
    for section in report.sections(runs):
        assert {run.folder.parent.name for run in section.runs} == {section.kind}


def test_kinds_are_apart(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", rows(90.0))
    b = write_run(tmp_path / "b", grokking(500), options=OPERATIONS)
    c = write_run(tmp_path / "c", rows(95.0), options={"learning_rate": 0.2})
    text = write(tmp_path / "page.html", a, b, c)
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert headings == ["Images", "Operations"]
    assert "images (2), operations (1)" in text
    images, operations = text.split("<h2>Operations</h2>")
    assert "Highest final test accuracy: 95 % (c)." in images
    assert [cells[0] for cells in table(images, "Summary")[1:]] == ["a", "c"]
    assert [cells[0] for cells in table(operations, "Summary")[1:]] == ["b"]
    names = {path.stem for path in (tmp_path / "page").iterdir()}
    assert {"images-loss-over-steps", "operations-accuracy-over-steps"} <= names
    ids = [attrs["id"] for _, attrs in Page(text).tags if "id" in attrs]
    assert ids == ["images-options"], "one run of operations differs from none"
    write(tmp_path / "page.html", b)
    names = {path.stem for path in (tmp_path / "page").iterdir()}
    assert not any(name.startswith(("images-", "operations-")) for name in names), "of earlier"


# --- grokking -----------------------------------------------------------------------------------


def test_steps_to_a_milestone_and_the_time_to_it(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, grokking(at), options=OPERATIONS)
        for name, at in (("early", 500), ("late", 1900), ("never", None))
    ]
    text = write(tmp_path / "page.html", *runs)
    title = "steps to test accuracy of 95\xa0%"
    assert column(text, "Summary", title) == ["500after 5.5 s", "1,900after 19.5 s", "not reached"]
    assert "First with test accuracy of 95 %: step 500 (early)." in text
    assert text.count('class="number best">500') == 1


def test_no_run_has_reached_a_milestone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", grokking(None), options=OPERATIONS)
    text = write(tmp_path / "page.html", run)
    assert column(text, "Summary", "steps to test accuracy of 95\xa0%") == ["not reached"]


def test_the_time_to_a_milestone_spans_sessions(tmp_path: Path) -> None:
    """Killed at step 1,000 after 10.5 s; the clock of the second session starts at zero."""
    logged = grokking(1500)
    again = [row | {"seconds": row["seconds"] - 10} for row in logged if row["step"] > 1000]
    killed = [row for row in logged if row["step"] <= 1000]
    run = write_run(tmp_path / "a", [*killed, *again], options=OPERATIONS)
    text = write(tmp_path / "page.html", run)
    # 10.5 s of the first session, 5.5 s of the second
    assert column(text, "Summary", "steps to test accuracy of 95\xa0%") == ["1,500after 16.0 s"]


def test_a_milestone_of_an_earlier_run_has_no_time(tmp_path: Path) -> None:
    """With resume=<run>, the record starts past the milestone."""
    logged = [row for row in grokking(500) if row["step"] > 1000]
    text = write(tmp_path / "page.html", write_run(tmp_path / "a", logged, options=OPERATIONS))
    assert column(text, "Summary", "steps to test accuracy of 95\xa0%") == ["500"]


def test_steps_of_grokking_are_on_a_logarithmic_axis(tmp_path: Path) -> None:
    run = report.read(write_run(tmp_path / "a", grokking(500), options=OPERATIONS))
    for kind, scale in (("operations", "log"), ("images", "linear")):
        drawn = {picture.name: picture for picture in report.pictures(kind, [run])}
        axes = drawn["accuracy-over-steps"].figure.axes[0]
        assert axes.get_xscale() == scale
        assert drawn["accuracy-over-seconds"].figure.axes[0].get_xscale() == "linear"
        points = [line.get_xydata().tolist() for line in axes.get_lines()]  # pyright: ignore
        assert [99.0] * 20 in [[y for _, y in line] for line in points], "training accuracy"
        assert [[500.0, 96.0]] in points, "the milestone"


# --- text ---------------------------------------------------------------------------------------


def test_text_is_compared_by_perplexity(tmp_path: Path) -> None:
    test = {"test perplexity": 8.0, "test accuracy": 40.0}
    logged = [
        {"step": k, "valid loss": 2.0, "valid perplexity": valid, **test, "seconds": 1.0 * k}
        for k, valid in ((10, 6.5), (20, 7.5))
    ]
    run = write_run(tmp_path / "a", logged, options=TEXT)
    text = write(tmp_path / "page.html", run)
    head, cells = table(text, "Summary")
    found = dict(zip(head, cells, strict=True))
    assert found["final test perplexity"] == "8.00"
    assert found["best valid perplexity"] == "6.50step 10"
    assert found["final test accuracy"] == "40.00 %"
    assert "Final test perplexity: 8. Final valid perplexity: 7.5." in text
    assert (tmp_path / "page" / "perplexity-over-steps.png").exists()


# --- translation --------------------------------------------------------------------------------


def translated(step: int, split: str, bleu: float, text: str, signature: str = SIGNATURE) -> str:
    sample = {"source": f"source {text}", "hypothesis": text, "reference": f"reference {text}"}
    row = {"step": step, "split": split, "bleu": bleu, "signature": signature, "samples": [sample]}
    return json.dumps(row) + "\n"


def translating(folder: Path, *lines: str) -> Path:
    valid = {"valid loss": 2.5, "valid token_accuracy": 30.0, "valid_ppl": 12.2}
    logged = [
        {"step": 10, "train loss": 3.0, "train token_accuracy": 20.0, "seconds": 1.0},
        {"step": 20, **valid, "seconds": 2.0},
        {"step": 20, "valid bleu_sampled": 14.0, "seconds": 3.0},
        {"step": 20, "valid bleu": 15.0, "valid _bleu_counts_0": 3.0, "seconds": 4.0},
        {"step": 20, "test bleu": 13.5, "seconds": 5.0},
    ]
    run = write_run(folder, logged, options=TRANSLATION)
    (run / "translations.jsonl").write_text("".join(lines))
    return run


def test_the_last_samples_of_each_split_are_shown(tmp_path: Path) -> None:
    run = translating(
        tmp_path / "a",
        translated(10, "valid", 1.25, "early"),
        translated(20, "valid", 15.0, "later"),
        translated(20, "test", 13.5, "final"),
    )
    text = write(tmp_path / "page.html", run)
    shown = re.findall(r'<dd dir="auto">([^<]*)</dd>', text)
    assert shown == [
        "source later", "later", "reference later", "source final", "final", "reference final",
    ]  # fmt: skip
    assert f"valid, step 20: BLEU 15.00; {SIGNATURE}" in text
    assert text.count("<details open>") == 1, "the newest"
    head, cells = table(text, "Summary")
    found = dict(zip(head, cells, strict=True))
    assert found["final test BLEU"] == "13.50"
    assert found["final valid token accuracy"] == "30.00 %"
    assert "Final test BLEU: 13.5. Final valid BLEU: 15." in text
    assert f'<p class="note">BLEU: <code>{SIGNATURE}</code></p>' in text
    assert (tmp_path / "page" / "BLEU-over-steps.png").exists()


def test_bleu_of_different_signatures_is_told(tmp_path: Path) -> None:
    a = translating(tmp_path / "a", translated(20, "test", 13.5, "a"))
    b = translating(tmp_path / "b", translated(20, "test", 13.5, "b", signature="nrefs:1|tok:zh"))
    text = write(tmp_path / "page.html", a, b)
    assert "BLEU was computed in several ways, which do not compare" in text
    assert "<code>nrefs:1|tok:zh</code>" in text


def test_a_translation_can_say_anything(tmp_path: Path) -> None:
    wild = '</dd><script>alert("1")</script>&amp; {title} %s $x$ \u202e \ud800 \x00'
    long = "again " * 1000
    run = translating(
        tmp_path / "a", translated(20, "valid", 1.0, long), translated(20, "test", 1.0, wild)
    )
    text = write(tmp_path / "page.html", run)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "&lt;/dd&gt;&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;amp; {title}" in text
    assert text.count("again ") < 500
    assert len(re.findall("</dl>", text)) == 3, "two samples, and how to run it again"


@pytest.mark.parametrize(
    "line",
    ["3", "null", "{}", '{"step": 1, "split": "valid", "samples": 5}', '{"step": 1, "spl',
     '{"step": 1, "split": "valid", "samples": [{"source": "a"}]}'],
)  # fmt: skip
def test_a_line_of_translations_that_is_none_is_counted(tmp_path: Path, line: str) -> None:
    run = translating(tmp_path / "a", translated(20, "test", 13.5, "fine"), line)
    found = report.read(run)
    assert ([said.split for said in found.translations], found.unreadable) == (["test"], 1)


def test_translations_without_score_or_signature(tmp_path: Path) -> None:
    row = {"step": 20, "split": "test", "bleu": None, "samples": []}
    run = translating(tmp_path / "a", json.dumps(row) + "\n")
    assert "test, step 20: BLEU —; no signature" in write(tmp_path / "page.html", run)
    (run / "translations.jsonl").unlink()
    assert ">Translations<" not in write(tmp_path / "page.html", run)


# --- seeds --------------------------------------------------------------------------------------


def seeded(folder: Path, seed: int, accuracy: float, rate: float = 0.1, **meta: Any) -> Path:
    options = {"init_key": seed, "rng_seed": 10 * seed, "learning_rate": rate}
    return write_run(folder, rows(accuracy), options=options, **meta)


def test_means_over_seeds(tmp_path: Path) -> None:
    """Of 90, 92 and 97: mean 93, and deviations -3, -1, 4: sqrt(26 / 2) = 3.61."""
    accuracies = (90.0, 92.0, 97.0)
    runs = [seeded(tmp_path / f"a{k}", k, x, finished="now") for k, x in enumerate(accuracies)]
    runs += [seeded(tmp_path / "b", 0, 94.0, rate=0.2, finished="now")]
    text = write(tmp_path / "page.html", *runs)
    assert column(text, "Means over seeds", "final test accuracy") == ["93.00 ± 3.61 %", "94.00 %"]
    assert column(text, "Means over seeds", "final test loss")[0] == "0.5000 ± 0.0000"
    assert column(text, "Means over seeds", "runs") == ["3", "1"]
    first, second = column(text, "Means over seeds", "configuration")
    assert (first, second) == ("learning_rate=0.1a0, a1, a2", "learning_rate=0.2b")


def test_means_leave_out_what_has_not_ended(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / f"a{k}", k, 90.0 + k, finished="now") for k in (0, 1)]
    killed = write_run(tmp_path / "a2", rows()[:3], options={"init_key": 2, "rng_seed": 20})
    text = write(tmp_path / "page.html", *runs, killed)
    assert column(text, "Means over seeds", "final test accuracy") == ["90.50 ± 0.71 %"]
    assert column(text, "Means over seeds", "runs") == ["2and 1 not finished"]


def test_means_of_milestones_say_how_many_reached_them(tmp_path: Path) -> None:
    runs = []
    for k, at in enumerate((500, 700, None)):
        options = OPERATIONS | {"init_key": k}
        runs.append(write_run(tmp_path / f"a{k}", grokking(at), options=options, steps=2000))
    text = write(tmp_path / "page.html", *runs)
    (cell,) = column(text, "Means over seeds", "steps to test accuracy of 95\xa0%")
    assert cell == "600 ± 1412 of 3 runs, after 6.5 ± 1.4 s"  # 141 = 100 sqrt(2)


def test_runs_that_differ_in_more_than_seeds_have_no_means(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / f"a{k}", 0, 90.0, rate=0.1 * k) for k in (1, 2)]
    assert "Means over seeds" not in write(tmp_path / "page.html", *runs)


# --- what is no run -----------------------------------------------------------------------------


def test_a_broken_run_is_left_out_of_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, rows()) for name in "abc"]
    (runs[1] / "metrics.jsonl").unlink()
    (runs[2] / "meta.json").write_text('{"steps": ')
    out = tmp_path / "page.html"
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    text, said = out.read_text(), capsys.readouterr().err
    assert "<h1>a: digits, mlp</h1>" in text
    for reason in (f"{runs[1]} is no run: it lacks metrics.jsonl.", f"{runs[2]} cannot be read"):
        assert reason in text
        assert reason in said
    assert report.main([*map(str, runs[1:]), "--out", str(out)]) == 2, "none is left"


def test_a_folder_that_does_not_exist_is_a_mistake(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", rows())
    with pytest.raises(ConfigError, match="there is no folder"):
        report.write([run, tmp_path / "b"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
