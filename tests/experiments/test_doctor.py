"""The doctor: what it says of made-up records, of a healthy one, and of a real run."""

import re
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import llqr
from llqr_experiments import doctor
from llqr_experiments.command import cli
from llqr_experiments.command.doctor import tell
from llqr_experiments.config.options import Config
from llqr_experiments.config.row import rows
from llqr_experiments.record import insight
from llqr_experiments.report import diagnosis
from llqr_experiments.report.diagnosis import diagnose
from llqr_experiments.report.runs import Run
from tests.experiments import support

OPTIONS = {
    "use_preconditioner": True, "main_optimizer": "polyak", "block_structure": "e-kfac",
    "precond_on_update": False, "learning_rate": 0.1, "damping": 0.0, "divergence": "newton",
}  # fmt: skip
HEALTHY = {
    "train loss": [2.0, 1.0, 0.5, 0.25],
    "refit objective before": [-1.0, -1.0],
    "refit objective after": [-3.0, -2.0],
    "refit guarded blocks": [0.0, 0.0],
    "refit indefinite blocks": [0.0, 0.0],
    "refit cosine Pg and g": [0.5, 0.4],
    "refit cosine refit and training gradient": [0.8, 0.7],
    "refit update over parameters": [0.0, 1e-3],
    "Preconditioner l2 norm": [10.0, 12.0],
}
FINISHED = {"steps": 3, "finished": "now"}


def run(logged=None, changed=None, meta=None, time=None) -> Run:
    """A run that logged these values at steps 0, 1, 2, ..."""
    series = HEALTHY | (logged or {})
    rows = [
        {"step": i, "seconds": float(i), "session": float(i)}
        | {name: values[i] for name, values in series.items() if i < len(values)}
        for i in range(max(map(len, series.values()), default=0))
    ]
    meta = (FINISHED if meta is None else meta) | {"time": time or {}}
    return Run(Path("r"), "r", OPTIONS | (changed or {}), "", meta, rows, [], 0)


SICK = {
    "no_number": ({"train loss": [2.0, 1.0, None]}, {}, {}, "not finite", "first at step 2"),
    "rises": ({"train loss": [2.0, 0.5, 3.0, 4.0, 4.0]}, {}, {}, "after it had", "0.5 at"),
    "rises late": ({"train loss": [2.0, 1.0, 0.5, 3.0, 4.0, 5.0]}, {}, {}, "after it had", "4 at"),
    "rises at once": ({"train loss": [2.0] + 30 * [9.0]}, {}, {}, "from the beginning", "9 at the"),
    "rejected": (
        {"refit guarded blocks": [2.0, 1.0], "a guarded, objective not lower": [1.0]}, {}, {},
        "do not lower their objective", "in 2 of 2 refits, 2 blocks at most; a",
    ),
    "flat": (
        {"refit guarded blocks": [1.0, 1.0], "w/b guarded, no curvature": [1.0]}, {}, {},
        "no curvature there", "w/b",
    ),
    "streaming": ({"refit guarded blocks": [1.0, 1.0]}, {}, {}, "keep the old P", "in 2 of 2"),
    "unmoved": (
        {"refit objective after": [-1.0, -1.0001]}, {}, {}, "hardly change P", "2 of 2 refits",
    ),
    "indefinite": (
        {"refit indefinite blocks": [0.0, 3.0]}, {}, {}, "has no minimum", "divergence=newton",
    ),
    "across": ({"refit cosine Pg and g": [0.01, 0.02]}, {}, {}, "turns the gradient away", "0.015"),
    "unlike": (
        {"refit cosine refit and training gradient": [0.05, 0.01]}, {}, {},
        "training does not take", "0.03 in the median of 2",
    ),
    "long": (
        {"refit update over parameters": [0.9, 0.5]}, {}, {}, "as long as the parameters", "0.7",
    ),
    "short": (
        {"refit update over parameters": [0.0, 1e-9]}, {}, {}, "hardly move", "learning_rate=0.1",
    ),
    "grown": ({"Preconditioner l2 norm": [1.0, 101.0]}, {}, {}, "grows", "1 after the first, 101"),
    "adam": (
        {}, {"main_optimizer": "adamw", "block_structure": "diagonal"}, {},
        "almost nothing", "learning_rate=0.1",
    ),
    "never refitted": (
        {name: [] for name in HEALTHY if name != "train loss"}, {"precond_start_step": 9}, {},
        "never refitted", "precond_start_step=9, 3 steps",
    ),
    "refused": ({"exact/refused": [0.0, 1.0, 2.0, 2.0]}, {}, {}, "are refused", "2 of 3 steps"),
    "slow": ({}, {}, {"time": {"refit": 60.0, "training": 50.0}}, "longer than", "60.0 s of"),
    "compiles": ({}, {}, {"time": {"compile": 60.0, "training": 9.0}}, "compilation", "60.0 of 69"),
    "waits": ({}, {}, {"time": {"data": 20.0, "training": 50.0}}, "wait for data", "20.0 s"),
    "broken off": ({}, {}, {"meta": {"steps": 9}}, "not come to its end", "step 3 of 9"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SICK)
def test_each_symptom_is_one_finding_with_its_figures(kind):
    logged, changed, more, what, seen = SICK[kind]
    sick = run(logged, changed, **more)
    found = diagnose(sick)
    assert len(found) == 1, found
    assert what in found[0].what
    assert seen in found[0].figures
    assert found[0].what[0].upper() + found[0].what[1:] in tell(sick)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"train loss": [1.0, 0.001, 0.004, 0.003]},  # noise near zero
        {"train loss": [0.01, 0.02]},  # too short to tell
        {"train loss": [2.0, 2.1, 2.0, 0.5]},  # it falls at last
        {"train loss": [2.0, 1.0, 0.5, 0.5, 9.0]},  # the last one alone
        {"refit guarded blocks": [1.0, 0.0, 0.0], "a guarded, direction turned": [1.0]},
        {"Preconditioner l2 norm": [1.0, 50.0]},
    ],
)
def test_a_healthy_record_has_no_findings(change):
    assert diagnose(run(change)) == []
    assert "Nothing in the record looks wrong" in tell(run(change))
    behind = {"main_optimizer": "adam", "block_structure": "diagonal", "precond_on_update": True}
    assert diagnose(run({}, behind)) == []
    assert diagnose(run({}, {}, time={"compile": 20.0, "training": 1.0})) == []


