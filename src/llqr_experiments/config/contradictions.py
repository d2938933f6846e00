"""Options that are legal one by one, and exclude each other."""

from collections.abc import Iterator
from typing import Any

from llqr_experiments.config.names import DRAWN
from llqr_experiments.config.row import spelt


def contradictions(config: Any) -> Iterator[str]:
    """Yield pairs of options that exclude each other, with the reason.

    Args:
      config: an `options.Config`, whose options are legal one by one.
    """
    chunked = config.llqr_batch_update_mode == "chunked_lqr_segment"
    if chunked and config.llqr_batch_update_chunk_size is None:
        yield "llqr_batch_update_mode=chunked_lqr_segment needs llqr_batch_update_chunk_size."
    if not chunked and config.llqr_batch_update_chunk_size is not None:
        yield (
            f"llqr_batch_update_chunk_size={config.llqr_batch_update_chunk_size} needs "
            "llqr_batch_update_mode=chunked_lqr_segment."
        )
    separable = config.llqr_second_order_mode == "sample_separable_exact"
    if not separable and config.llqr_second_order_chunk_size is not None:
        yield (
            f"llqr_second_order_chunk_size={config.llqr_second_order_chunk_size} needs "
            "llqr_second_order_mode=sample_separable_exact."
        )
    full = config.llqr_operator_mode == "lowmem_exact_full"
    if config.llqr_checkpoint_policy != "none" and not full:
        yield (
            f"llqr_checkpoint_policy={config.llqr_checkpoint_policy} needs "
            "llqr_operator_mode=lowmem_exact_full: otherwise all residuals are kept."
        )
    if not config.llqr_use_fast_paths and (chunked or config.llqr_second_order_chunk_size):
        yield "llqr_use_fast_paths=false takes the batch as a whole: no chunks."
    if config.precond_rank is not None and not config.block_structure.startswith("low-rank"):
        yield (
            f"precond_rank={config.precond_rank} is for low-rank-memory structures only, not for "
            f"block_structure={config.block_structure}."
        )
    yield from _of_labels(config)
    yield from _of_streaming(config)
    yield from _of_exact(config)
    yield from _of_runs(config)
    yield from _of_sam(config)


def _of_labels(config: Any) -> Iterator[str]:
    streaming = config.precond_streaming and config.precond_stream_probe == "fisher"
    fisher = config.precond_probe == "fisher" and not config.precond_streaming
    if config.use_preconditioner and (streaming or fisher) and config.divergence not in DRAWN:
        yield (
            f"{'precond_streaming=true' if streaming else 'precond_probe=fisher'} needs a "
            f"divergence from which labels can be drawn ({', '.join(DRAWN)}; gaussian for "
            f"numbers), not divergence={config.divergence}."
        )


def _of_streaming(config: Any) -> Iterator[str]:
    if not (config.precond_streaming and config.use_preconditioner):
        return
    if config.main_optimizer != "sgd":
        yield (
            "precond_streaming=true: P multiplies the momentum, and what follows is the learning "
            f"rate and weight_decay alone: main_optimizer=sgd, not {config.main_optimizer}. Rates "
            "of AdamW are a good start."
        )
    if config.precond_on_update:
        yield "precond_streaming=true has P in front of the learning rate: precond_on_update=false."
    if config.damping == 0:
        yield "precond_streaming=true needs a damping above 0; method=streaming sets 1e-4."
    if config.precond_identity_scaling != 1:
        yield "precond_streaming=true learns without steps: precond_identity_scaling=1."
    if config.multibatch_training or not config.batch_solve_precond:
        yield (
            "precond_streaming=true probes the training batch: leave multibatch_training and "
            "batch_solve_precond as they are."
        )
    if config.toy.name or config.comparison.name:
        yield "precond_streaming=true is for training runs."
    if config.quality:
        yield (
            f"quality={list(config.quality)} compares structures by a refit from the identity, "
            "which precond_streaming=true does not make."
        )


