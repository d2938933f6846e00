"""The optax transformations: P in front of an optimizer, around one, and a whole one."""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import optax

from llqr.curvature.route import Route
from llqr.errors import check_choice
from llqr.graft import Graft
from llqr.metrics import MetricLike, Reduction
from llqr.objective import BoundObjective
from llqr.preconditioning import Preconditioning, Refresh, Request
from llqr.refit.options import Refit, Streaming
from llqr.sharding import Shard
from llqr.state import check_container
from llqr.structures.rules import StructureLike
from llqr.typing import Number, Params

Precondition: TypeAlias = Literal["gradient", "update"]

BLOCK_SIZE = 1024
"""Of `llqr.streaming`: a QR factorisation of a longer side takes longer than a training step."""


def scale_by_llqr(
    *,
    structure: StructureLike | None = "diagonal",
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
      structure: a name of `llqr.STRUCTURES` (matrices get it, vectors a diagonal), "auto" (e-kfac,
        whose stacks and embeddings are found by names and shapes; None: the same, and `init` says
        what it found), a `Structure`, or a rule table: pairs (match, structure) or `Rule`s, ending
        with the catch-all ("*", structure).
      metric: in what the step is measured; see `llqr.metrics`.
      damping: lambda >= 0, added to the curvature. None: 0; with streaming refits, where it must
        be positive, 1e-4, and 3e-3 from gradients alone.
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
      A transformation whose `update` takes three keywords. `objective`: a
      `BoundObjective`, required unless refresh=False, refits come from outside only or need none
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
    ours = Preconditioning.of(
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
        del extra
        return ours.update(updates, state, params, Request(objective, refresh, apply))

    return optax.GradientTransformationExtraArgs(ours.init, update)


class ChainState(NamedTuple):
    """State of `llqr`."""

    preconditioner: Any  # an LLQRState
    base: Any  # state of the base optimizer


def llqr(
    base: optax.GradientTransformation,
    *,
    structure: StructureLike | None = "diagonal",
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
    check_choice("precondition", precondition, get_args(Precondition))
    base, first = optax.with_extra_args_support(base), precondition == "gradient"
    ours = Preconditioning.of(
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
        base=None if first else base,
    )
    learner = ours.learner
    if not first and (learner.has_momentum or graft == "rms"):
        raise ValueError(
            "precondition='update' lets P act behind the learning rate: "
            + ("streaming refits" if learner.has_momentum else "graft='rms'")
            + " would swallow it, and any schedule or weight decay with it. Use "
            "precondition='gradient', where P comes first."
        )

    def init(params: Params) -> Any:
        learner.check_base(base, params)
        return ChainState(ours.init(params), base.init(params))

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
        check_container(state, ChainState, "llqr")
        request, base_state = Request(objective, refresh, apply), state.base
        act = request.only is None  # else the base is left alone
        if act and not first:
            updates, base_state = base.update(updates, state.base, params, **extra)
        updates, ours_state = ours.update(
            updates, state.preconditioner, params, request, state.base
        )
        if act and first:
            updates, base_state = base.update(updates, state.base, params, **extra)
        return updates, ChainState(ours_state, base_state)

    return optax.GradientTransformationExtraArgs(init, update)


def streaming_llqr(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    structure: StructureLike | None = None,
    metric: MetricLike = "ngd",
    damping: Number | None = None,
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
      damping: lambda > 0, in units of the largest curvature of each block. None: 1e-4, and 3e-3
        with `Streaming(probe="gradient")`.
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
    off = isinstance(weight_decay, int | float) and weight_decay == 0  # an array may be anything
    decay = [] if off else [optax.add_decayed_weights(weight_decay, mask)]
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
