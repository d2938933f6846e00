"""Whether a batch can be cut between examples: found out by tracing the model.

A batch is a tree of arrays, and nothing in it says which axes are examples. Where the objective's
`batch_axes` do not say it either, first axes are taken for it, and it is found out: those axes are
followed through the model's program, from the arrays of the batch to the outputs. If some operation
mixes along them (edges that point to nodes, a scan over time, statistics over a batch), a part
would be another model, and the batch is not cut.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from llqr.errors import LayoutWarning
from llqr.objective import BoundObjective
from llqr.tree import is_none
from llqr.typing import Params

Axes = frozenset[int]
NONE: Axes = frozenset()


class Mixed(Exception):
    """An operation mixes along an axis that is followed."""


def part(objective: BoundObjective, params: Params, share: float, number: Any) -> BoundObjective:
    """Return the objective on a share of the examples, as `BoundObjective.part` does.

    The whole batch where that cannot be cut, with a warning that says why.

    Args:
      objective: on the whole batch.
      params: the parameters.
      share: in (0, 1].
      number: of the part; may be traced.
    """
    found = objective.part(share, number)
    if found is objective:
        sizes = sorted(objective.examples())
        if share < 1 and len(sizes) > 1:
            _warn(f"its arrays have {', '.join(map(str, sizes))} entries on their first axes")
        return found
    try:
        why = interaction(found, params)
        jax.eval_shape(found.loss, jax.eval_shape(found.outputs, params))
    except Exception as error:
        if objective.is_told:
            error.add_note(
                f"llqr: the model failed on the part of a batch that probes see (probe_share="
                f"{share:g}), which was cut where Objective(batch_axes=...) says; with Streaming("
                "probe_share=1.0) probes see the whole batch."
            )
            raise
        jax.eval_shape(objective, params)  # what fails on the whole batch too is told as it is
        lines = str(error).strip().splitlines() or [""]
        why = f"the model fails on a part ({type(error).__name__}: {lines[0]:.100})"
    if why is not None:
        _warn(why)
        return objective
    return found


def _warn(why: str) -> None:
    warnings.warn(
        f"llqr: probes see all of the batch, not a part of its examples: {why}. Say where the "
        "examples are, Objective(batch_axes=...), with None for what all of them share; or that "
        "the whole batch is meant, Streaming(probe_share=1.0).",
        LayoutWarning,
        stacklevel=3,
    )


def interaction(objective: BoundObjective, params: Params) -> str | None:
    """Return in words how entries of first axes interact in the model; None if they do not.

    None too where the objective says which axes are examples.

    Args:
      objective: on a batch, or on a part of it.
      params: the parameters.
    """
    if objective.is_told:
        return None
    leaves, treedef = jax.tree.flatten((objective, params))
    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
    try:
        return _found(treedef, shapes)
    except TypeError:  # a batch or an objective that cannot be hashed
        return _found.__wrapped__(treedef, shapes)


@lru_cache(maxsize=64)
def _found(treedef: Any, shapes: tuple[Any, ...]) -> str | None:
    objective, params = treedef.unflatten(shapes)
    program = jax.make_jaxpr(lambda b, p: b.outputs(p))(objective, params).jaxpr
    batch = jax.tree.leaves(objective.batch, is_leaf=is_none)
    axes = [a for a, x in zip(objective.axes(), batch, strict=True) if x is not None]
    ins = [NONE if a is None else frozenset([a]) for a in axes]
    ins += [NONE] * (len(program.invars) - len(ins))
    try:
        _followed(program, ins)
    except Mixed as mixed:
        return f"examples interact in the model ({mixed} along their axis)"
    return None


def _followed(program: Any, ins: Sequence[Axes]) -> list[Axes]:
    """Return the axes of a program's results that come from axes of what it takes.

    Raises:
      Mixed: an operation mixes along one of them.
    """
    known: dict[Any, Axes] = dict(zip(program.invars, ins, strict=True))

    def of(x: Any) -> Axes:
        return NONE if isinstance(x, core.Literal) else known.get(x, NONE)

    for equation in program.eqns:
        taken = [of(x) for x in equation.invars]
        outs = _after(equation, taken) if any(taken) else [NONE] * len(equation.outvars)
        if any(len(axes) > 1 for axes in outs):
            raise Mixed(f"{equation.primitive.name}, each with each other,")
        known |= dict(zip(equation.outvars, outs, strict=True))
    return [of(x) for x in program.outvars]


def _after(equation: Any, ins: list[Axes]) -> list[Axes]:
    """Axes of an equation's results."""
    name = equation.primitive.name
    if name in _RULES:
        return _RULES[name](equation, ins)
    for prefix, rule in _BY_PREFIX.items():
        if name.startswith(prefix):
            return rule(equation, ins)
    if (inner := _program(equation)) is not None and len(inner.invars) == len(ins):
        return _followed(inner, ins)
    return _alike(equation, ins)


