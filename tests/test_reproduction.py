"""Every command of REPRODUCTION.md composes, is legal, and shows a forecast in small."""

import importlib
import importlib.util
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from flax import nnx
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from llqr_experiments.command import cli
from llqr_experiments.config import build
from llqr_experiments.errors import ConfigError
from llqr_experiments.models import MODELS
from llqr_experiments.record import run_folder
from llqr_experiments.task.small import shrink
from tests.experiments import support

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "REPRODUCTION.md").read_text()
SEEDS = ("init_key", "rng_seed")
HORIZON = build.Horizon(100.0, 250.0)


def shell_commands(page: str) -> list[list[str]]:
    """The commands in a page's bash blocks, in words, lines that go on joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_commands(page: str) -> list[tuple[str, ...]]:
    """The arguments of each `run.py` in a page."""
    start = ["uv", "run", "python", "run.py"]
    return [tuple(words[4:]) for words in shell_commands(page) if words[:4] == start]


def runs_of(command: tuple[str, ...]) -> Iterator[list[str]]:
    """Overrides of a sweep's runs: the first values, then each other value in the place of its own.

    Of seeds the first is enough.
    """
    options = OverridesParser.create().parse_overrides([x for x in command if x != "-m"])
    swept = [option.is_sweep_override() for option in options]
    assert any(swept) == ("-m" in command), f"-m belongs to commas: {command}"
    values = [
        [f"{option.key_or_group}={value}" for value in option.sweep_string_iterator()]
        if several
        else [str(option.input_line)]
        for option, several in zip(options, swept, strict=True)
    ]
    first = [each[0] for each in values]
    yield first
    for i, (option, each) in enumerate(zip(options, values, strict=True)):
        if option.key_or_group not in SEEDS:
            yield from ([*first[:i], other, *first[i + 1 :]] for other in each[1:])


def check(command: tuple[str, ...]) -> None:
    """Do what run.py does with a command before it reads data."""
    cli.check_arguments(command)
    for overrides in runs_of(command):
        config = support.config(*overrides)
        build.optimizer(config, HORIZON)
        build.ascent(config, HORIZON)


COMMANDS = run_commands(PAGE)
RUNS = list(dict.fromkeys(tuple(run) for command in COMMANDS for run in runs_of(command)))


OURS = ("-streaming", "-exact")
"""Presets of methods that no paper has."""


def test_the_page_has_the_papers_experiments():
    assert len(COMMANDS) >= 50
    assert len(COMMANDS) == PAGE.count("uv run python run.py"), "a command outside of a block"
    assert len(RUNS) >= 120
    presets = {word for run in RUNS for word in run if word.startswith("experiment=")}
    theirs = {f"experiment={name}" for name in cli.presets("experiment")} - {"experiment=_default"}
    assert presets <= theirs
    assert {name for name in theirs - presets if not name.endswith(OURS)} == set()
    grokking = {word for run in RUNS for word in run if word.startswith("dataset=grok")}
    assert len(grokking) == 6
    modes = {word for run in RUNS for word in run if word.startswith("sam_mode=")}
    assert modes == {f"sam_mode={name}" for name in ("null", "base_sam", "base_fsam", "fisher_sam")}


def test_commands_are_taken_out_of_a_page():
    page = (
        "uv run python run.py a=0\n```bash\n# b=1\nuv run python run.py -m c=2,3 \\\n"
        "  'd=${c}'   # so\nls\n```\n"
    )
    assert run_commands(page) == [("-m", "c=2,3", "d=${c}")]
    runs = list(runs_of(("-m", "a=1,2", "b=[3,4]", "init_key=0,1", "c=null,5")))
    assert runs == [
        ["a=1", "b=[3,4]", "init_key=0", "c=null"],
        ["a=2", "b=[3,4]", "init_key=0", "c=null"],
        ["a=1", "b=[3,4]", "init_key=0", "c=5"],
    ]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=" ".join)
def test_commands_compose(command):
    check(command)


CIFAR = next(x for x in COMMANDS if {"divergence=ngd", "ema_decay=0.95"} <= set(x))


@pytest.mark.parametrize(
    ("word", "wrong", "error"),
    [
        ("ema_decay=0.95", "ema_dekay=0.95", SystemExit),
        (CIFAR[1], "experiment=resnet18-cifar10,resnet18-cifar01", SystemExit),
        ("sam_mode=null,base_sam,base_fsam", "sam_mode=null,base_sma", SystemExit),
        ("divergence=ngd", "divergence=ngdd", SystemExit),
        ("use_preconditioner=true", "use_preconditioner=false", ConfigError),
    ],
)
def test_a_wrong_command_would_be_found(word, wrong, error):
    assert word in CIFAR
    with pytest.raises(error):
        check(tuple(wrong if x == word else x for x in CIFAR))


def show_forecast(run: tuple[str, ...], out: Path, said: pytest.CaptureFixture[str]) -> None:
    """Run a command with smoke=true dry_run=true, in this process."""
    config = support.config(*run, "smoke=true", "dry_run=true", "logging.aim=false")
    cli.execute(OmegaConf.structured(config), out)
    assert re.search(
        r"4 of (\d+ examples|at most \d+ words)|iterations|20 steps", said.readouterr().out
    )


FAST = ("quick-local-test", "grokking", "char-lm", "transformer-iwslt14-de-en", "toy-rosenbrock")
"""Presets of each kind of data, whose models compile in a second or two."""


@pytest.mark.parametrize("preset", FAST)
def test_a_command_of_each_kind_has_a_forecast_in_small(preset, tmp_path, capsys):
    run = next(run for run in RUNS if f"experiment={preset}" in run)
    show_forecast(run, tmp_path, capsys)


def test_the_size_of_gpt2_is_as_told():
    make = MODELS["gpt2-small"].factory
    for options, told in [({}, "162,273,435"), ({"tied": True}, "123,625,802")]:
        like = nnx.eval_shape(lambda o=options: make((1024,), 50257, rngs=nnx.Rngs(0), **o))
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(like)))
        assert f"{size:,}" == told
        assert told in PAGE


PLANNED: set[str] = set()
"""What had a forecast before: many runs are the same in small, as those of both CIFAR sets are."""


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_every_command_has_a_forecast_in_small(run, tmp_path, capsys):
    small = repr(run_folder.options(shrink(support.config(*run))))
    if small not in PLANNED:
        show_forecast(run, tmp_path, capsys)
    PLANNED.add(small)


@pytest.mark.parametrize(
    "preset", ["grokking", pytest.param("resnet18-cifar10", marks=pytest.mark.slow)]
)
def test_hours_are_those_of_the_benchmark(preset, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    hours = importlib.import_module("hours")
    row = hours.estimate(preset)
    assert "| " + " | ".join(row) + " |\n|---" in PAGE
    assert hours.line(row) in PAGE
    rows = re.findall(r"^\| `([\w-]+)` \| ~?[\d,]+ \|", PAGE, re.MULTILINE)
    assert tuple(rows) == hours.PRESETS


@pytest.mark.parametrize("preset", sorted(set(cli.presets("experiment")) - {"_default"}))
def test_presets_begin_with_their_command(preset):
    text = (cli.CONFIGS / "experiment" / f"{preset}.yaml").read_text()
    header = re.findall(r"^# (uv run .*)$", text, re.MULTILINE)
    commands = run_commands("\n".join(["```bash", *header, "```"]))
    assert commands
    for command in commands:
        assert f"experiment={preset}" in command
        check(command)


def test_programs_and_links_exist():
    modules = [words[5] for words in shell_commands(PAGE) if words[3:5] == ["python", "-m"]]
    assert all(importlib.util.find_spec(name) for name in modules)
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / link).exists(), link
