"""The optax transformation: apply P at every step, refit it when due."""

import enum
from collections.abc import Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from llqr import _loops, metrics
from llqr._errors import check_choice, check_integer, check_range, unknown
from llqr._tree import check_inexact, divide, freeze, norm
from llqr._types import Array, Int, Number, Params, PyTree
from llqr.curvature.route import Route
from llqr.metrics import MetricLike, Reduction
from llqr.objective import BoundObjective
from llqr.refit.learn import learn
from llqr.refit.options import Refit, check_options
from llqr.refit.record import RefitInfo, no_refit
from llqr.refit.setup import Blocks, Inputs, Setup, numbers_at
from llqr.structures import plan as plans
from llqr.structures.plan import StructureLike


class _Only(enum.Enum):
    """The value of `refresh` by which `llqr.refresh` asks for a refit and nothing else."""

    REFIT = enum.auto()


Refresh: TypeAlias = bool | Array | _Only | None
Graft: TypeAlias = Literal["none", "global", "block"]
Precondition: TypeAlias = Literal["gradient", "update"]


class LLQRState(NamedTuple):
    """State of `scale_by_llqr`: arrays only."""

    count: Int[Array, ""]  # update calls so far
    # slot -> tree shaped like params: an array of the slot's own shape, or None; a block
    # over several leaves keeps its arrays at its first leaf
    blocks: dict[str, PyTree]
    refit: RefitInfo  # what the last refit did


