"""Methods without curvature, as they are in optax."""

from typing import Any

import jax
import optax

from benchmarks.suite.engine import Engine, optax_engine
from benchmarks.suite.workloads.problem import Batch, Workload

from .method import Method


def _from_optax(workload: Workload, make: Any, **options: Any) -> Engine:
    return optax_engine(workload, lambda rate: make(rate, **options))


def _muon(workload: Workload, **options: Any) -> Engine:
    """Muon on kernels, Adam on embeddings and vectors, as its authors advise.

    The rows of a convolution's matrix are all of its axes but the last. Layers in a scan are
    matrices each.
    """

    def dimensions(params: Any) -> Any:
        def one(path: Any, x: Any) -> Any:
            name = jax.tree_util.keystr(path)
            if "layers" in name:
                return optax.contrib.MuonDimensionNumbers(1, 2) if x.ndim == 3 else None
            if x.ndim < 2 or "embedding" in name:
                return None
            return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

        return jax.tree.map_with_path(one, params)

    return _from_optax(
        workload, optax.contrib.muon, muon_weight_dimension_numbers=dimensions, **options
    )


def _schedule_free(workload: Workload, **options: Any) -> Engine:
    def make(rate: Any) -> optax.GradientTransformation:
        return optax.contrib.schedule_free_adamw(rate, **options)

    return optax_engine(workload, make, evaluated=optax.contrib.schedule_free_eval_params)


def _sam(workload: Workload, rho: float, momentum: float) -> Engine:
    def make(rate: Any) -> optax.GradientTransformation:
        climb = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
        base = optax.sgd(rate, momentum, nesterov=True)
        return optax.contrib.sam(base, climb, sync_period=2, opaque_mode=True)

    def keywords(kind: str, params: Any, batch: Batch) -> dict[str, Any]:
        return {"grad_fn": lambda p, i: jax.grad(workload.objective)(p, batch)}

    return optax_engine(workload, make, keywords=keywords, work=lambda kind: 2.0)


def _lbfgs(workload: Workload, **options: Any) -> Engine:
    """Gradients come from the line search before, so that only its calls are counted."""
    tx = optax.lbfgs(**options)

    def step(carry: Any, batch: Batch, rate: Any) -> Any:
        del rate
        params, state = carry

        def loss(p: Any) -> Any:
            return workload.objective(p, batch)

        value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    def counted(carry: Any) -> Any:
        search, first = carry[1][-1], carry[1][0].count == 1
        return search.info.num_linesearch_steps + first

    return Engine(
        start=lambda params, batch, key: (params, tx.init(params)),
        step=lambda kind: step,
        parameters=lambda carry: carry[0],
        counted=counted,
    )


METHODS = (
    Method("SGD Nesterov", _from_optax, 0.1,
           {"make": optax.sgd, "momentum": 0.9, "nesterov": True},
           ({"momentum": 0.8}, {"momentum": 0.95}, {"momentum": 0.99})),
    Method("AdamW", _from_optax, 3e-3, {"make": optax.adamw, "weight_decay": 1e-4},
           ({"weight_decay": 0.01}, {"weight_decay": 0.1}, {"b2": 0.95})),
    Method("NadamW", _from_optax, 3e-3, {"make": optax.nadamw, "weight_decay": 1e-4},
           ({"weight_decay": 0.01}, {"weight_decay": 0.1}, {"b2": 0.95})),
    Method("schedule-free AdamW", _schedule_free, 3e-3, {"b1": 0.9, "weight_decay": 1e-4},
           ({"b1": 0.95}, {"b1": 0.98}, {"weight_decay": 0.01}), decays=False),
    Method("Muon", _muon, 1e-2, {"beta": 0.95},
           ({"beta": 0.9}, {"consistent_rms": 0.2}, {"weight_decay": 0.01})),
    Method("SAM", _sam, 0.1, {"rho": 0.05, "momentum": 0.9},
           ({"rho": 0.02}, {"rho": 0.1}, {"rho": 0.2})),
    Method("L-BFGS", _lbfgs, None, {"memory_size": 10},
           ({"memory_size": 5}, {"memory_size": 20}, {"memory_size": 50}),
           second_order=True, applies=lambda workload: workload.full_batch),
)  # fmt: skip
