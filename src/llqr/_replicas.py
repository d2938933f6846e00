"""Replicas of one model under `jax.pmap` or `jax.shard_map`: what is averaged over them.

Every replica holds the same parameters and its own part of the batch. What a refit learns from must
be that of the whole batch, or the replicas drift apart.
"""

import math
from typing import TypeAlias

import jax
from jax.sharding import AxisType

from llqr.typing import Array, PRNGKeyArray, PyTree

AxisName: TypeAlias = str | tuple[str, ...] | None
"""Names of mapped axes; () for replicas that have nothing in common, None where nobody said."""


def mean(tree: PyTree, axis_name: AxisName) -> PyTree:
    """Return the mean over replicas; the tree itself where there are none."""
    return _bound(jax.lax.pmean, tree, axis_name) if axis_name else tree


def total(tree: PyTree, axis_name: AxisName) -> PyTree:
    """Return the sum over replicas; the tree itself where there are none."""
    return _bound(jax.lax.psum, tree, axis_name) if axis_name else tree


def _bound(collective: object, tree: PyTree, axis_name: AxisName) -> PyTree:
    try:
        return collective(tree, axis_name)  # pyright: ignore[reportCallIssue]
    except NameError as error:
        raise ValueError(
            f"Route(axis_name={axis_name!r}): there is no such mapped axis around this call. Refit "
            "inside the jax.pmap or jax.shard_map that has it; a refit from outside, on the whole "
            "batch, takes an optimizer with the same options and no axis_name: states are alike."
        ) from error


def count(axis_name: AxisName) -> int:
    """Return the number of replicas."""
    return math.prod(jax.lax.axis_size(name) for name in _names(axis_name))


def own(tree: PyTree, axis_name: AxisName) -> PyTree:
    """Return the same values as each replica's own.

    `jax.shard_map` follows which values are the same everywhere, and sums the derivatives in them
    over replicas by itself; what is taken here in the replica's own values stays there.
    """
    followed = tuple(name for name in _names(axis_name) if name in _manual_axes())

    def one(x: Array) -> Array:
        try:
            return jax.lax.pcast(x, followed, to="varying")
        except ValueError:  # it is already
            return x

    return jax.tree.map(one, tree) if followed else tree


def _names(axis_name: AxisName) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else axis_name or ()


def _manual_axes() -> dict[str, int]:
    """Mapped axes around us, and the number of devices along each."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_types, mesh.axis_sizes, strict=True)
    return {name: size for name, kind, size in axes if kind == AxisType.Manual}


def own_key(key: PRNGKeyArray, axis_name: AxisName) -> PRNGKeyArray:
    """Return a random key of each replica's own."""
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name)) if axis_name else key


def check(axis_name: AxisName) -> None:
    """Raise ValueError where replicas would refit on their own parts without a word."""
    manual = [name for name, size in _manual_axes().items() if size > 1]
    if axis_name is None and manual:
        names = manual[0] if len(manual) == 1 else tuple(manual)
        raise ValueError(
            f"a refit inside jax.pmap or jax.shard_map over {', '.join(map(repr, manual))}: each "
            "replica would learn from its own part of the batch, and the replicas would drift "
            f"apart. route=llqr.Route(axis_name={names!r}) averages over them; "
            "llqr.Route(axis_name=()) says that they share the refit's batch, or have nothing in "
            "common. Or use jax.jit with sharded arrays, or refresh=False inside and llqr.refresh "
            "outside."
        )
