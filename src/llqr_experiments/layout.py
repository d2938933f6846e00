"""The devices of a run: its mesh, and what lies where on it.

  axis     what is spread along it
  data     the rows of a batch
  fsdp     the rows of a batch, and parameters and P
  tensor   the columns of matrices

Nothing else of the runner asks how many devices there are.
"""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llqr_experiments import processes
from llqr_experiments.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Axes along which the rows of a batch are spread."""


@dataclass(frozen=True)
class Share:
    """Which rows of a batch a process holds.

    Attributes:
      parts: equal runs of rows that a batch is cut into, one after the other.
      own: the numbers of those that this process holds, rising.
    """

    parts: int = 1
    own: tuple[int, ...] = (0,)

    @property
    def whole(self) -> bool:
        """Whether it holds all of them."""
        return len(self.own) == self.parts

    def rows(self, count: int) -> np.ndarray:
        """Return the rows of a batch of `count` that this process holds, rising.

        >>> Share(4, (2, 3)).rows(8).tolist()
        [4, 5, 6, 7]
        """
        return np.arange(count).reshape(self.parts, -1)[list(self.own)].reshape(-1)

    def count(self, held: int) -> int:
        """Return the rows of a batch of which this process holds `held`."""
        return held // len(self.own) * self.parts


WHOLE = Share()


@dataclass(frozen=True)
class Layout:
    """What lies where on the devices of a run.

    Attributes:
      mesh: over `AXES`; an abstract one is enough for forecasts.
    """

    mesh: Mesh | AbstractMesh

    @property
    def parts(self) -> int:
        """Into how many parts the rows of a batch are cut."""
        return math.prod(self.mesh.shape[name] for name in ROWS)

    @property
    def everywhere(self) -> NamedSharding:
        """On all devices alike."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def by_row(self) -> NamedSharding:
        """Spread by rows, along the first axis."""
        return NamedSharding(self.mesh, PartitionSpec(ROWS))

    def parameter(self, shape: tuple[int, ...]) -> NamedSharding:
        """Return where a parameter lies.

        The last axis of a matrix is spread along `tensor`, and the longest other one along `fsdp`,
        where these divide them; vectors, and what nothing divides, lie everywhere.

        Args:
          shape: of the parameter.
        """
        spec: list[str | None] = [None] * len(shape)
        tensor, fsdp = self.mesh.shape["tensor"], self.mesh.shape["fsdp"]
        if len(shape) >= 2:
            if tensor > 1 and shape[-1] % tensor == 0:
                spec[-1] = "tensor"
            free = [i for i, n in enumerate(shape) if spec[i] is None and n % fsdp == 0]
            if fsdp > 1 and free:
                spec[max(free, key=lambda i: (shape[i], -i))] = "fsdp"
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    @cached_property
    def share(self) -> Share:
        """Which rows of a batch this process holds."""
        if not processes.several():
            return Share(self.parts, tuple(range(self.parts)))
        held = self.by_row.addressable_devices_indices_map((self.parts,)).values()
        own = {index[0].indices(self.parts)[0] for index in held if index is not None}
        return Share(self.parts, tuple(sorted(own)))

    def join(self, batch: Any) -> Any:
        """Return global arrays from a batch of which this process holds its share of the rows."""
        return jax.tree.map(self._joined, batch)

    def _joined(self, held: Any) -> jax.Array:
        held, share = np.asarray(held), self.share
        count = share.count(len(held))
        rows = share.rows(count)

        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(count)
            at = int(np.searchsorted(rows, start))
            return held[at : at + stop - start]

        return jax.make_array_from_callback((count, *held.shape[1:]), self.by_row, piece)

    def put(self, batch: Any, axis: int = 0) -> Any:
        """Return global arrays from a batch that every process holds whole.

        Its rows are spread where they divide over the devices; other batches lie everywhere, and
        every device works through all of them.

        Args:
          batch: host arrays.
          axis: of the rows.
        """

        def one(x: Any) -> jax.Array:
            x = np.asarray(x)
            rows = x.ndim > axis and x.shape[axis] % self.parts == 0
            spec = PartitionSpec(*[None] * axis, ROWS) if rows else PartitionSpec()
            return self.place(x, NamedSharding(self.mesh, spec))

        return jax.tree.map(one, batch)

    def place(self, tree: Any, shardings: Any) -> Any:
        """Return a tree of host arrays, the same in all processes, as global arrays.

        Args:
          tree: what `numpy.asarray` takes.
          shardings: one for each leaf, or one for all.
        """
        if isinstance(shardings, NamedSharding):
            shardings = jax.tree.map(lambda _: shardings, tree)

        def one(x: Any, sharding: NamedSharding) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(one, tree, shardings)

    def whole(self, tree: Any) -> Any:
        """Return global arrays on every device alike, so that every process can read them."""
        return _moved(tree, self.everywhere)


@partial(jax.jit, static_argnames="sharding")
def _moved(tree: Any, sharding: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(tree, sharding)


def arrange(data: int | None, fsdp: int, tensor: int, *, abstract: bool = False) -> Layout | None:
    """Return the layout of a run; None: it is on one device, and nothing has to be said.

    Args:
      data: devices along `data`; None: all that are left.
      fsdp: along `fsdp`.
      tensor: along `tensor`.
      abstract: whether the devices need not be there.

    Raises:
      ConfigError: there are not as many devices, or some process would have none.
    """
    there, rest = jax.device_count(), fsdp * tensor
    if data is None:
        data = max(there // rest, 1)
        if not abstract and data * rest != there:
            raise ConfigError(
                f"mesh.fsdp={fsdp}, mesh.tensor={tensor}: {rest} does not divide the {there} "
                "devices that are here; give mesh.data too, to use fewer."
            )
    sizes = (data, fsdp, tensor)
    needed, told = math.prod(sizes), f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}"
    if abstract and needed != there:
        return Layout(AbstractMesh(sizes, AXES)) if needed > 1 else None
    if needed > there:
        raise ConfigError(f"{told}: {needed} devices, and there are {there} here.")
    if processes.several() and needed != there:
        raise ConfigError(
            f"{told}: {needed} devices, and the {processes.count()} processes of this run have "
            f"{there}: all of them must be used."
        )
    if needed == 1:
        return None
    kinds = (AxisType.Auto,) * len(AXES)
    return Layout(jax.make_mesh(sizes, AXES, kinds, devices=jax.devices()[:needed]))
