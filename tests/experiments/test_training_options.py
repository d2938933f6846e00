"""Options of data, training, evaluation and tracking, each by its effect; forecasts and sweeps."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from omegaconf import OmegaConf

import llqr
from llqr_experiments.command import cli, forecast, memory, reference, sweep
from llqr_experiments.config import build
from llqr_experiments.config.options import Config
from llqr_experiments.config.row import rows
from llqr_experiments.errors import ConfigError, DataError
from llqr_experiments.run import train
from llqr_experiments.run.checkpoint import Checkpoints
from llqr_experiments.run.job import prepare
from llqr_experiments.run.origin import origin
from llqr_experiments.run.session import begin
from llqr_experiments.run.step import Recipe, advance, init
from llqr_experiments.task import tasks
from tests.experiments import support

ROOT = cli.CONFIGS.parent
PLAIN = (
    "use_preconditioner=false",
    "architecture.hidden=[16]",
    "logging_freq=1",
    "total_epochs=2",
)


def losses(out, *overrides):
    rows = support.run(out, *PLAIN, *overrides)
    return np.array([row["train loss"] for row in rows if "train loss" in row]), rows


# --- steps ---------------------------------------------------------------------------------


def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path):
    whole, _ = losses(tmp_path / "a", "batch_size=120")
    parts, rows = losses(tmp_path / "b", "batch_size=30", "grad_acc_steps=4")
    assert len(whole) == len(parts) == int(2 * 1438 / 120)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    assert rows[-1]["step"] == len(parts)


def test_a_partial_batch_is_filled_up_and_counts_by_its_examples(tmp_path):
    """Epochs of 11 batches of 128 and one of 30; one compiled step serves all."""
    train.train_step.clear_cache()
    padded, _ = losses(tmp_path / "a", "partial_batch=pad", "learning_rate=1e-9")
    assert train.train_step._cache_size() == 1
    assert len(padded) == 24
    weights = np.array([128] * 11 + [30])
    for epoch in (padded[:12], padded[12:]):  # parameters hardly move: a mean over all examples
        np.testing.assert_allclose(epoch @ weights / 1438, np.mean(padded), rtol=1e-3)
    evaluated = support.run(
        tmp_path / "b", *PLAIN, "learning_rate=1e-9", "add_train_eval=true", "max_steps=1"
    )
    np.testing.assert_allclose(
        padded[:12] @ weights / 1438, evaluated[-1]["train_eval loss"], rtol=1e-5
    )
    accumulated, _ = losses(
        tmp_path / "c", "partial_batch=pad", "batch_size=32", "grad_acc_steps=4"
    )
    straight, _ = losses(tmp_path / "d", "partial_batch=pad", "batch_size=128")
    np.testing.assert_allclose(accumulated, straight, rtol=1e-5)


def test_the_rest_of_an_epoch_may_be_dropped(tmp_path):
    dropped, _ = losses(tmp_path, "partial_batch=drop")
    assert len(dropped) == 2 * 11


def test_steps_may_be_limited_without_touching_schedules(tmp_path):
    options = ("lr_scheduler=cosine_decay_with_floor", "lr_scheduler.t_max=2")
    whole, _ = losses(tmp_path / "a", *options)
    part, rows = losses(tmp_path / "b", *options, "max_steps=7")
    np.testing.assert_array_equal(part, whole[:7])
    assert rows[-1]["step"] == 7
    assert "test loss" in rows[-1]


def test_half_precision_trains_and_curvature_stays_in_float32(tmp_path):
    refits = ("use_preconditioner=true", "block_structure=diagonal", "precond_steps=3")
    full = support.run(tmp_path / "a", *PLAIN, *refits)
    half = support.run(tmp_path / "b", *PLAIN, *refits, "precision=bf16")
    first = [next(row for row in rows if "refit objective after" in row) for rows in (full, half)]
    assert first[0]["refit objective before"] == first[1]["refit objective before"]
    loss = [[row["train loss"] for row in rows if "train loss" in row] for rows in (full, half)]
    assert loss[0][0] != loss[1][0]
    np.testing.assert_allclose(loss[0], loss[1], rtol=0.05)


def _of_products(program):
    """Types of what is multiplied in a program, and in those inside it."""
    inside = (jaxprs_in_params(equation.params) for equation in program.eqns)
    found = {kind for programs in inside for one in programs for kind in _of_products(one)}
    products = (e for e in program.eqns if e.primitive.name == "dot_general")
    return found | {x.aval.dtype.name for e in products for x in e.invars}


@pytest.mark.parametrize(("precision", "kind"), [("bf16", "bfloat16"), ("float32", "float32")])
def test_all_products_of_a_model_have_its_precision(precision, kind):
    """Inputs too: else the first layer, and with it all that follow, would be in float32."""
    job = prepare(support.config("experiment=quick-local-test", *PLAIN, f"precision={precision}"))
    stream = job.task.material.streams.training(job.config)
    batch = next(stream)
    stream.close()
    sums = dict.fromkeys(tasks.sums_of(batch), jnp.zeros(()))
    carry = tasks.Carry(job.task.statistics, jax.random.key(0), sums)
    program = jax.make_jaxpr(job.task.training)(job.task.params, batch, carry)
    assert _of_products(program.jaxpr) == {kind}


def test_tensors_of_rank_four_are_normalised_before_the_update():
    params = {"conv": 3 * jnp.ones((2, 2, 1, 4)), "dense": 3 * jnp.ones((2, 2))}
    loss = lambda p, _, carry: (jnp.sum(p["conv"]) + jnp.sum(p["dense"]), carry)  # noqa: E731
    recipe = Recipe(optax.with_extra_args_support(optax.sgd(0.5)), normalize=True)
    state, _ = advance(loss, recipe, False, init(recipe, params), None)
    np.testing.assert_allclose(state.params["conv"], 0.5 * np.ones((2, 2, 1, 4)), rtol=1e-6)
    np.testing.assert_allclose(state.params["dense"], 2.5 * np.ones((2, 2)))
    zero = jax.tree.map(jnp.zeros_like, params)
    state, _ = advance(loss, recipe, False, init(recipe, zero), None)
    assert np.all(np.isfinite(state.params["conv"]))


@pytest.mark.parametrize("skip", [False, True])
def test_a_parameter_that_overflows_is_noted(skip):
    """Loss and gradient are finite, the update is not."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    loss = lambda p, _, carry: (jnp.sum(p["a"]) + 1e30 * jnp.sum(p["b"]), carry)  # noqa: E731
    recipe = Recipe(optax.with_extra_args_support(optax.sgd(1e30)), skip=skip)
    state, _ = advance(loss, recipe, False, init(recipe, params), None)
    assert int(state.health.bad_step) == 0
    assert int(state.health.bad_leaf) == 2 + 1, "behind the two gradients, the second parameter"
    assert bool(jnp.all(state.params["b"] == 1.0)) is skip
    assert int(state.step) == 1


