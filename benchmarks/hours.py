"""How long the papers' runs would take on a GPU: an estimate from operations, nothing is run.

    uv run python benchmarks/hours.py                       # the table of REPRODUCTION.md
    uv run python benchmarks/hours.py --tflops 60           # another assumption for S
    uv run python benchmarks/hours.py resnet18-cifar10

  F   operations of one gradient on a training batch, as XLA counts them before it compiles
  n   steps                                    examples in an epoch / batch * epochs
  r   refits                                   one every `update_preconditioner_every` steps
  k   inner steps of a refit, each about a gradient on b of the B examples of a step
  S   operations a second that the GPU sustains: assumed, 10e12 unless --tflops says otherwise
  o   seconds that a gradient takes at least, to start its kernels: assumed, 2e-3

  gradients   plain n     LLQR n + r k b / B     SAM: one more for each perturbed step
  hours       gradients (F / S + o) / 3600

S is the weak part. 10 TFLOP/s is a fifteenth of the float32 (TF32) peak of an A100, 156: narrow
layers reach less, wide ones more. Evaluations, beam search, compilation, products with P and
waiting for data are left out. Where the data cannot be had here, the number of examples is the
published one; for WikiText-103 and IWSLT'14 it is rough, and `~` marks it.
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from llqr_experiments import data, models
from llqr_experiments.command import cli
from llqr_experiments.config import build
from llqr_experiments.config.options import Config
from llqr_experiments.data.material import Material
from llqr_experiments.task import tasks

TFLOPS = 10.0
OVERHEAD = 2e-3
PRESETS = (
    "resnet18-cifar10", "vgg16bn-cifar10", "wide-resnet28x10-cifar10", "pyramidnet110-cifar10",
    "resnet18-cifar100-adamw", "vit-ti16-cifar100-adamw", "resnet50-imagenet",
    "short-resnet50-imagenet", "grokking", "gpt2small-wikitext103", "transformer-iwslt14-de-en",
)  # fmt: skip

IMAGES: Mapping[str, tuple[int, int, int]] = {
    "cifar10": (50_000, 32, 10),
    "cifar100": (50_000, 32, 100),
    "imagenet": (1_281_167, 224, 1000),
}
"""Training images, their side, classes."""

WIKITEXT_TOKENS = 118_000_000
"""Of the training split, by GPT-2's tokenizer: about."""

IWSLT_PAIRS, IWSLT_WORDS = 160_000, 4_000_000
IWSLT_WIDTH, IWSLT_FILLED = 32, 0.8
IWSLT_VOCABULARIES = 8848, 6632
"""Training pairs, words of one language, width of a batch, its share that is no padding: about."""


class Sizes(NamedTuple):
    """What is known of the data without having it."""

    material: Material
    batch: dict[str, Any]  # shapes of a step's batch
    epoch: float  # steps
    share: float  # examples of a refit / examples of a step
    rough: bool = False


def compose_preset(preset: str) -> Config:
    """Return the config of a preset, as run.py makes it."""
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=[f"experiment={preset}"])
    return OmegaConf.to_object(composed)  # type: ignore[return-value]


