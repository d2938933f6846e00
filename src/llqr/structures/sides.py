r"""Families of square matrices that act on the rows (or columns) of a block.

  symbol   meaning                                     shape
  S        the matrix that a side stands for           [d, d], never formed
  x        columns that it multiplies                  [d, k]
  r        rank: how many vectors a low-rank side keeps

  side             S                                               arrays
  identity         I                                               none
  diagonal         diag(main)                                      main [d]
  dense            main                                            main [d, d]
  symmetric        T + T^T - diag(T), T lower triangular           main [d, d]
  definite         T T^T                                           main [d, d]
  congruent        T diag(s) T^T                                   main [d, d], values [d]
  congruent_max    the same with s / max|s|                        main [d, d], values [d]
  householder      Q diag(s) Q^T, Q a product of 4 reflections     vectors [4, d], values [d]
  rank_one         main, changed by one symmetric rank a refit     main [d, d]
  rank_one_pair    main, changed by one rank a refit               main [d, d]
  low_rank         (I + u_r u_r^T) ... (I + u_1 u_1^T)             main [r, d]
  low_rank_pair    (I + u_r v_r^T) ... (I + u_1 v_1^T)             main [r, d], other [r, d]

`register_side` adds a family of your own. The last four keep a memory: a refit does not learn
their arrays but a fresh vector (or a pair), which is folded into them when it ends. `rank_one`
follows Sherman and Morrison, S - (S x)(x^T S) / (1 + x^T S x): the inverse of a matrix to which
x x^T was added.

Sources: Layerwise LQR (arXiv 2605.04230).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llqr.typing import Array, Float

SideArrays = Mapping[str, Float[Array, "..."]]
"""Local name ("main", "values", ...) -> array."""

Shapes = dict[str, tuple[int, ...]]

REFLECTIONS = 4
_TINY = 1e-8


def _same(arrays: SideArrays) -> dict[str, Array]:
    return dict(arrays)


@dataclass(frozen=True)
class Side:
    """One family; all members are pure functions.

    Attributes:
      shapes: (d, r) -> shape of each array.
      init: (value, d, r, dtype) -> the arrays for which S = value I (I, if not `scalable`).
      times: (arrays, x, transpose) -> S x or S^T x.
      cost: (d, r) -> multiply-adds for each entry of x.
      square: whether it stores d x d numbers, so that a long side is better diagonal.
      linear: whether S is linear in what a refit learns.
      symmetric: whether S is.
      definite: whether S is positive semidefinite.
      scalable: whether `value` can be other than 1.
      fresh: d -> shape of each vector that a refit learns in place of the arrays.
      fold: (arrays, fresh vectors) -> arrays.
      project: arrays -> the nearest legal ones: the same S in standard form.
      streams: what streaming refits make of it: "basis", any matrix kept in `main` (an orthogonal
        one, or without a spectrum a positive one), so that S = main must hold whatever is in it;
        "fixed", left as `init` made it, the identity; None: nothing, so that a structure with this
        side cannot be streamed.
    """

    shapes: Callable[[int, int], Shapes]
    init: Callable[[float, int, int, DTypeLike], dict[str, Array]]
    times: Callable[[SideArrays, Float[Array, "d k"], bool], Float[Array, "d k"]]
    cost: Callable[[int, int], int]
    square: bool = False
    linear: bool = False
    symmetric: bool = False
    definite: bool = False
    scalable: bool = True
    fresh: Callable[[int], Shapes] | None = None
    fold: Callable[[SideArrays, SideArrays], dict[str, Array]] | None = None
    project: Callable[[SideArrays], dict[str, Array]] = _same
    streams: Literal["basis", "fixed"] | None = None


def _square(d: int, r: int) -> Shapes:
    del r
    return {"main": (d, d)}


def _eye(value: float, d: int, r: int, dtype: DTypeLike) -> dict[str, Array]:
    del r
    return {"main": value * jnp.eye(d, dtype=dtype)}


def _root_eye(value: float, d: int, r: int, dtype: DTypeLike) -> dict[str, Array]:
    return _eye(value**0.5, d, r, dtype)


def _lower(arrays: SideArrays) -> dict[str, Array]:
    return {**arrays, "main": jnp.tril(arrays["main"])}


def _symmetric_times(
    arrays: SideArrays, x: Float[Array, "d k"], transpose: bool
) -> Float[Array, "d k"]:
    del transpose
    t = arrays["main"]
    return (jnp.tril(t) + jnp.tril(t, -1).T) @ x


def _definite_times(
    arrays: SideArrays, x: Float[Array, "d k"], transpose: bool
) -> Float[Array, "d k"]:
    del transpose
    t = jnp.tril(arrays["main"])
    return t @ (t.T @ x)


def _congruent_times(
    arrays: SideArrays, x: Float[Array, "d k"], transpose: bool, *, unit: bool
) -> Float[Array, "d k"]:
    del transpose
    t, s = jnp.tril(arrays["main"]), arrays["values"]
    s = _unit_max(s) if unit else s
    return t @ (s[:, None] * (t.T @ x))


def _unit_max(s: Float[Array, " d"]) -> Float[Array, " d"]:
    largest = jnp.max(jnp.abs(s))
    return s / jnp.where(largest > 0, largest, 1)


def _congruent_init(
    value: float, d: int, r: int, dtype: DTypeLike, *, unit: bool
) -> dict[str, Array]:
    # The size of a normalised s would be lost: T carries it.
    main, s = (value**0.5, 1.0) if unit else (1.0, value)
    return {**_eye(main, d, r, dtype), "values": jnp.full((d,), s, dtype)}


def _congruent_project(arrays: SideArrays, *, unit: bool) -> dict[str, Array]:
    out = _lower(arrays)
    return {**out, "values": _unit_max(out["values"])} if unit else out


def _congruent(unit: bool) -> Side:
    return Side(
        shapes=lambda d, r: {"main": (d, d), "values": (d,)},
        init=partial(_congruent_init, unit=unit),
        times=partial(_congruent_times, unit=unit),
        cost=lambda d, r: 2 * d + 1,
        square=True,
        symmetric=True,
        project=partial(_congruent_project, unit=unit),
    )


def _householder_init(value: float, d: int, r: int, dtype: DTypeLike) -> dict[str, Array]:
    # Q (value I) Q^T = value I for every Q. From zero vectors, Q could never move.
    del r
    vectors = jax.random.normal(jax.random.key(42), (REFLECTIONS, d), dtype)
    return {"vectors": vectors, "values": jnp.full((d,), value, dtype)}


def _householder_times(
    arrays: SideArrays, x: Float[Array, "d k"], transpose: bool
) -> Float[Array, "d k"]:
    del transpose
    units = [v / jnp.sqrt(jnp.maximum(jnp.sum(v * v), _TINY**2)) for v in arrays["vectors"]]
    for v in units:  # Q^T x
        x = _reflect(v, x)
    x = arrays["values"][:, None] * x
    for v in reversed(units):
        x = _reflect(v, x)
    return x


def _reflect(v: Float[Array, " d"], x: Float[Array, "d k"]) -> Float[Array, "d k"]:
    return x - 2 * v[:, None] * (v @ x)[None, :]


def _rank_one_fold(arrays: SideArrays, fresh: SideArrays) -> dict[str, Array]:
    u, s = fresh["u"], arrays["main"]
    v = fresh.get("v", u)
    left, right = s @ u, v @ s
    change = 1 + v @ left
    # Near -1, the inverse does not exist: bounded away from zero, its sign kept.
    change = jnp.where(jnp.abs(change) < _TINY, jnp.where(change < 0, -_TINY, _TINY), change)
    return {"main": s - left[:, None] * right[None, :] / change}


def _rank_one(pair: bool) -> Side:
    return Side(
        shapes=_square,
        init=_eye,
        times=_dense_times,
        cost=lambda d, r: d,
        square=True,
        symmetric=not pair,
        fresh=lambda d: {"u": (d,), "v": (d,)} if pair else {"u": (d,)},
        fold=_rank_one_fold,
    )


def _dense_times(
    arrays: SideArrays, x: Float[Array, "d k"], transpose: bool
) -> Float[Array, "d k"]:
    return (arrays["main"].T if transpose else arrays["main"]) @ x


def _low_rank_times(
    arrays: SideArrays, x: Float[Array, "d k"], transpose: bool
) -> Float[Array, "d k"]:
    us, vs = arrays["main"], arrays.get("other", arrays["main"])
    for j in reversed(range(len(us))) if transpose else range(len(us)):
        u, v = (vs[j], us[j]) if transpose else (us[j], vs[j])
        x = x + u[:, None] * (v @ x)[None, :]
    return x


def _low_rank_fold(arrays: SideArrays, fresh: SideArrays) -> dict[str, Array]:
    """First in, first out; an empty place is a zero vector, which changes nothing."""
    pairs = {"main": fresh["u"]} | ({"other": fresh["v"]} if "v" in fresh else {})
    return {k: jnp.concatenate([arrays[k][1:], new[None]]) for k, new in pairs.items()}


def _low_rank(pair: bool) -> Side:
    names = ("main", "other") if pair else ("main",)
    return Side(
        shapes=lambda d, r: dict.fromkeys(names, (r, d)),
        init=lambda value, d, r, dtype: {name: jnp.zeros((r, d), dtype) for name in names},
        times=_low_rank_times,
        cost=lambda d, r: 2 * r,
        scalable=False,
        fresh=lambda d: {"u": (d,), "v": (d,)} if pair else {"u": (d,)},
        fold=_low_rank_fold,
    )


SIDES: dict[str, Side] = {
    "identity": Side(
        shapes=lambda d, r: {},
        init=lambda value, d, r, dtype: {},
        times=lambda arrays, x, transpose: x,
        cost=lambda d, r: 0,
        linear=True,
        symmetric=True,
        definite=True,
        scalable=False,
        streams="fixed",
    ),
    "diagonal": Side(
        shapes=lambda d, r: {"main": (d,)},
        init=lambda value, d, r, dtype: {"main": jnp.full((d,), value, dtype)},
        times=lambda arrays, x, transpose: arrays["main"][:, None] * x,
        cost=lambda d, r: 1,
        linear=True,
        symmetric=True,
        streams="fixed",
    ),
    "dense": Side(
        _square, _eye, _dense_times, lambda d, r: d, square=True, linear=True, streams="basis",
    ),
    "symmetric": Side(
        _square, _eye, _symmetric_times, lambda d, r: d,
        square=True, linear=True, symmetric=True, project=_lower,
    ),
    "definite": Side(
        _square, _root_eye, _definite_times, lambda d, r: 2 * d,
        square=True, symmetric=True, definite=True, project=_lower,
    ),
    "congruent": _congruent(unit=False),
    "congruent_max": _congruent(unit=True),
    "householder": Side(
        shapes=lambda d, r: {"vectors": (REFLECTIONS, d), "values": (d,)},
        init=_householder_init,
        times=_householder_times,
        cost=lambda d, r: 4 * REFLECTIONS + 1,
        symmetric=True,
    ),
    "rank_one": _rank_one(pair=False),
    "rank_one_pair": _rank_one(pair=True),
    "low_rank": _low_rank(pair=False),
    "low_rank_pair": _low_rank(pair=True),
}  # fmt: skip


def register_side(name: str, side: Side) -> None:
    """Add a family of sides, for `Structure(left=name)` and everything that structures do.

    Args:
      name: not one that is taken.
      side: its functions.

    Raises:
      ValueError: another family has this name.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> from llqr.structures import Side, register_side
      >>> register_side("scalar", Side(
      ...     shapes=lambda d, r: {"main": ()},
      ...     init=lambda value, d, r, dtype: {"main": jnp.full((), value, dtype)},
      ...     times=lambda arrays, x, transpose: arrays["main"] * x,
      ...     cost=lambda d, r: 1, linear=True, symmetric=True))
      >>> llqr.Structure(name="scaled-rows", left="scalar", right="dense").slots
      ('left', 'right')
    """
    if SIDES.get(name, side) != side:
        raise ValueError(f"there is a family of sides {name!r} already; give yours another name.")
    SIDES[name] = side
