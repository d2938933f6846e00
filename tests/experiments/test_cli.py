"""The command line: help, messages, exit codes, presets."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from omegaconf import OmegaConf

import llqr
from llqr_experiments.command import cli
from llqr_experiments.config import build
from llqr_experiments.config.options import Config
from llqr_experiments.config.row import rows
from llqr_experiments.errors import ConfigError
from llqr_experiments.record import run_folder
from tests.experiments import support

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lerning_rate=0.1", r"unknown option 'lerning_rate': did you mean 'learning_rate'\?"),
        ("dataset.dataset_dri=x", r"did you mean 'dataset.dataset_dir'\?"),
        ("experiment=quick-locl-test", r"unknown experiment .* did you mean 'quick-local-test'\?"),
        ("experiment=grokking,char-ml", r"unknown experiment 'char-ml': did you mean 'char-lm'\?"),
        ("dataset=fashon_mnist", r"did you mean 'fashion_mnist'\?"),
        ("lr_scheduler.tmax=3", r"unknown option of lr_scheduler 'tmax': did you mean 't_max'\?"),
        ("experiment", r"cannot read 'experiment': write key=value"),
        ("init_key=range(0,2,0.5)", r"init_key=0.0: must be"),
        ("batch_size=range(0,3)", r"batch_size=0: must be >= 1"),
    ],
)
def test_a_misspelt_argument_names_the_nearest(argument, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.check_arguments(["batch_size=3", argument])
    assert stopped.value.code == 2
    import re

    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "experiment=quick-local-test", "init_key=0,1,2", "hydra.run.dir=x"],
        ["-m", "experiment=choice(grokking,char-lm)", "dataset=glob(grok*)"],
        ["-m", "init_key=range(3)", "sam_mode=null,base_sam"],
        ["--cfg", "job", "experiment=quick-local-test", "-p", "dataset"],
    ],
)
def test_good_arguments_pass_in_silence(arguments, capsys):
    cli.check_arguments(arguments)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit):  # all of them are looked at, to the last
        cli.check_arguments([*arguments, "lerning_rate=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ema_decay=1.5"], r"ema_decay=1.5: must be >= 0 and <= 1"),
        (["ema_decay=-0.1"], r"ema_decay=-0.1: must be >= 0 and <= 1"),
        (["batch_size=0"], r"batch_size=0: must be >= 1"),
        (["learning_rate=0"], r"learning_rate=0.0: must be > 0"),
        (["precond_solver=momentm"], r"precond_solver: .* did you mean 'momentum'\?"),
        (["divergence_reduction=avg"], r"divergence_reduction: .* Legal: mean, sum"),
        (["main_optimizer=adamw"], r"main_optimizer=adamw needs weight_decay"),
        (["adam_betas=[0.9]"], r"adam_betas=\[0.9\]: must be a list of 2: a number >= 0 and < 1"),
        (
            ["architecture.hidden=[]"],
            r"architecture.hidden=\[\]: must be a list, not empty: a whole number >= 1",
        ),
    ],
)
def test_an_illegal_value_says_what_is_legal(overrides, message):
    with pytest.raises(ConfigError, match=message):
        support.config(*overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("block_structure=e-kfca", r"unknown structure 'e-kfca': did you mean 'e-kfac'\?"),
        ("divergence=ngdd", r"unknown divergence 'ngdd': did you mean 'ngd'\?"),
        ("divergence=renyi_inf", r"renyi_inf is undefined"),
    ],
)
def test_a_name_of_the_library_that_does_not_exist(override, message):
    with pytest.raises(ConfigError, match=message):
        build.optimizer(support.config(override), build.Horizon(1.0, 1.0))


def test_a_schedule_that_cannot_be_built():
    with pytest.raises(ConfigError, match=r"lr_scheduler.t_max=-1: must be > 0"):
        support.config("lr_scheduler=cosine_annealing", "lr_scheduler.t_max=-1")
    short = support.config("lr_scheduler=warmup_cosine_decay", "lr_scheduler.t_max=1")
    with pytest.raises(ConfigError, match=r"lr_scheduler: t_max = 1.0 less warmup_epochs"):
        build.optimizer(short, build.Horizon(1.0, 1.0))


@pytest.mark.parametrize(
    ("argument", "meant"),
    [("lr=1", "learning_rate"), ("EPOCHS=3", "total_epochs"), ("Batch=3", "batch_size"),
     ("LEARNING_RATE=1", "learning_rate"), ("out_dir=x", "hydra.run.dir")],
)  # fmt: skip
def test_common_names_and_capitals_are_known(argument, meant, capsys):
    with pytest.raises(SystemExit):
        cli.check_arguments([argument])
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_every_alias_is_for_an_option():
    known = {name for name, _, _ in rows(Config)} | {*cli.GROUPS, *cli.HYDRAS_FOLDERS}
    assert set(cli.ALIASES.values()) <= known
    assert not set(cli.ALIASES) & known


def test_paths_with_letters_that_mean_something_to_hydra(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli.check_arguments(["dataset.dataset_dir=/data/\u00fcbung"])
    told = capsys.readouterr().err
    quoted = "dataset.dataset_dir='/data/\u00fcbung'"
    assert f'"{quoted}"' in told, "the shell's quotes around Hydra's"
    cli.check_arguments([quoted, "resume=/data/my runs"])
    monkeypatch.setenv("HOME", str(tmp_path))
    found = cli.at_home(["resume=~/a", "hydra.run.dir=~", "init_from=a~b", "wd_mask=[~/a]"])
    assert found == [f"resume={tmp_path}/a", f"hydra.run.dir={tmp_path}", "init_from=a~b",
                     "wd_mask=[~/a]"]  # fmt: skip
    assert support.config(quoted, "resume='~/b c'").resume == f"{tmp_path}/b c"


def test_help_and_a_misspelt_option_need_no_jax():
    """Which takes seconds to import."""
    code = (
        "import sys; from llqr_experiments.command import cli, sweep; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("group", "preset"), [(group, preset) for group in cli.GROUPS for preset in cli.presets(group)]
)
def test_every_preset_composes_and_builds(group, preset):
    config = support.config(f"{group}={preset}")
    made = run_folder.options(config)
    path = cli.CONFIGS / group / f"{preset}.yaml"
    own = OmegaConf.to_container(OmegaConf.load(path))
    whole = group in ("experiment", "method")
    for name, value in own.items():
        if name != "defaults":
            there = made[name] if whole else made[group][name]
            inside = {k: there[k] for k in value} if isinstance(value, dict) else there
            assert inside == value, name
    tx = build.optimizer(config, build.Horizon(100.0, 250.0))
    state = jax.eval_shape(tx.init, {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}})
    if config.use_preconditioner:
        assert llqr.find(state).refit.status.shape[0] > 0, "there are blocks to refit"
    else:
        with pytest.raises(ValueError, match="LLQR"):
            llqr.find(state)


def test_help_lists_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stopped:
        cli.check_arguments(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert "0.001" in lines["precond_lr"]
    assert "false" not in lines["label_smoothing"]
    assert "true" in lines["use_preconditioner"]
    assert all(name in text for name in cli.presets("experiment"))


def test_ctrl_c_while_jax_is_imported_says_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "run.py")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path)
    assert process.stderr is not None
    assert process.stderr.readline().startswith(b"starting: ")
    for _ in range(1000):  # Hydra makes the folder, and the imports begin
        if any(tmp_path.glob("outputs/*/*")):
            break
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b""
    assert process.returncode == -signal.SIGINT
    assert list(tmp_path.iterdir()) == [], "a folder without a run is left behind"


def test_run_py_trains_from_the_command_line(tmp_path):
    """As a user types it, in another process; then the same with bad input."""
    command = [sys.executable, str(ROOT / "run.py"), "experiment=quick-local-test"]
    # Without what conftest.py sets: two devices on two busy cores wait for each other in vain.
    own = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    done = subprocess.run(
        [*command, "total_epochs=3", "logging=files_only", folder],
        cwd=tmp_path, capture_output=True, text=True, check=True, env=own,
    )  # fmt: skip
    assert "test accuracy" in done.stdout
    assert support.rows(tmp_path / "run")[-1]["step"] == 33
    bad = subprocess.run(
        [*command, "ema_decay=2", folder], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert done.stderr.startswith("starting: ")
    assert bad.stderr.startswith("Error: ema_decay=2.0: must be >= 0 and <= 1")
    assert "Traceback" not in bad.stderr