def sizes(config: Config) -> Sizes:
    """Return the sizes of a preset's data, and shapes instead of batches."""
    name, rows = config.dataset.name, config.batch_size * config.grad_acc_steps
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)  # noqa: E731
    share = config.precond_batch_size / rows
    if name in IMAGES:
        examples, side, classes = IMAGES[name]
        batch = {"image": jax.ShapeDtypeStruct((rows, side, side, 3), np.float32)}
        made = _material("images", (side, side, 3), classes, "image")
        epoch = examples / rows
        whole = math.floor(epoch) if config.partial_batch == "drop" else epoch
        return Sizes(made, batch | {"label": integers(rows)}, whole, share)
    if name == "wikitext103":
        length = config.dataset.target_len or 1024
        made = _material("text", (length,), 50_257, "tokens")
        batch = {"tokens": integers(rows, length), "label": integers(rows, length)}
        return Sizes(made, batch, WIKITEXT_TOKENS // length / rows, share, rough=True)
    if name == "iwslt14_de_en":
        return _translation(config, integers)
    found = data.grokking(name)
    made = _material("operations", (found.length,), found.num_classes, "tokens")
    made = replace(made, options={"vocabulary": found.vocabulary})
    batch = {"tokens": integers(rows, found.length), "label": integers(rows)}
    return Sizes(made, batch, len(found.train) / rows, share)


def _translation(config: Config, integers: Any) -> Sizes:
    width, (source, target) = IWSLT_WIDTH, IWSLT_VOCABULARIES
    rows = config.dataset.max_tokens // width
    made = _material("translation", (), target, "source", "target_in")
    made = replace(made, options={"source_vocabulary": source})
    batch = {name: integers(rows, width) for name in ("source", "target_in", "label")}
    epoch = IWSLT_WORDS / (IWSLT_FILLED * config.dataset.max_tokens)
    share = config.precond_batch_size / (IWSLT_PAIRS / epoch)
    return Sizes(made, batch, epoch, share, rough=True)


def _material(kind: str, shape: tuple[int, ...], classes: int, *names: str) -> Material:
    nothing: Any = None

    def inputs(batch: dict[str, Any]) -> Any:
        return batch[names[0]] if len(names) == 1 else {name: batch[name] for name in names}

    return Material(kind, kind, nothing, {}, (), shape, classes, inputs)


def gradient_flops(config: Config, known: Sizes) -> float:
    """Return F: lowered for a sixteenth of the batch, and times 16."""
    made, chosen = known.material, config.architecture
    options = made.options | tasks.architecture_options(chosen)
    model = models.make(chosen.name, made.shape, made.classes, seed=0, options=options)
    task = tasks.assemble("estimate", made, model)
    batch = {
        name: jax.ShapeDtypeStruct((x.shape[0] // 16, *x.shape[1:]), x.dtype)
        for name, x in known.batch.items()
    }
    objective = tasks.bound(task, batch, task.statistics)
    lowered = jax.jit(lambda p, o: jax.grad(o)(p)).lower(task.params, objective)
    found: Any = lowered.cost_analysis()
    return 16.0 * float(found["flops"])


def estimate(preset: str, tflops: float = TFLOPS) -> dict[str, str]:
    """Return one row of the table."""
    config = compose_preset(preset)
    known = sizes(config)
    flops = gradient_flops(config, known)
    steps = int(known.epoch * config.total_epochs)
    refits = len(build.refit_steps(config, build.Horizon(known.epoch, config.total_epochs)))
    extra = refits * config.precond_steps * known.share
    perturbed = steps - (config.start_sam_after_step or 0)
    seconds = flops / (tflops * 1e12) + OVERHEAD
    hours = lambda gradients: two_digits(gradients * seconds / 3600)  # noqa: E731
    count = (lambda x: f"~{two_digits(x)}") if known.rough else "{:,}".format
    return {
        "preset": f"`{preset}`",
        "steps": count(steps),
        "TFLOP a step": two_digits(flops / 1e12),
        "refits": count(refits),
        "hours": hours(steps),
        "with LLQR": hours(steps + extra),
        "with SAM": hours(steps + perturbed),
        "with both": hours(steps + perturbed + extra),
    }


def two_digits(value: float) -> str:
    """Return a number rounded to two digits.

    Example:
      >>> two_digits(41234.0), two_digits(0.0123), two_digits(8.0)
      ('41,000', '0.012', '8')
    """
    return f"{float(f'{value:.2g}'):,g}"


def line(row: dict[str, str]) -> str:
    """Return a row in Markdown."""
    return f"| {' | '.join(row.values())} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Hours on a GPU, estimated from operations.")
    parser.add_argument("presets", nargs="*", default=PRESETS, help=", ".join(PRESETS))
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="sustained; default 10")
    arguments = parser.parse_args()
    for i, preset in enumerate(arguments.presets):
        row = estimate(preset, arguments.tflops)
        if i == 0:
            print(line({name: name for name in row}))
            print("|---" * len(row) + "|")
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
