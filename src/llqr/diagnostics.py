"""What a preconditioner is made of, and how near its step comes to the exact one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llqr import metrics
from llqr._linalg import solve
from llqr.advice import advise
from llqr.curvature.model import QuadraticModel, linearize
from llqr.metrics import MetricLike, Reduction
from llqr.objective import BoundObjective
from llqr.refit.learn import learn
from llqr.refit.options import Refit, check_options
from llqr.refit.record import STATUS, no_refit
from llqr.refit.setup import WHOLE, Blocks, Inputs, Setup, numbers_at
from llqr.state import blocks_of, find, is_ours, plans_of
from llqr.structures import matrix as mx
from llqr.structures import plan as plans
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.structures.rules import StructureLike, rule_table
from llqr.tree import cosine, freeze, leaf_names, norm, vdot
from llqr.typing import Array, Float, Params, PyTree

MAX_STEPS = 5000
"""Of conjugate gradients in `quality`."""


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
    followed: int = 0  # bytes of what streaming refits remember besides P

    def __str__(self) -> str:
        head = ("leaf", "shape", "seen as", "structure", "stored", "memory", "multiply-adds")
        table = _table([head, *(_cells(row) for row in self.rows)], 4, _total(self.rows))
        if not self.followed:
            return table
        return f"{table}\nand {_bytes(self.followed)} of momentum, second moments and curvature"


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
    found = plans_of(tx, params)
    if not found:
        raise ValueError("there is no llqr.llqr or llqr.scale_by_llqr in this optimizer.")
    rows = []
    for plan in found:
        for block in plans.apart(plan):
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
    state = jax.eval_shape(lambda p: tx.init(p), params)
    ours = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    arrays = jax.tree.leaves([x.stream for x in ours])
    return Description(tuple(rows), sum(x.size * x.dtype.itemsize for x in arrays))


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

    @property
    def advice(self) -> tuple[str, ...]:
        """What looks wrong, and what to try, in sentences; empty if nothing does."""
        return advise(self.refits, self.cosine, self.blocks)

    def __str__(self) -> str:
        head = ("leaf", "last refit", "cos(Ph, h)", "smallest", "largest", "norm")
        body = [
            (b.leaf, b.status, f"{b.cosine:.3f}", f"{b.minimum:.3g}", f"{b.maximum:.3g}",
             f"{b.norm:.4g}")
            for b in self.blocks
        ]  # fmt: skip
        return _table([head, *body], 2)


def inspect(
    tx: optax.GradientTransformation, state: Any, params: PyTree, *, asymmetry: bool = False
) -> Report:
    """Report on the arrays of P and on the last refit, block by block.

    `print` shows the table; `advice` says in words what looks wrong and what to try.

    Everything is measured on the device in one call, and fetched once.

    Args:
      tx: an optimizer with `llqr.llqr` or `llqr.scale_by_llqr` in it.
      state: its state.
      params: the parameters, or their shapes.
      asymmetry: also measure how far each dense side A is from symmetric: |A - A^T| / |A + A^T|
        in the Frobenius norm and |A - A^T| / |A| in the spectral norm (25 power iterations).
        Sides that are symmetric by construction, and all other arrays, have none.

    Raises:
      ValueError: there is no LLQR state in `state`.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="kfac")
      >>> report = llqr.inspect(tx, tx.init(params), params, asymmetry=True)
      >>> report.blocks[0].status, report.blocks[0].maximum, report.blocks[0].skew["left"]
      ('none', 1.0, (0.0, 0.0))
      >>> print(*report.advice)
      P was never refitted here: is a refit due, and does `objective` reach it?
    """
    ours = find(state)
    plan = plans_of(tx, params)[0]
    blocks = blocks_of(plan, ours, params)
    found, info = jax.device_get((_measure(plan, blocks, asymmetry), ours.refit))
    rows = []
    for label, status, angle, ((low, high, length), skews) in zip(
        plans.labels(plan), info.status, info.cosines, plans.per_matrix(plan, found), strict=True
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
    return Report(*counts, before, after, float(info.cosine), tuple(rows))


def _asymmetric_sides(block: Block) -> tuple[str, ...]:
    """Slots of the block's square sides that are not symmetric by construction."""
    sides = block.structure.sides.items()
    return tuple(slot for slot, side in sides if side.square and not side.symmetric)


