"""What a way to learn P is to the step that applies it: one protocol.

An update opens the state, lets the learner observe the gradient, refits when due, asks it for the
step, and closes the state (`llqr.preconditioning`). While it is open, the arrays of P, and what the
learner remembers of each matrix, are those of blocks instead of trees.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import optax

from llqr.curvature.route import Route
from llqr.graft import Graft, Step
from llqr.metrics import Reduction
from llqr.refit.record import RefitInfo
from llqr.refit.remedies import Remedies
from llqr.structures.matrix import Arrays, Structure
from llqr.structures.plan import Plan
from llqr.tree import Frozen
from llqr.typing import Array, Int, Number, Params, PyTree

Blocks: TypeAlias = tuple[Arrays, ...]
"""The arrays of every block of a plan."""

Seen: TypeAlias = list[Array]
"""A vector like the parameters, as the matrices of each block (`trees.gather`)."""


class Held(NamedTuple):
    """What an update holds while the state is open: a pytree."""

    arrays: Blocks  # of P
    memory: Any  # what the learner remembers besides
    info: RefitInfo
    seen: Seen  # the gradient as the learner's step needs it; [] before it observed one


class Asked(NamedTuple):
    """With what a refit is asked for."""

    params: Any  # the current ones; None where the learner needs no objective
    objective: Any  # a `BoundObjective`; likewise
    damping: Number
    count: Int[Array, ""]  # update calls so far
    gradient: Params | None  # that was observed; None: none was
    base_state: Any = ()  # of `Setting.base`


WHOLE = Route()


@dataclass(frozen=True)
class Setting:
    """What stays the same over a run, whatever the learner: static and hashable.

    Attributes:
      structures: of the rules.
      metric: a resolved metric, or a tree of them, flattened by `freeze`.
      reduction: over rows; "unit" divides C by its largest eigenvalue.
      sigma: P is stored as sigma P.
      route: how curvature products are computed.
      base: optimizer whose update P multiplies; None: P multiplies the gradient.
    """

    structures: tuple[Structure, ...]
    metric: Frozen
    reduction: Reduction
    sigma: float = 1.0
    route: Route = WHOLE
    base: optax.GradientTransformation | None = None


class Defaults(NamedTuple):
    """What is meant where nothing is said."""

    damping: float
    reduction: Reduction
    graft: Graft


@runtime_checkable
class Rhythm(Protocol):
    """Options of refits: when they are due."""

    @property
    def every(self) -> Any:
        """None: refits come from outside only."""
        ...

    def is_due(self, count: Any) -> Any:
        """Whether a refit is due before update call number `count`."""
        ...


@runtime_checkable
class Learner(Protocol):
    """One way to learn P; it owns what it remembers, and checks its options.

    Made from options and a `Setting`, of which it raises ValueError if they do not fit.
    """

    name: str
    """Of its options, as a user writes them."""

    defaults: Defaults
    """Of options that stand beside its own."""

    remedies: Remedies
    """What to try where a refit did not do what it should."""

    remembers: str
    """In words, what it remembers besides P; "" for nothing."""

    has_momentum: bool
    """Whether it takes the momentum itself, so that no base behind it may."""

    needs_objective: bool
    """Whether a refit takes an objective and parameters."""

    @property
    def options(self) -> Rhythm:
        """As given."""
        ...

    @property
    def setting(self) -> Setting:
        """As given."""
        ...

    @staticmethod
    def takes(options: Any) -> bool:
        """Whether these are its options."""
        ...

    def check_damping(self, damping: Number) -> None:
        """Raise ValueError if lambda is out of range."""
        ...

    def check_base(self, base: optax.GradientTransformation, params: Params) -> None:
        """Raise ValueError if an optimizer cannot come after the step."""
        ...

    def init(self, plan: Plan, params: Params) -> Any:
        """Return what it remembers before the first step, as trees.

        Raises:
          ValueError: a block that cannot be learned so.
        """
        ...

    def open(self, plan: Plan, kept: Any, like: PyTree) -> Any:
        """Return what it remembers by block, from the trees of a state.

        Raises:
          ValueError: they were made with other options.
        """
        ...

    def close(self, plan: Plan, memory: Any, like: PyTree) -> Any:
        """Return what it remembers as trees: the inverse of `open`."""
        ...

    @staticmethod
    def owns(kept: Any) -> bool:
        """Whether this is of a state that a learner of this kind has made."""
        ...

    def observe(self, plan: Plan, held: Held, gradient: Params, count: Int[Array, ""]) -> Held:
        """Return what is held after one more gradient, which may not be finite.

        Args:
          plan: the blocks.
          held: so far.
          gradient: like the parameters.
          count: update calls so far.
        """
        ...

    def refit(self, plan: Plan, held: Held, asked: Asked) -> Held:
        """Return what is held after one refit, its record written.

        Args:
          plan: the blocks.
          held: so far.
          asked: with what.
        """
        ...

    def step(
        self, plan: Plan, held: Held, vector: Params, count: Int[Array, ""], apply: bool
    ) -> tuple[Held, Step]:
        """Return what is held, and the step that P makes of a vector.

        Args:
          plan: the blocks.
          held: with this vector observed.
          vector: like the parameters.
          count: update calls so far.
          apply: whether the step is needed.
        """
        ...

    def reexpress(self, plan: Plan, held: Held, arrays: Blocks) -> Held:
        """Return what is held where other arrays of P are installed.

        Args:
          plan: the blocks.
          held: with the arrays so far.
          arrays: those that take their place.
        """
        ...

    def trees(self, kept: Any) -> dict[str, PyTree]:
        """Return those of its trees that lie as P's do, by slot."""
        ...

    def with_trees(self, kept: Any, trees: dict[str, PyTree]) -> Any:
        """Return what it remembers with others in place of `trees`."""
        ...


def asks(learner: Learner) -> str:
    """Return in words what `update` must be given for refits."""
    if not learner.needs_objective:
        return "refits see gradients alone: update takes no objective"
    if learner.options.every is None:
        return "refits come from llqr.refresh alone: update takes no objective"
    return "where a refit is due, update takes objective=objective.bind(batch), and refuses without"