def test_the_first_step_that_is_not_finite_is_the_one_that_is_told():
    loss = lambda p, batch, carry: (p * batch, carry)  # noqa: E731
    recipe = Recipe(optax.with_extra_args_support(optax.sgd(0.1)), skip=True)
    state = init(recipe, jnp.ones(()))
    for factor in (1.0, jnp.nan, 1.0, jnp.inf):
        state, _ = advance(loss, recipe, False, state, jnp.asarray(factor))
    assert (int(state.health.bad_step), int(state.health.bad_steps)) == (1, 2)


def test_a_random_direction_is_another_at_every_step():
    loss = lambda p, _, carry: (jnp.sum(p * jnp.arange(4.0)), carry)  # noqa: E731
    ascent = build.Ascent(llqr.sam(0.1), "random_direction", True)
    recipe = Recipe(optax.with_extra_args_support(optax.sgd(0.0)), ascent)
    state, seen = init(recipe, jnp.ones(4)), []
    for _ in range(2):
        state, _ = advance(loss, recipe, True, state, None)
        assert state.sharpness is not None
        seen.append(float(state.sharpness.info.perturbed_loss))
    assert abs(seen[0] - seen[1]) > 1e-3


def test_a_probe_sees_one_of_the_micro_batches():
    seen = set()

    def forward(params, batch):
        seen.add(batch["x"].shape)
        return batch["x"] @ params["w"]

    loss = lambda p, batch, carry: (jnp.mean((batch["x"] @ p["w"]) ** 2), carry)  # noqa: E731
    refit = llqr.Streaming(probe_share=1.0)
    tx = llqr.streaming(0.1, structure="diagonal", metric="gaussian", refit=refit)
    recipe = Recipe(tx, microbatches=2)
    state = init(recipe, {"w": jnp.ones((3, 2))})
    probing = llqr.Objective(forward, lambda z, batch: jnp.mean(z**2))
    advance(loss, recipe, False, state, {"x": jnp.ones((8, 3))}, seen=probing)
    assert seen == {(4, 3)}