def _alike(equation: Any, ins: Sequence[Axes]) -> list[Axes]:
    """Of what acts entry by entry, or along other axes: results have the axes of the arguments."""
    found = frozenset().union(*ins)
    sizes = {axis: _shape(x)[axis] for x, axes in zip(equation.invars, ins, strict=True)
             for axis in axes}  # fmt: skip
    for out in equation.outvars:
        shape = _shape(out)
        if any(axis >= len(shape) or shape[axis] != size for axis, size in sizes.items()):
            raise Mixed(equation.primitive.name)
    return [found] * len(equation.outvars)


def _shape(x: Any) -> tuple[int, ...]:
    return getattr(x.aval, "shape", ())


def _program(equation: Any) -> Any:
    """The program of a call: of `jit`, a checkpoint, a function with rules of its own."""
    for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and hasattr(inner, "invars"):
            return inner
    return None


def _along(parameter: str) -> Callable[..., list[Axes]]:
    """What mixes along the axes that a parameter names, and leaves the others."""

    def rule(equation: Any, ins: list[Axes]) -> list[Axes]:
        axes = equation.params[parameter]
        axes = set(axes) if hasattr(axes, "__iter__") else {int(axes)}
        if any(taken & axes for taken in ins):
            raise Mixed(equation.primitive.name)
        return _alike(equation, ins)

    return rule


def _reduced(equation: Any, ins: list[Axes]) -> list[Axes]:
    if "axes" not in equation.params:  # reduce_precision
        return _alike(equation, ins)
    gone = set(equation.params["axes"])
    if ins[0] & gone:
        raise Mixed(equation.primitive.name)
    return [_moved(ins[0], [a for a in range(len(_shape(equation.invars[0]))) if a not in gone])]


def _moved(axes: Axes, order: Sequence[int]) -> Axes:
    """Positions of axes in a list of all axes that are left, in their order."""
    return frozenset(i for i, axis in enumerate(order) if axis in axes)


def _broadcast(equation: Any, ins: list[Axes]) -> list[Axes]:
    to = equation.params["broadcast_dimensions"]
    return [frozenset(to[axis] for axis in ins[0])]


def _squeezed(equation: Any, ins: list[Axes]) -> list[Axes]:
    gone, before = equation.params["dimensions"], _shape(equation.invars[0])
    gone = {axis % len(before) for axis in gone}
    return [_moved(ins[0], [a for a in range(len(before)) if a not in gone])]


def _reshaped(equation: Any, ins: list[Axes]) -> list[Axes]:
    """An axis goes on where as many numbers lie behind each of its entries, or where it begins."""
    before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
    found = set()
    for axis in ins[0]:
        if before[axis] == 1:  # nothing to follow
            continue
        first = math.prod(before[:axis])  # numbers of the axes before
        ends = [math.prod(after[:i]) for i in range(len(after) + 1)]
        places = [i for i in range(len(after)) if ends[i] <= first < ends[i + 1]]
        if not places:
            raise Mixed("reshape")
        found.add(places[0])
    return [frozenset(found)]


