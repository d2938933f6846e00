"""The optax transformation: apply P at every step, refit it when due."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from llqr import _loops, _replicas, metrics
from llqr.curvature.route import Route
from llqr.errors import NoObjectiveError, check_choice, check_integer, check_range
from llqr.graft import Graft, grafted
from llqr.metrics import MetricLike, Reduction
from llqr.objective import BoundObjective
from llqr.refit import methods
from llqr.refit.options import Refit, check_options
from llqr.refit.record import RefitInfo, no_refit
from llqr.refit.setup import Blocks
from llqr.refit.stream import (
    DAMPING,
    SQUARES,
    Streaming,
    StreamState,
    check_streamable,
    kind_of,
)
from llqr.sharding import Shard, place
from llqr.state import LLQRState, blocks_of, check_container, note, product
from llqr.structures import catalogue
from llqr.structures import plan as plans
from llqr.structures.rules import Rule, StructureLike, rule_table, slots
from llqr.tree import all_like, check_alike, check_inexact, freeze
from llqr.typing import Array, Bool, Int, Number, Params, PyTree


@dataclass(frozen=True, eq=False)
class OnlyRefit:
    """The value of `refresh` by which `llqr.refresh` asks for a refit and nothing else.

    Attributes:
      reached: what each preconditioner that heard of it did.
    """

    reached: list[RefitInfo] = field(default_factory=list)


Refresh: TypeAlias = bool | Bool[Array, ""] | OnlyRefit | None
Precondition: TypeAlias = Literal["gradient", "update"]

BLOCK_SIZE = 1024
"""Of `llqr.streaming`: a QR factorisation of a longer side takes longer than a training step."""


def scale_by_llqr(
    *,
    structure: StructureLike = "diagonal",
    metric: MetricLike = "ngd",
    damping: Number | None = None,
    divergence_reduction: Reduction | None = None,
    identity_scaling: float = 1.0,
    max_dim: int = 10_000,
    block_size: int | None = None,
    graft: Graft | None = None,
    route: Route | None = None,
    refit: Refit | Streaming | None = None,
    shard: Shard | None = "params",
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
      damping: lambda >= 0, added to the curvature. None: 0, and 1e-4 with streaming refits,
        where it must be positive.
      divergence_reduction: "sum" or "mean" of the divergence over rows; "unit" divides C by
        its largest eigenvalue, so that damping and the refit's learning rate carry over
        between batch sizes, metrics and models. None: "sum", and "unit" with streaming refits.
      identity_scaling: sigma > 0; P is stored as sigma P. It changes how far a refit moves.
      max_dim: a dense side longer than this becomes diagonal.
      block_size: a dense side longer than this, and not than `max_dim`, is cut into blocks of one
        length, at most this, each with arrays of its own: less memory and time, and no curvature
        between blocks. None: none is cut.
      graft: "global" gives P g the length of g, "block" each block of P g that of its block
        of g, so that learning rates keep their meaning; "rms" gives each leaf of P g a root
        mean square of 0.2 (of 0.05, where the leaf is no matrix), so that those of Adam carry
        over; "none" leaves P g as it is. None: "none", and "rms" with streaming refits, which
        weigh entries behind it: by up to 4.4 where gradients agree, see `llqr.Streaming`.
      route: how curvature products are computed (memory, chunks); never changes a value.
      refit: when and how P is learned: `llqr.Refit`, the published method, in refits for which
        training stops; or `llqr.Streaming`, a little at every step. With the latter, updates
        must be the gradients themselves, and what comes out is P m, m their momentum.
      shard: where P lies on a mesh: "params": its arrays like the parameters, by their axes, and
        every device works on what is not spread; "blocks": like matrices together in one array, of
        which each device holds, multiplies and learns some, so that a step brings their gradients
        there and their updates back; None: on every device. Nothing changes on one device but, with
        "blocks", how the state is arranged. `llqr.state_shardings` says where the arrays belong.

    Returns:
      A transformation whose `update` takes three more keywords. `objective`: a
      `BoundObjective`, required unless refresh=False or refits come from outside only
      (`Refit(every=None)`). `refresh`: None follows the schedule,
      a Python bool decides at trace time, a bool array at run time. `apply`, a Python bool:
      False leaves the updates as they are, for steps that use P in another way
      (`precondition`). Unknown keywords are ignored. Called inside `jit`, the refit runs
      inside it too; on CPU with convolutions, pass refresh=False there and call
      `llqr.refresh` outside.

    Raises:
      ValueError: unknown name or value out of range; in `update`, a missing objective or
        params where a refit can happen.
      TypeError: an option of a wrong type, such as a schedule of the damping; in `init`, a
        parameter that is not floating-point.

    Example:
      >>> import jax, jax.numpy as jnp, optax, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda w, x: x @ w, loss=lambda z, x: jnp.mean((z - 1.0) ** 2))
      >>> w, x = jnp.zeros((2, 1)), jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> preconditioner = llqr.scale_by_llqr(structure="diagonal", metric="gauss_newton")
      >>> tx = optax.chain(preconditioner, optax.scale_by_learning_rate(0.1))
      >>> state, grads = tx.init(w), jax.grad(objective)(w, x)
      >>> updates, state = tx.update(grads, state, w, objective=objective.bind(x))
      >>> updates, state = tx.update(grads, state, w, refresh=False)  # P as it is
      >>> int(llqr.find(state).count), int(llqr.find(state).refit.refits)
      (2, 1)

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """
    refit = Refit() if refit is None else refit
    route = Route() if route is None else route
    streams = isinstance(refit, Streaming)
    damping = (DAMPING if streams else 0.0) if damping is None else damping
    reduction = divergence_reduction or ("unit" if streams else "sum")
    graft = graft or ("rms" if streams else "none")
    _check_options(damping, reduction, identity_scaling, max_dim, block_size, graft, refit, shard)
    table, resolved = rule_table(structure), metrics.resolve(metric)
    names = slots(table)
    method = _method(table, resolved, damping, reduction, identity_scaling, route, refit)

    def plan_of(params: Params) -> plans.Plan:
        plan = plans.make_plan(params, table, max_dim, block_size)
        return plans.owned(plan) if shard == "blocks" else plan

    def init(params: Params) -> Any:
        check_inexact(params)
        plan = plan_of(params)
        stream = method.init(plan, params, names)
        note(plan, identity_scaling, shard)
        blocks = plans.identity(plan, identity_scaling)
        packed = plans.pack(plan, blocks, params, names)
        info = no_refit(plans.size(plan))
        state = LLQRState(jnp.zeros((), jnp.int32), packed, info, stream)
        return place(plan, shard, state, params)

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
        check_container(state, LLQRState, "scale_by_llqr")
        check_inexact(updates)
        if params is not None:
            check_alike(updates, params, "the updates", "the parameters")
        if streams != isinstance(state.stream, StreamState):
            ways = ("llqr.Streaming", "llqr.Refit")
            raise ValueError(
                f"the optimizer has refit={ways[not streams]}(...), and the state is of one with "
                f"{ways[streams]}(...). Begin anew with tx.init(params)."
            )
        if isinstance(refit, Streaming) and "spectrum" in names:
            weighs = refit.signal_decay is not None
            if weighs != (SQUARES in state.stream.statistics):
                raise ValueError(
                    f"the optimizer has Streaming(signal_decay={refit.signal_decay!r}), and the "
                    f"state is of one with{'out' * weighs} weights by signal: give signal_decay="
                    f"{'None' if weighs else '0.95'} to go on with it (a state of before 0.2.0 "
                    "has no weights), or begin anew with tx.init(params)."
                )
        plan = plan_of(updates)
        blocks, info, stream = blocks_of(plan, state, updates), state.refit, state.stream
        only = refresh if isinstance(refresh, OnlyRefit) else None
        observed, seen = updates if only is None else None, []
        if observed is not None:
            stream, seen = method.observe(plan, blocks, stream, observed, state.count)
        if refresh is None and refit.every is None:  # from outside only
            refresh = False
        if refresh is not False:
            bound = _check_refit_inputs(objective, params, refresh)
            _replicas.check(route.axis_name)

            def run(*held: Any) -> tuple[Blocks, RefitInfo, Any, list[Array]]:
                return method.refit(plan, held, params, bound, state.count, base, observed)

            due = refit.is_due(state.count) if refresh is None else refresh
            due = True if isinstance(due, OnlyRefit) else due
            held = _loops.when(due, run, blocks, info, stream, seen)
            blocks, info, stream, seen = held
        packed = all_like(plans.pack(plan, blocks, updates, names), state.blocks)
        if only is not None:
            only.reached.append(info)
            stream = all_like(stream, state.stream)
            return updates, LLQRState(state.count, packed, info, stream)
        scaled = full = vector = updates
        if method.scale is not None:
            found = method.scale(plan, blocks, stream, seen, updates, state.count)
            stream, scaled, full, vector = found
        elif apply:
            scaled = full = product(plan, blocks, identity_scaling, updates)
        stream = all_like(stream, state.stream)
        if apply:
            scaled = grafted(plan, graft, scaled, vector, full)
            updates = jax.tree.map(lambda u, g: u.astype(g.dtype), scaled, updates)
        return updates, LLQRState(_increment(state.count), packed, info, stream)

    return optax.GradientTransformationExtraArgs(init, update)


