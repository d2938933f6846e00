"""What streaming learners share: their state, how they observe and step, and a refit's frame.

At every step each matrix observes the gradient; when due, all matrices `follow` what a refit sees,
like ones as one block; the step is P times the momentum. What happens to one matrix is told in
`eigen`, for those with a spectrum between bases, and in `factors`, for kfac.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llqr import _loops
from llqr.bases import check_plain
from llqr.errors import check_range
from llqr.graft import Step
from llqr.refit import eigen, factors, turning
from llqr.refit.learner import Asked, Blocks, Defaults, Held, Setting
from llqr.refit.momentum import MOMENTUM, is_usable
from llqr.refit.options import Streaming
from llqr.refit.record import STATUS, RefitInfo
from llqr.structures import trees
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays, Structure
from llqr.structures.plan import Plan, each
from llqr.tree import accurate_dtype, cosine_of, normal_like, replicate, sums, widen
from llqr.typing import Array, Bool, Float, Int, Number, Params, PyTree

DAMPING = 1e-4
"""Default lambda, in units of the largest curvature of each block (of the whole C for kfac)."""


class StreamState(NamedTuple):
    """What streaming refits remember besides P: arrays only, float32 at least."""

    # slot -> tree shaped like params, an array or None: the momentum and, where signal_decay is
    # given or there are no probes, q ("squares"), both in the bases; S_L and S_R ("left", "right");
    # with probes c ("spectrum"); for kfac A and B, and m as it is
    statistics: dict[str, Any]
    power: Params | None  # C v / |v| of the last power step, or a draw; None without kfac
    # by which C was last divided: the largest of all blocks; with kfac its largest eigenvalue
    top: Float[Array, ""]


class Memory(NamedTuple):
    """A `StreamState` that is open."""

    blocks: Blocks
    power: Params | None
    top: Float[Array, ""]


@lru_cache(maxsize=256)
def kind_of(structure: Structure) -> Any:
    """Return how matrices of a structure are followed: `eigen`, `factors`, or None for not at all.

    Example:
      >>> from llqr.structures import STRUCTURES
      >>> [kind_of(STRUCTURES[name]) for name in ("e-kfac", "sym-kfac")] == [eigen, None]
      True
    """
    plain = not (structure.positive or structure.normalize) and structure.view == "leaf"
    if not plain or any(side.streams is None for side in structure.sides.values()):
        return None
    return {"full": eigen, "none": factors}.get(structure.spectrum)


@dataclass(frozen=True)
class Following(ABC):
    """A `Learner` that follows the training; how it sees curvature is left open."""

    options: Streaming
    setting: Setting

    name: ClassVar[str] = "llqr.Streaming"
    defaults: ClassVar[Defaults] = Defaults(damping=DAMPING, reduction="unit", graft="rms")
    has_momentum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.setting.sigma != 1:
            raise ValueError(
                "identity_scaling belongs to refits that learn by steps (llqr.Refit): leave it at "
                f"1 with streaming refits, not {self.setting.sigma!r}."
            )
        for structure in self.setting.structures:
            if not self.follows(structure):
                raise ValueError(f"structure {structure.name!r} cannot be streamed {self.needs}")

    needs: ClassVar[str]
    """What structures it takes, as the end of a sentence."""

    @abstractmethod
    def follows(self, structure: Structure) -> bool:
        """Whether it takes a structure."""

    @abstractmethod
    def follow(self, plan: Plan, held: Held, asked: Asked) -> Held:
        """Return what is held after what all matrices do at a refit, like ones as one block."""

    def check_damping(self, damping: Number) -> None:
        """Raise ValueError unless lambda is positive."""
        check_range("damping (with streaming refits)", damping, low=0, open_low=True)

    def check_base(self, base: optax.GradientTransformation, params: Params) -> None:
        """Raise ValueError if a base optimizer remembers gradients, as P m does already."""
        check_plain(base, params, momentum=self.options.momentum)

    @cached_property
    def moves(self) -> bool:
        """Whether there may be matrices of two sides, which take products with C."""
        return any(kind_of(structure) is factors for structure in self.setting.structures)

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Of the trees of the state: they follow from the rules, not from the parameters."""
        found = {slot for structure in self.setting.structures for slot in structure.slots}
        weighs = "spectrum" in found and self.options.signal_decay is not None
        return (*sorted(found), MOMENTUM, *[eigen.SQUARES] * weighs)

    def slots_of(self, block: Block) -> tuple[str, ...]:
        """Of what is remembered of a block."""
        return kind_of(block.structure).slots(self.options, block)

    # --- the state ------------------------------------------------------------------------------

    def init(self, plan: Plan, params: Params) -> StreamState:
        """Return zeros; for kfac A and B the identity, and a normal draw for power steps."""
        blocks: list[Arrays] = []
        for block in plan:
            own = kind_of(block.structure).init(block, self.slots_of(block))
            blocks.append({slot: block.repeated(x) for slot, x in own.items()})
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=accurate_dtype(p)), params)
        power = normal_like(zeros, jax.random.key(0)) if self.moves else None
        return self.close(plan, Memory(tuple(blocks), power, jnp.ones((), jnp.float32)), params)

    @staticmethod
    def owns(kept: Any) -> bool:
        """Whether this is the state of streaming refits."""
        return isinstance(kept, StreamState)

    def open(self, plan: Plan, kept: StreamState, like: PyTree) -> Memory:
        """Return the state with the arrays of blocks in place of trees."""
        own, theirs = set(self.slots), set(kept.statistics)
        if own ^ theirs == {eigen.SQUARES}:
            weighs = eigen.SQUARES in own
            raise ValueError(
                f"the optimizer has Streaming(signal_decay={self.options.signal_decay!r}), and the "
                f"state is of one with{'out' * weighs} weights by signal: give signal_decay="
                f"{'None' if weighs else '0.95'} to go on with it (a state of before 0.2.0 has no "
                "weights), or begin anew with tx.init(params)."
            )
        if own != theirs:
            raise ValueError(
                f"the optimizer's refits remember {sorted(own)}, and the state is of one whose "
                f"refits remember {sorted(theirs)}: with another structure, or another `probe`. "
                "Begin anew with tx.init(params), or make the optimizer as it was."
            )
        if (kept.power is None) == self.moves:
            kinds = ("e-kfac or diagonal", "kfac") if self.moves else ("kfac", "e-kfac or diagonal")
            raise ValueError(
                f"the state is of an optimizer whose structures are {kinds[0]}, and this one's are "
                f"{kinds[1]}. Begin anew with tx.init(params), or make the optimizer as it was."
            )
        blocks = trees.unpack(plan, kept.statistics, like, self.slots_of)
        return Memory(blocks, kept.power, kept.top)

    def close(self, plan: Plan, memory: Memory, like: PyTree) -> StreamState:
        """Return the state with trees in place of the arrays of blocks."""
        statistics = trees.pack(plan, memory.blocks, like, self.slots)
        return StreamState(statistics, memory.power, memory.top)

    def trees(self, kept: StreamState) -> dict[str, PyTree]:
        """Return the statistics, which lie as P does."""
        return kept.statistics

    def with_trees(self, kept: StreamState, trees: dict[str, PyTree]) -> StreamState:
        """Return the state with other statistics."""
        return kept._replace(statistics=trees)

    # --- a step ---------------------------------------------------------------------------------

    def observe(self, plan: Plan, held: Held, gradient: Params, count: Int[Array, ""]) -> Held:
        """Return what is held after one more gradient: momentum, moments, V_L^T G V_R as seen."""

        def one(wide: Array, block: Block, *own: Any) -> tuple[Arrays, Array, Array]:
            return *kind_of(block.structure).observe(self.options, wide, block, *own), is_usable(
                own[-1]
            )

        wide, x = self.options.follows_wide(count), trees.gather(plan, gradient)
        found = each(plan, one, held.arrays, held.memory.blocks, x, shared=(wide,))
        blocks, seen, usable = columns(found, 3)
        info = held.info.after(jnp.all(trees.in_order(plan, usable)))
        memory = held.memory._replace(blocks=tuple(blocks))
        return held._replace(memory=memory, seen=seen, info=info)

    def step(
        self, plan: Plan, held: Held, vector: Params, count: Int[Array, ""], apply: bool
    ) -> tuple[Held, Step]:
        """Return what is held, and P v weighed by signal, v = G + mu m or m."""
        del apply  # squares follow all the same

        def one(count: Array, block: Block, *own: Any) -> tuple[Arrays, Array, Array, Array]:
            return kind_of(block.structure).step(self.options, count, block, *own)

        found = each(plan, one, held.arrays, held.memory.blocks, held.seen, shared=(count,))
        blocks, direction, full, v = columns(found, 4)
        direction = [block.within(x) for block, x in zip(plan, direction, strict=True)]
        held = held._replace(memory=held.memory._replace(blocks=tuple(blocks)))
        like = widen(vector)
        return held, Step(*(trees.scatter(plan, x, like) for x in (direction, full, v)))

    def reexpress(self, plan: Plan, held: Held, arrays: Blocks) -> Held:
        """Return what is held with other arrays of P, the momentum where it was."""

        def one(block: Block, old: Arrays, new: Arrays, own: Arrays) -> Arrays:
            m = kind_of(block.structure).reexpress(block, old, new, own[MOMENTUM])
            return own | {MOMENTUM: m}

        blocks = each(plan, one, held.arrays, arrays, held.memory.blocks)
        return held._replace(arrays=arrays, memory=held.memory._replace(blocks=tuple(blocks)))

    # --- a refit --------------------------------------------------------------------------------

    def refit(self, plan: Plan, held: Held, asked: Asked) -> Held:
        """Return what is held after one refit."""
        python = _loops.in_python(held, asked)
        run = _loops.compiled if python and not self.setting.route.layerwise else _loops.direct
        return run(_refit, (self, plan), held, asked)


