"""Means over parts of a batch: micro-batches of a gradient, groups of a perturbation."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from llqr._errors import check_integer
from llqr._tree import accurate_dtype, is_none, spread
from llqr._types import Array, PyTree

ValueAndGrad: TypeAlias = Callable[..., Callable[..., Any]]
"""A function with the signature of `jax.value_and_grad`, of which `has_aux` is used."""

Axes: TypeAlias = int | Sequence[Any] | None
"""Axis of the examples in every argument, as `in_axes` of `jax.vmap`."""


def microbatched(
    number: int,
    *,
    in_axes: Axes = 0,
    weight: Callable[..., Array] | None = None,
    thread: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] | None = None,
) -> ValueAndGrad:
    """Return `jax.value_and_grad` that works through the batch in parts.

    Value and gradient are means over the parts, so that they are those of the whole batch
    where the loss is a mean over examples. Part i holds the examples i, i + number, ...: with
    a batch that is sharded over devices, every device holds its share of every part.

    Args:
      number: of parts; it must divide the number of examples.
      in_axes: where the examples are in the arguments after `params`, as in `jax.vmap`; None
        for what all parts share. Scalars (and typed PRNG keys) are always shared.
      weight: `(*args) -> scalar`, how much a part counts; for example its number of valid
        targets, where the loss is a mean over those. None: all alike.
      thread: `(args, aux) -> args` puts what one part returned as auxiliary data, such as batch
        statistics, into the arguments of the next (into those that are shared). The result's
        auxiliary data is then the last part's; without it, that of all parts on a new first
        axis.

    Returns:
      A function like `jax.value_and_grad`: `(fun, has_aux=False) -> (params, *args) -> ...`.

    Raises:
      ValueError: `number` does not divide the examples.

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

            (value, grads), aux = mean_over_parts(
                part, args, number, in_axes=in_axes, weight=weight, thread=thread
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
    weight: Callable[..., Array] | None = None,
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
    """
    if number == 1:
        return function(*args)
    leaves, treedef = jax.tree.flatten(args, is_leaf=is_none)
    axes = _axes(in_axes, args, leaves)
    stacked = [_split(x, a, number) for x, a in zip(leaves, axes, strict=True) if a is not None]
    shared = [x for x, a in zip(leaves, axes, strict=True) if a is None]

    def arguments(shared: list[Any], parts: list[Array]) -> tuple[Any, ...]:
        ours, theirs = iter(parts), iter(shared)
        return treedef.unflatten(
            [next(theirs) if a is None else jnp.moveaxis(next(ours), 0, a) for a in axes]
        )

    def run(shared: list[Any], parts: list[Array]) -> tuple[PyTree, Array, PyTree, list[Any]]:
        given = arguments(shared, parts)
        found, aux = function(*given)
        share = jnp.asarray(1.0 if weight is None else weight(*given), jnp.float32)
        weighted = jax.tree.map(
            lambda x: x.astype(accurate_dtype(x)) * share.astype(accurate_dtype(x)), found
        )
        if thread is not None:
            following = jax.tree.leaves(thread(given, aux), is_leaf=is_none)
            shared = [x for x, a in zip(following, axes, strict=True) if a is None]
        return weighted, share, aux, shared

    def body(carry: Any, parts: list[Array]) -> tuple[Any, Any]:
        total, shares, _, shared = carry
        weighted, share, aux, shared = run(shared, parts)
        total = jax.tree.map(jnp.add, total, weighted)
        last = () if thread is None else aux
        return (total, shares + share, last, shared), (aux if thread is None else ())

    first = [x[0] for x in stacked]
    shapes = jax.eval_shape(run, shared, first)
    total, shares, last = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:3])
    start = (total, shares, () if thread is None else last, shared)
    # A gradient of a convolution is slow inside a compiled loop on CPU: no loop there.
    unroll = number if jax.default_backend() == "cpu" else 1
    (total, shares, last, _), auxes = jax.lax.scan(body, start, stacked, unroll=unroll)
    shares = jnp.where(shares > 0, shares, 1.0)
    kinds = jax.eval_shape(lambda *args: function(*args)[0], *arguments(shared, first))
    mean = jax.tree.map(lambda x, k: (x / shares.astype(x.dtype)).astype(k.dtype), total, kinds)
    return mean, (auxes if thread is None else last)


def _axes(in_axes: Axes, args: tuple[Any, ...], leaves: list[Any]) -> list[int | None]:
    """Axis of the examples in every leaf, None for what is shared."""
    prefix = in_axes if isinstance(in_axes, int) or in_axes is None else tuple(in_axes)
    chosen = spread(prefix, args)
    return [
        None if a is None or x is None or not jnp.ndim(x) else a
        for x, a in zip(leaves, chosen, strict=True)
    ]


def _split(x: Array, axis: int, number: int) -> Array:
    """[.., examples, ..] -> [number, examples / number, ...]; part i has i, i + number, ..."""
    x = jnp.moveaxis(jnp.asarray(x), axis, 0)
    if x.shape[0] % number:
        raise ValueError(
            f"cannot cut {x.shape[0]} examples (an argument of shape {x.shape}) into {number} "
            "equal parts; in_axes says which arguments hold examples, None which are shared."
        )
    return jnp.moveaxis(x.reshape(x.shape[0] // number, number, *x.shape[1:]), 1, 0)
