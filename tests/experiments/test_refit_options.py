"""Every refit option of the papers' guide, from the command line to what it changes."""

import numpy as np
import pytest

import llqr
from llqr_experiments.config import advice, build
from llqr_experiments.errors import ConfigError
from tests.experiments.support import config, run

HORIZON = build.Horizon(10.0, 2.0)
SHORT = (
    "total_epochs=1",
    "precond_steps=3",
    "update_preconditioner_every=5",
    "precond_batch_size=6",
)


def last(tmp_path, name, *overrides):
    """The last training loss of a short run, and the rows of its refits."""
    rows = run(tmp_path / name, *SHORT, "logging_freq=11", *overrides)
    losses = [row["train loss"] for row in rows if "train loss" in row]
    return losses[-1], [row for row in rows if "refit steps" in row]


@pytest.mark.parametrize(
    "overrides",
    [
        ["llqr_use_fast_paths=false"],
        ["llqr_operator_mode=lowmem_exact_full", "llqr_checkpoint_policy=dots_no_batch_dims"],
        ["llqr_batch_update_mode=chunked_lqr_segment", "llqr_batch_update_chunk_size=4"],
        ["llqr_second_order_mode=sample_separable_exact", "llqr_second_order_chunk_size=1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_routes_train_alike(tmp_path, overrides):
    default, _ = last(tmp_path, "default", "divergence=newton", "damping=1.0")
    other, refits = last(tmp_path, "other", "divergence=newton", "damping=1.0", *overrides)
    assert len(refits) == 3
    np.testing.assert_allclose(other, default, rtol=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=probe"],
        ["batch_solve_precond=false", "block_structure=diagonal"],
        ["multibatch_training=true"],
        ["precond_on_update=true", "main_optimizer=adamw", "weight_decay=0", "learning_rate=1e-3"],
        ["precond_solver=cg_zoom_hz"],
        ["precond_solver=cg", "block_structure=diagonal"],
        ["block_structure=low-rank-memory", "precond_rank=3"],
        ["block_structure=e-kfac-gpt", "measure_asymmetry=true", "precond_graft=block"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_options_change_the_run_and_log_their_refits(tmp_path, overrides):
    plain, _ = last(tmp_path, "plain", *(o for o in overrides if "optimizer" in o or "rate" in o
                                         or "decay" in o), "use_preconditioner=false")  # fmt: skip
    changed, refits = last(tmp_path, "changed", *overrides)
    assert changed != plain
    assert np.isfinite(changed)
    for row in refits:
        assert -1 <= row["refit cosine refit and training gradient"] <= 1
        assert np.isfinite(row["Preconditioner l2 norm"])
        assert any(name.startswith("layers_0/") and name.endswith(" l2 norm") for name in row)
    if "measure_asymmetry=true" in overrides:
        assert refits[-1]["layers_0/kernel/left/frob skew"] > 0
        assert refits[-1]["Average spectral skew across preconditioner"] > 0


def test_options_reach_the_library():
    options = build.refit_options(
        config(
            "momentum=0.7",
            "precond_anneal=true",
            "precond_probe=gaussian",
            "precond_probes=3", "rng_seed=5", "update_preconditioner_until=9",
        ),
        HORIZON,
    )  # fmt: skip
    assert options.momentum == 0.7  # that of the main optimizer
    assert (options.anneal, options.until) == (True, 9)
    assert build.refit_options(config("precond_tolerance=0.1"), HORIZON).tolerance == 0.1
    assert (options.probe, options.probes, options.seed) == ("gaussian", 3, 5)
    assert build.refit_options(config("precond_momentum=0.2"), HORIZON).momentum == 0.2
    route = build.route(config("llqr_operator_mode=lowmem_exact_k"))
    assert route == llqr.Route(memory="curvature_recomputed")
    assert build.structure(config("block_structure=low-rank-memory", "precond_rank=3")).rank == 3


def test_methods_set_what_they_are_and_presets_publish():
    published, probe = config(), config("method=probe")
    assert (published.precond_probe, published.divergence_reduction) == ("gradient", "sum")
    assert (probe.precond_probe, probe.divergence_reduction) == ("fisher", "unit")
    assert config("method=probe", "precond_probes=9").precond_probes == 9
    assert config("method=published") == published


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["llqr_batch_update_mode=chunked_lqr_segment"], "needs llqr_batch_update_chunk_size"),
        (["llqr_batch_update_chunk_size=8"], "needs llqr_batch_update_mode=chunked_lqr_segment"),
        (["llqr_second_order_chunk_size=8"], "llqr_second_order_mode=sample_separable_exact"),
        (["llqr_checkpoint_policy=dots_no_batch_dims"], "needs llqr_operator_mode=lowmem_exact"),
        (
            ["llqr_use_fast_paths=false", "llqr_batch_update_mode=chunked_lqr_segment",
             "llqr_batch_update_chunk_size=8"],
            "takes the batch as a whole",
        ),
        (["precond_rank=4"], "precond_rank=4 is for low-rank-memory structures only"),
        (["precond_solver=gc"], "unknown value 'gc'"),
        (["precond_probe=fischer"], "did you mean 'fisher'"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_the_reason(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precond_probes=2"], "one fixed direction"),
        (["precond_probe=gaussian", "batch_solve_precond=false"], "each example's gradient"),
        (["multibatch_training=true", "precond_solver=cg"], "no fresh_batches"),
        (["precond_solver=cg", "block_structure=kfac"], "not block_structure=kfac"),
        (["precond_probe=fisher", "divergence=newton"], "labels can be drawn"),
    ],
)
def test_what_the_library_refuses_is_a_config_error(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build.optimizer(config(*overrides), HORIZON)


def test_what_is_rarely_meant_is_said(tmp_path, capsys):
    adam = ("main_optimizer=adam", "block_structure=diagonal")
    assert "precond_on_update=true" in advice.warnings(config(*adam), HORIZON)[0]
    assert "no lower bound" in advice.warnings(config("divergence=newton"), HORIZON)[0]
    for fine in ((*adam, "precond_on_update=true"), (*adam, "use_preconditioner=false"),
                 ("divergence=newton", "damping=0.1"), ()):  # fmt: skip
        assert advice.warnings(config(*fine), HORIZON) == []
    warm = (
        "lr_scheduler=warmup_cosine_decay", "lr_scheduler.init_lr=0.0", "precond_on_update=true",
    )  # fmt: skip
    assert "precond_start_step=1 moves" in advice.warnings(config(*warm), HORIZON)[0]
    for fine in ("precond_start_step=1", "precond_probe=gaussian", "precond_on_update=false",
                 "lr_scheduler.init_lr=0.1"):  # fmt: skip
        assert advice.warnings(config(*warm, fine), HORIZON) == []
    run(tmp_path, *SHORT, *adam)
    assert "warning: adam divides the scale" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        ["divergence=newton", "precond_lr=1e6", "precond_solver=sgd", "precond_clip_norm=null"],
        ["precond_lr=1e30", "precond_solver=sgd", "precond_clip_norm=null"],
    ],
    ids=["the objective rises", "not finite"],
)
def test_a_refit_that_fails_changes_nothing_and_says_so(tmp_path, capsys, overrides):
    plain, _ = last(tmp_path, "plain", "use_preconditioner=false")
    guarded, refits = last(tmp_path, "guarded", "block_structure=kfac", *overrides)
    assert guarded == plain
    assert [row["refit guarded blocks"] for row in refits] == [6.0, 6.0, 6.0]
    assert any("guarded, " in name for name in refits[0])
    assert "6 of 6 blocks guarded" in capsys.readouterr().out