def columns(rows: list[tuple[Any, ...]], count: int) -> list[list[Any]]:
    """For each block a tuple -> for each entry of the tuple, a list of blocks'."""
    return [[row[i] for row in rows] for i in range(count)]


def _refit(static: tuple[Following, Plan], held: Held, asked: Asked) -> Held:
    """A refit, and the gradient in the bases after it."""
    learner, plan = static
    found, seen = learner.follow(plan, held, asked), held.seen
    if asked.gradient is not None:
        inside = lambda block, *own: kind_of(block.structure).project(block, *own)  # noqa: E731
        seen = each(plan, inside, found.arrays, trees.gather(plan, asked.gradient))
    return found._replace(seen=seen)


def turned(
    learner: Following, plan: Plan, held: Held, number: Int[Array, ""], stays: Sequence[Array] = ()
) -> list[Arrays]:
    """Return the bases of each block after refit `number`: of those that lie between bases."""
    between = [kind_of(block.structure) is eigen for block in plan]
    moments = [own if is_ else {} for own, is_ in zip(held.memory.blocks, between, strict=True)]
    return turning.turned(learner.options, number, plan, held.arrays, moments, stays)


def unless(flat: Bool[Array, ""], old: PyTree, new: PyTree) -> PyTree:
    """What was where a matrix is flat, else what is new."""
    return jax.tree.map(lambda was, is_: jnp.where(flat, was, is_), old, new)


