"""Every option of a run: its name, default, meaning, legal values and what it becomes.

The dataclasses here and in groups.py are Hydra's schema and the only place of the runner where a
default is written; `configs/` holds the presets, which override them. Option names are those of
the LLQR papers' guide, flat, so that its commands run verbatim. A row that becomes a field of
`llqr.Refit`, `llqr.Route` and the like says so, and build.py asks for it by that name. What the
library writes too (help is told without importing it), tests compare: defaults and choices.
"""

import os
from dataclasses import dataclass, field, fields, is_dataclass
from operator import not_
from typing import Any

from llqr_experiments.config.contradictions import contradictions
from llqr_experiments.config.groups import (
    Architecture,
    Comparison,
    Dataset,
    Distributed,
    Logging,
    Mesh,
    Toy,
    TranslationEval,
)
from llqr_experiments.config.names import (
    DIVERGENCES,
    EXACT_SOLVERS,
    GRAFTS,
    PROBES,
    SOLVERS,
    STREAM_PROBES,
    STRUCTURES,
)
from llqr_experiments.config.row import check, option, rows
from llqr_experiments.config.schedulers import check_scheduler
from llqr_experiments.errors import ConfigError

OPERATOR_MODES = {
    "cached_exact": "cached",
    "lowmem_exact_k": "curvature_recomputed",
    "lowmem_exact_full": "recomputed",
}
"""The papers' names and ours."""


SCHEDULERS = (
    "lr_scheduler",
    "precond_lr_scheduler",
    "ema_scheduler",
    "precond_update_scheduler",
    "perturbation_rho_scheduler",
)


