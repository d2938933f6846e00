"""Every option of a run: its name, default, meaning and legal values.

The dataclasses below are Hydra's schema and the only place where a default is written;
`configs/` holds the presets, which override them. Option names are those of the LLQR
papers' guide, flat, so that its commands run verbatim.
"""

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar, get_args

import llqr
from llqr._errors import unknown
from llqr.refits import Probe
from llqr.transform import Graft
from llqr_experiments.errors import ConfigError

T = TypeVar("T")


def _option(default: T, meaning: str, **rules: Any) -> T:
    """Declare an option; `rules` are checked by `_check`: choices, low, high, above."""
    metadata = {"meaning": meaning, **rules}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


OPERATOR_MODES = {
    "cached_exact": "cached",
    "lowmem_exact_k": "curvature_recomputed",
    "lowmem_exact_full": "recomputed",
}
"""The papers' names and ours."""


ARCHITECTURES = (
    "mlp", "mlp-legacy", "resnet-18", "resnet-50", "vgg16-bn", "wide-resnet-28-10",
    "pyramidnet-110", "vit-ti-16", "vit-s-16", "grok-transformer", "gpt2-small",
    "transformer-iwslt-de-en",
)  # fmt: skip


@dataclass
class Dataset:
    """Where the data comes from."""

    name: str = _option("mnist", "which data; see docs/data.md")
    dataset_dir: str | None = _option(None, "folder with the official files; null: search")
    download: bool = _option(True, "download the files if they are found nowhere")
    augment: bool = _option(
        False, "random crops, flips and the like in training, for the CIFAR sets and imagenet"
    )
    imbalance: float | None = _option(
        None, "long tail: largest class / smallest class of the training set; null: as it is", low=1
    )
    truncate: int | None = _option(None, "only this many first training examples; null: all", low=1)
    p: int = _option(97, "prime: size of the groups of the grokking sets", low=2)
    train_fraction: float = _option(
        0.6, "of all equations of a grokking set, those to train on", above=0, below=1
    )
    split_seed: int = _option(0, "which equations those are", low=0)
    tokenizer: str | None = _option(
        None, "of a text; null: that of the dataset", choices=("char", "bpe", "gpt2")
    )
    tokenizer_dir: str | None = _option(None, "folder of GPT-2's files; null: that of the text")
    vocabulary: int = _option(8192, "most tokens that bpe learns", low=1)
    target_len: int | None = _option(
        None, "tokens of a window of text; null: 1024 for wikitext103, else 256", low=1
    )
    held_out: list[float] = _option(
        [0.1, 0.1], "shares of valid and test, of a text without splits of its own"
    )
    cache_dir: str | None = _option(
        None, "where tokens are kept; null: ./data/tokens for a text, beside the files for pairs"
    )
    max_tokens: int = _option(4096, "most words of one language in a batch of translation", low=1)
    padding_factor: int = _option(8, "widths of such batches are multiples of it", low=1)
    percentiles: int = _option(8, "of the lengths, at which batches get another width", low=1)
    max_length: int = _option(1024, "most words of a sentence", low=1)
    refit_coverage: float = _option(
        0.95, "share of sentences that fit the one width of refit batches", above=0, high=1
    )


@dataclass
class Architecture:
    """The model."""

    name: str = _option("mlp", "the model", choices=ARCHITECTURES)
    hidden: list[int] | None = _option(None, "widths of hidden layers; null: the model's own")
    width: int | None = _option(None, "channels or features; null: the model's own", low=1)
    depth: int | None = _option(None, "blocks, or layers; null: the model's own", low=1)
    dropout: float | None = _option(
        None, "share of activations dropped in training; null: the model's own", low=0, below=1
    )
    heads: int | None = _option(None, "of attention; null: the model's own", low=1)
    mlp: int | None = _option(None, "features inside a transformer's layer; null: its own", low=1)
    patch: int | None = _option(None, "side of a ViT's patches; null: by the image", low=1)
    alpha: float | None = _option(None, "channels that a PyramidNet adds; null: 270", above=0)
    blocks: list[int] | None = _option(None, "convolutions in each block of a VGG; null: its own")
    units_per_group: int | None = _option(
        None, "of a wide ResNet; null: 4; 5 is the size of the papers", low=1
    )
    positions: str | None = _option(
        None, "of GPT-2; null: sinusoidal", choices=("sinusoidal", "learned")
    )
    tied: bool | None = _option(None, "GPT-2's output matrix is its embedding; null: it is not")


