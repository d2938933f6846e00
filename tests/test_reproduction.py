"""Every command of REPRODUCTION.md composes, and has a plan in small."""

import re
import shlex
from pathlib import Path

import pytest

from llqr_experiments import cli, plan, smoke
from tests.experiments import support

PAGE = (Path(__file__).parents[1] / "REPRODUCTION.md").read_text()
COMMANDS = re.findall(r"^uv run python run\.py (.+)$", PAGE, re.MULTILINE)


def runs_of(command):
    """Overrides of every run of a command: the first value of each sweep, then each other one."""
    options = [option.partition("=") for option in shlex.split(command) if option != "-m"]
    swept = [
        (name, re.split(r",(?![^\[]*\])", value) if command.startswith("-m ") else [value])
        for name, _, value in options
    ]
    first = [f"{name}={values[0]}" for name, values in swept]
    yield first
    for i, (name, values) in enumerate(swept):
        for value in values[1:]:
            yield [*first[:i], f"{name}={value}", *first[i + 1 :]]


RUNS = [(command, overrides) for command in COMMANDS for overrides in runs_of(command)]


def test_the_page_holds_the_papers_commands():
    assert len(COMMANDS) >= 40
    assert len(RUNS) >= 60
    presets = {option for _, run in RUNS for option in run if option.startswith("experiment=")}
    assert {f"experiment={name}" for name in cli.presets("experiment")} - presets <= {
        "experiment=_default"
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    for i, overrides in enumerate(runs_of(command)):
        cli.check_arguments(overrides)
        if i == 0:
            support.config(*overrides)


def test_a_misspelt_command_would_be_found():
    with pytest.raises(SystemExit):
        cli.check_arguments(["experiment=resnet18-cifar01"])


FAST = {"experiment=quick-local-test", "experiment=grokking-small", "experiment=sharpness-potholes"}


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        pytest.param(
            *run, marks=() if FAST & set(run[1]) else pytest.mark.slow, id=" ".join(run[1])
        )
        for run in RUNS
    ],
)
def test_commands_have_a_plan_in_small(command, overrides, capsys):
    plan.show(smoke.shrink(support.config(*overrides, "logging.aim=false")))
    said = capsys.readouterr().out
    assert "4 of " in said or "iterations" in said or "20 steps" in said