@partial(jax.jit, static_argnames=("plan", "asymmetry"))
def _measure(plan: plans.Plan, blocks: Blocks, asymmetry: bool) -> Any:
    """Of every matrix: (smallest, largest, norm) of its arrays, and asymmetry of its sides."""

    def one(block: Block, arrays: Arrays) -> Any:
        values = list(arrays.values())
        low = jnp.min(jnp.stack([jnp.min(x) for x in values]))
        high = jnp.max(jnp.stack([jnp.max(x) for x in values]))
        slots = _asymmetric_sides(block) if asymmetry else ()
        return (low, high, norm(values)), {slot: _skew(arrays[slot]) for slot in slots}

    return plans.each(plan, one, blocks)


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


@dataclass(frozen=True)
class Part:
    """How near a step comes to the exact one."""

    cosine: float  # of the two steps
    length: float  # |u| / |exact|


@dataclass(frozen=True)
class Approximation:
    """One step u, compared with the minimiser of J."""

    name: str
    share: float  # J(u) / J(exact): 1 is exact, 0 no progress, negative makes J larger
    best_share: float  # the same for the best multiple of u: what a learning rate could give
    whole: Part
    stages: dict[str, Part]  # by top-level entry of the parameters


@dataclass(frozen=True)
class Quality:
    """Approximations of one exact step; `print` it to read the table."""

    rows: tuple[Approximation, ...]
    objective: float  # J(exact), negative

    def __str__(self) -> str:
        stages = list(self.rows[0].stages)
        head = (
            "step",
            "share of optimum",
            "at best length",
            "cosine",
            "length",
            *(f"cos {s}" for s in stages),
        )
        body = [
            (row.name, _percent(row.share), _percent(row.best_share), f"{row.whole.cosine:.3f}",
             f"{row.whole.length:.3g}", *(f"{row.stages[s].cosine:.3f}" for s in stages))
            for row in self.rows
        ]  # fmt: skip
        return _table([head, *body], 1)


def quality(
    objective: BoundObjective,
    params: Params,
    *,
    structures: Sequence[StructureLike] = ("diagonal", "kfac", "e-kfac"),
    metric: MetricLike = "ngd",
    damping: float = 1e-3,
    divergence_reduction: Reduction = "sum",
    identity_scaling: float = 1.0,
    refit: Refit | None = None,
    max_dim: int = 10_000,
    tolerance: float = 1e-6,
) -> Quality:
    """Compare learned, block-diagonal and gradient steps with the exact step.

    The exact step minimises J(u) = g.u + 1/2 u.(C + lambda I) u. "block-diagonal" minimises it
    with every term between different stages removed from C: what is missing there is the
    value of cross-layer coupling. A structure's step is P h after one refit from the
    identity. Stages are the top-level entries of `params`.

    Args:
      objective: the curvature objective on a batch.
      params: the current parameters.
      structures: names or rule tables to learn.
      metric: with a convex J at this damping.
      damping: lambda > 0.
      divergence_reduction: "sum", "mean" or "unit", see `scale_by_llqr`.
      identity_scaling: sigma.
      refit: how the structures are learned, on this one batch; None: the papers' 50 steps.
      max_dim: see `scale_by_llqr`.
      tolerance: relative residual of the exact solves (conjugate gradients).

    Raises:
      NonConvexError: J has no minimum.
      ValueError: an exact solve did not converge; or an unknown name or a value out of range.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda p, x: x @ p["a"] + p["b"], loss=lambda z, x: jnp.mean((z - x) ** 2))
      >>> params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
      >>> found = llqr.quality(
      ...     objective.bind(jnp.array([[1.0, 2.0], [0.0, 1.0]])), params,
      ...     structures=["kfac"], metric="gauss_newton")
      >>> [row.name for row in found.rows]
      ['gradient', 'kfac', 'block-diagonal', 'exact']
    """
    model = linearize(
        objective, params, metric, damping=damping, divergence_reduction=divergence_reduction
    )
    g = model.gradient
    exact = _solve(model.product, g, tolerance)  # first: it fails where there is no minimum
    optimum = float(model.value(exact))
    steps: dict[str, Params] = {"gradient": jax.tree.map(jnp.negative, g)}
    frozen = freeze(metrics.resolve(metric))
    refit = Refit() if refit is None else replace(refit, fresh_batches=False)
    check_options(refit, metrics.resolve(metric), divergence_reduction, WHOLE)
    for chosen in structures:
        name = chosen if isinstance(chosen, str) else f"rules {len(steps)}"
        plan = plans.make_plan(params, rule_table(chosen), max_dim)
        setup = Setup(plan, frozen, divergence_reduction, identity_scaling, refit)
        setup.check()
        numbers = numbers_at(refit, jnp.zeros((), jnp.int32), damping)
        blocks = plans.identity(plan, 1.0)
        inputs = Inputs(blocks, no_refit(plans.size(plan)), params, objective, numbers)
        blocks, _ = learn(setup, inputs)
        scaled = plans.multiply(plan, blocks, steps["gradient"])
        steps[name] = jax.tree.map(lambda x: x / identity_scaling, scaled)
    steps["block-diagonal"] = _block_diagonal_step(model, tolerance)
    steps["exact"] = exact
    rows = []
    for name, u in steps.items():
        slope, curved = float(vdot(g, u)), float(vdot(u, model.product(u)))
        shares = (slope + curved / 2) / optimum, -(slope**2) / curved / 2 / optimum
        rows.append(_approximation(name, shares, u, exact))
    return Quality(tuple(rows), optimum)


