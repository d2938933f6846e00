"""LLQR in its five forms."""

from typing import Any

import optax

import llqr
from benchmarks.suite.engine import PLAIN, REFIT, Engine, Outside, optax_engine
from benchmarks.suite.workloads.problem import Batch, Workload, rows

from .method import Method

EVERY = 100
"""Steps from one published or probe refit to the next."""

MOST_BATCHES = 4
"""Of training, in the batch of a published or a probe refit."""

MOST_PARAMETERS = 20_000
"""Of a network whose exact steps are tried."""

EXACT_STEPS = 10
"""Steps of conjugate gradients at most."""

_PUBLISHED: dict[str, Any] = {"structure": "e-kfac"}
_PROBE: dict[str, Any] = {
    "structure": "kfac",
    "divergence_reduction": "unit",
    "damping": 1e-3,
    "graft": "global",
    "identity_scaling": 100.0,
}
_PROBE_REFIT: dict[str, Any] = {
    "steps": 50,
    "probe": "fisher",
    "probes": 2,
    "solver": "relative",
    "learning_rate": 0.1,
    "anneal": True,
    "clip_norm": None,
}
"""Both are `method=probe` of the runner."""

_PROBE_PRODUCTS = 1 + 8 + 2 * 50 * 2  # gradient, largest eigenvalue, two probes of 50 steps
_PUBLISHED_PRODUCTS = 1 + 50


def _streaming(workload: Workload, *, refit: llqr.Streaming, **options: Any) -> Engine:
    """A refit at each of the first ten steps and at every tenth: one more gradient of a part."""

    def make(rate: Any) -> optax.GradientTransformation:
        return llqr.streaming(rate, metric=workload.metric, refit=refit, **options)

    def keywords(kind: str, params: Any, batch: Batch) -> dict[str, Any]:
        if kind == PLAIN:
            return {"refresh": False}
        return {"refresh": True, "objective": workload.objective.bind(batch)}

    return optax_engine(
        workload,
        make,
        keywords=keywords,
        kind=lambda step: REFIT if refit.is_due(step) else PLAIN,
        work=lambda kind: 1.0 + refit.probe_share if kind == REFIT else 1.0,
    )


def _gradients(workload: Workload, *, refit: llqr.Streaming, **options: Any) -> Engine:
    """No objective: each step sees its gradient, and some turn the bases."""
    return optax_engine(
        workload,
        lambda rate: llqr.streaming(rate, refit=refit, **options),
        keywords=lambda kind, params, batch: {"refresh": kind == REFIT},
        kind=lambda step: REFIT if refit.is_due(step) else PLAIN,
    )


def _learned(
    workload: Workload,
    *,
    refit: dict[str, Any],
    size: int,
    products: float,
    momentum: float | None,
    **options: Any,
) -> Engine:
    """A refit from outside, from time to time, on a batch of its own."""

    def make(rate: Any) -> optax.GradientTransformationExtraArgs:
        refits = llqr.Refit(every=EVERY, **refit)
        return llqr.llqr(optax.sgd(rate, momentum), metric=workload.metric, refit=refits, **options)

    tx = make(1.0)

    def again(carry: Any, batch: Batch) -> Any:
        params, state = carry
        return params, llqr.refresh(tx, state, params, workload.objective.bind(batch))

    size = min(size, MOST_BATCHES * workload.batch, rows(workload.train))
    return optax_engine(
        workload,
        make,
        keywords=lambda kind, params, batch: {"refresh": False},
        outside=Outside(EVERY, size, products, again),
    )


def _exact(workload: Workload, **options: Any) -> Engine:
    def make(rate: Any) -> optax.GradientTransformation:
        return llqr.exact(
            optax.sgd(rate),
            metric=workload.metric,
            divergence_reduction="mean",
            max_steps=EXACT_STEPS,
            tolerance=1e-4,
            **options,
        )

    return optax_engine(
        workload,
        make,
        keywords=lambda kind, params, batch: {"objective": workload.objective.bind(batch)},
        counted=lambda state: 1 + state.steps,
    )


def _is_small(workload: Workload) -> bool:
    return workload.size() <= MOST_PARAMETERS


METHODS = (
    Method("LLQR streaming", _streaming, 1.6e-2, {"structure": "e-kfac", "refit": llqr.Streaming()},
           ({"damping": 1e-3}, {"damping": 1e-5}, {"weight_decay": 0.01}),
           second_order=True, ours=True, released={"refit": llqr.Streaming()}),
    Method("LLQR gradients", _gradients, 1.6e-2,
           {"structure": "e-kfac", "refit": llqr.Streaming(probe="gradient")},
           ({"damping": 3e-2}, {"damping": 3e-4}, {"weight_decay": 0.01}),
           second_order=True, ours=True, released={"refit": llqr.Streaming(probe="gradient")}),
    Method("LLQR published", _learned, 0.3,
           {**_PUBLISHED, "refit": {}, "size": 64, "products": _PUBLISHED_PRODUCTS,
            "momentum": None},
           ({"damping": 1e-2}, {"structure": "kfac"}, {"momentum": 0.9}),
           second_order=True, ours=True),
    Method("LLQR probe", _learned, 0.05,
           {**_PROBE, "refit": _PROBE_REFIT, "size": 256, "products": _PROBE_PRODUCTS,
            "momentum": 0.9},
           ({"damping": 1e-2}, {"damping": 1e-4}, {"structure": "e-kfac"}),
           second_order=True, ours=True),
    Method("LLQR exact", _exact, 0.3, {"damping": 1e-2},
           ({"damping": 1e-1}, {"damping": 1e-3}, {"damping": 1e-4}),
           second_order=True, ours=True, released={"damping": 1e-2},  # the library has no default
           share=1 / (1 + EXACT_STEPS), applies=_is_small),
)  # fmt: skip