def _method(
    table: Sequence[Rule], metric: PyTree, damping: Number, reduction: Reduction, sigma: float,
    route: Route, refit: Refit | Streaming,
) -> methods.Method:  # fmt: skip
    """How P is learned, its options checked."""
    if isinstance(refit, Streaming):
        structures = [catalogue.get(rule.structure) for rule in table]
        check_streamable(structures, metric)
        two_sided = any(kind_of(structure) == "sides" for structure in structures)
        return methods.streamed(freeze(metric), damping, reduction, two_sided, route, refit)
    check_options(refit, metric, reduction, route)
    return methods.learned(freeze(metric), damping, reduction, sigma, route, refit)


class ChainState(NamedTuple):
    """State of `llqr`."""

    preconditioner: Any  # an LLQRState
    base: Any  # state of the base optimizer


def llqr(
    base: optax.GradientTransformation,
    *,
    structure: StructureLike = "diagonal",
    metric: MetricLike = "ngd",
    damping: Number | None = None,
    divergence_reduction: Reduction | None = None,
    identity_scaling: float = 1.0,
    max_dim: int = 10_000,
    block_size: int | None = None,
    graft: Graft | None = None,
    precondition: Precondition = "gradient",
    route: Route | None = None,
    refit: Refit | Streaming | None = None,
    shard: Shard | None = "params",
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
      block_size: one longer than this is cut into blocks.
      graft: length of P g; not "rms" with precondition="update", which would swallow the
        learning rate inside `base`.
      precondition: "gradient": `base` sees P g; "update": P multiplies the update of `base`
        instead, the way to combine P with Adam. With Refit(probe="gradient") it is then learned
        on the update that `base` would make of the refit's gradient; random probes do not
        depend on `base`.
      route: how curvature products are computed.
      refit: when and how P is learned. With `llqr.Streaming`, whose P m takes the place of the
        gradient, `base` is what comes after it: `optax.sgd(rate)`, or decoupled weight decay
        and rate, `optax.chain(optax.add_decayed_weights(w), optax.scale_by_learning_rate(rate))`
        (`llqr.streaming` is that chain). A base with a momentum or second moments of its own is
        refused, and so is precondition="update".
      shard: where P lies on a mesh.

    Returns:
      A transformation like `base` whose `update` also takes `objective`, `refresh` and
      `apply` (see `scale_by_llqr`). All other keywords, and none of these, reach `base`:
      line searches are strict about theirs.

    Raises:
      ValueError: as `scale_by_llqr`; or options that would swallow the learning rate; in
        `init`, a base that averages gradients behind streaming refits.
      TypeError: as `scale_by_llqr`.

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
        block_size=block_size,
        graft=graft,
        route=route,
        refit=refit,
        shard=shard,
    )
    check_choice("precondition", precondition, get_args(Precondition))
    base, streams = optax.with_extra_args_support(base), isinstance(refit, Streaming)
    if precondition == "update" and (streams or graft == "rms"):
        raise ValueError(
            "precondition='update' lets P act behind the learning rate: "
            + ("streaming refits" if streams else "graft='rms'")
            + " would swallow it, and any schedule or weight decay with it. Use "
            "precondition='gradient', where P comes first."
        )

    def init(params: Params) -> Any:
        base_state = base.init(params)
        if streams:
            _check_plain(base_state, refit)
        return ChainState(preconditioner.init(params), base_state)

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
        only = isinstance(refresh, OnlyRefit)
        check_container(state, ChainState, "llqr")
        if precondition == "gradient":
            updates, learned = preconditioner.update(updates, state.preconditioner, params, **ours)
            if only:
                return updates, ChainState(learned, state.base)
            updates, base_state = base.update(updates, state.base, params, **extra)
            return updates, ChainState(learned, base_state)
        if not only:
            updates, base_state = base.update(updates, state.base, params, **extra)
        else:
            base_state = state.base
        updates, learned = preconditioner.update(
            updates, state.preconditioner, params, base=(base, state.base), **ours
        )
        return updates, ChainState(learned, base_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_plain(base_state: Any, refit: Any) -> None:
    """Raise ValueError if the base behind a streaming P averages gradients itself."""
    averages = (optax.ScaleByAdamState, optax.ScaleByRmsState, optax.TraceState)
    is_one = lambda x: isinstance(x, averages)  # noqa: E731
    for found in filter(is_one, jax.tree.leaves(base_state, is_leaf=is_one)):
        if isinstance(found, optax.TraceState) and refit.momentum == 0:
            continue
        raise ValueError(
            f"the base optimizer keeps a {type(found).__name__}, but with streaming refits P "
            "multiplies the momentum and gives each leaf its length: what follows is the "
            "learning rate and weight decay alone. Use llqr.streaming(rate, weight_decay=w), "
            "optax.sgd(rate), or optax.chain(optax.add_decayed_weights(w), "
            "optax.scale_by_learning_rate(rate))."
        )


def streaming_llqr(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    structure: StructureLike = "e-kfac",
    metric: MetricLike = "ngd",
    damping: Number = DAMPING,
    max_dim: int = 10_000,
    block_size: int | None = BLOCK_SIZE,
    graft: Graft = "rms",
    route: Route | None = None,
    refit: Streaming | None = None,
    shard: Shard | None = "params",
) -> optax.GradientTransformationExtraArgs:
    """Return the whole optimizer with streaming refits: `llqr.streaming`.

    Nesterov momentum -> P -> graft -> decoupled weight decay -> learning rate. Learning rates and
    weight decays of AdamW are a good start.

    Args:
      learning_rate: a number or a schedule.
      weight_decay: decoupled, as in AdamW: multiplied by the learning rate.
      mask: of the parameters that decay, as in `optax.add_decayed_weights`.
      structure: see `scale_by_llqr`, as for all that follow.
      metric: from which labels can be drawn.
      damping: lambda > 0, in units of the largest curvature of each block.
      max_dim: a dense side longer than this becomes diagonal: a fixed identity.
      block_size: one longer than this is cut into blocks of at most this; None: it is not.
      graft: length of P m.
      route: how the network is linearised.
      refit: when P follows.
      shard: where P lies on a mesh.

    Returns:
      A transformation as from `llqr.llqr`: `update` takes `objective` where a refit can happen,
      and `refresh`.

    Raises:
      ValueError: unknown name or value out of range; in `init`, a structure or a metric that
        cannot be streamed.
      TypeError: an option of a wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda w, x: jnp.tanh(x @ w), loss=lambda z, x: jnp.mean((z - 0.5) ** 2))
      >>> w, x = jnp.zeros((3, 2)), jnp.eye(3)
      >>> tx = llqr.streaming(0.1, metric="gaussian")
      >>> state = tx.init(w)
      >>> for step in range(100):
      ...     loss, grads = jax.value_and_grad(objective)(w, x)
      ...     updates, state = tx.update(grads, state, w, objective=objective.bind(x))
      ...     w = jax.tree.map(jnp.add, w, updates)
      >>> bool(loss < 1e-3)
      True

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """
    decay = [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []
    return llqr(
        optax.chain(*decay, optax.scale_by_learning_rate(learning_rate)),
        structure=structure,
        metric=metric,
        damping=damping,
        max_dim=max_dim,
        block_size=block_size,
        graft=graft,
        route=route,
        refit=Streaming() if refit is None else refit,
        shard=shard,
    )


def _check_options(
    damping: Any,
    divergence_reduction: Any,
    identity_scaling: Any,
    max_dim: Any,
    block_size: Any,
    graft: Any,
    refit: Any,
    shard: Any,
) -> None:
    if not isinstance(refit, Refit | Streaming):
        raise TypeError(f"refit must be an llqr.Refit or an llqr.Streaming, got {refit!r}.")
    if isinstance(refit, Streaming):
        check_range("damping (with streaming refits)", damping, low=0, open_low=True)
        if identity_scaling != 1:
            raise ValueError(
                "identity_scaling belongs to refits that learn by steps (llqr.Refit): leave it at "
                f"1 with streaming refits, not {identity_scaling!r}."
            )
    if callable(damping):
        raise TypeError(
            "damping must be a number or an array, not a function; for a schedule wrap the "
            "transformation: optax.inject_hyperparams(llqr.scale_by_llqr, static_args=...)."
        )
    for name, value in (
        ("identity_scaling", identity_scaling), ("max_dim", max_dim), ("block_size", block_size),
    ):  # fmt: skip
        if isinstance(value, jax.Array):
            raise TypeError(
                f"{name} must be a Python number: it decides what is compiled. Under "
                f"optax.inject_hyperparams, name it in static_args."
            )
    check_range("damping", damping, low=0)
    check_range("identity_scaling", identity_scaling, low=0, open_low=True)
    check_integer("max_dim", max_dim, low=1)
    if block_size is not None:
        check_integer("block_size", block_size, low=1)
    check_choice("divergence_reduction", divergence_reduction, get_args(Reduction))
    check_choice("graft", graft, get_args(Graft))
    if shard is not None:
        check_choice("shard", shard, get_args(Shard))


def _check_refit_inputs(objective: Any, params: Any, refresh: Any) -> BoundObjective:
    if isinstance(refresh, str):
        raise TypeError(f"refresh must be None, a bool or a bool array, got {refresh!r}.")
    if objective is None:
        raise NoObjectiveError(
            "update() needs objective=objective.bind(batch) where a refit can happen, and none "
            "arrived. Pass it, or pass refresh=False and refit with llqr.refresh(tx, state, "
            "params, objective). Where what calls update() passes no keywords on (Flax Linen's "
            "TrainState, training loops of other libraries), make refits come from outside only: "
            "refit=llqr.Refit(every=None), and llqr.refresh when one is due."
        )
    if not isinstance(objective, BoundObjective):
        raise TypeError(
            f"objective must be an llqr.Objective bound to a batch, objective.bind(batch); got "
            f"{type(objective).__name__}."
        )
    if params is None:
        raise ValueError("update() needs params where a refit can happen.")
    check_unmasked(params)
    return objective


def check_unmasked(tree: Any) -> None:
    """Raise ValueError if a wrapper of optax hides leaves of a tree like the parameters."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    if any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked))):
        raise ValueError(
            "optax.masked and optax.partition hide parameters, and LLQR needs them all. Put "
            "LLQR outside, llqr.llqr(optax.partition(...)), and choose leaves by its rules."
        )


def _increment(count: Int[Array, ""]) -> Int[Array, ""]:
    return jnp.asarray(optax.safe_increment(count))
