r"""Inner solvers: how a refit moves what it learns.

  symbol   meaning                                           shape
  G        gradient of the inner objective Phi               like the learned arrays
  d        search direction                                  like the learned arrays
  y        G - the last G                                    like the learned arrays

  name           rule
  momentum       m <- mu m + G, step -rate m
  sgd            step -rate G
  adam           Adam(0.9, 0.999)
  relative       step -rate rms(S) S G / |S G| for a side S (`scale_by_relative`): P
                 preconditions its own refit, whose Hessian is the C that P inverts
  cg             linear conjugate gradients, for structures linear in their arrays: Phi is
                 then a quadratic, and each step costs one product with C
  cg_zoom_hz     nonlinear conjugate gradients, beta of Hager and Zhang (clipped to +-1000),
                 zoom line search
  cg_back_pr+    the same with beta of Polak and Ribiere, max(0, .), Armijo backtracking

The first four are clipped first, and multiplied by the learning rate; the conjugate
gradients find their own lengths: clipping and learning rate do not enter. Where a step of the
last two leaves the legal arrays (an elementwise P is positive), it is clamped, and halved until
Phi falls all the same.

Sources: Layerwise LQR (arXiv 2605.04230) for the names and defaults; Hager and Zhang, A
Survey of Nonlinear Conjugate Gradient Methods (2006); the relative step is that of
preconditioned SGD on matrix Lie groups (Li, arXiv 1512.04202).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llqr.refit.objective import Phi
from llqr.refit.options import DETERMINISTIC, LINE_SEARCHES, SOLVERS, SolverLike
from llqr.structures import trees
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays
from llqr.structures.plan import Plan, each
from llqr.tree import divide, vdot
from llqr.typing import Array, Bool, Float, Number, PyTree

__all__ = [
    "DETERMINISTIC",
    "LINE_SEARCHES",
    "SOLVERS",
    "Solver",
    "SolverLike",
    "make",
    "scale_by_relative",
]

LINE_SEARCH_STEPS = 20
HALVINGS = 10
BETA_LIMIT = 1e3
BOUNDED, LONGEST = 0.1, 100.0
"""Bounds on a searched step, by the length of the arrays: where Phi curves down, and ever."""


@dataclass(frozen=True)
class Solver:
    """An inner solver.

    Attributes:
      init: (learned, (Phi, its gradient) at the start, or None) -> state.
      step: (Phi, learned, state, rate) -> (learned, state, Phi where it started).
      needs_first_gradient: whether `init` takes Phi and its gradient.
    """

    init: Callable[[PyTree, Any], Any]
    step: Callable[[Phi, PyTree, Any, Number], tuple[PyTree, Any, Float[Array, ""]]]
    needs_first_gradient: bool = False


def make(
    solver: SolverLike,
    plan: Plan,
    *,
    momentum: float,
    clip_norm: float | None,
    clip_value: float | None,
    clamp: Callable[[PyTree], PyTree] | None = None,
) -> Solver:
    """Return an inner solver by name, or one around an optax transformation.

    Args:
      solver: a name of `SOLVERS`, or a transformation whose updates are added as they are.
      plan: the blocks whose arrays are learned.
      momentum: mu.
      clip_norm: largest L2 norm of each array of G, matrix by matrix; None: no clipping.
      clip_value: largest absolute entry of G; None: no clipping.
      clamp: makes learned arrays legal, for a line search; None: all of them are.

    References:
      Hager and Zhang, A Survey of Nonlinear Conjugate Gradient Methods (2006), for cg_zoom_hz.
      Li, Preconditioned Stochastic Gradient Descent, arXiv 1512.04202, for relative.
    """
    if solver == "cg":
        return Solver(_cg_init, _cg_step, needs_first_gradient=True)
    if isinstance(solver, str) and solver in _SEARCHES:
        beta, search = _SEARCHES[solver]

        def step(phi: Phi, learned: PyTree, state: Any, rate: Number) -> Any:
            del rate
            return _nonlinear_step(phi, learned, state, beta, search, clamp)

        return Solver(_nonlinear_init, step)
    named = isinstance(solver, str)
    chain = [optax.identity()]
    if clip_norm is not None:
        chain.append(_each_matrix(_clip_each(clip_norm), plan))
    if clip_value is not None:
        chain.append(optax.clip(clip_value))
    if solver == "momentum":
        chain.append(optax.trace(momentum))
    elif solver == "adam":
        chain.append(optax.scale_by_adam())
    elif solver == "relative":
        chain.append(_each_matrix(scale_by_relative(), plan))
    elif not named:
        chain.append(_by_matrix(solver, plan))
    tx = optax.with_extra_args_support(optax.chain(*chain))

    def first_order(phi: Phi, learned: PyTree, state: Any, rate: Number) -> Any:
        value, gradient = phi.value_and_gradient(learned)
        updates, state = tx.update(gradient, state, learned)
        if named:
            updates = jax.tree.map(lambda u: -rate * u, updates)
        moved = jax.tree.map(lambda b, u: (b + u).astype(b.dtype), learned, updates)
        return moved, state, value

    return Solver(lambda learned, _: tx.init(learned), first_order)


def _each_matrix(tx: optax.GradientTransformation, plan: Plan) -> optax.GradientTransformation:
    """Let a transformation without a state act on each matrix by itself."""

    def one(_: Block, g: Arrays, s: Arrays) -> Any:
        return tx.update(g, optax.EmptyState(), s)[0]

    return optax.stateless(lambda g, s: tuple(each(plan, one, g, s)))


def _by_matrix(
    tx: optax.GradientTransformation, plan: Plan
) -> optax.GradientTransformationExtraArgs:
    """Show any transformation the arrays of each matrix: it may care for a leaf's shape."""
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        apart, at = trees.per_matrix(plan, updates), trees.per_matrix(plan, params)
        moved: Any
        moved, state = tx.update(tuple(apart), state, tuple(at), **extra)
        return tuple(trees.from_matrices(plan, moved)), state

    return optax.GradientTransformationExtraArgs(
        lambda params: tx.init(tuple(trees.per_matrix(plan, params))), update
    )


