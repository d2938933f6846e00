"""Stacks over the devices of a mesh: who holds which matrices, and works on them."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llqr.typing import Array, PyTree

AnyMesh: TypeAlias = Mesh | AbstractMesh


def mesh_of(tree: PyTree) -> AbstractMesh | None:
    """Return the mesh on which arrays are; None on one device, and inside `jax.shard_map`."""
    around = jax.sharding.get_abstract_mesh()
    for mesh in [around, *(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))]:
        if not mesh.empty and mesh.size > 1:
            return None if AxisType.Manual in mesh.axis_types else mesh
    return None


def stack_axes(mesh: AnyMesh | None, count: int) -> tuple[str, ...]:
    """Return the mesh axes over which a stack is spread: the most devices that divide it.

    Args:
      mesh: None: no axes.
      count: of matrices.

    Example:
      >>> mesh = AbstractMesh((2, 4), ("data", "fsdp"))
      >>> [stack_axes(mesh, count) for count in (48, 12, 6, 3)]
      [('data', 'fsdp'), ('fsdp',), ('data',), ()]
    """
    if mesh is None:
        return ()
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    found = [s for n in range(len(names) + 1) for s in itertools.combinations(names, n)]
    devices = {axes: math.prod(mesh.shape[name] for name in axes) for axes in found}
    return max((a for a in found if count % devices[a] == 0), key=devices.__getitem__)


def spread_stack(x: Array) -> Array:
    """Spread an array over devices by its first axis, as `over_devices` takes it."""
    mesh = mesh_of(x)
    axes = stack_axes(mesh, x.shape[0])
    if mesh is None or not (axes or AxisType.Explicit in mesh.axis_types):
        return x
    return _placed(x, NamedSharding(mesh, PartitionSpec(axes or None)))


def whole_stack(x: Array, leaves: Sequence[Array]) -> Array:
    """Bring together what was spread by the first axis, so that members can be taken.

    Args:
      x: a stack.
      leaves: its members, which it then lies like. Over automatic axes the compiler knows how
        they lie; without this, it would move each by itself.
    """
    mesh = mesh_of(x)
    if mesh is None:
        return x
    axes = x.ndim - 1
    rest: tuple[Any, ...] = (PartitionSpec.UNCONSTRAINED,) * axes
    if AxisType.Explicit in mesh.axis_types:
        alike = all(y.ndim >= axes and y.shape[y.ndim - axes :] == x.shape[1:] for y in leaves)
        found = {tuple(jax.typeof(y).sharding.spec)[y.ndim - axes :] for y in leaves}
        rest = found.pop() if alike and len(found) == 1 else (None,) * axes
    return _placed(x, NamedSharding(mesh, PartitionSpec(None, *rest)))


def over_devices(
    function: Callable[[Any, Any], PyTree], count: int, stacked: PyTree, shared: PyTree
) -> PyTree:
    """Return function(stacked, shared), each device on its own part of the stacks.

    Args:
      function: of a part of the stacks; returns arrays with that axis in front.
      count: length of the first axis of every array of `stacked`.
      stacked: a tree of stacks.
      shared: a tree of arrays that all see.
    """
    mesh = mesh_of((stacked, shared))
    axes = stack_axes(mesh, count)
    if mesh is None or not axes:
        return function(stacked, shared)
    own, all_ = PartitionSpec(axes), PartitionSpec()
    if AxisType.Explicit in mesh.axis_types:
        stacked = jax.tree.map(lambda x: _placed(x, NamedSharding(mesh, own)), stacked)
        shared = jax.tree.map(lambda x: _placed(x, NamedSharding(mesh, all_)), shared)
    run = jax.shard_map(function, mesh=mesh, in_specs=(own, all_), out_specs=own, check_vma=False)
    return run(stacked, shared)


def _placed(x: Array, where: NamedSharding) -> Array:
    explicit = AxisType.Explicit in where.mesh.axis_types
    place = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    return place(x, where)