# --- data ----------------------------------------------------------------------------------


def test_smaller_training_sets(tmp_path):
    small = tasks.build(support.config("dataset=digits", "dataset.truncate=100")).material
    assert small.sizes == {"train": 100, "test": 359}
    tail = tasks.build(support.config("dataset=digits", "dataset.imbalance=10")).material
    whole = next(tail.streams.evaluation("train", 2000))
    counts = np.bincount(whole["label"][whole["mask"]])
    assert counts.max() / counts.min() == pytest.approx(10, rel=0.15)
    with pytest.raises(DataError, match=r"1,?438"):
        tasks.build(support.config("dataset=digits", "dataset.truncate=5000"))


def test_overlapping_batches_share_examples(tmp_path):
    config = support.config("experiment=quick-local-test", "batch_overlap_fraction=0.5")
    job = train.prepare(config)
    assert job.last == 2246, "the number of steps is that of whole batches"
    start = origin(job, False, tmp_path, Checkpoints(tmp_path, 1, print), print)
    session = begin(job, start, tmp_path, print)
    first, second = next(session.stream), next(session.stream)
    np.testing.assert_array_equal(first["image"][64:], second["image"][:64])
    with pytest.raises(ConfigError, match="batch_overlap_fraction"):
        train.prepare(support.config("dataset=digits", "batch_overlap_fraction=0.3"))


# --- evaluation and trackers ---------------------------------------------------------------


def test_histograms_count_every_example(tmp_path):
    support.run(
        tmp_path, *PLAIN, "record_histograms=true", "add_train_eval=true", "test_eval_freq=10"
    )
    rows = [json.loads(line) for line in (tmp_path / "histograms.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rows} == {
        "test/p_correct_hist", "test/nll_hist", "train_eval/p_correct_hist", "train_eval/nll_hist",
    }  # fmt: skip
    assert sorted({row["step"] for row in rows}) == [10, 20, 22]
    for row in rows:
        assert len(row["counts"]) == 50
        assert len(row["edges"]) == 51
        assert sum(row["counts"]) == (359 if row["name"].startswith("test") else 1438)


def test_tensorboard_gets_the_metrics(tmp_path):
    support.run(tmp_path, *PLAIN, "logging.tensorboard=true", "max_steps=2")
    events = list((tmp_path / "tensorboard").glob("events*"))
    assert len(events) == 1
    assert b"train_loss" in events[0].read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["architecture.name=resnet"], "architecture.name: unknown value 'resnet'"),
        (["resume=a", "init_from=b"], "leave init_from out"),
        (["preempt_handling=true", "checkpoint_freq=null"], "needs checkpoint_freq"),
        (["preempt_handling=true", "comparison.name=training"], "is for one run"),
        (["partial_batch=fill"], "straddle"),
        (["precision=float16"], "bf16"),
        (["batch_overlap_fraction=1.0"], "must be >= 0 and < 1"),
    ],
)
def test_what_cannot_be_is_told_at_once(overrides, message):
    with pytest.raises(ConfigError, match=message):
        support.config(*overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('checkpoint_metric="test acuracy"', "did you mean 'test accuracy'"),
        ('checkpoint_metric="train_eval loss"', "needs add_train_eval=true"),
        ("architecture=grok-transformer", r"is for operations, and digits holds images: .*mlp"),
        ("architecture.heads=3", r"architecture.heads=3: mlp has no such option, only hidden"),
        ("dataset.p=7", r"dataset.p=7: digits has no such option, only dataset_dir"),
        ("translation_eval.enabled=true", "digits is no translation"),
    ],
)
def test_what_does_not_fit_the_data_is_told_before_training(override, message):
    with pytest.raises(ConfigError, match=message):
        train.prepare(support.config("experiment=quick-local-test", override))


def test_half_precision_keeps_losses_of_near_certainty():
    """log p of a sure answer is small and not 0."""
    task = tasks.build(support.config("dataset=digits", "precision=bf16"))
    params = jax.tree.map(lambda x: 3 * x, task.params)
    image = jnp.asarray(next(task.material.streams.evaluation("train", 64))["image"]) * 3
    sure = jnp.zeros(64, jnp.int32)
    bound = tasks.bound(task, {"image": image, "label": sure}, task.statistics)
    sure = jnp.argmax(bound.outputs(params), -1)
    batch, sums = {"image": image, "label": sure}, dict.fromkeys(tasks.CLASSES, jnp.zeros(()))
    carry = tasks.Carry(task.statistics, jax.random.key(0), sums)
    half, after = task.training(params, batch, carry)
    assert half.dtype == jnp.float32
    exact = float(tasks.bound(task, batch, task.statistics)(params))
    assert 0 < exact < 0.1
    np.testing.assert_allclose(half, exact, rtol=0.2)
    np.testing.assert_allclose(after.sums["loss"], 64 * half, rtol=1e-5)