def _product(equation: Any, ins: list[Axes]) -> list[Axes]:
    contract, batch = equation.params["dimension_numbers"]
    if any(taken & set(axes) for taken, axes in zip(ins, contract, strict=True)):
        raise Mixed(equation.primitive.name)
    found = {i for i, pair in enumerate(zip(*batch, strict=True))
             if any(axis in taken for axis, taken in zip(pair, ins, strict=True))}  # fmt: skip
    at = len(batch[0])
    for x, taken, gone, shared in zip(equation.invars, ins, contract, batch, strict=True):
        free = [a for a in range(len(_shape(x))) if a not in {*gone, *shared}]
        found |= {at + i for i, axis in enumerate(free) if axis in taken}
        at += len(free)
    return [frozenset(found)]


def _convolved(equation: Any, ins: list[Axes]) -> list[Axes]:
    numbers = equation.params["dimension_numbers"]
    if ins[0] - {numbers.lhs_spec[0]} or ins[1] or equation.params["batch_group_count"] > 1:
        raise Mixed(equation.primitive.name)
    return [frozenset([numbers.out_spec[0]]) if ins[0] else NONE]


def _gathered(equation: Any, ins: list[Axes]) -> list[Axes]:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
    together = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims,
                        strict=True))  # fmt: skip
    free = [a for a in range(len(operand))
            if a not in {*numbers.collapsed_slice_dims, *together}]  # fmt: skip
    found, indices = set(), set(ins[1])
    for axis in ins[0]:
        if axis in together:
            indices.add(together[axis])
        elif axis in numbers.start_index_map or sizes[axis] != operand[axis]:
            raise Mixed(equation.primitive.name)
        else:
            found.add(numbers.offset_dims[free.index(axis)])
    places = [a for a in range(len(out)) if a not in numbers.offset_dims]
    return [frozenset(found | {places[axis] for axis in indices})]


def _scattered(equation: Any, ins: list[Axes]) -> list[Axes]:
    """Into what has the axis itself; where only what is added has it, all end in one place."""
    numbers = equation.params["dimension_numbers"]
    moved = set(numbers.scatter_dims_to_operand_dims)
    if ins[0] & moved or ((ins[1] or ins[2]) and not ins[0]):
        raise Mixed(equation.primitive.name)
    return [ins[0]]


def _sliced(equation: Any, ins: list[Axes]) -> list[Axes]:
    before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
    if any(before[axis] != after[axis] for axis in ins[0]) or any(ins[1:]):
        raise Mixed(equation.primitive.name)
    return [ins[0]]


def _updated(equation: Any, ins: list[Axes]) -> list[Axes]:
    operand, update = (_shape(x) for x in equation.invars[:2])
    if any(operand[axis] != update[axis] for axis in ins[0] | ins[1]) or any(ins[2:]):
        raise Mixed(equation.primitive.name)
    return [ins[0] | ins[1]]


def _padded(equation: Any, ins: list[Axes]) -> list[Axes]:
    if any(equation.params["padding_config"][axis] != (0, 0, 0) for axis in ins[0]):
        raise Mixed(equation.primitive.name)
    return [ins[0]]


def _windowed(equation: Any, ins: list[Axes]) -> list[Axes]:
    if any(equation.params["window_dimensions"][axis] > 1 for taken in ins for axis in taken):
        raise Mixed(equation.primitive.name)
    return _alike(equation, ins)


def _scanned(equation: Any, ins: list[Axes]) -> list[Axes]:
    given = equation.params
    consts, carried = given["num_consts"], given["num_carry"]
    fixed, carry, xs = ins[:consts], ins[consts : consts + carried], ins[consts + carried :]
    over = any(0 in axes for axes in xs)
    if over and carried:
        raise Mixed(equation.primitive.name)  # one example after the other
    inner = [frozenset(a - 1 for a in axes if a) for axes in xs]
    carry, ys = _settled(given["jaxpr"].jaxpr, fixed, carry, inner)
    return carry + [frozenset({a + 1 for a in axes} | ({0} if over else set())) for axes in ys]


