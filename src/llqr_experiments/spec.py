"""Every option of a run: its name, default, meaning and legal values.

The dataclasses below are Hydra's schema and the only place where a default is written;
`configs/` holds the presets, which override them. Option names are those of the LLQR
papers' guide, flat, so that its commands run verbatim.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from llqr._errors import unknown
from llqr_experiments.errors import ConfigError

T = TypeVar("T")


def _option(default: T, meaning: str, **rules: Any) -> T:
    """Declare an option; `rules` are checked by `_check`: choices, low, high, above."""
    metadata = {"meaning": meaning, **rules}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Dataset:
    """Where the data comes from."""

    name: str = _option("mnist", "digits, mnist or fashion_mnist")
    dataset_dir: str | None = _option(None, "folder with the official files; null: search")
    download: bool = _option(True, "download the files if they are found nowhere")


@dataclass
class Architecture:
    """The model."""

    name: str = _option("mlp", "mlp")
    hidden: list[int] = _option([100, 300], "widths of the hidden layers")


@dataclass
class Logging:
    """Where metrics go besides metrics.jsonl."""

    aim: bool = _option(True, "log to Aim when it is installed")
    aim_repo: str | None = _option(None, "folder of the Aim repository; null: the current one")


@dataclass
class Toy:
    """A toy function instead of a training run."""

    name: str | None = _option(
        None,
        "function to minimise; null: train a model",
        choices=("rosenbrock", "split_rosenbrock", "ackley", "goldstein_price"),
    )
    start: list[float] = _option([], "where to start")
    iterations: int = _option(500, "most steps of every method", low=1)
    tolerance: float = _option(1e-8, "value above the least at which to stop", above=0)
    damping: float = _option(1e-3, "first damping of the exact methods, raised as needed", low=0)
    gradient_rate: float = _option(1e-3, "learning rate of gradient descent", above=0)


@dataclass
class Config:
    """A whole run."""

    dataset: Dataset = field(default_factory=Dataset)
    architecture: Architecture = field(default_factory=Architecture)
    logging: Logging = field(default_factory=Logging)
    toy: Toy = field(default_factory=Toy)
    lr_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    precond_lr_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    ema_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    precond_update_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})

    # training
    batch_size: int = _option(128, "examples in a training step", low=1)
    eval_batch_size: int | None = _option(
        None, "examples in an evaluation step; null: batch_size", low=1
    )
    total_epochs: float = _option(250.0, "passes over the training set", above=0)
    learning_rate: float = _option(0.1, "of the main optimizer", above=0)
    momentum: float = _option(0.9, "of polyak, and of the inner solver", low=0, high=1)
    main_optimizer: str = _option(
        "sgd",
        "the optimizer that is wrapped",
        choices=("sgd", "polyak", "adam", "adamw", "adamw_b2-98", "adamw_b2-95"),
    )
    adam_betas: list[float] = _option([0.9, 0.999], "of adam and adamw")
    weight_decay: float | None = _option(
        None, "decoupled for adamw; else added after preconditioning", low=0
    )
    wd_mask: list[str] | None = _option(
        None, "no decay where one of these is part of a parameter's path"
    )
    label_smoothing: float = _option(0.0, "of training and refit loss", low=0, high=1)
    init_key: int = _option(42, "seed of the parameters", low=0)
    rng_seed: int = _option(123, "seed of data order and augmentation", low=0)

    # reports, in steps
    test_eval_freq: int = _option(2000, "steps between evaluations on the test set", low=1)
    logging_freq: int = _option(50, "steps between logged training metrics", low=1)
    report_freq: int = _option(200, "steps between lines on a terminal without a bar", low=1)
    quality: list[str] = _option(
        [], "structures whose step is compared with the exact one before and after training"
    )

    # preconditioner
    use_preconditioner: bool = _option(True, "false runs the main optimizer alone")
    block_structure: str = _option("diagonal", "structure of P; see llqr.STRUCTURES")
    precond_max_dim: int = _option(10_000, "dense sides longer than this become diagonal", low=1)
    divergence: str = _option("ngd", "metric of the step; see llqr.metrics")
    divergence_order_param: float = _option(0.5, "order of the renyi divergence", above=0)
    divergence_reduction: str = _option(
        "sum", "of the divergence over rows", choices=("sum", "mean")
    )
    damping: float = _option(0.0, "added to the curvature of every parameter", low=0)
    update_preconditioner_every: int = _option(1000, "steps between refits", low=1)
    update_preconditioner_until: int | None = _option(
        None, "no refit at or after this step; null or 0: never stops", low=0
    )
    precond_start_step: int = _option(0, "step of the first refit", low=0)
    precond_batch_size: int = _option(64, "examples in a refit", low=1)
    precond_steps: int = _option(50, "inner steps of a refit", low=1)
    precond_lr: float = _option(1e-3, "of the inner solver", above=0)
    precond_solver: str = _option("momentum", "inner solver", choices=("momentum", "sgd", "adam"))
    precond_clip_norm: float | None = _option(
        5.0, "largest L2 norm of the gradient of each stored array; null or 0: off", low=0
    )
    precond_clip_element_wise: float | None = _option(
        None, "largest entry of that gradient; null or 0: off", low=0
    )
    precond_identity_scaling: float = _option(1.0, "sigma: P is stored as sigma P", above=0)
    normalize_grad_for_lqr: bool = _option(False, "refit for the direction g / |g|")
    allow_grad_inversion: bool = _option(False, "let P turn the sign of gradient entries")
    warm_start_precond: bool = _option(True, "start a refit from the current P, not the identity")
    ema_decay: float = _option(0.0, "weight of the old P after a refit", low=0, high=1)

    def __post_init__(self) -> None:
        for name, option, value in options(self):
            _check(name, option.metadata, value)
        if len(self.adam_betas) != 2 or not all(0 <= b < 1 for b in self.adam_betas):
            raise ConfigError(f"adam_betas={self.adam_betas}: give two numbers in [0, 1).")
        if not self.architecture.hidden or min(self.architecture.hidden) < 1:
            raise ConfigError(
                f"architecture.hidden={self.architecture.hidden}: give at least one width >= 1."
            )
        if self.main_optimizer.startswith("adamw") and self.weight_decay is None:
            name = self.main_optimizer
            raise ConfigError(f"main_optimizer={name} needs weight_decay: a number, 0 for none.")


SCHEDULERS = ("lr_scheduler", "precond_lr_scheduler", "ema_scheduler", "precond_update_scheduler")


def options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (full name, dataclass field, value) of every leaf option, or of a config class."""
    for option in fields(config):
        value = getattr(config, option.name, None)
        if option.name in SCHEDULERS:
            yield option.name, option, value
        elif option.name in ("dataset", "architecture", "logging", "toy"):
            yield from options(
                option.default_factory if isinstance(config, type) else value, f"{option.name}."
            )
        else:
            yield prefix + option.name, option, value


def _check(name: str, rules: Any, value: Any) -> None:
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise ConfigError(f"{name}: {unknown('value', value, rules['choices'])}")
    bounds = [
        ("low", lambda v, b: v >= b, ">="),
        ("high", lambda v, b: v <= b, "<="),
        ("above", lambda v, b: v > b, ">"),
    ]
    for rule, holds, _ in bounds:
        if rule in rules and not holds(value, rules[rule]):
            legal = " and ".join(f"{s} {rules[r]}" for r, _, s in bounds if r in rules)
            raise ConfigError(f"{name}={value}: must be {legal}.")
