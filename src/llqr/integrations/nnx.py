"""Flax NNX: objectives over a module, refits for `nnx.Optimizer`, staged models."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from llqr.access import refresh as _refresh
from llqr.objective import FIRST, BoundObjective, Objective
from llqr.stages import StagedModel, stages_from_functions
from llqr.structures import Rule, layouts
from llqr.structures.rules import StructureLike, for_leaf, rule_table
from llqr.tree import leaf_names


def objective(
    model: nnx.Module, call: Callable[[Any, Any], Any], loss: Callable[[Any, Any], Any],
    mask: Callable[[Any], Any] | None = None, wrt: Any = nnx.Param,
    batch_axes: Callable[[Any], Any] | None = None,
) -> Objective:  # fmt: skip
    """Return the objective `loss(call(model, batch), batch)` over the variables `wrt`.

    The model's mode is kept: build it from a model in evaluation mode (`model.eval()`) so
    that the curvature uses running statistics and no dropout. Bind it with `bind`.

    Args:
      model: the module; its structure is kept, its variables are not.
      call: (model, batch) -> outputs.
      loss: (outputs, batch) -> scalar.
      mask: (batch) -> which rows count; None: all.
      wrt: filter of the variables that are parameters: that of the `nnx.Optimizer`.
      batch_axes: (batch) -> axes of the examples, see `llqr.Objective`. The model's other state has
        none.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> model.kernel[...] = jnp.ones((2, 1))
      >>> mean_square = objective(
      ...     model, lambda model, x: model(x), lambda z, x: jnp.mean(z**2))
      >>> params = nnx.as_pure(nnx.state(model, nnx.Param))
      >>> float(bind(mean_square, model, jnp.eye(2))(params))
      1.0
    """
    graphdef, own = nnx.split(model, wrt, ...)[:2]
    names = frozenset(leaf_names(nnx.as_pure(own)))

    def forward(params: Any, data: Any) -> Any:
        _check_wrt(names, frozenset(leaf_names(params)), frozenset(leaf_names(data[1])))
        return call(nnx.merge(graphdef, params, data[1]), data[0])

    return Objective(
        forward,
        lambda outputs, data: loss(outputs, data[0]),
        None if mask is None else lambda data: mask(data[0]),
        lambda data: (FIRST if batch_axes is None else batch_axes(data[0]), None),
    )


def _check_wrt(own: frozenset[str], given: frozenset[str], rest: frozenset[str]) -> None:
    """Raise ValueError unless parameters and the model's other state are all of the model."""
    wrong = sorted((given & rest) | (own - given - rest))
    if not wrong:
        return
    raise ValueError(
        f"{len(given)} variables are trained, and the objective is not over them alone: "
        f"{', '.join(wrong[:3])}{', ...' if wrong[3:] else ''} are in both or in neither. Say in "
        "all three places which variables train: nnx.Optimizer(model, tx, wrt=...), "
        "llqr_nnx.objective(..., wrt=...) and llqr_nnx.bind(..., wrt=...)."
    )


def bind(
    objective: Objective, model: nnx.Module, batch: Any, wrt: Any = nnx.Param
) -> BoundObjective:
    """Return the objective on a batch, with the model's other state as data.

    Args:
      objective: from `objective`, with the same `wrt`.
      model: the module, whose batch statistics and keys are taken as they are now.
      batch: what the objective's functions take.
      wrt: as in `objective`.
    """
    return objective.bind((batch, nnx.as_pure(nnx.split(model, wrt, ...)[2])))


def rules(model: nnx.Module, structure: StructureLike = "auto", wrt: Any = nnx.Param) -> list[Rule]:
    """Return the rule table of a structure, with what the model says of its leaves.

    Stacks that `nnx.scan` and `nnx.vmap` made with `transform_metadata={nnx.PARTITION_NAME:
    "layers"}` are known by the names of their axes; embeddings are those of `nnx.Embed`. In other
    leaves names and shapes decide (`structure="auto"`).

    Args:
      model: the module.
      structure: of all matrices; see `llqr.llqr`.
      wrt: filter of the variables that are parameters.

    Example:
      >>> model = nnx.Sequential(nnx.Embed(9, 4, rngs=nnx.Rngs(0)))
      >>> rules(model)[0].matches("layers/0/embedding", (9, 4)), rules(model)[0].seldom
      (True, True)
    """
    paths = [path for path, part in nnx.iter_modules(model) if isinstance(part, nnx.Embed)]
    embeddings = {"/".join(map(str, [*path, "embedding"])) for path in paths}
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    state = nnx.state(model, wrt)
    variables = jax.tree.leaves(state, is_leaf=is_variable)
    table: list[Rule] = []
    for path, variable in zip(leaf_names(nnx.as_pure(state)), variables, strict=True):
        known = variable.get_metadata()
        names = known.get("out_sharding") or known.get("sharding_names") or known.get("sharding")
        stack = layouts.stack_axes(names) if isinstance(names, tuple) else ()
        seldom = path in embeddings or None
        if stack or seldom:
            table += for_leaf(path, structure, stack, seldom=seldom)
    return [*table, *rule_table(structure)]