def scale_by_relative() -> optax.GradientTransformation:
    """Make steps relative to the array that is learned: the solver "relative".

    A matrix side S (the entries "left" and "right" of a dict, square) with gradient G moves
    along S G, or along G where that would not descend; its length is the root mean square
    of S's singular values. The refit's Hessian is the curvature that S should invert, so
    that S G is Newton's direction once S is right. Any other array s moves along |s| G, the
    largest entry by the root mean square of s and no entry by more than itself: with a
    learning rate below 1, none crosses zero. A step does not depend on the scale of G.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_relative()
      >>> updates, _ = tx.update([jnp.array([2.0, 0.0])], tx.init(None), [jnp.array([1.0, 1.0])])
      >>> updates[0].tolist()
      [1.0, 0.0]

    References:
      Li, Preconditioned Stochastic Gradient Descent, arXiv 1512.04202.
    """

    def one(path: Any, g: Array, s: Array) -> Array:
        side = getattr(path[-1], "key", None) in ("left", "right") if path else False
        if side and s.ndim == 2 and s.shape[0] == s.shape[1]:
            step = s @ g
            step = jnp.where(jnp.sum(step * g) > 0, step, g)
            size, typical = jnp.sqrt(jnp.sum(step * step)), jnp.sqrt(jnp.sum(s * s) / s.shape[0])
            return (divide(typical, size) * step).astype(g.dtype)
        step = jnp.abs(s) * g
        size = jnp.max(jnp.abs(step), initial=0.0)
        step = divide(jnp.sqrt(jnp.mean(s * s)), size) * step
        return jnp.clip(step, -jnp.abs(s), jnp.abs(s)).astype(g.dtype)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(one, updates, params)
    )


