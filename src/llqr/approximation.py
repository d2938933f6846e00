"""How near a preconditioner's step comes to the exact one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from llqr import metrics
from llqr._linalg import solve
from llqr._tables import table
from llqr.curvature.model import QuadraticModel, linearize
from llqr.metrics import MetricLike, Reduction
from llqr.objective import BoundObjective
from llqr.refit.learner import WHOLE
from llqr.refit.options import Refit, check_options
from llqr.refit.published import learn
from llqr.refit.record import no_refit
from llqr.refit.setup import Inputs, Setup, numbers_at
from llqr.structures import trees
from llqr.structures.plan import make_plan, size
from llqr.structures.preconditioner import Preconditioner
from llqr.structures.rules import StructureLike, rule_table
from llqr.tree import cosine, freeze, leaf_names, norm, vdot
from llqr.typing import Array, Params, PyTree

MAX_STEPS = 5000
"""Of conjugate gradients in `quality`."""


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
        return table([head, *body], 1)


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
      damping: lambda >= 0; positive where C is singular.
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
        plan = make_plan(params, rule_table(chosen), max_dim)
        setup = Setup(plan, frozen, divergence_reduction, identity_scaling, refit)
        setup.check()
        numbers = numbers_at(refit, jnp.zeros((), jnp.int32), damping)
        blocks = trees.identity(plan, identity_scaling)
        inputs = Inputs(blocks, no_refit(size(plan)), params, objective, numbers)
        blocks, _ = learn(setup, inputs)
        p = Preconditioner.on(plan, blocks, g, identity_scaling)
        steps[name] = p.product(steps["gradient"])
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