def _settled(
    program: Any, fixed: Sequence[Axes], carry: Sequence[Axes], xs: Sequence[Axes]
) -> tuple[list[Axes], list[Axes]]:
    """Axes of what a loop carries, when they change no more; and of what its body gives besides."""
    carry = list(carry)
    while True:
        outs = _followed(program, [*fixed, *carry, *xs])
        new = [a | b for a, b in zip(carry, outs, strict=False)]
        if new == carry:
            return carry, outs[len(carry) :]
        if any(len(axes) > 1 for axes in new):
            raise Mixed("a loop")
        carry = new


def _looped(equation: Any, ins: list[Axes]) -> list[Axes]:
    given = equation.params
    tests, bodies = given["cond_nconsts"], given["body_nconsts"]
    fixed, carry = ins[tests : tests + bodies], ins[tests + bodies :]
    return _settled(given["body_jaxpr"].jaxpr, fixed, carry, [])[0]


def _branched(equation: Any, ins: list[Axes]) -> list[Axes]:
    found = [_followed(branch.jaxpr, ins[1:]) for branch in equation.params["branches"]]
    return [frozenset().union(*axes) for axes in zip(*found, strict=True)]


def _trailing(count: int) -> Callable[..., list[Axes]]:
    """What mixes along the last axes."""

    def rule(equation: Any, ins: list[Axes]) -> list[Axes]:
        for x, taken in zip(equation.invars, ins, strict=True):
            if any(axis >= len(_shape(x)) - count for axis in taken):
                raise Mixed(equation.primitive.name)
        return [frozenset().union(*ins)] * len(equation.outvars)

    return rule


def _transformed(equation: Any, ins: list[Axes]) -> list[Axes]:
    return _trailing(len(equation.params["fft_lengths"]))(equation, ins)


def _stacked(equation: Any, ins: list[Axes]) -> list[Axes]:
    """Into a new axis: those behind it move on."""
    new = int(equation.params["axis"])
    return [frozenset(axis + (axis >= new) for axis in frozenset().union(*ins))]


def _refused(equation: Any, ins: list[Axes]) -> list[Axes]:
    del ins
    raise Mixed(equation.primitive.name)


def _transposed(equation: Any, ins: list[Axes]) -> list[Axes]:
    return [_moved(ins[0], equation.params["permutation"])]


_RULES: dict[str, Callable[..., list[Axes]]] = {
    "broadcast_in_dim": _broadcast, "squeeze": _squeezed, "reshape": _reshaped,
    "transpose": _transposed, "dot_general": _product, "conv_general_dilated": _convolved,
    "gather": _gathered, "slice": _sliced, "dynamic_slice": _sliced,
    "dynamic_update_slice": _updated, "pad": _padded, "scan": _scanned, "while": _looped,
    "cond": _branched, "argmax": _reduced, "argmin": _reduced, "cumsum": _along("axis"),
    "cumprod": _along("axis"), "cummax": _along("axis"), "cummin": _along("axis"),
    "cumlogsumexp": _along("axis"), "sort": _along("dimension"), "rev": _along("dimensions"),
    "concatenate": _along("dimension"), "split": _along("axis"), "top_k": _trailing(1),
    "fft": _transformed, "stack": _stacked, "cholesky": _trailing(2), "eigh": _trailing(2),
    "eig": _trailing(2),
    "qr": _trailing(2), "svd": _trailing(2), "lu": _trailing(2), "schur": _trailing(2),
    "geqrf": _trailing(2), "householder_product": _trailing(2), "triangular_solve": _trailing(2),
    "ragged_dot": _refused, "ragged_dot_general": _refused,
}  # fmt: skip
_BY_PREFIX = {
    "scatter": _scattered, "reduce_window": _windowed, "reduce_": _reduced,
    "select_and_": _windowed,
}  # fmt: skip