def _clip_each(limit: float) -> optax.GradientTransformation:
    """Scale every array to an L2 norm of at most `limit`."""

    def clip(x: Array) -> Array:
        norm = jnp.sqrt(jnp.sum(x * x))
        return x * jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(x.dtype).tiny))

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))


# --- linear conjugate gradients ------------------------------------------------------------------


class _CGState(NamedTuple):
    residual: PyTree  # -gradient of Phi
    direction: PyTree
    squared: Array  # of the residual
    value: Array  # Phi


def _cg_init(learned: PyTree, found: tuple[Array, PyTree]) -> _CGState:
    del learned
    value, gradient = found
    residual = jax.tree.map(jnp.negative, gradient)
    return _CGState(residual, residual, vdot(residual, residual), value)


def _cg_step(
    phi: Phi, learned: PyTree, state: _CGState, rate: Number
) -> tuple[PyTree, _CGState, Array]:
    """One step; it stays where it is once solved, or where Phi curves down."""
    del rate
    p = state.direction
    q = phi.product(p)
    curvature = vdot(p, q)
    alpha = jnp.where(curvature > 0, divide(state.squared, curvature), 0.0)
    moved = jax.tree.map(lambda b, d: (b + alpha * d).astype(b.dtype), learned, p)
    residual = jax.tree.map(lambda r, x: (r - alpha * x).astype(r.dtype), state.residual, q)
    squared = vdot(residual, residual)
    beta = jnp.where(alpha > 0, divide(squared, state.squared), 0.0)
    direction = jax.tree.map(lambda r, d: (r + beta * d).astype(r.dtype), residual, p)
    value = state.value - alpha * state.squared / 2  # exact on a quadratic
    return moved, _CGState(residual, direction, squared, value), state.value


# --- nonlinear conjugate gradients ---------------------------------------------------------------


class _NonlinearState(NamedTuple):
    gradient: PyTree  # the last one
    direction: PyTree
    started: Bool[Array, ""]


def _nonlinear_init(learned: PyTree, _: Any) -> _NonlinearState:
    zeros = jax.tree.map(jnp.zeros_like, learned)
    return _NonlinearState(zeros, zeros, jnp.array(False))


def _nonlinear_step(
    phi: Phi,
    learned: PyTree,
    state: _NonlinearState,
    beta: Callable[[PyTree, PyTree, PyTree], Array],
    search: Callable[[Callable[[Array], Array], Array, Array, Array], Array],
    clamp: Callable[[PyTree], PyTree] | None,
) -> tuple[PyTree, _NonlinearState, Array]:
    value, g = phi.value_and_gradient(learned)
    change = jax.tree.map(jnp.subtract, g, state.gradient)
    b = jnp.where(state.started, beta(g, change, state.direction), 0.0)
    d = jax.tree.map(lambda x, last: (b * last - x).astype(x.dtype), g, state.direction)
    downhill = vdot(g, d) < 0
    d = jax.tree.map(lambda d, x: jnp.where(downhill, d, -x), d, g)  # restart
    zero = jnp.zeros_like(value)
    _, slope, curved = phi.along(learned, d, zero)
    # The Newton length along the line, so that the search starts near its end. Where Phi curves
    # down there is none, and it may have no lower bound: then a step that P can follow.
    length = jnp.sqrt(vdot(learned, learned))
    length = jnp.where(length > 0, length, 1.0)  # arrays that start at zero have no length yet
    size = divide(length, jnp.sqrt(vdot(d, d)), 1.0)
    convex, short = curved > 0, BOUNDED * size
    guess = jnp.where(convex, jnp.minimum(divide(-slope, curved), LONGEST * size), short)
    line = jax.tree.map(lambda x: (guess * x).astype(x.dtype), d)

    # A custom rule: the slope is known from tangent sweeps, no transpose is needed. The search
    # counts in float64 where JAX does, whatever Phi is in.
    @jax.custom_jvp
    def along(t: Array) -> Array:
        return phi.along(learned, line, t.astype(value.dtype))[0].astype(value.dtype)

    @along.defjvp
    def _rule(primals: Any, tangents: Any) -> Any:
        found, slope, _ = phi.along(learned, line, primals[0].astype(value.dtype))
        return found.astype(value.dtype), (slope * tangents[0]).astype(value.dtype)

    longest = jnp.where(convex, divide(LONGEST * size, guess, 1.0), 1.0).astype(value.dtype)
    t = search(along, value, (guess * slope).astype(value.dtype), longest)
    t = jnp.where(jnp.isfinite(t), t, 0.0)
    found, _, bent = phi.along(learned, line, t)
    t = jnp.where(found < value, t, 0.0)
    # It went past a valley that is none: Phi curves down at the end, so that nothing holds it.
    runaway = convex & ~(bent > 0) & (t > 0)
    t = jnp.where(runaway, jnp.minimum(t, divide(short, guess)), t)

    def at(t: Array) -> PyTree:
        moved = jax.tree.map(lambda b, x: (b + t * x).astype(b.dtype), learned, line)
        return moved if clamp is None else clamp(moved)

    if clamp is not None:  # the search does not know where arrays end
        t = _halved(lambda t: phi.along(at(t), line, zero)[0], value, t)
    return at(t), _NonlinearState(g, d, jnp.array(True)), value


