"""SAM in the runner: every mode trains, switches have their effect, contradictions are told."""

import numpy as np
import pytest

import llqr
from llqr_experiments.config import advice, build
from llqr_experiments.errors import ConfigError
from llqr_experiments.run.train import train_step
from tests.experiments.support import config, run

SHORT = (
    "total_epochs=1",
    "precond_steps=3",
    "update_preconditioner_every=5",
    "precond_batch_size=6",
    "logging_freq=1",
    "block_structure=diagonal",  # compiles fast; others are tests/unit/test_sharpness.py's
    "architecture.hidden=[24]",
)
ALONE = ("use_preconditioner=false", "sam_use_preconditioner_on_update=false")
LONG = build.Horizon(100.0, 100.0)
ON_P = ("perturb_mode=ema_precond_grad", "norm_mode=matrix_norm")


def losses(tmp_path, name, *overrides):
    """Training losses of every step of a short run, and what is logged of SAM."""
    rows = run(tmp_path / name, *SHORT, *overrides)
    trained = [row["train loss"] for row in rows if "train loss" in row]
    return np.array(trained), [row for row in rows if "sam active steps" in row]


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (["sam_mode=base_sam", *ON_P], 2),
        (["sam_mode=base_sam", "sam_groups=4", *ALONE], 2),
        (["sam_mode=base_fsam", "perturb_mode=ema_direction", "norm_mode=layer_matrix_norm"], 2),
        (["sam_mode=past_fsam", "norm_mode=layer_euclidean", "gbar_beta=0.6"], 1),
        (["sam_mode=asam", *ALONE], 2),
        (["sam_mode=fisher_sam"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_every_mode_trains_and_is_logged(tmp_path, capsys, overrides, passes):
    trained, sam = losses(tmp_path, "sam", *overrides)
    assert np.mean(trained[-3:]) < 0.9 * trained[0]
    steps = len(trained)
    assert sam[-1]["sam active steps"] == steps
    assert sam[-1]["sam gradient evaluations"] == passes * steps
    assert sam[5]["sam perturbation norm"] > 0
    if passes == 2:
        both = [row["sam perturbed loss"] - row["sam clean loss"] for row in sam]
        np.testing.assert_allclose([row["sam sharpness"] for row in sam], both, atol=1e-6)
        assert np.mean(both) > 0
    else:
        assert "sam clean loss" not in sam[-1], "no pass goes there"
    shown = capsys.readouterr().out
    assert "step      0   " + overrides[0].split("=")[1] + " becomes active" in shown
    assert f"{passes * steps} in {steps} steps, {steps} of them perturbed" in shown


def test_switches_decide_where_p_enters(tmp_path):
    """P in the update, in the perturbation, in both, in none: four different runs."""
    on, off = "sam_use_preconditioner_on_update=true", "sam_use_preconditioner_on_update=false"
    base = ("sam_mode=base_sam", "perturbation_rho=0.5", "precond_steps=20")
    runs = {
        "both": losses(tmp_path, "a", *base, on, *ON_P)[0],
        "update": losses(tmp_path, "b", *base, on)[0],
        "perturbation": losses(tmp_path, "c", *base, off, *ON_P)[0],
        "none": losses(tmp_path, "d", *base, off)[0],
    }
    np.testing.assert_allclose(runs["none"], losses(tmp_path, "e", *base, *ALONE)[0], rtol=1e-6)
    for one in runs:
        for other in runs:
            if one < other:
                assert np.abs(runs[one] - runs[other]).max() > 1e-5, (one, other)


@pytest.mark.parametrize("mode", ["base_sam", "fisher_sam"])
def test_before_its_start_sam_is_the_configured_run(tmp_path, capsys, mode):
    plain, _ = losses(tmp_path, "plain")
    late, sam = losses(
        tmp_path, "late", f"sam_mode={mode}", "start_sam_after_step=6",
        "sam_use_preconditioner_on_update=false",
    )  # fmt: skip
    np.testing.assert_array_equal(late[:6], plain[:6])
    assert np.abs(late[7:] - plain[7:]).max() > 1e-4
    assert [row["sam active steps"] for row in sam[:8]] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert [row["sam gradient evaluations"] for row in sam[:8]] == [1, 2, 3, 4, 5, 6, 8, 10]
    assert f"step      6   {mode} becomes active" in capsys.readouterr().out


def test_a_late_start_compiles_its_own_step_and_no_other(tmp_path):
    train_step.clear_cache()
    losses(tmp_path, "late", "sam_mode=base_sam", "start_sam_after_step=4")
    assert train_step._cache_size() == 2


def test_research_switches_have_their_effect(tmp_path):
    base = ("sam_mode=base_sam", "main_optimizer=polyak", *ALONE)
    plain, _ = losses(tmp_path, "a", *base)
    source = "sam_research_base_vector_source="
    for name in ("main_optimizer_momentum", "random_direction"):
        other, sam = losses(tmp_path, name, *base, source + name)
        assert np.abs(other - plain).max() > 1e-4
        norms = [row["sam perturbation norm"] for row in sam]
        first = 0.0 if "momentum" in name else 0.1  # momentum is zero at the first step
        np.testing.assert_allclose(norms[:3], [first, 0.1, 0.1], rtol=1e-5)
    _, sam = losses(tmp_path, "descent", *base, "sam_research_perturb_sign=descent")
    assert np.mean([row["sam sharpness"] for row in sam]) < 0


def test_rho_follows_its_schedule(tmp_path):
    options = {"target_value": "null", "init_value": 0.1, "ramp_start_step": 2, "ramp_end_step": 6}
    _, sam = losses(
        tmp_path, "a", "sam_mode=base_sam", "perturbation_rho=0.3",
        "perturbation_rho_scheduler=cosine_ramp_step_increase",
        *(f"perturbation_rho_scheduler.{name}={value}" for name, value in options.items()),
    )  # fmt: skip
    norms = [row["sam perturbation norm"] for row in sam][:9]
    np.testing.assert_allclose(norms[:3] + norms[6:], [0.1] * 3 + [0.3] * 3, rtol=1e-5)
    np.testing.assert_allclose(norms[4], 0.2, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sam_mode=bas_sam"], "did you mean 'base_sam'"),
        (
            ["sam_mode=base_sam", "use_preconditioner=false"],
            "sam_use_preconditioner_on_update=true needs use_preconditioner=true",
        ),
        (
            ["sam_mode=base_sam", "perturb_mode=ema_precond_grad", *ALONE],
            "perturb_mode=ema_precond_grad needs use_preconditioner=true",
        ),
        (["sam_mode=asam", "norm_mode=matrix_norm"], "must be ema_grad, euclidean"),
        (["sam_mode=fisher_sam", "perturb_mode=ema_direction"], "must be ema_grad, euclidean"),
        (["sam_mode=past_fsam", "sam_research_perturb_sign=descent"], "not for past_fsam"),
        (["sam_research_perturb_sign=descent"], "not for null"),
        (
            ["sam_mode=base_sam", "sam_research_base_vector_source=main_optimizer_momentum"],
            "main_optimizer=sgd has no momentum",
        ),
        (["sam_mode=past_fsam", "sam_groups=2"], "the same for every group"),
        (["sam_mode=base_sam", "sam_groups=3"], "does not divide batch_size=128"),
        (
            [
                "sam_mode=base_sam",
                "sam_groups=2",
                "sam_research_base_vector_source=random_direction",
            ],
            "the same for every group",
        ),
        (["sam_mode=asam", "asam_eta=-1"], "asam_eta=-1.0: must be >= 0"),
        (["perturbation_rho=-1"], "perturbation_rho=-1.0: must be >= 0"),
        (["gbar_eps=0"], "gbar_eps=0.0: must be > 0"),
        (["experiment=toy-ackley", "sam_mode=base_sam"], "is for training"),
    ],
)
def test_contradictions_are_told(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


def test_the_papers_toggles_compose_and_reach_the_step():
    on = ("use_preconditioner=true", "sam_use_preconditioner_on_update=true", ON_P[0])
    off = (*ALONE, "perturb_mode=ema_grad")
    for mode in ("base_sam", "base_fsam"):
        for toggles in (on, off):
            made = build.ascent(config(f"sam_mode={mode}", *toggles), LONG)
            assert made.configured == made.uses_preconditioner == (toggles is on)
    for toggles in (on, off):
        assert build.ascent(config("sam_mode=null", *toggles), LONG) is None
    # it never uses P: nothing to toggle
    fisher = build.ascent(config("sam_mode=fisher_sam", "use_preconditioner=false"), LONG)
    assert not fisher.configured
    assert not fisher.uses_preconditioner


def test_what_is_rarely_meant_is_warned_of():
    late = config(
        "sam_mode=base_sam", "start_sam_after_step=4000",
        "perturbation_rho_scheduler=cosine_ramp_step_increase",
    )  # fmt: skip
    assert any("counts from step 0" in text for text in advice.warnings(late, LONG))
    assert any("perturbation_rho=0.1 is not used" in text for text in advice.warnings(late, LONG))
    never = advice.warnings(late, build.Horizon(10.0, 3.0))
    assert any("30 steps, none of them perturbed" in text for text in never)
    unused = config("sam_mode=fisher_sam")
    assert any("uses P" in text for text in advice.warnings(unused, LONG))
    assert "saves them" in advice.warnings(unused, LONG)[0]
    delayed = config("sam_mode=fisher_sam", "start_sam_after_step=9")
    assert "saves them" not in advice.warnings(delayed, LONG)[0]
    assert not advice.warnings(config("sam_mode=base_sam"), LONG)
    ema = ("ema_scheduler=cosine_annealing", "ema_scheduler.t_max=100")
    falling = advice.warnings(config(*ema, "ema_decay=0.99"), LONG)
    assert "ema_scheduler decreases" in falling[0]
    assert not advice.warnings(config(*ema, "ema_decay=0.8"), LONG)


def test_options_reach_the_method():
    made = build.ascent(
        config("sam_mode=base_fsam", "gbar_beta=0.6", "gbar_eps=1e-6", "norm_mode=matrix_norm",
               "perturb_mode=ema_direction", "perturbation_rho=0.075"),
        build.Horizon(1.0, 1.0),
    )  # fmt: skip
    assert made == build.Ascent(
        llqr.friendly_sam(
            0.075, beta=0.6, epsilon=1e-6, norm="matrix_norm", direction="ema_direction"
        ),
        "current_gradient",
        True,
    )
    fisher = build.ascent(config("sam_mode=fisher_sam", "fisher_sam_eta=0.3"), build.Horizon(1, 1))
    assert fisher == build.Ascent(llqr.fisher_sam(0.1, eta=0.3), "current_gradient", False)
