"""Every preset composes, has a forecast, and runs in small; with a SAM step where it can."""

from dataclasses import replace

import numpy as np
import pytest

from llqr_experiments.command import cli, forecast
from llqr_experiments.run import train
from llqr_experiments.study import comparison, toys
from llqr_experiments.task.small import shrink
from tests.experiments import support

PRESETS = cli.presets("experiment")
FAST = {
    "_default", "quick-local-test", "quick-local-test-streaming", "grokking", "char-lm",
    "toy-rosenbrock",
}  # fmt: skip
"""Presets whose smoke run compiles in a few seconds."""


def small(preset):
    return shrink(support.config(f"experiment={preset}", "logging.aim=false"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_forecast(preset, capsys):
    forecast.show(small(preset))
    said = capsys.readouterr().out
    assert "4 of " in said or "iterations" in said or "20 steps" in said


def test_a_forecast_counts_the_memory_of_many_batches_with_running_statistics(capsys):
    config = small("resnet18-cifar10")
    forecast.show(replace(config, multibatch_training=True, plan_memory=True))
    assert "MiB on top while one runs" in " ".join(capsys.readouterr().out.split())


def run(preset, out):
    """A smoke run with a SAM step, where it trains a model; returns the rows of its record."""
    config = small(preset)
    if config.toy.name:
        toys.run(config, out, command="test")
        return None
    if config.comparison.name:
        comparison.run(config, out, command="test")
        return None
    if not config.exact_steps:
        config = replace(config, sam_mode="base_sam", start_sam_after_step=2)
    train.run(config, out, command="test", quiet=True)
    return support.rows(out)


@pytest.mark.parametrize(
    "preset",
    [pytest.param(p, marks=() if p in FAST else pytest.mark.slow) for p in PRESETS],
)
def test_every_preset_runs_in_small(preset, tmp_path):
    rows = run(preset, tmp_path)
    if rows is None:
        assert (tmp_path / "meta.json").exists()
        return
    last = {name for row in rows if row["step"] == 4 for name in row}
    assert {"test loss", "valid loss"} & last
    losses = [row["train loss"] for row in rows if "train loss" in row]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    if small(preset).exact_steps:
        assert rows[-2]["exact/refused"] == 0
        return
    refits = [row for row in rows if "refit objective after" in row]
    first = small(preset).precond_start_step
    if small(preset).precond_streaming:  # logged beside the loss, how many there were
        assert refits[-1]["refits"] == 2
        assert refits[-1]["refit guarded blocks"] == 0
    else:
        assert [row["step"] for row in refits] == [first, first + 2]
    perturbed = [row["sam active steps"] for row in rows if "sam active steps" in row]
    assert perturbed[-1] == 2


# Spec 7.4: what the papers ran, row by row.
CIFAR = {
    "batch_size": 128, "main_optimizer": "polyak", "learning_rate": 0.05, "momentum": 0.9,
    "weight_decay": 5e-4, "total_epochs": 200.0, "precond_batch_size": 128,
    "update_preconditioner_every": 1000, "test_eval_freq": 2000, "block_structure": "diagonal",
    "divergence": "ngd", "lr_scheduler.name": "cosine_annealing", "lr_scheduler.t_max": 200,
}  # fmt: skip
IMAGENET = {
    "batch_size": 256, "main_optimizer": "polyak", "learning_rate": 0.1, "weight_decay": 1e-4,
    "label_smoothing": 0.1, "test_eval_freq": 5000, "checkpoint_freq": 2500,
    "update_preconditioner_every": 1500, "architecture.name": "resnet-50",
    "lr_scheduler.name": "warmup_piecewise_decay", "partial_batch": "drop",
}  # fmt: skip
IWSLT = {
    "dataset.max_tokens": 16384, "eval_batch_size": 128, "main_optimizer": "adamw",
    "learning_rate": 5e-4, "adam_betas": [0.9, 0.98], "weight_decay": 1e-4,
    "lr_scheduler.name": "inverse_sqrt", "lr_scheduler.warmup_updates": 4000,
    "total_epochs": 133.0, "precond_batch_size": 48, "update_preconditioner_every": 1000,
    "label_smoothing": 0.1, "start_sam_after_step": 4000, "test_eval_freq": 1000,
    "translation_eval.freq": 10000, "translation_eval.max_examples": 256,
    "translation_eval.full_eval_freq": 15000, "translation_eval.full_eval_at_end": True,
    "translation_eval.print_samples": True,
}  # fmt: skip
ROWS = {
    **{
        f"{name}-cifar{n}": CIFAR | {"architecture.name": model, "dataset.name": f"cifar{n}"}
        for n in (10, 100)
        for name, model in (
            ("resnet18", "resnet-18"), ("vgg16bn", "vgg16-bn"),
            ("wide-resnet28x10", "wide-resnet-28-10"), ("pyramidnet110", "pyramidnet-110"),
        )
    },
    "resnet18-cifar100-adamw": CIFAR | {
        "main_optimizer": "adamw", "learning_rate": 3e-3, "weight_decay": 1e-2,
        "wd_mask": ["Norm", "scale", "bias"], "lr_scheduler.name": "warmup_cosine_decay",
    },
    "vit-ti16-cifar100-adamw": {
        "batch_size": 256, "main_optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.3,
        "lr_scheduler.name": "warmup_cosine_decay", "lr_scheduler.t_max": 300,
        "total_epochs": 300.0, "precond_batch_size": 256, "label_smoothing": 0.1,
    },
    "resnet50-imagenet": IMAGENET | {
        "total_epochs": 100.0, "precond_batch_size": 256,
        "lr_scheduler.epoch_decay_bounds": [30, 70, 90],
    },
    "short-resnet50-imagenet": IMAGENET | {
        "total_epochs": 50.0, "precond_batch_size": 128,
        "lr_scheduler.epoch_decay_bounds": [30, 40, 45],
    },
    "grokking": {
        "dataset.name": "mod_sum", "batch_size": 512, "main_optimizer": "adamw_b2-98",
        "learning_rate": 1e-3, "weight_decay": 0.0, "lr_scheduler.name": "step_warmup",
        "lr_scheduler.warmup_ratio": 1e-4, "total_epochs": 6050.0, "precond_batch_size": 512,
        "update_preconditioner_every": 2500, "test_eval_freq": 1000, "logging_freq": 250,
        "report_freq": 2000, "checkpoint_freq": 2500,
    },
    "gpt2small-wikitext103": {
        "batch_size": 32, "grad_acc_steps": 16, "eval_batch_size": 128,
        "main_optimizer": "polyak", "learning_rate": 0.01, "weight_decay": 1e-4,
        "lr_scheduler.warmup_epochs": 1, "lr_scheduler.t_max": 25, "lr_scheduler.eta_min": 1e-4,
        "total_epochs": 25.0, "precond_batch_size": 32, "update_preconditioner_every": 50,
        "test_eval_freq": 100, "checkpoint_freq": 100,
    },
    "transformer-iwslt14-de-en": IWSLT,
    "transformer-iwslt14-de-en-ema-cosine0925": IWSLT | {
        "ema_decay": 0.8, "ema_scheduler.name": "cosine_annealing", "ema_scheduler.t_max": 133,
        "ema_scheduler.eta_min": 0.925,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", ROWS)
def test_presets_are_those_of_the_papers(preset):
    config = support.config(f"experiment={preset}")
    for name, value in ROWS[preset].items():
        found = config
        for part in name.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found == value, name


def test_the_base_of_presets_is_no_preset():
    assert "_cifar" not in PRESETS
    assert set(ROWS) <= set(PRESETS)