def refresh(optimizer: nnx.Optimizer, model: nnx.Module, objective: BoundObjective) -> None:
    """Refit the preconditioner inside an `nnx.Optimizer`, in place.

    Args:
      optimizer: around an LLQR transformation.
      model: with the current parameters.
      objective: the curvature objective on the refit batch, from `bind`.

    Raises:
      ValueError: there is no LLQR state in the optimizer.
    """
    state = _refresh(*pure(optimizer, model), objective)
    nnx.update(optimizer.opt_state, nnx.state(state))


def pure(optimizer: nnx.Optimizer, model: nnx.Module) -> tuple[Any, Any, Any]:
    """Return (tx, state, params) as trees of arrays, which functions of `llqr` take.

    Args:
      optimizer: around an LLQR transformation.
      model: with the parameters that it trains.

    Example:
      >>> import llqr, optax
      >>> model = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, llqr.llqr(optax.sgd(0.1)), wrt=nnx.Param)
      >>> print(llqr.inspect(*pure(optimizer, model)))
      leaf    last refit  cos(Ph, h)  smallest  largest   norm
      --------------------------------------------------------
      kernel  none             0.000         1        1  2.449
      where a refit is due, update takes objective=objective.bind(batch), and refuses without
    """
    params = nnx.as_pure(nnx.state(model, optimizer.wrt))
    return optimizer.tx, nnx.as_pure(optimizer.opt_state), params


class Stages(NamedTuple):
    """A staged model of NNX modules.

    Attributes:
      model: its functions take the statistics as their context; `model.bind(statistics)`
        freezes them.
      params: by stage.
      statistics: batch statistics, by stage.
    """

    model: StagedModel
    params: dict[str, Any]
    statistics: dict[str, Any]


def stages(parts: Sequence[tuple[Any, ...]]) -> Stages:
    """Return a staged model from modules and functions in order.

    Args:
      parts: (name, module or function) with x -> x; or (name, part, how) with
        `how(part, x) -> x`, where it acts on some of x only. A module that comes again shares
        its parameters with the stage where it came first. Mode is kept: use modules in
        evaluation mode.

    Raises:
      ValueError: two modules share some of their parameters.
    """
    functions, owners, params, statistics, seen = [], {}, {}, {}, {}
    for name, part, *how in parts:
        call = how[0] if how else _call
        if not isinstance(part, nnx.Module):
            functions.append((name, partial(_apply, partial(call, part))))
            continue
        graphdef, theta, batch, rest = nnx.split(part, nnx.Param, nnx.BatchStat, ...)
        owner = owners.setdefault(id(part), name)
        shared = name != owner
        run = partial(_run, graphdef, rest, call, owner, shared)
        functions.append((name, run, (owner,) if shared else ()))
        if shared:
            continue
        for variable in jax.tree.leaves(theta, is_leaf=lambda x: isinstance(x, nnx.Variable)):
            if seen.setdefault(id(variable), name) != name:
                raise ValueError(f"stages {seen[id(variable)]!r} and {name!r} share parameters.")
        for found, kept in ((theta, params), (batch, statistics)):
            if jax.tree.leaves(found):
                kept[name] = nnx.to_pure_dict(found)
    return Stages(stages_from_functions(functions), params, statistics)


def _call(module: Any, x: Any) -> Any:
    return module(x)


def _apply(function: Callable[[Any], Any], _: Any, x: Any, context: Any = None) -> Any:
    return function(x)


def _run(
    graphdef: Any, rest: Any, how: Any, owner: str, shared: bool, theta: Any, x: Any, context: Any
) -> Any:
    own = theta[owner] if shared else theta
    states = [nnx.State(found or {}) for found in (own, context.get(owner))]
    return how(nnx.merge(graphdef, *states, rest), x)
