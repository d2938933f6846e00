"""Means over parts of a batch: micro-batches of a gradient, groups of a perturbation."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from llqr import _loops
from llqr.errors import check_integer
from llqr.objective import Objective, example_axes
from llqr.tree import accurate_dtype, is_legacy_key, is_none, replicate, spread, widen
from llqr.typing import Array, Number, PyTree

ValueAndGrad: TypeAlias = Callable[..., Callable[..., Any]]
"""A function with the signature of `jax.value_and_grad`, of which `has_aux` is used."""

Axes: TypeAlias = int | Sequence[Any] | None
"""Axis of the examples in every argument, as `in_axes` of `jax.vmap`."""


def microbatched(
    number: int,
    *,
    in_axes: Axes = 0,
    weight: Callable[..., Number] | None = None,
    thread: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] | None = None,
) -> ValueAndGrad:
    """Return `jax.value_and_grad` that works through the batch in parts.

    Value and gradient are means over the parts, so that they are those of the whole batch
    where the loss is a mean over examples. Part i holds the examples i, i + number, ...: with
    a batch that is sharded over devices, every device holds its share of every part.

    Args:
      number: of parts; it must divide the number of examples.
      in_axes: where the examples are in the arguments after `params`, as in `jax.vmap`; None
        for what all parts share. Scalars are always shared, random keys among them: every part
        draws the same numbers, unless `thread` advances the key. Of an `llqr.Objective` with
        `batch_axes`, these say it, unless axes are given here.
      weight: `(*args) -> scalar`, how much a part counts; for example its number of valid
        targets, where the loss is a mean over those. None: all alike.
      thread: `(args, aux) -> args` puts what one part returned as auxiliary data, such as batch
        statistics, into the arguments of the next (into those that are shared). The result's
        auxiliary data is then the last part's; without it, that of all parts on a new first
        axis (of a single part as it is).

    Returns:
      A function like `jax.value_and_grad`: `(fun, has_aux=False) -> (params, *args) -> ...`.

    Raises:
      ValueError: `number` is below 1 or does not divide the examples.
      TypeError: `number` is no Python int.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> def loss(w, x):
      ...     return jnp.mean((x * w) ** 2)
      >>> value, grad = llqr.microbatched(2)(loss)(3.0, jnp.arange(4.0))
      >>> float(value), float(grad)
      (31.5, 21.0)
    """
    check_integer("number", number, low=1)

    def transform(fun: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
        take = jax.value_and_grad(fun, has_aux=has_aux)

        def value_and_grad(params: Any, *args: Any) -> Any:
            def part(*args: Any) -> tuple[Any, Any]:
                value, grads = take(params, *args)
                return ((value[0], grads), value[1]) if has_aux else ((value, grads), ())

            axes = in_axes
            if axes == 0 and isinstance(fun, Objective) and fun.batch_axes is not None:
                (batch,) = args
                axes = (_axes_of(fun.batch_axes(batch), batch),)
            (value, grads), aux = mean_over_parts(
                part, args, number, in_axes=axes, weight=weight, thread=thread
            )
            return ((value, aux), grads) if has_aux else (value, grads)

        return value_and_grad

    return transform


def mean_over_parts(
    function: Callable[..., tuple[PyTree, PyTree]],
    args: tuple[Any, ...],
    number: int,
    *,
    in_axes: Axes = 0,
    weight: Callable[..., Number] | None = None,
    thread: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] | None = None,
) -> tuple[PyTree, PyTree]:
    """Return the mean of `function`'s first result over parts of the batch, and its second.

    Args:
      function: `(*args) -> (tree to average, auxiliary tree)`.
      args: of the whole batch.
      number: of parts.
      in_axes: see `microbatched`, as for what follows.
      weight: of a part.
      thread: auxiliary data into the next part's arguments.

    Returns:
      The mean, in the dtypes of a part's; and the auxiliary trees of all parts on a new first
      axis, or with `thread` the last one (with one part as it is).

    Raises:
      ValueError: `number` does not divide the examples.
    """
    if number == 1:
        return function(*args)
    leaves, treedef = jax.tree.flatten(args, is_leaf=is_none)
    axes = _axes(in_axes, args, leaves)
    stacked = [_split(x, a, number) for x, a in zip(leaves, axes, strict=True) if a is not None]

    def arguments(shared: list[Any], parts: list[Array]) -> tuple[Any, ...]:
        ours, theirs = iter(parts), iter(shared)
        return treedef.unflatten(
            [next(theirs) if a is None else jnp.moveaxis(next(ours), 0, a) for a in axes]
        )

    def run(shared: list[Any], parts: list[Array]) -> tuple[PyTree, Array, PyTree, PyTree]:
        given = arguments(shared, parts)
        found, aux = function(*given)
        share = jnp.asarray(1.0 if weight is None else weight(*given), jnp.float32)
        counted = share > 0  # a mean over no targets may be NaN
        weighted = jax.tree.map(
            lambda x: jnp.where(counted, widen(x) * share.astype(accurate_dtype(x)), 0), found
        )
        return weighted, share, aux, found

    def threaded(shared: list[Any], parts: list[Array], aux: PyTree) -> list[Any]:
        if thread is None:
            return shared
        following = jax.tree.leaves(thread(arguments(shared, parts), aux), is_leaf=is_none)
        return [x for x, a in zip(following, axes, strict=True) if a is None]

    # The first part by itself: what it returns has the shapes, dtypes and shardings of the sum.
    shared = [x for x, a in zip(leaves, axes, strict=True) if a is None]
    first = [x[0] for x in stacked]
    total, shares, aux, found = run(shared, first)
    shared = threaded(shared, first, aux)
    moving = [thread is not None and hasattr(x, "shape") for x in shared]  # what a loop carries

    def body(carry: Any, parts: list[Array]) -> tuple[Any, Any]:
        total, shares, _, moved = carry
        ours = iter(moved)
        now = [next(ours) if m else x for m, x in zip(moving, shared, strict=True)]
        weighted, share, aux, _ = run(now, parts)
        total = jax.tree.map(jnp.add, total, weighted)
        kept, each = (aux, ()) if thread is not None else ((), aux)
        now = threaded(now, parts, aux)
        moved = [x for m, x in zip(moving, now, strict=True) if m]
        return (total, shares + share, kept, moved), each

    moved = [x for m, x in zip(moving, shared, strict=True) if m]
    start = (total, shares, () if thread is None else aux, moved)
    rest = [x[1:] for x in stacked]
    (total, shares, last, _), others = jax.lax.scan(
        body, start, rest, unroll=_loops.unrolled(number)
    )
    shares = jnp.where(shares > 0, shares, 1.0)
    mean = jax.tree.map(
        lambda x, like: (x / shares.astype(x.dtype)).astype(like.dtype), total, found
    )
    if thread is not None:
        return mean, last
    return mean, jax.tree.map(lambda x, more: jnp.concatenate([x[None], more]), aux, others)


def _axes(in_axes: Axes, args: tuple[Any, ...], leaves: list[Any]) -> list[int | None]:
    """Axis of the examples in every leaf, None for what is shared."""
    prefix = in_axes if isinstance(in_axes, int) or in_axes is None else tuple(in_axes)
    chosen = spread(prefix, args)
    shared = is_legacy_key if prefix == 0 else lambda x: False
    return [
        a if a is not None and getattr(x, "ndim", 0) and not shared(x) else None
        for x, a in zip(leaves, chosen, strict=True)
    ]


def _axes_of(said: PyTree, batch: PyTree) -> PyTree:
    """Axes of the examples, in the containers of the batch."""
    treedef = jax.tree.structure(batch, is_leaf=is_none)
    return treedef.unflatten(example_axes(said, batch))


def _split(x: Array, axis: int, number: int) -> Array:
    """[.., examples, ..] -> [number, examples / number, ...]; part i has i, i + number, ..."""
    x = jnp.moveaxis(jnp.asarray(x), axis, 0)
    if (x.shape[0] // number) % max(jax.typeof(x).sharding.mesh.size, 1):
        x = replicate(x)  # over explicit axes, a part must divide evenly
    if x.shape[0] % number:
        raise ValueError(
            f"cannot cut {x.shape[0]} examples (an argument of shape {x.shape}) into {number} "
            "equal parts; in_axes says which arguments hold examples, None which are shared."
        )
    return jnp.moveaxis(x.reshape(x.shape[0] // number, number, *x.shape[1:]), 1, 0)
