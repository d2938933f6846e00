"""What a preconditioner is made of, and what its last refit did."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llqr._tables import table
from llqr.advice import advise
from llqr.exact import ExactState
from llqr.refit.learner import Blocks, asks
from llqr.refit.record import STATUS
from llqr.refit.remedies import PUBLISHED, Remedies
from llqr.state import blocks_of, find, is_ours, shapes_of, visited
from llqr.structures import matrix as mx
from llqr.structures import trees
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan, apart, each, labels
from llqr.tree import accurate_dtype, norm
from llqr.trust import TrustReport, TrustState, report
from llqr.typing import Array, Float, PyTree


@dataclass(frozen=True)
class Row:
    """One block of a description, or one stack of blocks."""

    leaf: str  # path of the first leaf
    more: int  # how many other leaves share the block
    shape: tuple[int, ...]  # of the first leaf
    view: tuple[int, ...]  # of the block as P sees it
    stack: tuple[int, ...]  # how many such blocks: members of a stack, then parts of a matrix
    structure: str
    parameters: int  # numbers in the block's leaves
    stored: int  # numbers that the structure stores
    bytes: int
    cost: int  # multiply-adds of one product P x


@dataclass(frozen=True)
class Description:
    """Blocks of a preconditioner; `print` it to read the table."""

    rows: tuple[Row, ...]
    followed: int = 0  # bytes of what is remembered besides P
    remembers: str = ""  # what that is, in words
    doubts: tuple[str, ...] = ()  # what leaves were taken for by names and shapes alone

    def __str__(self) -> str:
        head = ("leaf", "shape", "seen as", "structure", "stored", "memory", "multiply-adds")
        text = table([head, *(_cells(row) for row in self.rows)], 4, _total(self.rows))
        if self.followed:
            text += f"\nand {_bytes(self.followed)} of {self.remembers}"
        return "\n".join([text, *(f"note: {words}" for words in self.doubts)])


def describe(tx: optax.GradientTransformation, params: PyTree) -> Description:
    """Return which structure preconditions which leaf, its memory and its cost.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      params: the parameters, or their shapes.

    Raises:
      ValueError: there is no LLQR transformation in `tx`.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="e-kfac")
      >>> print(llqr.describe(tx, {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}))
      leaf           shape  seen as  structure  stored  memory  multiply-adds
      -----------------------------------------------------------------------
      b              3      3        diagonal        3    12 B              3
      w              4x3    4x3      e-kfac         37   148 B            180
      -----------------------------------------------------------------------
      15 parameters                                 40   160 B            183
    """
    found = visited(tx, params)
    if not found:
        raise ValueError("there is no llqr.llqr or llqr.scale_by_llqr in this optimizer.")
    rows = []
    for plan in (visit.plan for visit in found):
        for block in apart(plan):
            source, count = block.sources[0], block.count
            shapes = mx.array_shapes(block.structure, block.shape).values()
            stored = count * sum(math.prod(shape) for shape in shapes)
            rows.append(
                Row(
                    leaf=block.names[0],
                    more=len(block.names) - 1,
                    shape=source.views[0].whole,
                    view=block.shape,
                    stack=source.grid,
                    structure=block.structure.name,
                    parameters=sum(math.prod(view.whole) for view in source.views),
                    stored=stored,
                    bytes=stored * jnp.dtype(block.dtype).itemsize,
                    cost=count * mx.cost(block.structure, block.shape),
                )
            )
    state = shapes_of(tx, params)
    ours = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    arrays = jax.tree.leaves([x.stream for x in ours])
    words = dict.fromkeys(
        learner.remembers for learner in (visit.learner for visit in found) if learner.remembers
    )
    followed = sum(x.size * x.dtype.itemsize for x in arrays)
    doubts = dict.fromkeys(words for visit in found for words in visit.doubts)
    return Description(tuple(rows), followed, " and ".join(words), tuple(doubts))


def _cells(row: Row) -> tuple[str, ...]:
    leaf = row.leaf + (f" (+{row.more} more)" if row.more else "")
    size = (f"{row.stored:,}", _bytes(row.bytes), f"{row.cost:,}")
    view = " of ".join(map(_shape, [row.stack, row.view] if row.stack else [row.view]))
    return (leaf, _shape(row.shape), view, row.structure, *size)


def _total(rows: tuple[Row, ...]) -> tuple[str, ...]:
    stored, size, cost = (sum(getattr(r, k) for r in rows) for k in ("stored", "bytes", "cost"))
    count = f"{sum(r.parameters for r in rows):,} parameters"
    return (count, "", "", "", f"{stored:,}", _bytes(size), f"{cost:,}")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _bytes(size: int) -> str:
    value, unit = float(size), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {units[unit]}" if unit == 0 else f"{value:.1f} {units[unit]}"


@dataclass(frozen=True)
class BlockReport:
    """What a preconditioner's arrays look like, and what the last refit did to one block."""

    leaf: str  # path of the first leaf
    status: str  # a word of `llqr.STATUS`
    cosine: float  # of P h and h at the last refit
    minimum: float  # over the block's arrays
    maximum: float
    norm: float
    skew: dict[str, tuple[float, float]]  # slot -> asymmetry (Frobenius, spectral)


