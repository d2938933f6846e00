r"""The damped inverse behind an exact step, four ways: R^T (R R^T + lambda I)^-1 v.

  solver     factorised, once for all lambda            memory             at each lambda
  dual       R R^T, see below                           m n + m m          m m m / 3, or m m
  primal     R^T R, see below                           m n + n n          n n n / 3, or n n
  cg         a sketch of rank k, which preconditions    k min(m, n)        conjugate gradients
  riccati    nothing                                    of the regulator   one layerwise recursion

A matrix A = R R^T or R^T R has one eigendecomposition U diag(w) U^T for all lambdas, or a Cholesky
factor of A + lambda I for each. The latter is some ten times cheaper, and as exact where lambda is
well above the rounding of A: below that, and at the first step, which asks for the largest
eigenvalue, the former is taken.

R is the Jacobian of m residuals in n parameters (`llqr.residuals`). By the push-through identity
this is (R^T R + lambda I)^-1 R^T v: all give the same step. In chunks of rows, R is never held: the
first two need m m or n n numbers, and the rows of one chunk, or of two.

Over a mesh with explicit axes R is held by columns: each device has all rows of its part of the
parameters, R R^T is the sum of what they have, and a step moves m n / devices + m m numbers, where
gathering the rows would move m n and have every device multiply all of them.

Sources: Layerwise LQR (arXiv 2605.04230); Frangella, Tropp, Udell (arXiv 2110.02820) for cg.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from llqr import lqr
from llqr._linalg import conjugate_gradients, eigh, exactly, nystroem
from llqr.curvature.model import QuadraticModel
from llqr.objective import BoundObjective
from llqr.residuals import Linear, Residuals, Rows, as_map, rows
from llqr.tree import axis_devices, divide, norm, replicate
from llqr.typing import Array, Bool, Float, Int, Params

Solver: TypeAlias = Literal["auto", "cg", "riccati", "dual", "primal"]
SOLVERS: tuple[str, ...] = get_args(Solver)
"""By the number that a state holds."""

LARGEST = 8192
"""Side of the largest matrix that "auto" factorises."""
HELD = 2**28
"""Numbers of R that "auto" holds at once: 2 GiB in float64."""
SKETCH = 128
"""Rank of the sketch that preconditions conjugate gradients."""
CG_STEPS = 100
"""Most steps of conjugate gradients at one lambda, where nothing is said."""


class Effort(NamedTuple):
    """What a solution cost."""

    steps: Int[Array, ""]  # of conjugate gradients
    residual: Float[Array, ""]  # relative, in the end


SAFE = 10
"""Least lambda of a Cholesky factor: as many roundings of the matrix times its side."""

Solve: TypeAlias = Callable[[Array], tuple[Array, Effort]]
"""v [m] -> R^T (R R^T + lambda)^-1 v [n], and what that cost."""


class Inverse(NamedTuple):
    """How R acts, and its damped inverse."""

    top: Float[Array, ""]  # largest eigenvalue of R R^T, or an estimate from below
    rank: Int[Array, ""]  # of R, as far as rounding shows; of the sketch; 0: unknown
    at: Callable[[Array], Solve]  # lambda ->
    map: Linear
    finite: Bool[Array, ""]  # whether R is, as far as that shows
    agrees: Bool[Array, ""]  # whether rows that were made one by one are those of the whole model


@dataclass(frozen=True)
class Sizes:
    """What decides between solvers.

    Args:
      residuals: m.
      parameters: n.
    """

    residuals: int
    parameters: int

    @property
    def side(self) -> int:
        """Of the smaller matrix."""
        return min(self.residuals, self.parameters)


def choose(solver: str, sizes: Sizes) -> str:
    """Return the solver: of "auto" the one with the smaller matrix, or cg where that is too large.

    Args:
      solver: a name.
      sizes: of R.

    Example:
      >>> choose("auto", Sizes(300, 700)), choose("auto", Sizes(50_000, 9_000))
      ('dual', 'cg')
    """
    if solver != "auto":
        return solver
    if sizes.side > LARGEST:
        return "cg"
    return "dual" if sizes.residuals <= sizes.parameters else "primal"


@dataclass(frozen=True)
class Ways:
    """How an inverse is to be computed.

    Args:
      solver: a name.
      chunk: blocks of rows that are held at once; None: by their number.
      sketch: rank of the sketch behind cg.
      tolerance: of cg, relative residual.
      max_steps: of cg at one lambda; None: `CG_STEPS`.
      max_size: see `llqr.lqr.riccati`.
      coarse: one rounding of the parameters as they are kept.
    """

    solver: str = "auto"
    chunk: int | None = None
    sketch: int = SKETCH
    tolerance: float = 1e-8
    max_steps: int | None = None
    max_size: int = lqr.MAX_SIZE
    coarse: float = 0.0


def damped(
    ways: Ways, found: Residuals, model: QuadraticModel, objective: BoundObjective, params: Params,
    regulator: Callable[[], lqr.LQRProblem], lowest: Array,
) -> tuple[str, Inverse]:  # fmt: skip
    """Return which solver it is, and the damped inverse by it.

    Args:
      ways: how.
      found: residuals and roots.
      model: of the loss at the same point.
      objective: on a batch.
      params: the parameters.
      regulator: makes the model's regulator, for riccati.
      lowest: lambda that will be tried; 0: not known.
    """
    flat, unravel = ravel_pytree(params)
    whole = as_map(model.jacobian, model.outputs, params, found)
    sizes = Sizes(found.r.size, flat.size)
    name = choose(ways.solver, sizes)
    if name == "cg":
        return name, iterative(whole, sizes, found.r.dtype, ways)
    if name == "riccati":
        return name, layerwise(regulator(), whole, flat, unravel, ways.max_size)
    usable = found.convex & found.separable & found.finite
    blocks = rows(objective, params, whole, found)
    own = [float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves((model.outputs, flat))]
    coarse = max(ways.coarse, *own)
    gradient = ravel_pytree(model.gradient)[0].astype(flat.dtype)
    inverse = factorised(name, blocks, whole, gradient, found.r, lowest, usable, ways.chunk, coarse)
    return name, inverse


def factorised(
    solver: str, blocks: Rows, model: Linear, gradient: Array, r: Array, lowest: Array,
    usable: Bool[Array, ""], chunk: int | None, coarse: float,
) -> Inverse:  # fmt: skip
    """Return the inverse by a factorisation of R R^T or R^T R.

    Args:
      solver: "dual" or "primal".
      blocks: rows of R.
      model: R as a map.
      gradient: R^T r, by the whole model.
      r: residuals.
      lowest: lambda that is tried; 0: at the first step.
      usable: where False, all is 0.
      chunk: blocks of rows that are held at once; None: by their number.
      coarse: one rounding of what the model computes in.
    """
    dual, m, n = solver == "dual", blocks.residuals, gradient.size
    many = blocks.count
    if chunk is None and m * n > HELD:
        chunk = max(1, HELD * many // (2 * m * n))
    if chunk is None or chunk >= many:
        matrix = _by_columns(blocks.matrix())
        spec = "mn,kn->mk" if dual else "mn,mk->nk"
        square = _product(spec, matrix, matrix)[: m if dual else n, : m if dual else n]
        model = Linear(
            lambda d: _product("mn,n->m", matrix, _padded(d, matrix.shape[1])),
            lambda v: _product("mn,m->n", matrix, v)[:n],
        )
        agrees = _agrees(model.back(r), gradient, matrix, r, coarse)
    else:
        chunks = blocks.chunks(chunk)
        square = chunks.outer(gradient) if dual else chunks.inner(gradient)
        v = r if dual else gradient
        image = model.along(gradient) if dual else model.back(model.along(gradient))
        agrees = _agrees(square @ v, image, square, v, coarse)
    finite = jnp.all(jnp.isfinite(square))
    # A factorisation of what is not finite might never end.
    square = jnp.where(usable & finite, square, 0.0)
    side, trace = len(square), jnp.trace(square)
    eps = jnp.finfo(square.dtype).eps
    eigen = lowest < SAFE * side * eps * trace
    w, u = jax.lax.cond(eigen, eigh, lambda x: (jnp.zeros(side, x.dtype), x), square)
    w = jnp.maximum(w, 0.0)
    # Of eigenvalues, the mean by themselves is near the largest.
    top = jnp.where(eigen, jnp.max(w), divide(jnp.sum(square * square), trace))
    rank = jnp.sum(w > max(m, n) * eps * top, dtype=jnp.int32)  # 0 without eigenvalues

    def at(damping: Array) -> Solve:
        def factor() -> Array:
            return jnp.linalg.cholesky(square + damping * jnp.eye(side, dtype=square.dtype))

        half = jax.lax.cond(eigen, lambda: u, factor)

        def by_eigenvectors(v: Array) -> Array:
            return exactly("ij,j->i", half, exactly("ij,i->j", half, v) / (w + damping))

        def by_factor(v: Array) -> Array:
            return jax.scipy.linalg.cho_solve((half, True), v)

        def inverted(v: Array) -> Array:
            return jax.lax.cond(eigen, by_eigenvectors, by_factor, v)

        def solve(v: Array) -> tuple[Array, Effort]:
            found = model.back(inverted(v)) if dual else inverted(model.back(v))
            return found, _no_effort(w)

        return solve

    return Inverse(top, rank, at, model, finite, agrees)


def iterative(model: Linear, sizes: Sizes, dtype: Any, ways: Ways) -> Inverse:
    """Return the inverse by conjugate gradients, preconditioned by a sketch of the matrix.

    Args:
      model: R as a map.
      sizes: of R; the equations are those of the smaller side.
      dtype: of the residuals.
      ways: sketch, tolerance and most steps.
    """
    dual = sizes.residuals <= sizes.parameters
    product = _squared(model, dual)
    found = nystroem(product, sizes.side, ways.sketch, dtype)
    top = found.w[0]
    rank = jnp.sum(found.w > sizes.side * jnp.finfo(dtype).eps * top, dtype=jnp.int32)

    def at(damping: Array) -> Solve:
        def solve(v: Array) -> tuple[Array, Effort]:
            x, info = conjugate_gradients(
                lambda x: product(x) + damping * x,
                v if dual else model.back(v),
                tolerance=ways.tolerance,
                max_steps=CG_STEPS if ways.max_steps is None else ways.max_steps,
                precondition=lambda r: found.precondition(damping, r),
            )
            return (model.back(x) if dual else x), Effort(info.steps, info.residual)

        return solve

    return Inverse(top, rank, at, model, found.finite, jnp.array(True))


def layerwise(
    problem: lqr.LQRProblem, model: Linear, like: Array, unravel: Callable[[Array], Any],
    max_size: int,
) -> Inverse:  # fmt: skip
    """Return the inverse by the Riccati recursion: one for each lambda and right side.

    Args:
      problem: the regulator, whose damping is replaced.
      model: R as a map.
      like: the parameters, flat.
      unravel: to the parameters.
      max_size: see `llqr.lqr.riccati`.
    """
    found = nystroem(_squared(model, dual=False), like.size, 8, like.dtype)

    def at(damping: Array) -> Solve:
        def solve(v: Array) -> tuple[Array, Effort]:
            damped = replace(problem, damping=damping)
            u = lqr.solve(damped, gradient=unravel(model.back(v)), max_size=max_size)
            return -ravel_pytree(u)[0], _no_effort(like)

        return solve

    none = jnp.zeros((), jnp.int32)
    return Inverse(found.w[0], none, at, model, found.finite, jnp.array(True))


def _no_effort(like: Array) -> Effort:
    return Effort(jnp.zeros((), jnp.int32), jnp.zeros((), like.dtype))


def _squared(model: Linear, dual: bool) -> Callable[[Array], Array]:
    """Return R R^T or R^T R as a map."""
    if dual:
        return lambda v: model.along(model.back(v))
    return lambda d: model.back(model.along(d))


def _agrees(mine: Array, whole: Array, matrix: Array, v: Array, coarse: float) -> Bool[Array, ""]:
    """Whether what is made of rows one by one does to v what the whole model does."""
    scale = jnp.sqrt(jnp.sum(matrix * matrix)) * norm(v)
    return norm(mine - whole) <= coarse**0.5 * scale


def _by_columns(matrix: Array) -> Array:
    """R with columns over the devices of an explicit mesh, zeros added until they divide them."""
    devices = axis_devices(matrix)
    if devices < 2:
        return matrix
    extra = -matrix.shape[1] % devices
    known = jax.typeof(matrix).sharding
    matrix = jax.sharding.reshard(matrix, PartitionSpec(known.spec[0], None))  # to be padded
    matrix = jnp.pad(matrix, ((0, 0), (0, extra)))
    return jax.sharding.reshard(matrix, PartitionSpec(None, known.mesh.axis_names))


def _padded(d: Array, size: int) -> Array:
    return jnp.pad(d, (0, size - d.size)) if d.size < size else d


def _product(spec: str, *factors: Array) -> Array:
    """A product whose result every device of an explicit mesh has whole."""
    if not any(axis_devices(x) for x in factors):
        return exactly(spec, *factors)
    out = PartitionSpec(*[None] * len(spec.partition("->")[2]))
    whole = [replicate(x) if x.ndim == 1 else x for x in factors]
    return exactly(spec, *whole, out_sharding=out)