def scale_by_llqr(
    *,
    structure: StructureLike = "diagonal",
    metric: MetricLike = "ngd",
    damping: Number = 0.0,
    divergence_reduction: Reduction = "sum",
    identity_scaling: float = 1.0,
    max_dim: int = 10_000,
    graft: Graft = "none",
    route: Route | None = None,
    refit: Refit | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by a learned inverse preconditioner P.

    P starts as the identity and is relearned when a refit is due, from the objective that
    is passed to `update`. The direction is preconditioned, not scaled by a learning rate:
    chain an optimizer behind it, or use `llqr.llqr`.

    Args:
      structure: a name of `llqr.STRUCTURES` (matrices get it, vectors a diagonal), a
        `Structure`, or a rule table: pairs (match, structure) or `Rule`s, ending with the
        catch-all ("*", structure).
      metric: in what the step is measured; see `llqr.metrics`.
      damping: lambda >= 0, added to the curvature.
      divergence_reduction: "sum" or "mean" of the divergence over rows; "unit" divides C by
        its largest eigenvalue, so that damping and the refit's learning rate carry over
        between batch sizes, metrics and models.
      identity_scaling: sigma > 0; P is stored as sigma P. It changes how far a refit moves.
      max_dim: a dense side longer than this becomes diagonal.
      graft: "global" gives P g the length of g, "block" each block of P g that of its block
        of g, so that learning rates keep their meaning; "none" leaves P g as it is.
      route: how curvature products are computed (memory, chunks); never changes a value.
      refit: when and how P is learned.

    Returns:
      A transformation whose `update` takes three more keywords. `objective`: a
      `BoundObjective`, required unless refresh=False. `refresh`: None follows the schedule,
      a Python bool decides at trace time, a bool array at run time. `apply`, a Python bool:
      False leaves the updates as they are, for steps that use P in another way
      (`precondition`). Unknown keywords are ignored. Called inside `jit`, the refit runs
      inside it too; on CPU with convolutions, pass refresh=False there and call
      `llqr.refresh` outside.

    Raises:
      ValueError: unknown name or value out of range.

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """
    refit = Refit() if refit is None else refit
    route = Route() if route is None else route
    _check_options(damping, divergence_reduction, identity_scaling, max_dim, graft, refit)
    table = plans.rule_table(structure)
    resolved = metrics.resolve(metric)
    check_options(refit, resolved, divergence_reduction, route)
    frozen_metric = freeze(resolved)
    slots = plans.slots(table)

    def setup_of(plan: plans.Plan, base: optax.GradientTransformation | None) -> Setup:
        return Setup(
            plan, frozen_metric, divergence_reduction, identity_scaling, refit, route, base
        )

    def init(params: Params) -> Any:
        check_inexact(params)
        plan = plans.make_plan(params, table, max_dim)
        setup_of(plan, None).check()
        if (recorder := _recorder.get()) is not None:
            recorder.append(Visited(plan, identity_scaling))
        blocks = plans.identity(plan, identity_scaling)
        packed = plans.pack(plan, blocks, params, slots)
        return LLQRState(jnp.zeros((), jnp.int32), packed, no_refit(len(plan)))

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        objective: BoundObjective | None = None,
        refresh: Refresh = None,
        apply: bool = True,
        base: tuple[optax.GradientTransformation, Any] | None = None,
        **extra: Any,
    ) -> tuple[Params, Any]:
        del extra
        plan = plans.make_plan(updates, table, max_dim)
        blocks, info = plans.unpack(plan, state.blocks, updates), state.refit
        if refresh is not False:
            bound = _check_refit_inputs(objective, params, refresh)
            optimizer, base_state = (None, ()) if base is None else base
            setup = setup_of(plan, optimizer)

            def run(blocks: Blocks, info: RefitInfo) -> tuple[Blocks, RefitInfo]:
                numbers = numbers_at(refit, state.count, damping)
                return learn(setup, Inputs(blocks, info, params, bound, numbers, base_state))

            due = refit.is_due(state.count) if refresh is None else refresh
            due = True if due is _Only.REFIT else due
            blocks, info = _loops.when(due, run, blocks, info)
        packed = plans.pack(plan, blocks, updates, slots)
        if refresh is _Only.REFIT:
            return updates, LLQRState(state.count, packed, info)
        if apply:
            scaled = _product(plan, blocks, identity_scaling, updates)
            updates = _grafted(plan, graft, scaled, updates)
        return updates, LLQRState(_increment(state.count), packed, info)

    return optax.GradientTransformationExtraArgs(init, update)


class ChainState(NamedTuple):
    """State of `llqr`."""

    preconditioner: Any  # an LLQRState
    base: Any  # state of the base optimizer


def llqr(
    base: optax.GradientTransformation,
    *,
    structure: StructureLike = "diagonal",
    metric: MetricLike = "ngd",
    damping: Number = 0.0,
    divergence_reduction: Reduction = "sum",
    identity_scaling: float = 1.0,
    max_dim: int = 10_000,
    graft: Graft = "none",
    precondition: Precondition = "gradient",
    route: Route | None = None,
    refit: Refit | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax optimizer: it sees P g in place of the gradient g.

    With precondition="update", P multiplies its updates instead.

    Args:
      base: any optax optimizer. In front of Adam, whose steps do not depend on the scale of
        each gradient entry, a diagonal P has almost no effect.
      structure: see `scale_by_llqr`, as for all that follow.
      metric: in what the step is measured.
      damping: added to the curvature.
      divergence_reduction: "sum", "mean" or "unit".
      identity_scaling: sigma.
      max_dim: a dense side longer than this becomes diagonal.
      graft: length of P g.
      precondition: "gradient": `base` sees P g; "update": P multiplies the update of `base`
        instead, the way to combine P with Adam. With Refit(probe="gradient") it is then learned
        on the update that `base` would make of the refit's gradient; random probes do not
        depend on `base`.
      route: how curvature products are computed.
      refit: when and how P is learned.

    Returns:
      A transformation like `base` whose `update` also takes `objective`, `refresh` and
      `apply` (see `scale_by_llqr`). All other keywords, and none of these, reach `base`:
      line searches are strict about theirs.

    Example:
      >>> import jax, jax.numpy as jnp, optax, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda params, batch: batch["x"] @ params["w"],
      ...     loss=lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2))
      >>> params = {"w": jnp.ones((3, 2))}
      >>> batch = {"x": jnp.eye(3), "y": jnp.zeros((3, 2))}
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac", metric="gauss_newton")
      >>> state = tx.init(params)
      >>> loss, grads = jax.value_and_grad(objective)(params, batch)
      >>> updates, state = tx.update(grads, state, params, objective=objective.bind(batch))
      >>> params = optax.apply_updates(params, updates)
      >>> bool(objective(params, batch) < loss)
      True

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """
    preconditioner = scale_by_llqr(
        structure=structure,
        metric=metric,
        damping=damping,
        divergence_reduction=divergence_reduction,
        identity_scaling=identity_scaling,
        max_dim=max_dim,
        graft=graft,
        route=route,
        refit=refit,
    )
    check_choice("precondition", precondition, get_args(Precondition))
    base = optax.with_extra_args_support(base)

    def init(params: Params) -> Any:
        return ChainState(preconditioner.init(params), base.init(params))

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        objective: BoundObjective | None = None,
        refresh: Refresh = None,
        apply: bool = True,
        **extra: Any,
    ) -> tuple[Params, Any]:
        ours = {"objective": objective, "refresh": refresh, "apply": apply}
        if precondition == "gradient":
            updates, learned = preconditioner.update(updates, state.preconditioner, params, **ours)
            if refresh is _Only.REFIT:
                return updates, ChainState(learned, state.base)
            updates, base_state = base.update(updates, state.base, params, **extra)
            return updates, ChainState(learned, base_state)
        if refresh is not _Only.REFIT:
            updates, base_state = base.update(updates, state.base, params, **extra)
        else:
            base_state = state.base
        updates, learned = preconditioner.update(
            updates, state.preconditioner, params, base=(base, state.base), **ours
        )
        return updates, ChainState(learned, base_state)

    return optax.GradientTransformationExtraArgs(init, update)