@dataclass(frozen=True)
class Report:
    """State of a preconditioner; `print` it to read the table."""

    refits: int
    steps: int  # inner steps of the last refit
    objective_before: float
    objective_after: float
    cosine: float  # of P h and h, all blocks together
    blocks: tuple[BlockReport, ...]
    remedies: Remedies = PUBLISHED  # of the way in which P is learned
    updates: int = 1  # steps of the optimizer so far
    directed: bool = True  # whether the refit had a direction h
    dropped: int = 0  # of them with a gradient that was not finite
    asks: str = ""  # what `update` takes where a refit is due, in words

    @property
    def advice(self) -> tuple[str, ...]:
        """What looks wrong, and what to try, in sentences; empty if nothing does."""
        return advise(
            self.refits, self.cosine, self.blocks, self.remedies, steps=self.updates,
            directed=self.directed, dropped=self.dropped,
        )  # fmt: skip

    def __str__(self) -> str:
        head = ("leaf", "last refit", "cos(Ph, h)", "smallest", "largest", "norm")
        body = [
            (b.leaf, b.status, f"{b.cosine:.3f}", f"{b.minimum:.3g}", f"{b.maximum:.3g}",
             f"{b.norm:.4g}")
            for b in self.blocks
        ]  # fmt: skip
        return "\n".join([table([head, *body], 2), *([self.asks] if self.asks else [])])


def inspect(
    tx: optax.GradientTransformation, state: Any, params: PyTree, *, asymmetry: bool = False
) -> Report | TrustReport:
    """Report on the arrays of P and on the last refit, block by block; or on a trust region.

    `print` shows the table; `advice` says in words what looks wrong and what to try. Of
    `llqr.exact(damping=llqr.Trust())` a `TrustReport`: solver, rows, rank, damping, the last step.

    Everything is measured on the device in one call, and fetched once.

    Args:
      tx: an optimizer with `llqr.llqr`, `llqr.scale_by_llqr` or `llqr.exact` in it.
      state: its state.
      params: the parameters, or their shapes.
      asymmetry: also measure how far each dense side A is from symmetric: |A - A^T| / |A + A^T|
        in the Frobenius norm and |A - A^T| / |A| in the spectral norm (25 power iterations).
        Sides that are symmetric by construction, and all other arrays, have none.

    Raises:
      ValueError: there is no LLQR state in `state`, nor one of a trust region.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac")
      >>> report = llqr.inspect(tx, tx.init(params), params, asymmetry=True)
      >>> report.blocks[0].status, report.blocks[0].maximum, report.blocks[0].skew["left"]
      ('none', 1.0, (0.0, 0.0))
      >>> report.advice, report.asks.split(',')[0]
      ((), 'where a refit is due')
    """
    exact = [x for x in jax.tree.leaves(state, is_leaf=_is_trusting) if _is_trusting(x)]
    if exact and not visited(tx, params):
        count = sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(params))
        return report(exact[0].trust, exact[0].residual, count, accurate_dtype(params))
    ours = find(state)
    plan, learner = visited(tx, params)[0][:2]
    blocks = blocks_of(plan, ours, params)
    found, info = jax.device_get((_measure(plan, blocks, asymmetry), ours.refit))
    rows = []
    for label, status, angle, ((low, high, length), skews) in zip(
        labels(plan), info.status, info.cosines, trees.per_matrix(plan, found), strict=True
    ):
        pairs = {slot: (float(a), float(b)) for slot, (a, b) in skews.items()}
        word = STATUS[int(status)]
        rows.append(
            BlockReport(
                leaf=label,
                status=word,
                cosine=float(angle),
                minimum=float(low),
                maximum=float(high),
                norm=float(length),
                skew=pairs,
            )
        )
    before, after = float(info.objective_before), float(info.objective_after)
    counts = int(info.refits), int(info.steps)
    return Report(
        *counts, before, after, float(info.cosine), tuple(rows), learner.remedies,
        updates=int(ours.count), dropped=int(info.dropped), asks=asks(learner),
        directed=int(ours.count) > 0 or not learner.has_momentum,
    )  # fmt: skip


def _is_trusting(x: Any) -> bool:
    """Whether it is the state of exact steps in a trust region."""
    return isinstance(x, ExactState) and isinstance(x.trust, TrustState)


def _asymmetric_sides(block: Block) -> tuple[str, ...]:
    """Slots of the block's square sides that are not symmetric by construction."""
    sides = block.structure.sides.items()
    return tuple(slot for slot, side in sides if side.square and not side.symmetric)


@partial(jax.jit, static_argnames=("plan", "asymmetry"))
def _measure(plan: Plan, blocks: Blocks, asymmetry: bool) -> Any:
    """Of every matrix: (smallest, largest, norm) of its arrays, and asymmetry of its sides."""

    def one(block: Block, arrays: Arrays) -> Any:
        values = list(arrays.values())
        low = jnp.min(jnp.stack([jnp.min(x) for x in values]))
        high = jnp.max(jnp.stack([jnp.max(x) for x in values]))
        slots = _asymmetric_sides(block) if asymmetry else ()
        return (low, high, norm(values)), {slot: _skew(arrays[slot]) for slot in slots}

    return each(plan, one, blocks)


def _skew(a: Float[Array, "d d"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    difference, total = a - a.T, a + a.T
    frobenius = jnp.linalg.norm(difference) / (jnp.linalg.norm(total) + 1e-12)
    return frobenius, _spectral_norm(difference) / (_spectral_norm(a) + 1e-12)


def _spectral_norm(a: Float[Array, "d d"]) -> Float[Array, ""]:
    """Largest singular value by 25 power iterations on A^T A from the vector of ones."""

    def step(_: int, v: Array) -> Array:
        w = a.T @ (a @ v)
        return w / jnp.maximum(jnp.linalg.norm(w), 1e-30)

    v = jnp.full((a.shape[1],), a.shape[1] ** -0.5, a.dtype)
    return jnp.linalg.norm(a @ jax.lax.fori_loop(0, 25, step, v))
