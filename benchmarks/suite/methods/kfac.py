"""K-FAC as it is in kfac-jax, through its preconditioner for optax.

Version 0.0.8 asks JAX for the parameters of a primitive in a form that JAX 0.10 has dropped:
`_evaluate` takes the place of that one function.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.suite.engine import PLAIN, Engine
from benchmarks.suite.workloads.problem import Batch, Workload, rows

kfac_jax = importlib.import_module("kfac_jax")  # an extra, for Python 3.11
_matcher = importlib.import_module("kfac_jax._src.tag_graph_matcher")


def _evaluate(equation: Any, values: Any) -> list[Any]:
    """Return the outputs of one equation of a jaxpr."""
    chosen = equation.primitive.get_bind_params(equation.params)
    if isinstance(chosen, tuple):  # JAX before 0.10
        functions, chosen = chosen
        values = [*functions, *values]
    found = equation.primitive.bind(*values, **chosen)
    return list(found) if equation.primitive.multiple_results else [found]


_matcher.eval_jaxpr_eqn = _evaluate  # type: ignore[attr-defined]


def preconditioner(workload: Workload, *, damping: float, every: int) -> Any:
    """Return kfac-jax's preconditioner; `every` so many steps it inverts anew."""

    def value(params: Any, batch: Batch) -> Any:
        outputs = workload.forward(params, batch)
        if workload.metric == "ngd":  # a sum over places by the number of examples
            mask = None if workload.mask is None else workload.mask(batch)
            places = batch["label"].size if mask is None else jnp.sum(mask)
            kfac_jax.register_softmax_cross_entropy_loss(
                outputs, batch["label"], mask, weight=rows(batch) / places
            )
        else:
            kfac_jax.register_squared_error_loss(outputs, batch["label"], weight=0.5)
        return workload.loss(outputs, batch)

    return kfac_jax.OptaxPreconditioner(
        value,
        damping=damping,
        inverse_update_period=every,
        pmap_axis_name=None,
        batch_size_extractor=rows,
    )


def engine(
    workload: Workload, *, damping: float, momentum: float, every: int, constraint: float
) -> Engine:
    """Return K-FAC with momentum behind it; the curvature follows in every step.

    As in kfac-jax's own optimizer, the step before momentum is no longer than sqrt(constraint) in
    the norm of the curvature.
    """
    made = preconditioner(workload, damping=damping, every=every)

    def start(params: Any, batch: Batch, key: Any) -> Any:
        state = made.init((params, batch), key)
        return params, jax.tree.map(jnp.zeros_like, params), state, key

    def step(carry: Any, batch: Batch, rate: Any) -> Any:
        params, trace, state, key = carry
        key, probe = jax.random.split(key)
        state = made.maybe_update(state, (params, batch), probe)
        grads = jax.grad(workload.objective)(params, batch)
        updates = made.apply(grads, state)
        square = rate**2 * optax.tree.vdot(updates, grads)
        short = jnp.minimum(1.0, jnp.sqrt(constraint / square))
        updates = jax.tree.map(lambda u: short * u, updates)
        trace = jax.tree.map(lambda m, u: momentum * m + u, trace, updates)
        params = jax.tree.map(lambda p, m: p - (rate * m).astype(p.dtype), params, trace)
        return params, trace, made.increment_count(state), key

    return Engine(
        start=start,
        step=lambda kind: step,
        parameters=lambda carry: carry[0],
        kind=lambda step: PLAIN,
        work=lambda kind: 2.0,
    )
