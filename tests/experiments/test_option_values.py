"""Whatever value an option is given: it is refused in words, or the run can be made of it."""

import functools
import inspect
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import llqr
from llqr import schedules
from llqr_experiments.command import cli
from llqr_experiments.config import build, names
from llqr_experiments.config.options import SCHEDULERS, Config
from llqr_experiments.config.row import BOUNDS, MOST, default, kinds, plain, rows
from llqr_experiments.config.schedulers import SCHEDULES
from llqr_experiments.errors import ConfigError, DataError, RunError
from llqr_experiments.run import job
from tests.experiments import support

HORIZON = build.Horizon(11.23, 3.0)
ROWS = {name: row for name, row, _ in rows(Config) if name not in SCHEDULERS}
ARGUMENTS = {
    (schedule, row.name): row for schedule, kind in SCHEDULES.items() for row in fields(kind)
}
ODD = (
    "null", "true", "foo", "''", "[]", "[1]", "[[1]]", "[a]", "{}", "{a:1}", "nan", "inf", "-inf",
    "-1", "0", "0.5", "1e300", str(MOST), str(2**31), str(2**40), str(2**63), str(2**64),
    "9" * 30, "${nothing}", "???",
)  # fmt: skip


def near(row: Any) -> list[str]:
    """Values at the bounds of an option and past them, one of its choices and a misspelling."""
    rules = row.metadata
    found = [str(rules[rule] + d) for rule in BOUNDS if rule in rules for d in (-1, 0, 1)]
    if "choices" in rules:
        found += [rules["choices"][-1], rules["choices"][0].upper() + "x"]
    return found + ["[0.5,0.1]", "[nan,1]", "[1,2,3]", f"[{10**12}]"] * (
        get_origin(kinds(row)[0]) is list
    )


CASES = [(name, value) for name, row in ROWS.items() for value in (*ODD, *near(row))] + [
    (f"lr_scheduler.{argument}", value, schedule)
    for (schedule, argument), row in ARGUMENTS.items()
    for value in (*ODD, *near(row), "3", "[[1,2],[0,1]]", "[[-1,1]]")
]


@functools.cache
def base() -> Any:
    return OmegaConf.structured(support.config("experiment=quick-local-test"))


def made(name: str, value: str, schedule: str | None = None) -> Config:
    """The config of a command with one option more, checked as run.py does; one that can be built.

    Raises:
      RunError: it is refused.
    """
    argument = f"{name}={value}"
    cli._check_argument(argument)
    group, _, key = name.partition(".")
    parsed = cli.OverridesParser.create().parse_override(argument).value()
    given: dict[str, Any] = {name: parsed} if not key else {group: {key: parsed}}
    if schedule is not None:
        given[group]["name"] = schedule
    try:
        composed = OmegaConf.merge(base(), given)
    except OmegaConfBaseException as error:  # Hydra composes, and tells its errors itself
        raise ConfigError(str(error)) from error
    config = cli.settings(composed)  # type: ignore[arg-type]
    job.check(config)
    build.check_schedules(config, HORIZON)
    return config


def refused(*case: str) -> RunError | None:
    """The error; anything that is no RunError is a fault."""
    try:
        made(*case)
    except RunError as error:
        return error
    return None


def assert_each_is_refused_or_can_be_built(cases):
    for case in cases:
        error, (name, value) = refused(*case), case[:2]
        if value in ("nan", "inf", "[[1]]", "{a:1}", "${nothing}"):
            row = ROWS.get(name)
            free = row and str in (kinds(row)[0], *get_args(kinds(row)[0]))
            assert error is not None or free, case


@pytest.mark.parametrize("part", range(4))
def test_a_value_is_refused_in_words_or_can_be_built(part, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/nowhere")
    assert_each_is_refused_or_can_be_built(CASES[part::20])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4, 20))