@dataclass
class Logging:
    """Where metrics go besides metrics.jsonl."""

    aim: bool = _option(True, "log to Aim when it is installed")
    aim_repo: str | None = _option(None, "folder of the Aim repository; null: the current one")
    tensorboard: bool = _option(False, "log to TensorBoard, in the run's folder")


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
class Comparison:
    """Methods side by side, and how sharp the loss is where they end."""

    name: str | None = _option(
        None,
        "what main optimizer, SAM, LLQR and LLQR+SAM are compared on; null: one run",
        choices=("potholes", "training"),
    )
    runs: int = _option(3, "random starts of every method: points, or seeds of training", low=1)
    steps: int = _option(1500, "steps of every run on potholes", low=1)
    radii: list[float] = _option(
        [0.03, 0.1, 0.3, 1.0], "distances at which the rise of the loss is measured"
    )


@dataclass
class TranslationEval:
    """Translations during and after training, scored by BLEU."""

    enabled: bool = _option(False, "translate the valid set, and in the end the test set")
    freq: int | None = _option(
        None, "steps between BLEU of a sample; null: test_eval_freq; 0: never", low=0
    )
    max_examples: int | None = _option(None, "sentences of the sample; null: all", low=1)
    full_eval_at_end: bool = _option(True, "BLEU of the whole valid set in the end")
    full_eval_freq: int | None = _option(
        None, "steps between BLEU of the whole valid set; null: only in the end", low=1
    )
    progress_freq: int = _option(
        64, "batches between lines of progress where there is no terminal", low=1
    )
    beam_size: int = _option(5, "hypotheses that are followed", low=1)
    max_len_a: float = _option(1.2, "longest translation: this times the source's length,", low=0)
    max_len_b: int = _option(10, "... plus this many tokens", low=0)
    remove_bpe: str = _option("@@ ", "mark of split words, which is removed", choices=("@@ ",))
    detok: str = _option(
        "moses",
        "how tokens become text: by Moses' rules, or apart",
        choices=("moses", "space", "none"),
    )
    print_samples: bool = _option(False, "show some translations")
    checkpoint_metric: str = _option(
        "bleu",
        "what the best checkpoint is best in: BLEU of the whole valid set, or its loss",
        choices=("bleu", "loss"),
    )
    maximize_checkpoint_metric: bool = _option(True, "whether more BLEU is better")