def refresh(
    tx: optax.GradientTransformation, state: Any, params: Params, objective: BoundObjective
) -> Any:
    """Refit P now, from outside the training step.

    The way to refit on CPU, and wherever the refit's data differs from the training batch:
    call the training step with refresh=False and this function when a refit is due. The
    count and the state of every other transformation stay as they are.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      state: its state.
      params: the current parameters.
      objective: the curvature objective on the refit batch.

    Returns:
      The state with new blocks.

    Raises:
      ValueError: there is no LLQR state in `state`.
    """
    tx = optax.with_extra_args_support(tx)
    zeros = jax.tree.map(jnp.zeros_like, params)
    find(state)
    _, new = tx.update(zeros, state, params, objective=objective, refresh=_Only.REFIT)

    return jax.tree.map(
        lambda old, new: new if _is_ours(old) else old, state, new, is_leaf=_is_ours
    )


def find(state: Any) -> LLQRState:
    """Return the (first) LLQR state inside an optimizer's state.

    Raises:
      ValueError: there is none.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(x)]
    if not found:
        raise ValueError(
            "no LLQR state found: the optimizer must contain llqr.llqr or llqr.scale_by_llqr."
        )
    return found[0]


def _is_ours(x: Any) -> bool:
    return isinstance(x, LLQRState)


def precondition(tx: optax.GradientTransformation, state: Any, vector: Params) -> Params:
    """Return P v for the (first) preconditioner inside an optimizer, without a graft.

    `functools.partial(llqr.precondition, tx, state)` is the product that `llqr.sam` takes as
    `precondition=`.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      state: its state.
      vector: v, a tree like the parameters.

    Raises:
      ValueError: there is no LLQR transformation in `tx`.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac")
      >>> params = {"w": jnp.ones((3, 2))}
      >>> llqr.precondition(tx, tx.init(params), params)["w"].tolist()  # P is I before a refit
      [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    found = find(state)
    _check_unmasked(found.blocks)
    plan, scaling = _visited(tx, vector)[0]
    blocks = plans.unpack(plan, found.blocks, vector)
    return _product(plan, blocks, scaling, vector)


def blocks(
    tx: optax.GradientTransformation, state: Any, params: Params
) -> dict[str, dict[str, Array]]:
    """Return the arrays of the (first) preconditioner inside an optimizer, to read or save them.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      state: its state.
      params: the parameters, or their shapes.

    Returns:
      Path of a block's first leaf -> slot ("left", "right", "spectrum", ...) -> array; what the
      arrays stand for is in `llqr.structures.catalogue`. P is stored as sigma P.

    Raises:
      ValueError: there is no LLQR transformation in `tx`.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac")
      >>> params = {"w": jnp.ones((3, 2))}
      >>> {slot: a.shape for slot, a in llqr.blocks(tx, tx.init(params), params)["w"].items()}
      {'left': (3, 3), 'right': (2, 2)}
    """
    plan, found = _visited(tx, params)[0].plan, find(state)
    arrays = plans.unpack(plan, found.blocks, params)
    return {block.names[0]: dict(own) for block, own in zip(plan, arrays, strict=True)}


def install(
    tx: optax.GradientTransformation,
    state: Any,
    params: Params,
    blocks: Mapping[str, Mapping[str, Array]],
) -> Any:
    """Return the state with other arrays in its (first) preconditioner; the rest stays.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      state: its state.
      params: the parameters, or their shapes.
      blocks: as `llqr.blocks` gives them; blocks and slots that are left out stay.

    Raises:
      ValueError: there is no LLQR transformation in `tx`; or an array for a block or slot that
        does not exist, of another shape, or not finite.
    """
    plan, found = _visited(tx, params)[0].plan, find(state)
    known = {block.names[0]: i for i, block in enumerate(plan)}
    arrays = list(plans.unpack(plan, found.blocks, params))
    for name, slots in blocks.items():
        if name not in known:
            raise ValueError(unknown("block (path of its first leaf)", name, known))
        own = arrays[known[name]]
        for slot, array in slots.items():
            if slot not in own:
                raise ValueError(f"block {name!r}: {unknown('slot', slot, own)}")
            if jnp.shape(array) != own[slot].shape:
                raise ValueError(
                    f"block {name!r}, slot {slot!r}: the array must have the shape "
                    f"{own[slot].shape}, not {jnp.shape(array)}."
                )
            if not _loops.is_traced(array) and not jnp.all(jnp.isfinite(array)):
                raise ValueError(f"block {name!r}, slot {slot!r}: the array is not finite.")
        cast = {slot: jnp.asarray(array, own[slot].dtype) for slot, array in slots.items()}
        arrays[known[name]] = own | cast
    packed = plans.pack(plan, arrays, params, tuple(found.blocks))
    new = found._replace(blocks=packed)
    return jax.tree.map(lambda x: new if x is found else x, state, is_leaf=_is_ours)


class Visited(NamedTuple):
    """What a composed transformation does not show of an LLQR transformation inside."""

    plan: plans.Plan
    identity_scaling: float


_recorder: ContextVar[list[Visited] | None] = ContextVar("recorder", default=None)


def plans_of(tx: optax.GradientTransformation, params: Params) -> tuple[plans.Plan, ...]:
    """Return the plan of every LLQR transformation inside `tx`, however it is composed.

    A composed optax transformation does not show its parts; its `init` visits them all.
    """
    return tuple(visited.plan for visited in _visited(tx, params))


def _visited(tx: optax.GradientTransformation, params: Params) -> tuple[Visited, ...]:
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
    return _visit(tx, treedef, shapes)


@lru_cache(maxsize=64)
def _visit(tx: Any, treedef: Any, shapes: tuple[Any, ...]) -> tuple[Visited, ...]:
    found: list[Visited] = []
    token = _recorder.set(found)
    try:
        # A new function each time: eval_shape does not trace one that it knows again.
        jax.eval_shape(lambda p: tx.init(p), treedef.unflatten(shapes))
    finally:
        _recorder.reset(token)
    return tuple(found)


def _product(plan: plans.Plan, blocks: Blocks, identity_scaling: float, vector: Params) -> Params:
    """P v, where sigma P is stored."""
    product = plans.multiply(plan, blocks, vector)
    if identity_scaling == 1:
        return product
    return jax.tree.map(lambda u: (u / identity_scaling).astype(u.dtype), product)


def _grafted(plan: plans.Plan, graft: Graft, scaled: Params, updates: Params) -> Params:
    """Give P g the length of g, as a whole or block by block; zero stays zero."""
    if graft == "none":
        return scaled
    ps, gs = jax.tree.leaves(scaled), jax.tree.leaves(updates)
    groups = [block.leaves for block in plan] if graft == "block" else [range(len(ps))]
    out = list(ps)
    for group in groups:
        p, g = [ps[i] for i in group], [gs[i] for i in group]
        have, want = norm(p), norm(g)
        ratio = divide(want, have, 1.0)
        for i, x in zip(group, p, strict=True):
            out[i] = (ratio * x).astype(x.dtype)
    return jax.tree.unflatten(jax.tree.structure(scaled), out)


def _check_options(
    damping: Any,
    divergence_reduction: Any,
    identity_scaling: Any,
    max_dim: Any,
    graft: Any,
    refit: Any,
) -> None:
    if not isinstance(refit, Refit):
        raise TypeError(f"refit must be an llqr.Refit, got {refit!r}.")
    if callable(damping):
        raise TypeError(
            "damping must be a number or an array, not a function; for a schedule wrap the "
            "transformation: optax.inject_hyperparams(llqr.scale_by_llqr, static_args=...)."
        )
    for name, value in (("identity_scaling", identity_scaling), ("max_dim", max_dim)):
        if isinstance(value, jax.Array):
            raise TypeError(
                f"{name} must be a Python number: it decides what is compiled. Under "
                f"optax.inject_hyperparams, name it in static_args."
            )
    check_range("damping", damping, low=0)
    check_range("identity_scaling", identity_scaling, low=0, open_low=True)
    check_integer("max_dim", max_dim, low=1)
    check_choice("divergence_reduction", divergence_reduction, get_args(Reduction))
    check_choice("graft", graft, get_args(Graft))


def _check_refit_inputs(objective: Any, params: Any, refresh: Any) -> BoundObjective:
    if isinstance(refresh, str):
        raise TypeError(f"refresh must be None, a bool or a bool array, got {refresh!r}.")
    if objective is None:
        raise ValueError(
            "update() needs objective=objective.bind(batch) where a refit can happen. Pass it, "
            "or pass refresh=False and refit with llqr.refresh(tx, state, params, objective)."
        )
    if not isinstance(objective, BoundObjective):
        raise TypeError(
            f"objective must be an llqr.Objective bound to a batch, objective.bind(batch); got "
            f"{type(objective).__name__}."
        )
    if params is None:
        raise ValueError("update() needs params where a refit can happen.")
    _check_unmasked(params)
    return objective


def _check_unmasked(tree: Any) -> None:
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    if any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked))):
        raise ValueError(
            "optax.masked and optax.partition hide parameters, and LLQR needs them all. Put "
            "LLQR outside, llqr.llqr(optax.partition(...)), and choose leaves by its rules."
        )


def _increment(count: Int[Array, ""]) -> Int[Array, ""]:
    return jnp.asarray(optax.safe_increment(count))