def test_so_is_any_other(part, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/nowhere")
    assert_each_is_refused_or_can_be_built(CASES[part::20])


def test_there_are_enough_of_them():
    assert len(CASES) > 20 * 150, "600 of them without the slow ones"


def test_defaults_and_what_is_legal_are_accepted():
    for name, row in ROWS.items():
        for value in (default(row), *row.metadata.get("choices", ())):
            cli._check_argument(
                f"{name}='{value}'" if value.strip() != value else f"{name}={value}"
            )


def test_names_and_arguments_are_the_librarys():
    assert set(names.STRUCTURES) == set(llqr.STRUCTURES)
    theirs = set(llqr.metrics.METRICS) - {"bernoulli"}  # no task here has binary outputs
    assert set(names.DIVERGENCES) == theirs | {"renyi_inf"}
    drawn = {x for x in theirs if llqr.metrics.can_sample(llqr.metrics.resolve(x))}
    assert set(names.DRAWN) == drawn
    assert set(names.OF_NUMBERS) <= theirs
    assert names.SOLVERS == llqr.solvers.SOLVERS
    assert set(SCHEDULES) == set(schedules.SCHEDULES)
    for schedule, kind in SCHEDULES.items():
        parameters = inspect.signature(schedules.SCHEDULES[schedule]).parameters
        ours = {row.name: plain(row) for row in fields(kind)}
        given = ("base", "steps_per_epoch", "total_epochs")
        assert set(ours) == set(parameters) - set(given), schedule
        for name, value in ours.items():
            if name == "boundaries":
                assert parameters[name].default is None
                continue
            there = parameters[name].default
            assert value == (list(there) if isinstance(there, tuple) else there), (schedule, name)


def test_every_row_has_type_and_meaning():
    for name, row in [*ROWS.items(), *ARGUMENTS.items()]:
        kind, _ = kinds(row)
        inner = get_args(kind)[0] if get_origin(kind) is list else kind
        inner = get_args(inner)[0] if get_origin(inner) is list else inner
        assert inner in (bool, int, float, str), name
        assert row.metadata["meaning"], name
        assert not is_dataclass(kind)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("lr_scheduler=null", "lr_scheduler"),
        ("dataset=null", "unknown dataset 'null'"),
        ("toy=null", "toy is a group of options"),
        ("~batch_size", "an option cannot be left out"),
        ("learning_rate=${foo}", r"learning_rate: Interpolation key 'foo' not found"),
        ("learning_rate=inf", "learning_rate=inf: must be"),
        ("toy.start=[nan,1]", r"toy.start=\[nan, 1.0\]: must be a list: a number"),
        ("rng_seed=99999999999", "rng_seed=99999999999: must be >= 0 and <= "),
        ("quality=[foo]", "quality: unknown value 'foo'"),
        ("block_structure=e-kfca use_preconditioner=false", "did you mean 'e-kfac'"),
    ],
)
def test_faults_are_told_in_words(overrides, message):
    def start() -> None:
        given = overrides.split()
        for override in given:
            cli._check_argument(override)
        cli.settings(OmegaConf.merge(base(), OmegaConf.from_dotlist(given)))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=message):
        start()


@pytest.mark.parametrize(
    ("group", "given", "message"),
    [
        ("lr_scheduler", None, "lr_scheduler=None: must be one of its presets"),
        ("lr_scheduler", {}, "lr_scheduler.name: unknown schedule None"),
        ("lr_scheduler", {"name": ["a"]}, "unknown schedule"),
        ("lr_scheduler", {"name": "linear", "decay_factor": "x"}, "must be a number >= 0"),
        ("ema_scheduler", {"name": "cosine_annealing", "t_max": 1, "eta_min": 1.5}, r"ema_decay=1"),
        (
            "precond_update_scheduler",
            {"name": "piecewise_constant", "boundaries": {0: 1e-9}},
            "precond_update_scheduler gives update_preconditioner_every",
        ),
        *(
            ("precond_update_scheduler", {"name": "piecewise_constant", "boundaries": value}, text)
            for value, text in [
                (3, "boundaries=3: must be a list: a list of 2"),
                ([[1]], "must be a list"),
                ([[2, 1], [1, 1]], "rising"),
                ([[2, 1], [2, 3]], "rising"),
                ([[1, 0]], "factor > 0"),
            ]
        ),
        *(
            (
                "lr_scheduler",
                {"name": "warmup_piecewise_decay", "epoch_decay_bounds": value},
                "a list: a number >= 0, rising",
            )
            for value in ([3, 2], [3, 3])
        ),
    ],
)
def test_schedules_are_checked_by_their_rows_and_over_the_run(group, given, message):
    with pytest.raises(ConfigError, match=message):
        build.check_schedules(replace(Config(), **{group: given}), HORIZON)


def test_half_an_epoch_is_enough_for_a_schedule():
    """What is checked before the data is known must not refuse what the data allows."""
    linear = {"name": "linear", "transition_epochs": 0.5}
    job.check(replace(Config(), precond_lr_scheduler=linear))


# --- runs of extremes ------------------------------------------------------------------------

NOT_TRIED = ("dry_run", "smoke", "preempt_handling", "dataset.download", "dataset.dataset_dir")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name not in NOT_TRIED])
def test_what_is_accepted_trains_or_is_refused_before_the_first_step(name, tmp_path, monkeypatch):
    """No failure later than the preparation of the run: nothing is left behind by it."""
    for i, case in enumerate(case for case in CASES if case[0] == name and len(case) == 2):
        try:
            config = made(*case)
        except RunError:
            continue
        small = replace(config, dataset=replace(config.dataset, truncate=64), max_steps=2)
        if config.architecture.hidden is None and config.architecture.name == "mlp":
            small = replace(small, architecture=replace(config.architecture, hidden=[4]))
        out = tmp_path / str(i)
        try:
            job.prepare(small)
        except (ConfigError, DataError):
            continue
        from llqr_experiments.run import train

        if config.toy.name is None and config.comparison.name is None:
            train.run(small, out, quiet=True)


def test_what_a_preset_gave_a_schedule_can_be_left_out():
    """constant is off, whatever the preset's schedule took; another one says how."""
    preset = "experiment=pinn-poisson"
    assert support.config(preset, "lr_scheduler=constant").lr_scheduler["name"] == "constant"
    with pytest.raises(ConfigError, match=r"of inverse_sqrt 't_max'.*~lr_scheduler.t_max leaves"):
        support.config(preset, "lr_scheduler=inverse_sqrt")
    support.config(preset, "lr_scheduler=inverse_sqrt", "~lr_scheduler.t_max")
    with pytest.raises(ConfigError, match="unknown argument of constant 'tmax'"):
        support.config(preset, "lr_scheduler=constant", "+lr_scheduler.tmax=3")