def _block_diagonal_step(model: QuadraticModel, tolerance: float) -> Params:
    """The minimiser of J without the curvature between different stages."""
    gradients, treedef = jax.tree.flatten(model.gradient)
    step = [jnp.zeros_like(g) for g in gradients]
    for members in _stages(model.gradient).values():

        def product(part: list[Array], members: list[int] = members) -> list[Array]:
            whole = [jnp.zeros_like(g) for g in gradients]
            for i, u in zip(members, part, strict=True):
                whole[i] = u
            curved = jax.tree.leaves(model.product(treedef.unflatten(whole)))
            return [curved[i] for i in members]

        solved = _solve(product, [gradients[i] for i in members], tolerance)
        for i, u in zip(members, solved, strict=True):
            step[i] = u
    return treedef.unflatten(step)


def _stages(params: Params) -> dict[str, list[int]]:
    """Top-level entry of the parameters -> positions of its leaves."""
    stages: dict[str, list[int]] = {}
    for i, name in enumerate(leaf_names(params)):
        stages.setdefault(name.partition("/")[0], []).append(i)
    return stages


def _approximation(
    name: str, shares: tuple[float, float], u: Params, exact: Params
) -> Approximation:
    us, es = jax.tree.leaves(u), jax.tree.leaves(exact)
    stages = {
        stage: _part([us[i] for i in members], [es[i] for i in members])
        for stage, members in _stages(exact).items()
    }
    return Approximation(name, *shares, _part(us, es), stages)


def _solve(product: Callable[[PyTree], PyTree], g: PyTree, tolerance: float) -> PyTree:
    """-product^-1 g."""
    found, _ = solve(product, g, tolerance=tolerance, max_steps=MAX_STEPS)
    return jax.tree.map(jnp.negative, found)


def _percent(share: float) -> str:
    return f"{100 * share:,.1f} %"


def _part(u: PyTree, exact: PyTree) -> Part:
    length = norm(u) / jnp.maximum(norm(exact), 1e-30)
    return Part(float(cosine(u, exact)), float(length))


def _table(
    lines: Sequence[tuple[str, ...]], left: int, total: tuple[str, ...] | None = None
) -> str:
    """Align columns under a ruled head, the first `left` of them to the left."""
    every = [*lines, total] if total else list(lines)
    widths = [max(len(line[i]) for line in every) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in every
    ]
    rule = "-" * max(map(len, text))
    text.insert(1, rule)
    if total:
        text.insert(-1, rule)
    return "\n".join(text)
