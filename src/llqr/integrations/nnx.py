"""Flax NNX: objectives over a module, refits for `nnx.Optimizer`, staged models."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx

from llqr.lqr import StagedModel, stages_from_functions
from llqr.objective import BoundObjective, Objective
from llqr.transform import refresh as _refresh


def objective(
    model: nnx.Module, call: Callable[[Any, Any], Any], loss: Callable[[Any, Any], Any],
    mask: Callable[[Any], Any] | None = None, wrt: Any = nnx.Param,
) -> Objective:  # fmt: skip
    """Return the objective `loss(call(model, batch), batch)` over the variables `wrt`.

    The model's mode is kept: build it from a model in evaluation mode (`model.eval()`) so
    that the curvature uses running statistics and no dropout. Bind it with `bind`.
    """
    graphdef = nnx.split(model, wrt, ...)[0]
    return Objective(
        lambda params, data: call(nnx.merge(graphdef, params, data[1]), data[0]),
        lambda outputs, data: loss(outputs, data[0]),
        None if mask is None else lambda data: mask(data[0]),
    )


def bind(
    objective: Objective, model: nnx.Module, batch: Any, wrt: Any = nnx.Param
) -> BoundObjective:
    """Bind a batch and the model's other state (batch statistics, keys), which is data."""
    return objective.bind((batch, nnx.as_pure(nnx.split(model, wrt, ...)[2])))


def refresh(optimizer: nnx.Optimizer, model: nnx.Module, objective: BoundObjective) -> None:
    """Refit the preconditioner inside an `nnx.Optimizer`, in place."""
    params = nnx.as_pure(nnx.state(model, optimizer.wrt))
    state = _refresh(optimizer.tx, nnx.as_pure(optimizer.opt_state), params, objective)
    nnx.update(optimizer.opt_state, nnx.state(state))


def stages(parts: Sequence[tuple[str, Any]]) -> tuple[StagedModel, dict[str, Any]]:
    """Return a staged model, and its parameters, from modules and functions x -> x in order.

    Other state than parameters (batch statistics) is frozen: use modules in evaluation mode.
    """
    functions, params = [], {}
    for name, part in parts:
        if isinstance(part, nnx.Module):
            graphdef, theta, rest = nnx.split(part, nnx.Param, ...)
            functions.append((name, partial(_run, graphdef, rest)))
            if jax.tree.leaves(theta):
                params[name] = nnx.as_pure(theta)
        else:
            functions.append((name, lambda _, x, part=part: part(x)))
    return stages_from_functions(functions), params


def _run(graphdef: Any, rest: Any, theta: Any, x: Any) -> Any:
    return nnx.merge(graphdef, nnx.State({}) if theta is None else theta, rest)(x)