def test_what_it_advises_exists():
    """Every option=value in an advice is legal on the command line, and so are other names."""
    sick = [run(logged, changed, **more) for logged, changed, more, *_ in SICK.values()]
    told = [finding.advice for one in sick for finding in diagnose(one)]
    text = " ".join([*told, *(advice for _, advice in diagnosis.REASONS.values())])
    given = re.findall(r"\b[a-z_]+=[\w.-]*\w", text)
    assert len(set(given)) >= 10
    for argument in given:
        cli._check_argument(argument)
    names = {name for name, _, _ in rows(Config)} | set(cli.GROUPS)
    mentioned = set(re.findall(r"\b[a-z]+_[a-z_]+\b", text))
    assert {word for word in mentioned if word not in names} <= {"step_warmup", "cg_zoom_hz"}


def test_a_real_run(tmp_path, capsys):
    """Refits at a rate that is far too large: every guard holds, and the doctor says so."""
    support.run(
        tmp_path / "run", "total_epochs=1", "precond_lr=1e4", "precond_clip_norm=null",
        "block_structure=diagonal", "update_preconditioner_every=4", "precond_steps=2",
        "architecture.hidden=[4]", "precond_batch_size=8", "logging_freq=1",
    )  # fmt: skip
    doctor.main([str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert re.search(r"1\. Guards keep the old P: refits ", said)
    assert "seen: in 3 of 3 refits" in said
    assert "try:  " in said
    assert re.search(r"refit objective after: .+ -> .+, 3 times", said)
    assert re.search(r"refit update over parameters: 0\.\d+ -> 0\.\d+, 3 times", said)
    with pytest.raises(SystemExit):
        doctor.main([str(tmp_path)])
    assert "is no run" in capsys.readouterr().err


def test_the_length_of_the_next_update():
    """Of plain descent with P = 1: rate |g| / |w|; and no refit happens on the way."""
    tx = llqr.llqr(optax.sgd(0.5), metric="gaussian", refit=llqr.Refit(every=1))
    params, x = {"w": 2 * jnp.ones(4)}, jnp.arange(4.0)
    bound = llqr.Objective(lambda p, x: p["w"] * x, lambda z, x: jnp.sum(z)).bind(x)
    found = insight.step_length(tx, tx.init(params), bound, params)
    assert float(found) == pytest.approx(0.5 * 14**0.5 / 4, rel=1e-6)


def test_the_length_of_p_is_that_of_all_blocks_together():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((4, 4))}
    tx = llqr.scale_by_llqr(structure="diagonal")
    report = llqr.inspect(tx, tx.init(params), params)
    record = insight.refit_record(report, 1.0, 1.0)
    assert record["a l2 norm"] == pytest.approx(3)
    assert record["b l2 norm"] == pytest.approx(4)
    assert record["Preconditioner l2 norm"] == pytest.approx(5)
