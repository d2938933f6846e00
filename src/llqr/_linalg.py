"""Linear algebra on pytrees."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llqr.errors import NonConvexError
from llqr.tree import all_finite, divide, is_traced, vdot
from llqr.typing import Array, Float, Int, PyTree

NOT_CONVEX = (
    "the curvature is not positive along a search direction, so that the step has no minimum. "
    "Use a larger damping, or a positive semi-definite metric (ngd, or gauss_newton of a loss that "
    "is convex in the outputs) with some."
)


class CGInfo(NamedTuple):
    """How conjugate gradients ended."""

    steps: Array  # int32[]
    residual: Array  # relative, float[]
    convex: Array  # bool[]: no direction of non-positive curvature was met


class _CG(NamedTuple):
    x: PyTree
    r: PyTree
    p: PyTree
    rr: Array
    rz: Array  # of r and the preconditioned r
    steps: Array
    convex: Array


def conjugate_gradients(
    product: Callable[[PyTree], PyTree],
    b: PyTree,
    *,
    tolerance: float = 1e-10,
    max_steps: int | None = None,
    precondition: Callable[[PyTree], PyTree] = lambda r: r,
) -> tuple[PyTree, CGInfo]:
    """Solve product(x) = b for a symmetric positive definite product.

    Not `jax.scipy.sparse.linalg.cg`, which goes on in silence where the curvature along a
    search direction is not positive, and returns a saddle.

    Args:
      product: x -> A x.
      b: right side.
      tolerance: relative residual at which to stop.
      max_steps: None: ten times the number of entries of b.
      precondition: r -> M r, symmetric and positive definite, near to the inverse of A.

    Returns:
      x, and how it ended; if the product is not convex, the last x before it showed.
    """
    size = sum(leaf.size for leaf in jax.tree.leaves(b))
    limit = 10 * size if max_steps is None else max_steps
    bb = vdot(b, b)

    def unfinished(s: _CG) -> Array:
        return (s.rr > tolerance**2 * bb) & (s.steps < limit) & s.convex

    def step(s: _CG) -> _CG:
        q = product(s.p)
        curvature = vdot(s.p, q)
        convex = curvature > 0
        alpha = jnp.where(convex, divide(s.rz, curvature), 0.0)
        x = jax.tree.map(lambda x, p: x + alpha * p, s.x, s.p)
        r = jax.tree.map(lambda r, q: r - alpha * q, s.r, q)
        z = precondition(r)
        rz = vdot(r, z)
        p = jax.tree.map(lambda z, p: z + rz / s.rz * p, z, s.p)
        return _CG(x, r, p, vdot(r, r), rz, s.steps + 1, convex)

    zeros, z = jax.tree.map(jnp.zeros_like, b), precondition(b)
    start = _CG(zeros, b, z, bb, vdot(b, z), jnp.zeros((), jnp.int32), jnp.array(True))
    end = jax.lax.while_loop(unfinished, step, start)
    residual = jnp.sqrt(end.rr / jnp.where(bb > 0, bb, 1.0))
    return end.x, CGInfo(end.steps, residual, end.convex)


def solve(
    product: Callable[[PyTree], PyTree],
    b: PyTree,
    *,
    tolerance: float,
    max_steps: int | None = None,
    converge: bool = True,
) -> tuple[PyTree, CGInfo]:
    """Solve product(x) = b, or say that there is no solution.

    Args:
      product: x -> A x, symmetric.
      b: right side.
      tolerance: relative residual at which to stop.
      max_steps: None: ten times the number of entries of b.
      converge: whether running out of steps is an error.

    Raises:
      NonConvexError: A is not positive definite.
      ValueError: it did not converge. Inside a trace, where nothing can be raised, x is NaN
        in both cases.
    """
    x, info = conjugate_gradients(product, b, tolerance=tolerance, max_steps=max_steps)
    solved = info.convex
    if converge:
        solved &= info.residual <= 1e3 * tolerance
    if not is_traced(x):
        if not info.convex:
            raise NonConvexError(NOT_CONVEX)
        if not solved:
            raise ValueError(
                f"conjugate gradients stopped after {int(info.steps)} steps at the relative "
                f"residual {float(info.residual):.1e}: the problem is too ill-conditioned. Use a "
                "larger damping, or more steps."
            )
    return jax.tree.map(lambda leaf: jnp.where(solved, leaf, jnp.nan), x), info


PANELS = {1024: 8, math.inf: 32}
"""Sides up to a length: columns that Gram-Schmidt takes one after the other, others at once."""


def orthonormal(x: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Return Q of a QR factorisation with a positive diagonal of R: an orthonormal basis.

    Gram-Schmidt in panels, twice, which is enough (Giraud et al., Numer. Math. 101, 2005). Matrix
    products do most of it, many matrices at once as they are, and no routine of LAPACK's: those
    take turns with XLA's threads on CPUs, and batches of them can wait for ever.

    Args:
      x: square; a column that depends on those before it, beyond rounding, is of no use, and a
        zero column stays zero.
    """
    size = x.shape[0]
    width = next(width for most, width in PANELS.items() if size <= most)
    panels = -(-size // width)
    rows = jnp.pad(x.T, ((0, panels * width - size), (0, 0)))  # whose entries lie side by side
    place = jnp.arange(width)[:, None]

    def one(j: Int[Array, ""], y: Array) -> Array:
        own = jax.lax.dynamic_index_in_dim(y, j, keepdims=True)
        square = jnp.sum(own * own)
        own = own / jnp.sqrt(jnp.where(square > 0, square, 1))
        along = jnp.sum(y * own, axis=1, keepdims=True)
        return jnp.where(place == j, own, jnp.where(place > j, y - along * own, y))

    def panel(k: Int[Array, ""], q: Array) -> Array:
        y = jax.lax.dynamic_slice_in_dim(rows, k * width, width)
        y = jax.lax.fori_loop(0, width, one, y - (y @ q.T) @ q)
        y = y - (y @ q.T) @ q
        for _ in range(2):  # what the second pass took is missing from their lengths
            y = 1.5 * y - 0.5 * (y @ y.T) @ y
        return jax.lax.dynamic_update_slice_in_dim(q, y, k * width, axis=0)

    return jax.lax.fori_loop(0, panels, panel, jnp.zeros_like(rows))[:size].T


def exactly(spec: str, *factors: Array, **options: Any) -> Array:
    """Return `jnp.einsum` in the precision of the dtype: accelerators would take less.

    Args:
      spec: of the product.
      *factors: arrays.
      **options: of `jnp.einsum`.
    """
    return jnp.einsum(spec, *factors, precision=jax.lax.Precision.HIGHEST, **options)


def eigh_of_each(x: Float[Array, "rows K K"]) -> tuple[Array, Array]:
    """Return eigenvalues and eigenvectors of small symmetric matrices: [rows, K], [rows, K, K].

    Of diagonal ones without a factorisation. Of others on CPU one after the other. There a batched
    factorisation waits for tasks that it puts into the very pool of threads in which it runs: as
    many of them at once as there are threads wait for ever (jaxlib 0.10).

    Args:
      x: the matrices, finite.
    """
    if x.shape[-1] == 1:
        return x[..., 0], jnp.ones_like(x)
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    of_diagonal = lambda x: (jnp.diagonal(x, axis1=1, axis2=2), eye)  # noqa: E731
    one_by_one = lambda x: jax.lax.map(eigh, x)  # noqa: E731
    of_any = lambda x: jax.lax.platform_dependent(x, cpu=one_by_one, default=eigh)  # noqa: E731
    return jax.lax.cond(jnp.all((x == 0) | (eye != 0)), of_diagonal, of_any, x)


def eigh(x: Float[Array, "... d d"]) -> tuple[Array, Array]:
    """Return eigenvalues, rising, and eigenvectors of symmetric matrices: [..., d], [..., d, d].

    Args:
      x: the matrices, finite.
    """
    found = jnp.linalg.eigh(x)
    return found.eigenvalues, found.eigenvectors


class Sketch(NamedTuple):
    """U diag(w) U^T, near to a symmetric positive semi-definite A."""

    w: Float[Array, " k"]  # falling
    u: Float[Array, "d k"]
    finite: Array  # bool[]: whether A is, as far as that shows; else all is 0

    def precondition(self, damping: Array, r: Float[Array, " d"]) -> Float[Array, " d"]:
        """Return M r, M near to (w_k + lambda) (A + lambda I)^-1.

        Args:
          damping: lambda.
          r: a vector.
        """
        inside = self.u.T @ r
        return r + self.u @ (((self.w[-1] + damping) / (self.w + damping) - 1) * inside)


def nystroem(
    product: Callable[[Array], Array], size: int, rank: int, dtype: Any, *, chunk: int = 16
) -> Sketch:
    """Return a randomised Nystroem approximation of a symmetric positive semi-definite A.

    Args:
      product: v -> A v.
      size: d, of v.
      rank: k, of the approximation: as many products.
      dtype: of v.
      chunk: products that are computed at once.

    Source: Frangella, Tropp, Udell, Randomized Nystroem preconditioning (arXiv 2110.02820),
    algorithm 2.1.
    """
    rank = min(rank, size)
    probes = jax.random.normal(jax.random.key(0), (rank, size), dtype)
    probes = jnp.linalg.qr(probes.T)[0]
    images = jax.lax.map(product, probes.T, batch_size=min(chunk, rank)).T
    length = jnp.sqrt(jnp.sum(images * images))
    finite, shift = jnp.isfinite(length), jnp.sqrt(size) * jnp.finfo(dtype).eps * length
    # A factorisation of what is not finite might never end.
    images = jnp.where(finite, images + shift * probes, probes)
    inner = exactly("dk,dl->kl", probes, images)
    factor = jnp.linalg.cholesky((inner + inner.T) / 2)
    finite &= all_finite(factor)  # products that are too rough for the shift
    factor = jnp.where(finite, factor, jnp.eye(rank, dtype=dtype))
    half = jax.scipy.linalg.solve_triangular(factor, images.T, lower=True).T
    u, s, _ = jnp.linalg.svd(half, full_matrices=False)
    some = finite & (length > 0)
    return Sketch(jnp.where(some, jnp.maximum(s * s - shift, 0.0), 0.0), u, finite)


def newton_schulz(x: Float[Array, "m n"], steps: int = 5) -> Float[Array, "m n"]:
    """Return U S V^T of a matrix, all singular values S near to 1: zero stays zero.

    Between 0.7 and 1.2 those that were not tiny, by Muon's polynomial, the steepest at 0.

    Args:
      x: of any scale.
      steps: of the iteration, three products each.

    Source: Jordan et al., Muon: kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = divide(x, jnp.max(jnp.abs(x)))  # squares of small entries would be 0
    x = divide(x, jnp.sqrt(jnp.sum(x * x)))

    def step(_: Any, x: Array) -> Array:
        gram = x @ x.T
        return a * x + (b * gram + c * gram @ gram) @ x

    x = jax.lax.fori_loop(0, steps, step, x)  # a loop: a fifth of the program
    return x.T if tall else x