def top_of(setting: Setting, block: Block, own: Arrays) -> Array:
    """By what the curvature of matrices is divided: its largest entry; 1 where there is none.

    Parts of one matrix are divided by the largest entry of all of them.
    """
    if setting.reduction != "unit":
        return block.repeated(jnp.ones((), block.dtype))
    top = block.each(kind_of(block.structure).top, own)
    cut = block.sources[0].cut
    if cut is not None:  # all sources are cut alike
        top = jnp.max(replicate(top).reshape(-1, math.prod(cut.grid)), axis=1)
        top = jnp.repeat(top, math.prod(cut.grid))
    return jnp.where(top > 0, top, 1.0)


def largest(tops: list[Array]) -> Float[Array, ""]:
    """The largest of what matrices are divided by: for the record."""
    found = [replicate(top).ravel().astype(jnp.float32) for top in tops]
    return jnp.max(jnp.concatenate(found), initial=0.0) if found else jnp.zeros(())


def record(
    plan: Plan, arrays: Blocks, blocks: list[Arrays], info: RefitInfo, usable: list[Array],
    flat: list[Array], values: tuple[Array, ...],
) -> RefitInfo:  # fmt: skip
    """What the refit did; cosines are those of P m and m."""

    def products(block: Block, own: Arrays, m: Array) -> tuple[Array, ...]:
        pm = kind_of(block.structure).product(block, own, m)
        return sums(pm * m, pm * pm, m * m)

    found = columns(each(plan, products, arrays, [own[MOMENTUM] for own in blocks]), 3)
    of_each = [trees.in_order(plan, x) for x in found]
    code = {word: i for i, word in enumerate(STATUS)}
    kept, zero = trees.in_order(plan, usable), trees.in_order(plan, flat)
    status = jnp.where(kept, code["updated"], jnp.where(zero, code["flat"], code["nonfinite"]))
    return RefitInfo(
        refits=info.refits + 1,
        steps=jnp.ones((), jnp.int32),
        objective_before=values[0],
        objective_after=values[1],
        cosine=cosine_of(*map(jnp.sum, of_each)).astype(jnp.float32),
        status=status.astype(jnp.int32),
        cosines=cosine_of(*of_each).astype(jnp.float32),
        dropped=info.dropped,
    )