@dataclass
class Config:
    """A whole run."""

    dataset: Dataset = field(default_factory=Dataset)
    architecture: Architecture = field(default_factory=Architecture)
    logging: Logging = field(default_factory=Logging)
    translation_eval: TranslationEval = field(default_factory=TranslationEval)
    toy: Toy = field(default_factory=Toy)
    comparison: Comparison = field(default_factory=Comparison)
    lr_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    precond_lr_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    ema_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    precond_update_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    perturbation_rho_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})

    # training
    batch_size: int = _option(128, "examples in a training step (or micro-batch)", low=1)
    grad_acc_steps: int = _option(1, "micro-batches whose gradients make one step", low=1)
    batch_overlap_fraction: float = _option(
        0.0, "share of a training batch that the next one has too", low=0, below=1
    )
    partial_batch: str = _option(
        "straddle",
        "where an epoch does not end with a full batch: go on into the next, fill up, or drop",
        choices=("straddle", "pad", "drop"),
    )
    data_threads: int = _option(2, "threads that prepare training batches ahead; 0: none", low=0)
    eval_batch_size: int | None = _option(
        None, "examples in an evaluation step; null: batch_size", low=1
    )
    total_epochs: float = _option(250.0, "passes over the training set", above=0)
    max_steps: int | None = _option(
        None, "end after this many steps; schedules keep total_epochs", low=1
    )
    precision: str = _option(
        "float32", "of the model in training; curvature is float32", choices=("float32", "bf16")
    )
    normalize_conv_params: bool = _option(
        False, "scale tensors of rank 4 and more to L2 norm sqrt(size) before each update"
    )
    on_nonfinite: str = _option(
        "stop",
        "at a loss or gradient that is not finite: stop, or skip the step and count it",
        choices=("stop", "skip"),
    )
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

    # checkpoints
    checkpoint_freq: int | None = _option(
        1000, "steps between checkpoints; null or 0: none at all", low=0
    )
    checkpoint_keep: int = _option(3, "newest checkpoints kept, besides the best", low=1)
    checkpoint_metric: str | None = _option(
        None,
        "what the best checkpoint is best in, such as `test loss`; null: test accuracy of images, "
        "valid loss of texts",
    )
    maximize_checkpoint_metric: bool | None = _option(
        None, "whether more of it is better; null: of accuracies, not of losses"
    )
    resume: str | None = _option(None, "run folder to go on from, in a new folder")
    init_from: str | None = _option(None, "run folder whose parameters are the initial ones")
    preempt_handling: bool = _option(
        False, "checkpoints in $SCRATCH/<experiment>/<job id>, for preemptible jobs"
    )
    jobid: str | None = _option(None, "job id; null: $SLURM_JOBID")

    # how a run is started
    smoke: bool = _option(False, "the same run, shrunk to a few steps on embedded data")
    dry_run: bool = _option(False, "print the plan of the run, and end")
    plan_memory: bool = _option(
        True,
        "dry_run compiles a refit to say what it holds in memory, a minute for large models; smoke "
        "leaves it out",
    )

    # reports, in steps
    test_eval_freq: int = _option(2000, "steps between evaluations on the test set", low=1)
    logging_freq: int = _option(50, "steps between logged training metrics", low=1)
    add_train_eval: bool = _option(False, "evaluate on the training set too")
    record_histograms: bool = _option(
        False, "histograms of p(correct) and loss of every example, at evaluations"
    )
    report_freq: int = _option(200, "steps between lines on a terminal without a bar", low=1)
    quality: list[str] = _option(
        [], "structures whose step is compared with the exact one before and after training"
    )

    # preconditioner
    use_preconditioner: bool = _option(True, "false runs the main optimizer alone")
    block_structure: str = _option("diagonal", "structure of P; see llqr.STRUCTURES")
    block_structure_init: str = _option("identity", "where P starts", choices=("identity",))
    precond_rank: int | None = _option(
        None, "vectors kept by the low-rank-memory structures; null: 8", low=1
    )
    precond_max_dim: int = _option(10_000, "dense sides longer than this become diagonal", low=1)
    divergence: str = _option("ngd", "metric of the step; see llqr.metrics")
    divergence_order_param: float = _option(0.5, "order of the renyi divergence", above=0)
    divergence_reduction: str = _option(
        "sum",
        "of the divergence over rows; unit: curvature scaled to largest eigenvalue 1",
        choices=("sum", "mean", "unit"),
    )
    damping: float = _option(0.0, "added to the curvature of every parameter", low=0)
    update_preconditioner_every: int = _option(1000, "steps between refits", low=1)
    update_preconditioner_until: int | None = _option(
        None, "no refit at or after this step; null or 0: never stops", low=0
    )
    precond_start_step: int = _option(0, "step of the first refit", low=0)
    precond_batch_size: int = _option(64, "examples in a refit", low=1)
    precond_steps: int = _option(50, "inner steps of a refit", low=1)
    precond_tolerance: float = _option(
        0.0,
        "stop a refit when a step changes its objective by less than this share; 0: never",
        low=0,
    )
    precond_lr: float = _option(1e-3, "of the inner solver", above=0)
    precond_anneal: bool = _option(False, "precond_lr falls to zero over each refit")
    precond_momentum: float | None = _option(
        None, "of the inner solver; null: that of the main optimizer", low=0, high=1
    )
    precond_solver: str = _option("momentum", "inner solver", choices=llqr.solvers.SOLVERS)
    precond_probe: str = _option(
        "gradient", "direction that P is learned on", choices=get_args(Probe)
    )
    precond_probes: int = _option(1, "directions in an inner step", low=1)
    precond_graft: str = _option(
        "none", "length given to P g: its own, or that of g", choices=get_args(Graft)
    )
    precond_on_update: bool = _option(
        False, "P multiplies the optimizer's update, not the gradient"
    )
    batch_solve_precond: bool = _option(
        True, "one problem for the refit batch; false: the mean of one for each example"
    )
    multibatch_training: bool = _option(False, "a fresh batch at every inner step")
    llqr_use_fast_paths: bool = _option(True, "fused products; false: layer by layer")
    llqr_operator_mode: str = _option(
        "cached_exact", "what a refit keeps in memory", choices=tuple(OPERATOR_MODES)
    )
    llqr_checkpoint_policy: str = _option(
        "none", "of lowmem_exact_full", choices=("none", "dots_no_batch_dims")
    )
    llqr_batch_update_mode: str = _option(
        "full_batch",
        "refit on the batch as a whole or in chunks",
        choices=("full_batch", "chunked_lqr_segment"),
    )
    llqr_batch_update_chunk_size: int | None = _option(
        None, "examples in a chunk of chunked_lqr_segment", low=1
    )
    llqr_second_order_mode: str = _option(
        "batched_exact",
        "second derivatives of the batch at once or example by example",
        choices=("batched_exact", "sample_separable_exact"),
    )
    llqr_second_order_chunk_size: int | None = _option(
        None, "examples at once in sample_separable_exact; null: the refit batch", low=1
    )
    measure_asymmetry: bool = _option(False, "log how far each side of P is from symmetric")
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

    # sharpness-aware minimization
    sam_mode: str | None = _option(
        None,
        "gradient at a perturbed point; null: plain gradient",
        choices=("base_sam", "base_fsam", "past_fsam", "asam", "fisher_sam"),
    )
    perturbation_rho: float = _option(0.1, "radius of the perturbation", low=0)
    perturb_mode: str = _option(
        "ema_grad",
        "direction: w, P w, or P w of length 1",
        choices=("ema_grad", "ema_precond_grad", "ema_direction"),
    )
    norm_mode: str = _option(
        "euclidean",
        "what has length rho",
        choices=("euclidean", "matrix_norm", "layer_euclidean", "layer_matrix_norm"),
    )
    gbar_beta: float = _option(0.9, "decay of the mean gradient of the fsam modes", low=0, high=1)
    gbar_eps: float = _option(1e-12, "added under the roots of the perturbation", above=0)
    asam_eta: float = _option(0.01, "added to |parameter| by asam", low=0)
    fisher_sam_eta: float = _option(0.1, "added to the squared gradient by fisher_sam", low=0)
    start_sam_after_step: int | None = _option(
        None, "first step with a perturbation; null: 0", low=0
    )
    sam_use_preconditioner_on_update: bool = _option(
        True, "P also multiplies the gradient at the perturbed point (fisher_sam: never)"
    )
    sam_groups: int = _option(1, "parts of the batch with a perturbation each (m-sharpness)", low=1)
    sam_research_base_vector_source: str = _option(
        "current_gradient",
        "what is perturbed along, for research",
        choices=("current_gradient", "main_optimizer_momentum", "random_direction"),
    )
    sam_research_perturb_sign: str = _option(
        "ascent", "sign of the perturbation, for research", choices=("ascent", "descent")
    )

    def __post_init__(self) -> None:
        for name, option, value in options(self):
            _check(name, option.metadata, value)
        if len(self.adam_betas) != 2 or not all(0 <= b < 1 for b in self.adam_betas):
            raise ConfigError(f"adam_betas={self.adam_betas}: give two numbers in [0, 1).")
        hidden = self.architecture.hidden
        if hidden is not None and (not hidden or min(hidden) < 1):
            raise ConfigError(f"architecture.hidden={hidden}: give at least one width >= 1.")
        radii = self.comparison.radii
        if not radii or min(radii) <= 0:
            raise ConfigError(f"comparison.radii={radii}: give at least one radius > 0.")
        for pair in self._contradictions():
            raise ConfigError(pair)
        if self.main_optimizer.startswith("adamw") and self.weight_decay is None:
            name = self.main_optimizer
            raise ConfigError(f"main_optimizer={name} needs weight_decay: a number, 0 for none.")

    def _contradictions(self) -> Iterator[str]:
        """Pairs of options that exclude each other, with the reason."""
        chunked = self.llqr_batch_update_mode == "chunked_lqr_segment"
        if chunked and self.llqr_batch_update_chunk_size is None:
            yield "llqr_batch_update_mode=chunked_lqr_segment needs llqr_batch_update_chunk_size."
        if not chunked and self.llqr_batch_update_chunk_size is not None:
            yield (
                f"llqr_batch_update_chunk_size={self.llqr_batch_update_chunk_size} needs "
                "llqr_batch_update_mode=chunked_lqr_segment."
            )
        separable = self.llqr_second_order_mode == "sample_separable_exact"
        if not separable and self.llqr_second_order_chunk_size is not None:
            yield (
                f"llqr_second_order_chunk_size={self.llqr_second_order_chunk_size} needs "
                "llqr_second_order_mode=sample_separable_exact."
            )
        full = self.llqr_operator_mode == "lowmem_exact_full"
        if self.llqr_checkpoint_policy != "none" and not full:
            yield (
                f"llqr_checkpoint_policy={self.llqr_checkpoint_policy} needs "
                "llqr_operator_mode=lowmem_exact_full: otherwise all residuals are kept."
            )
        if not self.llqr_use_fast_paths and (chunked or self.llqr_second_order_chunk_size):
            yield "llqr_use_fast_paths=false takes the batch as a whole: no chunks."
        if self.precond_rank is not None and not self.block_structure.startswith("low-rank"):
            yield (
                f"precond_rank={self.precond_rank} is for low-rank-memory structures only, not for "
                f"block_structure={self.block_structure}."
            )
        yield from self._run_contradictions()
        yield from self._sam_contradictions()

    def _run_contradictions(self) -> Iterator[str]:
        if self.resume and self.init_from:
            yield f"resume={self.resume} brings its own parameters: leave init_from out."
        if self.preempt_handling and not self.checkpoint_freq:
            yield "preempt_handling=true needs checkpoint_freq."
        if self.preempt_handling and self.comparison.name:
            yield "preempt_handling=true is for one run, not for a comparison."

    def _sam_contradictions(self) -> Iterator[str]:
        mode, uses_p = self.sam_mode, self.perturb_mode != "ema_grad"
        source = self.sam_research_base_vector_source
        researched = source != "current_gradient" or self.sam_research_perturb_sign != "ascent"
        if researched and mode not in ("base_sam", "base_fsam"):
            yield (
                "the switches sam_research_base_vector_source and sam_research_perturb_sign are "
                f"for sam_mode=base_sam and base_fsam, not for {mode or 'null'}."
            )
        if source == "main_optimizer_momentum" and self.main_optimizer == "sgd":
            yield (
                f"sam_research_base_vector_source={source}: main_optimizer=sgd has no momentum; "
                "polyak and the adam family have."
            )
        if self.toy.name and self.comparison.name:
            names = f"toy.name={self.toy.name} and comparison.name={self.comparison.name}"
            yield f"{names}: choose one of them."
        if mode is None:  # the other options may stay: one sweep runs with and without SAM
            return
        if self.toy.name:
            yield f"sam_mode={mode} is for training, not for toy.name={self.toy.name}."
        own_geometry = mode in ("asam", "fisher_sam")
        if own_geometry and (uses_p or self.norm_mode != "euclidean"):
            yield (
                f"sam_mode={mode} has a perturbation of its own: perturb_mode={self.perturb_mode}, "
                f"norm_mode={self.norm_mode} must be ema_grad, euclidean."
            )
        outer = mode != "fisher_sam" and self.sam_use_preconditioner_on_update
        if outer and not self.use_preconditioner:
            yield (
                "sam_use_preconditioner_on_update=true needs use_preconditioner=true; for SAM "
                "without LLQR set both to false."
            )
        if uses_p and not self.use_preconditioner:
            yield (
                f"perturb_mode={self.perturb_mode} needs use_preconditioner=true; without a "
                "preconditioner it is ema_grad."
            )
        if self.batch_size % self.sam_groups:
            yield f"sam_groups={self.sam_groups} does not divide batch_size={self.batch_size}."
        if self.sam_groups > 1 and source != "current_gradient":
            yield (
                f"sam_groups={self.sam_groups}: with sam_research_base_vector_source={source} the "
                "perturbation is the same for every group."
            )
        if mode == "past_fsam" and self.sam_groups > 1:
            yield (
                f"sam_groups={self.sam_groups}: past_fsam perturbs along earlier gradients, which "
                "are the same for every group."
            )


