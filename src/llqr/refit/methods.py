"""The two ways to learn P, published refits and streaming ones, behind one interface."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from llqr.curvature.route import Route
from llqr.metrics import Reduction
from llqr.objective import BoundObjective
from llqr.refit import streaming
from llqr.refit.learn import learn
from llqr.refit.options import Refit
from llqr.refit.record import RefitInfo
from llqr.refit.setup import Blocks, Inputs, Setup, numbers_at
from llqr.refit.stream import Streaming, StreamSetup
from llqr.structures import plan as plans
from llqr.tree import Frozen
from llqr.typing import Array, Int, Number, Params


class Method(NamedTuple):
    """How P is learned: all that differs between published and streaming refits."""

    # -> what it remembers besides P; raises where a block cannot be learned so
    init: Callable[[plans.Plan, Params, tuple[str, ...]], Any]
    # (plan, blocks, that, updates, count) -> that, and what `scale` needs of the updates
    observe: Callable[..., tuple[Any, list[Array]]]
    # (plan, blocks, that, what it needs, updates, count) -> that, the step, and trees as long as P
    # v and v; None: the step is P of the updates
    scale: Callable[..., tuple[Any, Params, Params, Params]] | None
    # (plan, (blocks, info, that, what `scale` needs), params, objective, count, base, updates or
    # None) -> blocks, info, that, what `scale` needs
    refit: Callable[..., tuple[Blocks, RefitInfo, Any, list[Array]]]


def learned(
    metric: Frozen, damping: Number, reduction: Reduction, sigma: float, route: Route, refit: Refit
) -> Method:
    """Return the published way: refits that minimise Phi, for which training stops.

    Args:
      metric: a resolved metric, or a tree of them, flattened by `freeze`.
      damping: lambda >= 0.
      reduction: over rows.
      sigma: P is stored as sigma P.
      route: how curvature products are computed.
      refit: the options.

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230.
    """

    def setup_of(plan: plans.Plan, base: optax.GradientTransformation | None = None) -> Setup:
        return Setup(plan, metric, reduction, sigma, refit, route, base)

    def run(
        plan: plans.Plan, held: Any, params: Params, objective: BoundObjective,
        count: Int[Array, ""],
        base: tuple[optax.GradientTransformation, Any] | None, updates: Params | None,
    ) -> tuple[Blocks, RefitInfo, Any, list[Array]]:  # fmt: skip
        del updates
        blocks, info, *others = held
        optimizer, base_state = (None, ()) if base is None else base
        numbers = numbers_at(refit, count, damping)
        inputs = Inputs(blocks, info, params, objective, numbers, base_state)
        return *learn(setup_of(plan, optimizer), inputs), *others

    def init(plan: plans.Plan, params: Params, slots: tuple[str, ...]) -> Any:
        del params, slots
        setup_of(plan).check()
        return ()

    return Method(
        init=init,
        observe=lambda plan, blocks, stream, updates, count: (stream, []),
        scale=None,
        refit=run,
    )


def streamed(
    metric: Frozen, damping: Number, reduction: Reduction, two_sided: bool, route: Route,
    options: Streaming,
) -> Method:  # fmt: skip
    """Return the streaming way: statistics at every step, a probe now and then.

    Args:
      metric: a resolved metric, or a tree of them, flattened by `freeze`, from which
        labels can be drawn.
      damping: lambda > 0.
      reduction: over rows.
      two_sided: whether a rule has a structure of two sides without a spectrum.
      route: how the network is linearised.
      options: of the refits.
    """

    def setup_of(plan: plans.Plan) -> StreamSetup:
        return StreamSetup(plan, metric, reduction, options, two_sided, route)

    def run(
        plan: plans.Plan, held: Any, params: Params, objective: BoundObjective,
        count: Int[Array, ""], base: Any, updates: Params | None,
    ) -> tuple[Blocks, RefitInfo, Any, list[Array]]:  # fmt: skip
        del count, base
        blocks, info, stream, seen = held
        setup = setup_of(plan)
        return streaming.refit(
            setup, blocks, info, stream, seen, updates, params, objective, damping
        )

    return Method(
        init=lambda plan, params, slots: streaming.init(setup_of(plan), params, slots),
        observe=lambda plan, *inputs: streaming.observe(setup_of(plan), *inputs),
        scale=lambda plan, *inputs: streaming.scale(setup_of(plan), *inputs),
        refit=run,
    )
