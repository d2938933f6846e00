"""K-FAC as it is in kfac-jax: through its preconditioner for optax, and by its own optimizer.

Version 0.0.8 asks JAX for the parameters of a primitive in a form that JAX 0.10 has dropped:
`_evaluate` takes the place of that one function.
"""

import importlib
from functools import partial
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


DAMPING = "damping"
"""The kind of step in which the optimizer adapts its damping."""

DAMPING_EVERY = 5


def registered(workload: Workload) -> Any:
    """Return (parameters, batch) -> loss, with what kfac-jax must know of it."""

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

    return value


def preconditioner(workload: Workload, *, damping: float, every: int) -> Any:
    """Return kfac-jax's preconditioner; `every` so many steps it inverts anew."""
    return kfac_jax.OptaxPreconditioner(
        registered(workload),
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


def adaptive_optimizer(
    workload: Workload, *, every: int, decay: float, damping: float = 1.0
) -> Any:
    """Return kfac-jax's own optimizer: rate, momentum and damping are by its own rules.

    Rate and momentum minimise a quadratic model with the exact Fisher matrix. The damping follows
    Levenberg and Marquardt in every fifth step, by a factor of decay^5 (Martens and Grosse, arXiv
    1503.05671, sections 6.4, 6.5 and 7).
    """
    return kfac_jax.Optimizer(
        jax.value_and_grad(registered(workload)),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=damping,
        damping_adaptation_interval=DAMPING_EVERY,
        damping_adaptation_decay=decay,
        inverse_update_period=every,
        num_burnin_steps=0,
        batch_size_extractor=rows,
    )


def adaptive_engine(workload: Workload, **options: Any) -> Engine:
    """Return K-FAC by its own optimizer; what the suite tunes as a rate is the first damping.

    Gradients: one of the loss, one for the factors, and a product with the Fisher matrix for each
    of two directions; the loss at the new parameters, in every fifth step, is counted as one more.
    """
    optimizer = adaptive_optimizer(workload, **options)

    def start(params: Any, batch: Batch, key: Any) -> Any:
        return params, optimizer.init(params, key, batch), key

    def step(kind: str, carry: Any, batch: Batch, rate: Any) -> Any:
        params, state, key = carry
        key, probe = jax.random.split(key)
        state = state.copy()
        first = jnp.asarray(rate, state.damping.dtype)
        state.damping = jnp.where(state.step_counter == 0, first, state.damping)
        # Only what is decided outside of compiled code depends on the number.
        number = DAMPING_EVERY - 1 if kind == DAMPING else 1
        with optimizer.staging_context():
            params, state, _ = optimizer.step(
                params, state, probe, batch=batch, global_step_int=number
            )
        return params, state, key

    return Engine(
        start=start,
        step=lambda kind: partial(step, kind),
        parameters=lambda carry: carry[0],
        kind=lambda step: PLAIN if (step + 1) % DAMPING_EVERY else DAMPING,
        work=lambda kind: 5.0 if kind == DAMPING else 4.0,
    )