def _of_exact(config: Any) -> Iterator[str]:
    if not config.exact_steps:
        return
    plain = {
        "use_preconditioner": (False, "exact steps have no P"),
        "sam_mode": (None, "exact steps are of the loss itself"),
        "grad_acc_steps": (1, "an exact step is that of a whole batch"),
        "sam_groups": (1, "an exact step is that of a whole batch"),
        "normalize_conv_params": (False, "parameters stay where an exact step was found"),
    }
    for name, (value, why) in plain.items():
        if getattr(config, name) != value:
            given, own = (spelt(x) for x in (getattr(config, name), value))
            yield f"exact_steps=true with {name}={given}: {why}. Set {name}={own}."
    if config.precision == "bf16":
        yield "exact_steps=true with precision=bf16: float64 is for them, float32 is the least."
    of_loss = config.divergence == "gauss_newton" or not config.exact_trust
    if config.divergence_reduction == "unit" or not (
        of_loss or config.divergence_reduction == "mean"
    ):
        yield (
            "exact_steps=true compares curvature with the loss, a mean over rows: "
            f"divergence_reduction=mean, not {config.divergence_reduction}."
        )
    if config.toy.name or config.comparison.name:
        yield "exact_steps=true is for training runs."
    if not config.exact_trust:
        return
    whole = config.learning_rate == 1 and config.lr_scheduler["name"] == "constant"
    if config.main_optimizer != "sgd" or not whole or config.weight_decay:
        yield (
            "exact_trust=true takes the whole step, whose length it has chosen: "
            "main_optimizer=sgd, learning_rate=1, lr_scheduler=constant, without weight_decay. "
            "method=exact sets the first two."
        )


def _of_runs(config: Any) -> Iterator[str]:
    if config.resume and config.init_from:
        yield f"resume={config.resume} brings its own parameters: leave init_from out."
    if config.preempt_handling and not config.checkpoint_freq:
        yield "preempt_handling=true needs checkpoint_freq."
    if config.preempt_handling and config.comparison.name:
        yield "preempt_handling=true is for one run, not for a comparison."


def _of_sam(config: Any) -> Iterator[str]:
    mode, uses_p = config.sam_mode, config.perturb_mode != "ema_grad"
    source = config.sam_research_base_vector_source
    researched = source != "current_gradient" or config.sam_research_perturb_sign != "ascent"
    if researched and mode not in ("base_sam", "base_fsam"):
        yield (
            "the switches sam_research_base_vector_source and sam_research_perturb_sign are "
            f"for sam_mode=base_sam and base_fsam, not for {mode or 'null'}."
        )
    if source == "main_optimizer_momentum" and config.main_optimizer == "sgd":
        yield (
            f"sam_research_base_vector_source={source}: main_optimizer=sgd has no momentum; "
            "polyak and the adam family have."
        )
    if config.toy.name and config.comparison.name:
        names = f"toy.name={config.toy.name} and comparison.name={config.comparison.name}"
        yield f"{names}: choose one of them."
    if mode is None:  # the other options may stay: one sweep runs with and without SAM
        return
    if config.toy.name:
        yield f"sam_mode={mode} is for training, not for toy.name={config.toy.name}."
    own_geometry = mode in ("asam", "fisher_sam")
    if own_geometry and (uses_p or config.norm_mode != "euclidean"):
        yield (
            f"sam_mode={mode} has a perturbation of its own: perturb_mode={config.perturb_mode}, "
            f"norm_mode={config.norm_mode} must be ema_grad, euclidean."
        )
    outer = mode != "fisher_sam" and config.sam_use_preconditioner_on_update
    if outer and not config.use_preconditioner:
        yield (
            "sam_use_preconditioner_on_update=true needs use_preconditioner=true; for SAM "
            "without LLQR set both to false."
        )
    if uses_p and not config.use_preconditioner:
        yield (
            f"perturb_mode={config.perturb_mode} needs use_preconditioner=true; without a "
            "preconditioner it is ema_grad."
        )
    if config.batch_size % config.sam_groups:
        yield f"sam_groups={config.sam_groups} does not divide batch_size={config.batch_size}."
    if config.sam_groups > 1 and source != "current_gradient":
        yield (
            f"sam_groups={config.sam_groups}: with sam_research_base_vector_source={source} the "
            "perturbation is the same for every group."
        )
    if mode == "past_fsam" and config.sam_groups > 1:
        yield (
            f"sam_groups={config.sam_groups}: past_fsam perturbs along earlier gradients, which "
            "are the same for every group."
        )
