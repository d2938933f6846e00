"""Every run in small: a few steps of a tiny model on data that needs no files."""

from dataclasses import replace

from llqr_experiments.config.options import Architecture, Config, Dataset
from llqr_experiments.data.kinds import KINDS
from llqr_experiments.models import MODELS


def shrink(config: Config) -> Config:
    """Return the same run made small.

    Everything that decides what is run (optimizer, structure, metric, SAM, schedules, quality,
    routes, augmentation) stays; only sizes shrink.
    """
    batch = 16 if 16 % config.sam_groups == 0 else config.sam_groups
    chunk = lambda size: None if size is None else min(size, 4)  # noqa: E731
    late = config.start_sam_after_step
    return replace(
        config,
        dataset=_data(config),
        architecture=_model(config.architecture),
        toy=replace(config.toy, iterations=5),
        comparison=replace(config.comparison, runs=1, steps=20),
        batch_size=batch,
        eval_batch_size=64,
        batch_overlap_fraction=0.0,
        grad_acc_steps=min(config.grad_acc_steps, 2),
        data_threads=min(config.data_threads, 2),
        max_steps=4,
        plan_memory=False,
        test_eval_freq=2,
        logging_freq=1,
        report_freq=1,
        checkpoint_freq=2 if config.checkpoint_freq else None,
        update_preconditioner_every=2,
        precond_stream_every=2,
        precond_stream_warmup=1,
        precond_start_step=min(config.precond_start_step, 1),
        precond_batch_size=8,
        precond_steps=2,
        llqr_batch_update_chunk_size=chunk(config.llqr_batch_update_chunk_size),
        llqr_second_order_chunk_size=chunk(config.llqr_second_order_chunk_size),
        start_sam_after_step=None if late is None else min(late, 2),
    )


def _data(config: Config) -> Dataset:
    if config.architecture.name.startswith("mlp"):
        return Dataset(name="digits", truncate=200)
    return KINDS[MODELS[config.architecture.name].takes].small(config.dataset)


def _model(architecture: Architecture) -> Architecture:
    """The small sibling; what has no size stays as it is."""
    small = MODELS[architecture.name].small
    plain = Architecture(name=architecture.name)
    kept = {"positions": architecture.positions, "tied": architecture.tied}
    return replace(plain, **kept, dropout=architecture.dropout, **small)