@dataclass
class Config:
    """A whole run."""

    dataset: Dataset = field(default_factory=Dataset)
    architecture: Architecture = field(default_factory=Architecture)
    logging: Logging = field(default_factory=Logging)
    translation_eval: TranslationEval = field(default_factory=TranslationEval)
    mesh: Mesh = field(default_factory=Mesh)
    distributed: Distributed = field(default_factory=Distributed)
    toy: Toy = field(default_factory=Toy)
    comparison: Comparison = field(default_factory=Comparison)
    lr_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    precond_lr_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    ema_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    precond_update_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    perturbation_rho_scheduler: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})

    # training
    batch_size: int = option(128, "examples in a training step (or micro-batch)", low=1)
    grad_acc_steps: int = option(
        1, "micro-batches whose gradients make one step", low=1, becomes="recipe.microbatches"
    )
    batch_overlap_fraction: float = option(
        0.0, "share of a training batch that the next one has too", low=0, below=1
    )
    partial_batch: str = option(
        "straddle",
        "where an epoch does not end with a full batch: go on into the next, fill up, or drop",
        choices=("straddle", "pad", "drop"),
    )
    data_threads: int = option(
        2, "threads that prepare training batches ahead; 0: none", low=0, high=1024
    )
    eval_batch_size: int | None = option(
        None, "examples in an evaluation step; null: batch_size", low=1
    )
    total_epochs: float = option(250.0, "passes over the training set", above=0)
    max_steps: int | None = option(
        None, "end after this many steps; schedules keep total_epochs", low=1
    )
    precision: str = option(
        "float32",
        "of the model in training; curvature, and all with float64, is float32 at least",
        choices=("float32", "bf16", "float64"),
    )
    normalize_conv_params: bool = option(
        False,
        "scale tensors of rank 4 and more to L2 norm sqrt(size) before each update",
        becomes="recipe.normalize",
    )
    on_nonfinite: str = option(
        "stop",
        "at a loss or gradient that is not finite: stop, or skip the step and count it",
        choices=("stop", "skip"),
        becomes="recipe.skip",
        convert={"stop": False, "skip": True},
    )
    learning_rate: float = option(0.1, "of the main optimizer", above=0, by="lr_scheduler")
    momentum: float = option(
        0.9, "of polyak, of streaming P, and of the inner solver", low=0, high=1,
        becomes="streaming.momentum",
    )  # fmt: skip
    main_optimizer: str = option(
        "sgd",
        "the optimizer that is wrapped",
        choices=("sgd", "polyak", "adam", "adamw", "adamw_b2-98", "adamw_b2-95"),
    )
    adam_betas: list[float] = option(
        [0.9, 0.999], "of adam and adamw", length=2, of={"low": 0, "below": 1}
    )
    weight_decay: float | None = option(
        None, "decoupled for adamw; else added after preconditioning", low=0
    )
    wd_mask: list[str] | None = option(
        None, "no decay where one of these is part of a parameter's path"
    )
    label_smoothing: float = option(0.0, "of training and refit loss", low=0, high=1)
    init_key: int = option(42, "seed of the parameters", low=0)
    rng_seed: int = option(
        123,
        "seed of data order and augmentation",
        low=0,
        becomes=("recipe.seed", "refit.seed", "streaming.seed"),
    )

    # checkpoints
    checkpoint_freq: int | None = option(
        1000, "steps between checkpoints; null or 0: none at all", low=0
    )
    checkpoint_keep: int = option(3, "newest checkpoints kept, besides the best", low=1)
    checkpoint_metric: str | None = option(
        None,
        "what the best checkpoint is best in, such as `test loss`; null: test accuracy of images, "
        "valid loss of texts",
    )
    maximize_checkpoint_metric: bool | None = option(
        None, "whether more of it is better; null: of accuracies, not of losses"
    )
    resume: str | None = option(None, "run folder to go on from, in a new folder", path=True)
    init_from: str | None = option(
        None, "run folder whose parameters are the initial ones", path=True
    )
    preempt_handling: bool = option(
        False, "checkpoints in $SCRATCH/<experiment>/<job id>, for preemptible jobs"
    )
    jobid: str | None = option(None, "job id; null: $SLURM_JOBID")

    # how a run is started
    smoke: bool = option(False, "the same run, shrunk to a few steps on embedded data")
    dry_run: bool = option(False, "say what the run would do and cost, and end")
    plan_memory: bool = option(
        True,
        "dry_run compiles a refit to say what it holds in memory, a minute for large models; smoke "
        "leaves it out",
    )

    # reports, in steps
    test_eval_freq: int = option(2000, "steps between evaluations on the test set", low=1)
    logging_freq: int = option(50, "steps between logged training metrics", low=1)
    add_train_eval: bool = option(False, "evaluate on the training set too")
    record_histograms: bool = option(
        False, "histograms of p(correct) and loss of every example, at evaluations"
    )
    report_freq: int = option(200, "steps between lines on a terminal without a bar", low=1)
    quality: list[str] = option(
        [],
        "structures whose step is compared with the exact one before and after training",
        of={"choices": STRUCTURES},
    )

    # preconditioner
    use_preconditioner: bool = option(True, "false runs the main optimizer alone")
    block_structure: str = option(
        "diagonal", "structure of P", choices=STRUCTURES, called="structure"
    )
    block_structure_init: str = option("identity", "where P starts", choices=("identity",))
    precond_rank: int | None = option(
        None, "vectors kept by the low-rank-memory structures; null: 8", low=1
    )
    precond_max_dim: int = option(
        10_000, "dense sides longer than this become diagonal", low=1, becomes="llqr.max_dim"
    )
    precond_block_size: int | None = option(
        None,
        "dense sides longer than this are cut into blocks of at most this; null: none is",
        low=1,
        becomes="llqr.block_size",
    )
    precond_shard: str | None = option(
        "params",
        "where P lies on several devices: like the parameters; or like matrices together, each "
        "device with some of them, which it alone multiplies and learns; null: on every device",
        choices=("params", "blocks"),
        becomes="llqr.shard",
    )
    divergence: str = option("ngd", "metric of the step", choices=DIVERGENCES, called="divergence")
    divergence_order_param: float = option(0.5, "order of the renyi divergence", above=0)
    divergence_reduction: str = option(
        "sum",
        "of the divergence over rows; unit: curvature scaled to largest eigenvalue 1",
        choices=("sum", "mean", "unit"),
        becomes="llqr.divergence_reduction",
    )
    damping: float = option(
        0.0, "added to the curvature of every parameter", low=0, becomes="llqr.damping"
    )
    update_preconditioner_every: int = option(
        1000, "steps between refits", low=1, becomes="refit.every", by="precond_update_scheduler"
    )
    update_preconditioner_until: int | None = option(
        None,
        "no refit at or after this step; null or 0: never stops",
        low=0,
        becomes=("refit.until", "streaming.until"),
        off=0,
    )
    precond_start_step: int = option(
        0, "step of the first refit", low=0, becomes=("refit.start", "streaming.start")
    )
    precond_streaming: bool = option(
        False,
        "P follows the training instead of stopping for refits: a probe now and then, in the step "
        "and on its batch; the options precond_stream_* are of it, the solver's are not",
    )
    precond_stream_every: int = option(
        10, "steps between such probes", low=1, becomes="streaming.every"
    )
    precond_stream_probe: str = option(
        "fisher",
        "where curvature is seen: in labels drawn from the model, or in the gradients alone",
        choices=STREAM_PROBES,
        becomes="streaming.probe",
    )
    precond_stream_orthogonalize: bool | None = option(
        None,
        "steps of matrices by Newton-Schulz behind P; null: where probe is gradient",
        becomes="streaming.orthogonalize",
    )
    precond_stream_probe_share: float = option(
        0.25,
        "share of the examples of the batch that a probe sees",
        above=0,
        high=1,
        becomes="streaming.probe_share",
    )
    precond_stream_warmup: int = option(
        10, "first steps, with a probe each", low=0, becomes="streaming.warmup"
    )
    precond_stream_basis_decay: float = option(
        0.95,
        "running mean of the second moments of the gradient, which give the bases of P",
        low=0,
        below=1,
        becomes="streaming.basis_decay",
    )
    precond_stream_spectrum_decay: float = option(
        0.9,
        "running mean of the curvature that probes show, which gives the spectrum of P",
        low=0,
        high=1,
        becomes="streaming.spectrum_decay",
    )
    precond_stream_signal_decay: float | None = option(
        0.95,
        "running mean of the squares of the gradient in the bases of P, by which the step is "
        "weighed; null: it is not",
        low=0,
        below=1,
        becomes="streaming.signal_decay",
    )
    precond_stream_nesterov: bool = option(
        True, "P multiplies the Nesterov momentum", becomes="streaming.nesterov"
    )
    precond_stream_wide: int = option(
        256, "sides longer than this follow more rarely", low=1, becomes="streaming.wide"
    )
    precond_stream_rate: float = option(
        0.3, "relative step of kfac's sides", above=0, below=1, becomes="streaming.rate"
    )
    precond_batch_size: int = option(64, "examples in a refit", low=1)
    precond_steps: int = option(50, "inner steps of a refit", low=1, becomes="refit.steps")
    precond_tolerance: float = option(
        0.0,
        "stop a refit when a step changes its objective by less than this share; 0: never",
        low=0,
        becomes="refit.tolerance",
    )
    precond_lr: float = option(
        1e-3,
        "of the inner solver",
        above=0,
        becomes="refit.learning_rate",
        by="precond_lr_scheduler",
    )
    precond_anneal: bool = option(
        False, "precond_lr falls to zero over each refit", becomes="refit.anneal"
    )
    precond_momentum: float | None = option(
        None,
        "of the inner solver; null: that of the main optimizer",
        low=0,
        high=1,
        becomes="refit.momentum",
        instead="momentum",
    )
    precond_solver: str = option(
        "momentum", "inner solver", choices=SOLVERS, becomes="refit.solver"
    )
    precond_probe: str = option(
        "gradient", "direction that P is learned on", choices=PROBES, becomes="refit.probe"
    )
    precond_probes: int = option(
        1, "directions in an inner step", low=1, becomes=("refit.probes", "streaming.probes")
    )
    precond_graft: str = option(
        "none",
        "length given to P g: its own, that of g, or rms: 0.2 for matrices, 0.05 for vectors",
        choices=GRAFTS,
        becomes="llqr.graft",
    )
    precond_on_update: bool = option(
        False,
        "P multiplies the optimizer's update, not the gradient",
        becomes="llqr.precondition",
        convert={False: "gradient", True: "update"},
    )
    batch_solve_precond: bool = option(
        True,
        "one problem for the refit batch; false: the mean of one for each example",
        becomes="refit.per_example",
        convert=not_,
    )
    multibatch_training: bool = option(
        False, "a fresh batch at every inner step", becomes="refit.fresh_batches"
    )
    llqr_use_fast_paths: bool = option(
        True, "fused products; false: layer by layer", becomes="route.layerwise", convert=not_
    )
    llqr_operator_mode: str = option(
        "cached_exact",
        "what a refit keeps in memory",
        choices=tuple(OPERATOR_MODES),
        becomes="route.memory",
        convert=OPERATOR_MODES,
    )
    llqr_checkpoint_policy: str = option(
        "none",
        "of lowmem_exact_full",
        choices=("none", "dots_no_batch_dims"),
        becomes="route.checkpoint_policy",
    )
    llqr_batch_update_mode: str = option(
        "full_batch",
        "refit on the batch as a whole or in chunks",
        choices=("full_batch", "chunked_lqr_segment"),
    )
    llqr_batch_update_chunk_size: int | None = option(
        None, "examples in a chunk of chunked_lqr_segment", low=1, becomes="route.chunk_size"
    )
    llqr_second_order_mode: str = option(
        "batched_exact",
        "second derivatives of the batch at once or example by example",
        choices=("batched_exact", "sample_separable_exact"),
    )
    llqr_second_order_chunk_size: int | None = option(
        None,
        "examples at once in sample_separable_exact; null: the refit batch",
        low=1,
        becomes="route.chunk_size",
    )
    measure_asymmetry: bool = option(False, "log how far each side of P is from symmetric")
    precond_clip_norm: float | None = option(
        5.0,
        "largest L2 norm of the gradient of each stored array; null or 0: off",
        low=0,
        becomes="refit.clip_norm",
        off=0,
    )
    precond_clip_element_wise: float | None = option(
        None,
        "largest entry of that gradient; null or 0: off",
        low=0,
        becomes="refit.clip_value",
        off=0,
    )
    precond_identity_scaling: float = option(
        1.0, "sigma: P is stored as sigma P", above=0, becomes="llqr.identity_scaling"
    )
    normalize_grad_for_lqr: bool = option(
        False, "refit for the direction g / |g|", becomes="refit.normalize_gradient"
    )
    allow_grad_inversion: bool = option(
        False, "let P turn the sign of gradient entries", becomes="refit.allow_grad_inversion"
    )
    warm_start_precond: bool = option(
        True, "start a refit from the current P, not the identity", becomes="refit.warm_start"
    )
    ema_decay: float = option(
        0.0,
        "weight of the old P after a refit",
        low=0,
        high=1,
        becomes="refit.ema_decay",
        by="ema_scheduler",
    )

    # exact steps
    exact_steps: bool = option(
        False,
        "whole second-order steps in place of P and of rates; the options exact_* are of them, "
        "those of P are not",
    )
    exact_trust: bool = option(
        True,
        "in a trust region, which adapts the damping and takes what lowers the loss; false: with "
        "`damping`, and a learning rate",
    )
    exact_solver: str = option(
        "auto",
        "of their equations: a matrix of residuals (dual) or parameters (primal), conjugate "
        "gradients, or layer by layer (riccati)",
        choices=EXACT_SOLVERS,
        becomes="exact.solver",
    )
    exact_tolerance: float = option(
        1e-8, "of cg, relative residual", above=0, becomes="exact.tolerance"
    )
    exact_max_steps: int | None = option(
        None, "most steps of cg; null: by the library", low=1, becomes="exact.max_steps"
    )
    exact_start: float = option(
        1e-3,
        "first damping of a trust region, in units of the largest curvature",
        above=0,
        becomes="trust.start",
    )
    exact_tries: int = option(
        8, "dampings that are tried in a step; then none is taken", low=1, becomes="trust.tries"
    )
    exact_geodesic: bool = option(
        True, "steps follow the curvature of the residuals along them", becomes="trust.geodesic"
    )
    exact_noisy: bool = option(
        False,
        "the damping follows what a step does to the loss of the next batch: for mini-batches of "
        "data with noise",
        becomes="trust.noisy",
    )
    exact_momentum: float = option(
        0.0,
        "share of the last step that goes on where a batch says nothing about it (SPRING)",
        low=0,
        below=1,
        becomes="trust.momentum",
    )
    exact_radius: float | None = option(
        None, "longest step, in the metric; null: any", above=0, becomes="trust.radius"
    )
    exact_chunk: int | None = option(
        None,
        "examples whose derivatives are held at once; null: by their size",
        low=1,
        becomes="trust.chunk",
    )
    exact_sketch: int = option(
        128, "rank of the matrix that preconditions cg", low=1, becomes="trust.sketch"
    )

    # sharpness-aware minimization
    sam_mode: str | None = option(
        None,
        "gradient at a perturbed point; null: plain gradient",
        choices=("base_sam", "base_fsam", "past_fsam", "asam", "fisher_sam"),
    )
    perturbation_rho: float = option(
        0.1, "radius of the perturbation", low=0, becomes="sam.rho", by="perturbation_rho_scheduler"
    )
    perturb_mode: str = option(
        "ema_grad",
        "direction: w, P w, or P w of length 1",
        choices=("ema_grad", "ema_precond_grad", "ema_direction"),
        becomes="sam.direction",
    )
    norm_mode: str = option(
        "euclidean",
        "what has length rho",
        choices=("euclidean", "matrix_norm", "layer_euclidean", "layer_matrix_norm"),
        becomes="sam.norm",
    )
    gbar_beta: float = option(
        0.9, "decay of the mean gradient of the fsam modes", low=0, high=1, becomes="sam.beta"
    )
    gbar_eps: float = option(
        1e-12, "added under the roots of the perturbation", above=0, becomes="sam.epsilon"
    )
    asam_eta: float = option(0.01, "added to |parameter| by asam", low=0, becomes="asam.eta")
    fisher_sam_eta: float = option(
        0.1, "added to the squared gradient by fisher_sam", low=0, becomes="fisher_sam.eta"
    )
    start_sam_after_step: int | None = option(
        None,
        "first step with a perturbation; null: 0",
        low=0,
        becomes="sam.start",
        convert=lambda step: step or 0,
    )
    sam_use_preconditioner_on_update: bool = option(
        True, "P also multiplies the gradient at the perturbed point (fisher_sam: never)"
    )
    sam_groups: int = option(
        1, "parts of the batch with a perturbation each (m-sharpness)", low=1, becomes="sam.groups"
    )
    sam_research_base_vector_source: str = option(
        "current_gradient",
        "what is perturbed along, for research",
        choices=("current_gradient", "main_optimizer_momentum", "random_direction"),
    )
    sam_research_perturb_sign: str = option(
        "ascent",
        "sign of the perturbation, for research",
        choices=("ascent", "descent"),
        becomes="sam.sign",
    )

    def __post_init__(self) -> None:
        for group in SCHEDULERS:
            check_scheduler(group, getattr(self, group))
        for name, row, value in rows(self):
            if name not in SCHEDULERS:
                if is_dataclass(row.type):  # a group set to null
                    raise ConfigError(f"{name}=null: a group has options, and cannot be null.")
                check(name, row, value)
        _at_home(self)
        for pair in contradictions(self):
            raise ConfigError(pair)
        if self.main_optimizer.startswith("adamw") and self.weight_decay is None:
            name = self.main_optimizer
            raise ConfigError(f"main_optimizer={name} needs weight_decay: a number, 0 for none.")


def _at_home(config: Any) -> None:
    """Replace `~` in paths by the home folder: shells leave it, after "="."""
    for row in fields(config):
        value = getattr(config, row.name)
        if is_dataclass(value):
            _at_home(value)
        elif row.metadata.get("path") and value is not None:
            setattr(config, row.name, os.path.expanduser(value))