def _halved(function: Callable[[Array], Array], value: Array, t: Array) -> Array:
    """The first of t, t/2, t/4, ... with a function value below `value`; 0 if there is none."""

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        t, _, halvings = carry
        return t / 2, function(t / 2) < value, halvings + 1

    start = (t, function(t) < value, jnp.zeros((), jnp.int32))
    t, lower, _ = jax.lax.while_loop(lambda c: ~c[1] & (c[0] > 0) & (c[2] < HALVINGS), step, start)
    return jnp.where(lower, t, 0.0)


def _polak_ribiere(g: PyTree, y: PyTree, d: PyTree) -> Array:
    del d
    last = jax.tree.map(jnp.subtract, g, y)
    return jnp.maximum(divide(vdot(g, y), vdot(last, last)), 0.0)


def _hager_zhang(g: PyTree, y: PyTree, d: PyTree) -> Array:
    dy = vdot(d, y)
    twice = 2 * divide(vdot(y, y), dy)
    direction = jax.tree.map(lambda y, d: y - twice * d, y, d)
    return jnp.clip(divide(vdot(direction, g), dy), -BETA_LIMIT, BETA_LIMIT)


def _zoom(function: Callable[[Array], Array], value: Array, slope: Array, longest: Array) -> Array:
    search = optax.scale_by_zoom_linesearch(
        LINE_SEARCH_STEPS, max_learning_rate=longest, initial_guess_strategy="one"
    )
    return _search(search, function, value, slope)


def _backtracking(
    function: Callable[[Array], Array], value: Array, slope: Array, longest: Array
) -> Array:
    del longest  # it starts at the guess and goes back
    search = optax.scale_by_backtracking_linesearch(LINE_SEARCH_STEPS, decrease_factor=0.5)
    return _search(search, function, value, slope)


def _search(search: Any, function: Any, value: Array, slope: Array) -> Array:
    """The length found by an optax line search on a function of one number."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        zero, one = jnp.zeros_like(value), jnp.ones_like(value)
        length, _ = search.update(
            one, search.init(zero), zero, value=value, grad=slope, value_fn=function
        )
    return length


_SEARCHES = dict(
    zip(LINE_SEARCHES, ((_hager_zhang, _zoom), (_polak_ribiere, _backtracking)), strict=True)
)
"""Nonlinear conjugate gradients: beta and line search by name."""
