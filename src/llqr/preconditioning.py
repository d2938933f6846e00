"""What an update does: open the state, observe the gradient, refit P when due, step, close."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from llqr import _loops, _replicas, metrics
from llqr.curvature.route import Route
from llqr.errors import NoObjectiveError, check_choice, check_integer, check_range
from llqr.graft import Graft, Step, grafted
from llqr.metrics import MetricLike, Reduction
from llqr.objective import BoundObjective
from llqr.refit.learner import Asked, Held, Learner, Setting
from llqr.refit.options import Refit
from llqr.refit.record import RefitInfo, no_refit
from llqr.refit.ways import way
from llqr.sharding import Shard, place
from llqr.state import LLQRState, check_container, closed, note, opened, say
from llqr.structures import catalogue, trees
from llqr.structures.plan import Plan, doubts, make_plan, owned, size
from llqr.structures.rules import AUTO, Rule, StructureLike, rule_table, slots
from llqr.tree import check_alike, check_inexact, freeze
from llqr.typing import Array, Bool, Int, Number, Params


@dataclass(frozen=True, eq=False)
class OnlyRefit:
    """The value of `refresh` by which `llqr.refresh` asks for a refit and nothing else.

    Attributes:
      reached: what each preconditioner that heard of it did.
    """

    reached: list[RefitInfo] = field(default_factory=list)


Refresh: TypeAlias = bool | Bool[Array, ""] | OnlyRefit | None


class Request(NamedTuple):
    """What `update` is asked for besides the step: its keywords."""

    objective: BoundObjective | None = None
    refresh: Refresh = None
    apply: bool = True

    @property
    def only(self) -> OnlyRefit | None:
        """Whom to tell, where a refit is asked for and nothing else."""
        return self.refresh if isinstance(self.refresh, OnlyRefit) else None


@dataclass(frozen=True)
class Preconditioning:
    """What `scale_by_llqr` and `llqr` share: P, how it is learned, and how long its steps are."""

    learner: Learner
    damping: Number
    table: tuple[Rule, ...]
    max_dim: int
    block_size: int | None
    graft: Graft
    shard: Shard | None
    asked: bool = True
    """Whether the structure was chosen; else what is found out by names and shapes is said."""

    @classmethod
    def of(
        cls,
        *,
        structure: StructureLike | None,
        metric: MetricLike,
        damping: Number | None,
        divergence_reduction: Reduction | None,
        identity_scaling: float,
        max_dim: int,
        block_size: int | None,
        graft: Graft | None,
        route: Route | None,
        refit: Any,
        shard: Shard | None,
        base: optax.GradientTransformation | None = None,
    ) -> "Preconditioning":
        """Check options, and fill in what is not said."""
        options = Refit() if refit is None else refit
        learned = way(options)
        lam: Number = learned.defaults.damping if damping is None else damping
        reduction = divergence_reduction or learned.defaults.reduction
        chosen: Graft = graft or learned.defaults.graft
        _check_options(lam, reduction, identity_scaling, max_dim, block_size, chosen, shard)
        chosen_by_name = AUTO if structure is None else structure
        table, known = rule_table(chosen_by_name), freeze(metrics.resolve(metric))
        structures = tuple(catalogue.get(rule.structure) for rule in table)
        route = Route() if route is None else route
        setting = Setting(structures, known, reduction, identity_scaling, route, base)
        learner = learned(options, setting)
        learner.check_damping(lam)
        asked = structure is not None
        return cls(learner, lam, table, max_dim, block_size, chosen, shard, asked)

    def plan(self, params: Params) -> Plan:
        """Who gets what."""
        plan = make_plan(params, self.table, self.max_dim, self.block_size)
        return owned(plan) if self.shard == "blocks" else plan

    def init(self, params: Params) -> Any:
        """Return the state before the first step."""
        check_inexact(params)
        plan, learner, sigma = self.plan(params), self.learner, self.learner.setting.sigma
        kept = learner.init(plan, params)
        note(plan, learner, self.shard, self._doubts(params))
        packed = trees.pack(plan, trees.identity(plan, sigma), params, slots(self.table))
        state = LLQRState(jnp.zeros((), jnp.int32), packed, no_refit(size(plan)), kept)
        return place(plan, learner, self.shard, state, params)

    def _doubts(self, params: Params) -> tuple[str, ...]:
        """What names and shapes alone say of the leaves; said, unless "auto" was asked for."""
        found = doubts(params, self.table)
        if not (self.asked and any(rule.stack == AUTO for rule in self.table)):
            for words in found:
                say(words)
        return tuple(found)

    def update(
        self, updates: Params, state: Any, params: Params | None, request: Request,
        base_state: Any = (),
    ) -> tuple[Params, Any]:  # fmt: skip
        """Return the step and the state: open it, observe, refit when due, step, close."""
        _check_update(updates, state, params)
        learner, plan, count = self.learner, self.plan(updates), state.count
        held = opened(learner, plan, state, updates)
        if request.only is not None:
            held = self._refit(plan, held, count, None, params, request, base_state)
            request.only.reached.append(held.info)
            return updates, closed(learner, plan, held, state, updates)
        held = learner.observe(plan, held, updates, count)
        held = self._refit(plan, held, count, updates, params, request, base_state)
        held, step = learner.step(plan, held, updates, count, request.apply)
        if request.apply:
            updates = self._scaled(plan, step, updates)
        state = state._replace(count=_increment(count))
        return updates, closed(learner, plan, held, state, updates)

    def _refit(
        self, plan: Plan, held: Held, count: Int[Array, ""], gradient: Params | None,
        params: Params | None, request: Request, base_state: Any,
    ) -> Held:  # fmt: skip
        """Return what is held, after a refit where one is due: as asked, else by the schedule."""
        options, setting, due = self.learner.options, self.learner.setting, request.refresh
        if not (due is None or isinstance(due, bool | OnlyRefit) or _is_bool_array(due)):
            raise TypeError(f"refresh must be None, a bool or a bool array, got {due!r}.")
        if isinstance(due, OnlyRefit):
            due = True
        elif due is None:
            due = False if options.every is None else options.is_due(count)
        if due is False:
            return held
        bound = None
        if self.learner.needs_objective:
            bound = _check_refit_inputs(request.objective, params)
            _replicas.check(setting.route.axis_name)
        else:
            params = None
        base_state = () if setting.base is None else base_state
        asked = Asked(params, bound, self.damping, count, gradient, base_state)
        run = lambda held: (self.learner.refit(plan, held, asked),)  # noqa: E731
        return _loops.when(due, run, held)[0]

    def _scaled(self, plan: Plan, step: Step, updates: Params) -> Params:
        """The step with its length, in the dtypes of the updates."""
        scaled = grafted(plan, self.graft, step)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), scaled, updates)


def _check_options(
    damping: Any,
    divergence_reduction: Any,
    identity_scaling: Any,
    max_dim: Any,
    block_size: Any,
    graft: Any,
    shard: Any,
) -> None:
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
    check_range("identity_scaling", identity_scaling, low=0, open_low=True)
    check_integer("max_dim", max_dim, low=1)
    if block_size is not None:
        check_integer("block_size", block_size, low=1)
    check_choice("divergence_reduction", divergence_reduction, get_args(Reduction))
    check_choice("graft", graft, get_args(Graft))
    if shard is not None:
        check_choice("shard", shard, get_args(Shard))


def _is_bool_array(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.bool_)


def _check_update(updates: Any, state: Any, params: Any) -> None:
    check_container(state, LLQRState, "scale_by_llqr")
    check_inexact(updates)
    if params is not None:
        check_alike(updates, params, "the updates", "the parameters")


def _check_refit_inputs(objective: Any, params: Any) -> BoundObjective:
    if objective is None:
        raise NoObjectiveError(
            "update() needs objective=objective.bind(batch) where a refit can happen, and none "
            "arrived. Pass it, or pass refresh=False and refit with llqr.refresh(tx, state, "
            "params, objective). Where what calls update() passes no keywords on (Flax Linen's "
            "TrainState, training loops of other libraries), take refit=llqr.Streaming("
            'probe="gradient"), which needs none; or make refits come from outside only, '
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
