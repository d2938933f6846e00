"""Where loops run: in Python over compiled pieces, or compiled whole.

XLA on CPU runs the gradients of convolutions inside a compiled loop 30 to 50 times slower than
outside it, so a loop there is driven from Python. On other devices, and inside a caller's trace,
it is compiled. Both run the same pieces; others say what runs, and ask here where.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from llqr.tree import is_traced, shard_like, zeros_like
from llqr.typing import Array, Bool, PyTree


def in_python(*trees: PyTree) -> bool:
    """Whether a loop over these arrays is driven from Python: on CPU, outside any trace."""
    return not is_traced(trees) and _platform(trees) == "cpu"


def _platform(tree: PyTree) -> str:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            return next(iter(leaf.devices())).platform
    return jax.default_backend()


@partial(jax.jit, static_argnames=("function", "static"))
def compiled(function: Callable[..., Any], static: Any, *arguments: Any) -> Any:
    """Return function(static, *arguments), compiled: one piece of a loop in Python."""
    return function(static, *arguments)


def direct(function: Callable[..., Any], static: Any, *arguments: Any) -> Any:
    """Return function(static, *arguments) as it is: compiled with what is around it."""
    return function(static, *arguments)


def repeat(
    step: Callable[[Any], Any],
    carry: Any,
    steps: int,
    *,
    python: bool,
    done: Callable[[Any], Bool[Array, ""]] | None = None,
) -> Any:
    """Return the carry after `steps` steps, or after the first that leaves it done.

    Args:
      step: carry -> carry; in Python, a compiled piece.
      carry: a pytree.
      steps: the most steps.
      python: where the loop runs, from `in_python`.
      done: carry -> whether to stop; None: never. In Python, the host waits for it.
    """
    if python:
        for _ in range(steps):
            carry = step(carry)
            if done is not None and bool(done(carry)):
                break
        return carry
    if done is None:
        return jax.lax.scan(lambda c, _: (step(c), None), carry, length=steps)[0]

    def unfinished(counted: tuple[Array, Any]) -> Array:
        return (counted[0] < steps) & ~done(counted[1])

    start = (jnp.zeros((), jnp.int32), carry)
    return jax.lax.while_loop(unfinished, lambda c: (c[0] + 1, step(c[1])), start)[1]


def stacked(function: Callable[[Any], PyTree], count: int, *, python: bool) -> PyTree:
    """Stack function(0) .. function(count - 1) on a new first axis, one after the other."""
    if not python:
        return jax.lax.map(function, jnp.arange(count))
    return _stack([function(i) for i in range(count)])


def total(function: Callable[[Any], PyTree], count: int, like: PyTree, *, python: bool) -> PyTree:
    """Return function(0) + .. + function(count - 1), shaped like `like`."""
    if not python:
        zeros = zeros_like(like)
        add = lambda sum_, i: (jax.tree.map(jnp.add, sum_, function(i)), None)  # noqa: E731
        return jax.lax.scan(add, zeros, jnp.arange(count))[0]
    sum_ = function(0)
    for i in range(1, count):
        sum_ = jax.tree.map(jnp.add, sum_, function(i))
    return sum_


def mapped(function: Callable[..., PyTree], *trees: PyTree, python: bool) -> PyTree:
    """Map over the leading axis: at once, or in Python where the function loops there itself."""
    if not python:
        return jax.vmap(function)(*trees)
    count = jax.tree.leaves(trees)[0].shape[0]
    return _stack([function(*jax.tree.map(lambda x, i=i: x[i], trees)) for i in range(count)])


def unrolled(count: int) -> int:
    """How far to unroll a `lax.scan` of `count` gradients that must stay inside a trace."""
    return count if jax.default_backend() == "cpu" else 1


def when(due: bool | Array, run: Callable[..., Any], *operands: Any) -> Any:
    """Return run(*operands) if due, else the operands; decided in Python where that is known.

    Under `jax.vmap`, `run` runs if it is due for any member, and the others keep their operands: a
    `lax.cond` over members would run it always.
    """
    if not isinstance(due, Tracer):
        return run(*operands) if due else operands

    def chosen(*kept: Any) -> Any:
        choose = lambda new, old: jnp.where(due, shard_like(new, old), old)  # noqa: E731
        return jax.tree.map(choose, run(*kept), kept)

    return jax.lax.cond(_anywhere(due), chosen, lambda *kept: kept, *operands)


@custom_vmap
def _anywhere(due: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether it is due for any of the members of a `jax.vmap`: one answer for all."""
    return due


@_anywhere.def_vmap
def _(size: int, batched: list[bool], due: Bool[Array, " members"]) -> tuple[Array, bool]:
    del size, batched
    return _anywhere(jnp.any(due)), False


def _stack(found: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