def test_the_closing_table_says_how_long_steps_waited(tmp_path, capsys):
    support.run(tmp_path, *PLAIN)
    said = capsys.readouterr().out
    assert re.search(r"waiting\s+of the time of training and refits: data [\d.]+ %, logging", said)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert {"training", "data", "logging", "compile", "evaluation"} <= meta["time"].keys()


# --- forecasts, smoke, sweeps, the table of options ------------------------------------------


def test_a_forecast_says_what_would_be_done(tmp_path, capsys):
    config = support.config(
        "experiment=quick-local-test", "dry_run=true", "sam_mode=base_sam",
        "start_sam_after_step=246", "checkpoint_freq=500",
    )  # fmt: skip
    out = tmp_path / "made by hydra"
    out.mkdir()
    cli.execute(OmegaConf.structured(config), out)
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "mlp, 39,810 parameters", "1,438 train, 359 test examples",
        "2,246 of 128 examples (200 epochs)", "5 of",
        "base_sam from step 246: 2,000 perturbed steps, 4,246 gradients in all",
        "3, before steps 0, 1,000, 2,000", "refits about 75 gradients", "e-kfac",
        "refit memory", "MiB on top while one runs, compiled as a whole for cpu",
    ):  # fmt: skip
        assert part in said, part
    assert not out.exists()


def test_a_forecast_counts_refits_of_translation_by_their_tokens():
    """Pairs have no number of examples in a batch; attention makes operations nearly tokens."""
    config = support.config(
        "experiment=small-translation", "dataset=numbers_de_en", "architecture.width=32",
        "architecture.depth=1", "precond_batch_size=48",
    )  # fmt: skip
    job = prepare(config)
    streams = job.task.material.streams
    refit, training = next(streams.refits(config)), streams.shapes(config)
    tokens = [sum(x.size for x in batch.values()) for batch in (refit, training)]
    said = forecast._overhead(job, float(job.last))
    found = float(re.search(r"refits about (\d+) gradients", said)[1])  # type: ignore[index]
    expected = len(job.refit_steps) * config.precond_steps * tokens[0] / tokens[1]
    assert found == pytest.approx(expected, rel=0.2)


def test_the_memory_of_a_refit_is_what_it_holds():
    """At least P twice (what is learned, and its momentum); less in chunks."""

    def needed(route):
        tx = llqr.llqr(optax.sgd(0.1), structure="kfac", route=route, refit=llqr.Refit(steps=2))
        params = {"w": jnp.ones((60, 50)), "v": jnp.ones((50, 10))}
        state = tx.init(params)
        batch = {"x": jnp.ones((4000, 60)), "y": jnp.zeros((4000, 10))}
        compiled = memory.compile_refit(tx, state, params, OBJECTIVE.bind(batch))
        return memory.temporary(compiled), memory.size(state)

    whole, stored = needed(llqr.Route())
    hidden = 4000 * 50 * 4  # one layer's activations
    assert stored == pytest.approx(4 * (60**2 + 2 * 50**2 + 10**2), rel=0.01)
    assert 2 * stored + 2 * hidden < whole < 2 * stored + 12 * hidden
    assert needed(llqr.Route(chunk_size=40))[0] < whole - hidden


OBJECTIVE = llqr.Objective(
    forward=lambda params, batch: jnp.tanh(batch["x"] @ params["w"]) @ params["v"],
    loss=lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2),
)


def test_smoke_runs_a_few_steps(tmp_path, capsys):
    config = support.config(
        "experiment=quick-local-test", "smoke=true", "logging.aim=false", "sam_mode=base_sam",
        "sam_groups=4", "batch_size=128",
    )  # fmt: skip
    cli.execute(OmegaConf.structured(config), tmp_path / "run")
    assert support.rows(tmp_path / "run")[-1]["step"] == 4
    assert "step      4   test loss" in capsys.readouterr().out


