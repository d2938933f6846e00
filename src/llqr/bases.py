"""What a base optimizer does with gradients, found out by tracing it: does it remember them?"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Jaxpr, Literal

from llqr.tree import leaf_names
from llqr.typing import Params


def check_plain(base: optax.GradientTransformation, params: Params, *, momentum: float) -> None:
    """Raise ValueError if the base behind a streaming P remembers gradients itself.

    What its state will be is traced, so that every optimizer is known by what it does: one whose
    state depends on the gradients takes a momentum, second moments or the like. Counts, random keys
    and numbers that follow a schedule depend on no gradient.

    Args:
      base: with extra keywords supported.
      params: the parameters, or their shapes.
      momentum: mu of the refits; with 0 a base may have a momentum, though no second moments, nor
        clipping before it: that belongs in front of P.
    """
    kept = _memory(base, params)
    if not kept or (momentum == 0 and _is_momentum(base, params)):
        return
    raise ValueError(
        f"the base optimizer keeps a memory of gradients ({', '.join(map(repr, kept[:3]))} of its "
        "state), but with streaming refits P multiplies the momentum and gives each leaf its "
        "length: what follows is the learning rate and weight decay alone. Use "
        "llqr.streaming(rate, weight_decay=w), optax.sgd(rate), or "
        "optax.chain(optax.add_decayed_weights(w), optax.scale_by_learning_rate(rate))."
    )


def _memory(base: optax.GradientTransformation, params: Params) -> list[str]:
    """The numbers in the next state that depend on this gradient, by their paths."""
    state = jax.eval_shape(base.init, params)
    try:
        program, after = jax.make_jaxpr(lambda g, s, p: base.update(g, s, p)[1], return_shape=True)(
            params, state, params
        )
    except Exception:  # it wants more than a gradient, as line searches do
        shapes = {jnp.shape(x) for x in jax.tree.leaves(params)}
        alike = zip(leaf_names(state), jax.tree.leaves(state), strict=True)
        return [name for name, x in alike if _is_number(x) and x.shape in shapes]
    marked = [i < len(jax.tree.leaves(params)) for i in range(len(program.jaxpr.invars))]
    depends = _reach(program.jaxpr, marked)
    found = zip(leaf_names(after), jax.tree.leaves(after), depends, strict=True)
    return [name for name, x, does in found if does and _is_number(x)]


def _is_momentum(base: optax.GradientTransformation, params: Params) -> bool:
    """Whether what it remembers is linear in the gradient, and its update follows its length."""
    state = jax.eval_shape(base.init, params)

    def tangents(t: Any, g: Any, s: Any, p: Any) -> Any:
        return jax.jvp(lambda g: base.update(g, s, p), (g,), (t,))[1]

    try:
        program, (update, after) = jax.make_jaxpr(tangents, return_shape=True)(
            params, params, state, params
        )
    except Exception:
        return False
    size, leaves = len(jax.tree.leaves(params)), jax.tree.leaves(after)
    count = len(program.jaxpr.invars)
    by_change = _reach(program.jaxpr, [i < size for i in range(count)])
    by_gradient = _reach(program.jaxpr, [size <= i < 2 * size for i in range(count)])
    first = len(jax.tree.leaves(update))
    linear = not any(
        depends for depends, x in zip(by_gradient[first:], leaves, strict=True) if _is_number(x)
    )
    return linear and all(by_change[:first])


def _is_number(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2"}
"""Primitives that run one program on their operands, one for one."""


def _reach(program: Jaxpr, marked: Sequence[bool]) -> list[bool]:
    """Which results of a program depend on what is marked; where that is hard to say, they do."""
    known = dict(zip(program.invars, marked, strict=True))

    def is_marked(x: Any) -> bool:
        return not isinstance(x, Literal) and known.get(x, False)

    for equation in program.eqns:
        ins = [is_marked(x) for x in equation.invars]
        inside = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        inside: Any = getattr(inside, "jaxpr", inside)
        outs = [any(ins)] * len(equation.outvars)
        if equation.primitive.name in _CALLS and len(inside.invars) == len(ins):
            outs = _reach(inside, ins)
        known.update(zip(equation.outvars, outs, strict=True))
    return [is_marked(x) for x in program.outvars]