SCHEDULERS = (
    "lr_scheduler",
    "precond_lr_scheduler",
    "ema_scheduler",
    "precond_update_scheduler",
    "perturbation_rho_scheduler",
)


NESTED = ("dataset", "architecture", "logging", "translation_eval", "toy", "comparison")


def options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (full name, dataclass field, value) of every leaf option, or of a config class."""
    for option in fields(config):
        value = getattr(config, option.name, None)
        if option.name in SCHEDULERS:
            yield option.name, option, value
        elif option.name in NESTED:
            yield from options(
                option.default_factory if isinstance(config, type) else value, f"{option.name}."
            )
        else:
            yield prefix + option.name, option, value


def default(option: Field[Any]) -> str:
    """Return an option's default as it is written on the command line."""
    value: Any = option.default
    if option.default_factory is not MISSING:
        value = option.default_factory()
    spelling = {"None": "null", "True": "true", "False": "false"}
    return spelling.get(str(value), str(value))


def legal(option: Field[Any]) -> str:
    """Return the legal values of an option in words."""
    rules = option.metadata
    if "choices" in rules:
        return ", ".join(f"`{choice}`" for choice in rules["choices"])
    signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    return ", ".join(f"{sign} {rules[rule]:g}" for rule, sign in signs.items() if rule in rules)


def _check(name: str, rules: Any, value: Any) -> None:
    if value is None:
        return
    if "choices" in rules and value not in rules["choices"]:
        raise ConfigError(f"{name}: {unknown('value', value, rules['choices'])}")
    bounds = [
        ("low", lambda v, b: v >= b, ">="),
        ("high", lambda v, b: v <= b, "<="),
        ("above", lambda v, b: v > b, ">"),
        ("below", lambda v, b: v < b, "<"),
    ]
    for rule, holds, _ in bounds:
        if rule in rules and not holds(value, rules[rule]):
            legal = " and ".join(f"{s} {rules[r]}" for r, _, s in bounds if r in rules)
            raise ConfigError(f"{name}={value}: must be {legal}.")