def test_a_sweep_is_summed_up(tmp_path, capsys):
    for name, accuracy in (("init_key=0,wd_mask=[a,b]", 91.0), ("init_key=1,wd_mask=[a,b]", 92.5)):
        (tmp_path / name).mkdir()
        meta = {"results": {"test accuracy": accuracy}, "time": {"training": 3.0}, "finished": "x"}
        (tmp_path / name / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "init_key=2,wd_mask=[a,b]").mkdir()
    (tmp_path / "init_key=2,wd_mask=[a,b]" / "meta.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        sweep.Summary().on_multirun_end(
            OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
        )
    assert ended.value.code == 1, "one did not finish"
    said = capsys.readouterr().out
    assert "3 runs" in said
    assert re.search(r"0\s+91\s", said)
    assert "not finished" in said
    assert "wd_mask" not in said, "the same for all"
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert lines[0] == "init_key,wd_mask,test accuracy,seconds,status"
    assert lines[2].startswith('1,"[a,b]",92.5')


def test_folders_of_a_sweep_are_named_after_what_is_swept(tmp_path):
    """A name of all options would be too long, and a path in it would make folders."""
    config = OmegaConf.create(
        {"hydra": {"sweep": {"dir": str(tmp_path)}, "overrides": {
            "task": [
                "experiment=grokking", "dataset.dataset_dir=/a/b", "init_key=0,${here}", "+x=1"
            ],
            "hydra": ["hydra.sweep.dir=here"],
        }}}
    )  # fmt: skip
    OmegaConf.set_readonly(config.hydra, True)
    summary = sweep.Summary()
    summary.on_multirun_start(config)
    assert summary._total == 2
    own, added = config.hydra.overrides.hydra
    assert own == "hydra.sweep.dir=here"
    assert added == (
        "hydra.job.config.override_dirname.exclude_keys=[experiment,dataset.dataset_dir,x]"
    )
    assert sweep.unswept(["a=1", "a=1,2"]) == []
    assert sweep.unswept([]) == []


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_run_that_fails(tmp_path):
    done = subprocess.run(
        [sys.executable, "run.py", "-m", "experiment=quick-local-test", "smoke=true",
         "logging.aim=false", "use_preconditioner=false", "learning_rate=1e38,0.1",
         f"dataset.dataset_dir={tmp_path}", f"hydra.sweep.dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"learning_rate=1e+38", "learning_rate=0.1"}
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(lines) == 3
    assert {line.rsplit(",", 1)[-1] for line in lines[1:]} == {"finished", "not finished"}


def test_the_table_of_options_is_that_of_the_schema():
    """Mend it with: python -m llqr_experiments.options > docs/options.md"""
    assert (ROOT / "docs" / "options.md").read_text() == reference.page()


# Spec 7.1.
GUIDE = """
batch_size grad_acc_steps eval_batch_size learning_rate momentum main_optimizer adam_betas
weight_decay wd_mask total_epochs label_smoothing test_eval_freq logging_freq report_freq
checkpoint_freq add_train_eval record_histograms init_key rng_seed update_preconditioner_every
update_preconditioner_until precond_rank precond_identity_scaling precond_steps
precond_batch_size precond_lr precond_solver precond_on_update precond_clip_norm
precond_clip_element_wise normalize_grad_for_lqr normalize_conv_params allow_grad_inversion
use_preconditioner measure_asymmetry divergence divergence_order_param block_structure
block_structure_init batch_solve_precond llqr_operator_mode llqr_checkpoint_policy
llqr_use_fast_paths llqr_batch_update_mode llqr_batch_update_chunk_size llqr_second_order_mode
llqr_second_order_chunk_size warm_start_precond multibatch_training damping ema_decay
preempt_handling jobid sam_mode start_sam_after_step perturbation_rho asam_eta fisher_sam_eta
sam_use_preconditioner_on_update perturb_mode norm_mode sam_research_base_vector_source
sam_research_perturb_sign gbar_beta gbar_eps batch_overlap_fraction logging.aim logging.aim_repo
translation_eval.enabled translation_eval.freq translation_eval.max_examples
translation_eval.full_eval_at_end translation_eval.full_eval_freq translation_eval.progress_freq
translation_eval.beam_size translation_eval.max_len_a translation_eval.max_len_b
translation_eval.remove_bpe translation_eval.detok translation_eval.print_samples
translation_eval.checkpoint_metric translation_eval.maximize_checkpoint_metric
"""


def test_every_option_of_the_guide_is_there():
    names = {name for name, _, _ in rows(Config)}
    assert [name for name in GUIDE.split() if name not in names] == []
