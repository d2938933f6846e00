"""Runs of text, translation and operations: compilations, interruptions, BLEU when it is due."""

import json
import signal

import jax
import numpy as np
import pytest

import llqr
from llqr_experiments.data import translation
from llqr_experiments.errors import ConfigError
from llqr_experiments.record import translations
from llqr_experiments.run import checkpoint, phases, translate
from llqr_experiments.run.checkpoint import BEST
from llqr_experiments.run.preemption import Interrupted
from tests.experiments import sequence_files, support
from tests.experiments.sequence_files import TEXT, TRANSLATION
from tests.experiments.support import assert_same_end, interrupt

COMMON = (
    "main_optimizer=adam", "learning_rate=0.02", "logging_freq=1", "precond_steps=2",
    "precond_batch_size=4", "precond_lr=0.01", "architecture.dropout=0.1",
)  # fmt: skip


def lines(out):
    return [json.loads(line) for line in (out / translations.FILE).read_text().splitlines()]


# --- compilations, and BLEU when it is due ------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A run of two epochs on sentences of 1 to 30 words, and what was compiled when."""
    out = tmp_path_factory.mktemp("counted")
    sizes = {"train": 90, "valid": 7, "test": 5}
    folder = sequence_files.pairs(out / "pairs", longest=30, sizes=sizes)
    served, refits, compiled = [], [], []
    original, refresh = translation.train_stream, llqr.refresh

    def stream(*args, **kwargs):
        for batch in original(*args, **kwargs):
            served.append(batch["label"].shape)
            yield batch

    def refit(*args, **kwargs):
        refits.append("during")
        found = refresh(*args, **kwargs)
        refits[-1] = "after"
        return found

    def listen(event, duration_secs, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append((facts["fun_name"], len(served), list(refits)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(translation, "train_stream", stream)
            patch.setattr(llqr, "refresh", refit)
            support.run(
                out / "run", *TRANSLATION, *COMMON, f"dataset.dataset_dir={folder}",
                "dataset.max_tokens=64", "dataset.percentiles=3", "dataset.padding_factor=3",
                "total_epochs=2", "update_preconditioner_every=25", "test_eval_freq=9",
                "block_structure=diagonal", "translation_eval.enabled=true",
                "translation_eval.beam_size=2", "translation_eval.freq=12",
                "translation_eval.full_eval_freq=24", "translation_eval.max_examples=3",
            )  # fmt: skip
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return out / "run", served, compiled


@pytest.mark.slow
def test_each_shape_compiles_once_in_the_first_epoch(counted):
    out, served, compiled = counted
    length, shapes = len(served) // 2, set(served)
    assert len(served) == support.rows(out)[-1]["step"] == 2 * length
    when = [at for name, at, _ in compiled if name == "jit(train_step)"]
    assert len(when) == len(shapes) == 3
    assert max(when) <= length
    assert set(served[:length]) == shapes


@pytest.mark.slow
def test_refits_and_evaluations_compile_once(counted):
    _, _, compiled = counted
    during = [refits for _, _, refits in compiled if refits and refits[-1] == "during"]
    assert during
    assert {len(refits) for refits in during} == {1}
    assert any(len(refits) == 2 for _, _, refits in compiled), "there was one refit only"
    evaluations = [at for name, at, _ in compiled if name == "jit(_accumulate)"]
    assert set(evaluations) == {9}


@pytest.mark.slow
def test_bleu_is_measured_when_it_is_due(counted):
    out, served, _ = counted
    rows, last = support.rows(out), len(served)
    found = {
        name: {row["step"]: row[f"{name} examples"] for row in rows if name in row}
        for name in ("valid bleu", "valid bleu_sampled", "test bleu")
    }
    full = {step for step in range(1, last) if step % 24 == 0} | {last}
    assert found["valid bleu"] == dict.fromkeys(full, 7)
    sampled = {step for step in range(1, last) if step % 12 == 0} - full
    assert found["valid bleu_sampled"] == dict.fromkeys(sampled, 3)
    assert found["test bleu"] == {last: 5}
    written = lines(out)
    kinds = [(line["split"], line["step"]) for line in written[:-1]]
    assert kinds == [("valid", step) for step in sorted(full | sampled)]
    assert written[-1]["split"] == "test"
    references = (out.parent / "pairs" / "valid.en").read_text().splitlines()
    by_step = {line["step"]: line for line in written[:-1]}
    chosen = {last: [0, 1, 3, 4, 6], 12: [0, 3, 6]}
    for step, places in chosen.items():
        samples = by_step[step]["samples"]
        assert [sample["reference"] for sample in samples] == [references[i] for i in places]
        bleu = next(row for row in rows if row["step"] == step and "valid bleu" in str(row))
        assert by_step[step]["bleu"] in bleu.values()
    assert all("version:" in line["signature"] for line in written)
    assert "valid bleu" in str(json.loads((out / "meta.json").read_text())["results"])


@pytest.mark.parametrize("preset", ["transformer-iwslt14-de-en", "small-translation"])
def test_presets_have_few_shapes(preset):
    """Lengths as of IWSLT: 1 to 175 words, 23 on average. SAM's start doubles the variants."""
    random, config = np.random.default_rng(0), support.config(f"experiment={preset}").dataset
    source = np.clip(random.lognormal(2.9, 0.7, 20_000), 1, 175).astype(int) + 1
    target = np.clip(source * random.normal(1, 0.15, 20_000), 2, 176).astype(int)
    sides = [
        translation.Sentences(np.zeros(n.sum(), np.int32), np.cumsum([0, *n])) for n in
        (source, target)
    ]  # fmt: skip
    bucketing = translation.Bucketing(config.max_tokens, config.percentiles, config.padding_factor)
    pairs = translation.Pairs(*sides, np.arange(20_000, dtype=np.int32))
    assert 2 * len(translation.Buckets(pairs, bucketing).shapes) <= 24


# --- interruptions ------------------------------------------------------------------------------


def stopped(monkeypatch, at, out, *options):
    """Run until a signal at step `at`; then lose what is newer than the checkpoint before it."""
    with monkeypatch.context() as patch:
        interrupt(patch, at)
        with pytest.raises(Interrupted):
            support.run(out, *options)
    newest = checkpoint.steps(out / "checkpoints")[-1]
    assert newest == at
    checkpoint.shutil.rmtree(out / "checkpoints" / checkpoint.LATEST / str(newest))


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A whole run of a tied GPT-2 with e-kfac-gpt, and its options: 11 steps make an epoch."""
    out = tmp_path_factory.mktemp("text")
    options = (
        *TEXT, *COMMON, f"dataset.dataset_dir={sequence_files.text(out / 'files')}",
        f"dataset.cache_dir={out / 'cache'}", "batch_size=8",
        "block_structure=e-kfac-gpt", "update_preconditioner_every=6", "test_eval_freq=7",
        "max_steps=14", "checkpoint_freq=8",
    )  # fmt: skip
    return out / "run", support.run(out / "run", *options), options


def test_a_tied_head_trains_with_e_kfac_gpt(text_run):
    _, rows, _ = text_run
    losses = [row["train loss"] for row in rows if "train loss" in row]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    refits = [row for row in rows if "refit objective after" in row]
    assert [row["step"] for row in refits] == [0, 6, 12]
    for row in refits:
        assert row["refit objective after"] < row["refit objective before"]
        assert row["refit guarded blocks"] == 0
    assert rows[-1]["valid perplexity"] == pytest.approx(np.exp(rows[-1]["valid loss"]))


def test_text_goes_on_in_the_middle_of_an_epoch(text_run, tmp_path, monkeypatch):
    whole, _, options = text_run
    stopped(monkeypatch, 10, tmp_path / "run", *options)
    support.run(tmp_path / "run", *options)
    assert_same_end(tmp_path / "run", whole)


class Scores:
    """Stands in for translation: BLEU from a list, the same again for the same parameters."""

    def __init__(self, scores):
        self.scores, self.known, self.calls = iter(scores), {}, []

    def __call__(self, decoder, params, data, split, options, *, batch_size, most, follow, layout):
        key = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))
        self.calls.append((split, key))
        if split == "valid" and key not in self.known:
            self.known[key] = next(self.scores)
        bleu = translation.Bleu(self.known.get(key, 0.0), (0,) * 4, (0,) * 4, 0, 0, "none")
        return translate.Translated(bleu, 1.0, len(getattr(data, split)), ())


@pytest.fixture(scope="module")
def translation_run(tmp_path_factory):
    """A whole run whose BLEU is 10, 30, 20, 25 at the steps 3, 6, 9, 10."""
    out, scores = tmp_path_factory.mktemp("translation"), Scores([10.0, 30.0, 20.0, 25.0, 5.0])
    folder = sequence_files.pairs(out / "pairs")
    options = (
        *TRANSLATION, *COMMON, f"dataset.dataset_dir={folder}", "dataset.percentiles=1",
        "block_structure=diagonal", "update_preconditioner_every=4", "test_eval_freq=5",
        "max_steps=10", "checkpoint_freq=7", "translation_eval.enabled=true",
        "translation_eval.freq=0", "translation_eval.full_eval_freq=3",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translate, "translate", scores)
        support.run(out / "run", *options)
    return out / "run", scores, options


def test_the_test_set_is_translated_with_the_best_parameters(translation_run):
    out, scores, _ = translation_run
    (*valid, (last, key)) = scores.calls
    assert [split for split, _ in valid] == ["valid"] * 4
    assert last == "test"
    assert key == valid[1][1] != valid[-1][1]
    assert checkpoint.steps(out / "checkpoints", BEST) == [6]
    assert [(line["split"], line["step"], line["bleu"]) for line in lines(out)] == [
        ("valid", 3, 10), ("valid", 6, 30), ("valid", 9, 20), ("valid", 10, 25), ("test", 6, 30),
    ]  # fmt: skip
    meta = json.loads((out / "meta.json").read_text())
    assert meta["best"] == {"value": 30.0, "step": 6.0}
    rows = [row for row in support.rows(out) if "best valid bleu" in row]
    assert [(row["best valid bleu"], row["best valid bleu step"]) for row in rows] == [
        (10, 3), (30, 6), (30, 6), (30, 6),
    ]  # fmt: skip


def test_translation_goes_on_and_the_best_survives(translation_run, tmp_path, monkeypatch):
    """From step 7, in the second epoch; also a translation of the test set is not doubled."""
    whole, scores, options = translation_run
    monkeypatch.setattr(translate, "translate", scores)
    out, known = tmp_path / "run", dict(scores.known)
    stopped(monkeypatch, 8, out, *options)
    with (out / translations.FILE).open("a") as file:
        file.write(json.dumps(lines(whole)[-1]) + "\n")
    before = len(scores.calls)
    support.run(out, *options)
    assert_same_end(out, whole)
    assert scores.known == known, "the same parameters to the last bit"
    assert [split for split, _ in scores.calls[before:]] == ["valid", "valid", "test"]
    assert scores.known[scores.calls[-1][1]] == 30.0
    assert lines(out) == lines(whole)


def test_the_best_of_the_run_that_is_gone_on_from(translation_run, tmp_path, monkeypatch, capsys):
    """In another folder, where nothing was better: its parameters, or else the last ones."""
    whole, scores, options = translation_run
    monkeypatch.setattr(translate, "translate", scores)
    more = (*options, "max_steps=11", "translation_eval.full_eval_freq=100", f"resume={whole}")
    support.run(tmp_path / "a", *more)
    assert scores.known[scores.calls[-2][1]] == 5.0
    assert scores.known[scores.calls[-1][1]] == 30.0
    assert lines(tmp_path / "a")[-1]["step"] == 6
    copy = tmp_path / "copy"
    checkpoint.shutil.copytree(whole, copy)
    checkpoint.shutil.rmtree(copy / "checkpoints" / BEST)
    capsys.readouterr()
    support.run(tmp_path / "b", *more[:-1], f"resume={copy}")
    assert scores.known[scores.calls[-1][1]] == 5.0
    said = " ".join(capsys.readouterr().out.split())
    assert "the best checkpoint, of step 6, cannot be read" in said


def test_first_steps_of_milestones_survive(tmp_path, monkeypatch):
    """Accuracy is 50, 96, 60, 99.5 % at the steps 2, 4, 6, 8; a signal comes at step 5."""
    shares = iter([0.5, 0.96, 0.6, 0.995])
    monkeypatch.setattr(
        phases, "evaluate", lambda *_: {"loss": 1.0, "correct": 1000 * next(shares), "rows": 1000}
    )
    options = (
        "dataset=grok_mod_sum", "dataset.p=5", "architecture=grok-transformer",
        "architecture.width=4", "architecture.heads=2", "architecture.depth=1",
        "architecture.mlp=4", "batch_size=5", "use_preconditioner=false", "test_eval_freq=2",
        "logging_freq=1", "max_steps=8", "checkpoint_freq=100",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        interrupt(patch, 5, signal.SIGUSR1)
        with pytest.raises(Interrupted):
            support.run(tmp_path, *options)
    rows = support.run(tmp_path, *options)
    first = "first step with test accuracy of {} %"
    assert rows[-1][first.format(95)] == 4
    assert rows[-1][first.format(99)] == 8
    by_step = {row["step"]: row for row in rows if "test accuracy" in row}
    assert [first.format(95) in by_step[step] for step in (2, 4, 6, 8)] == [False, True, True, True]
    results = json.loads((tmp_path / "meta.json").read_text())["results"]
    assert results[first.format(95)] == 4


@pytest.mark.parametrize("option", ["grad_acc_steps=2", "sam_groups=2"])
def test_what_needs_batches_of_one_shape_is_refused(tmp_path, option):
    folder = sequence_files.pairs(tmp_path / "pairs")
    options = (*TRANSLATION, f"dataset.dataset_dir={folder}", "sam_mode=base_sam", option)
    with pytest.raises(ConfigError, match=f"{option}: batches of translation differ in shape"):
        support.run(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()
