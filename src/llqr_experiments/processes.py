"""Processes of a run: who they are, who writes, and how they decide together.

All processes run the same program on the same global arrays (`jax.distributed`). Nothing else of
the runner asks how many of them there are.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llqr_experiments.errors import ConfigError, LostProcess, RunError

T = TypeVar("T")

LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
"""Variables in which launchers say how many processes there are, and which one this is."""

FINDS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri")
"""Variables by which `jax.distributed` finds the coordinator itself: under srun and mpirun."""

HEARTBEAT = 20
"""Seconds without a sign of life after which a process counts as gone."""


def connect(coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Join the processes of this run, where there are several; before anything is computed.

    Args:
      coordinator: "host:port" at which process 0 can be reached; None: as the launcher says.
      processes: their number; None: as the launcher says, or one.
      index: of this one; None: as the launcher says.

    Raises:
      ConfigError: something of it is not known, or the others cannot be reached.
    """
    launched = _launched(os.environ)
    if processes is None:
        processes = launched[0] if launched else 1
    if index is None and launched:
        index = launched[1]
    if processes == 1 or _connected():
        return
    if index is None:
        raise ConfigError(
            f"distributed.processes={processes}: no launcher says which of them this one is; give "
            "distributed.index, 0 for the first."
        )
    if index >= processes:
        raise ConfigError(
            f"distributed.index={index} is none of distributed.processes={processes}: they count "
            "from 0."
        )
    if coordinator is None and not any(name in os.environ for name in FINDS):
        raise ConfigError(
            f"distributed.processes={processes}: how they reach process 0 is not known; give "
            "distributed.coordinator=HOST:PORT, the same to all."
        )
    try:
        jax.distributed.initialize(
            coordinator, processes, index,
            heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"distributed.coordinator={coordinator}: process {index} of {processes} cannot join "
            f"({str(error).splitlines()[0]})."
        ) from error


def _launched(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """How many processes a launcher has started, and which this is; None: there was none."""
    for size, rank in LAUNCHERS:
        if size in environment and rank in environment:
            return int(environment[size]), int(environment[rank])
    return None


def _connected() -> bool:
    return bool(jax.distributed.is_initialized())


def several() -> bool:
    """Whether this run has more than one process."""
    return _connected() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not several() or jax.process_index() == 0


def index() -> int:
    """Which process this is."""
    return jax.process_index() if several() else 0


def count() -> int:
    """How many processes this run has."""
    return jax.process_count() if several() else 1


def decide(function: Callable[[], T]) -> T:
    """Return what a function finds in the first process, in all of them; its errors too.

    For what has to be the same everywhere and depends on files, clocks or chance.

    Args:
      function: of no arguments; its result can be pickled.

    Raises:
      Exception: what the function has raised.
    """
    if not several():
        return function()
    found: Any = None
    if first():
        try:
            found = (True, function())
        except Exception as error:
            found = (False, error)
    good, value = pickle.loads(_broadcast(pickle.dumps(found)))
    if good:
        return value
    if isinstance(value, RunError):
        value.everywhere = True
    raise value


def one_by_one(function: Callable[[], T]) -> T:
    """Return what a function finds, in the first process before the others.

    For what the first one may have to fetch for all of them.

    Args:
      function: of no arguments.

    Raises:
      Exception: what the function has raised.
    """
    found: list[T] = []
    decide(lambda: found.append(function()))
    return found[0] if found else function()


def _broadcast(content: bytes) -> bytes:
    """The bytes of the first process."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    sent = np.zeros(size, np.uint8)
    if first():
        sent[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes()


def gather(value: T) -> list[T]:
    """Return every process's value, in all of them.

    Args:
      value: of this process; it can be pickled.
    """
    if not several():
        return [value]
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content))))
    sent = np.zeros(int(sizes.max()), np.uint8)
    sent[: len(content)] = content
    every = np.asarray(multihost_utils.process_allgather(sent)).astype(np.uint8)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def wait(name: str) -> None:
    """Return when all processes have come here.

    Args:
      name: of the place.
    """
    if several():
        multihost_utils.sync_global_devices(name)


class Common:
    """Whether something was asked for in any process: the same answer in all, one call later.

    An answer is that of the call before, so that no process waits for the step that it has just
    begun: all have made that call, and all read the same.
    """

    def __init__(self) -> None:
        self._asked: Any = None

    def any(self, value: int) -> int:
        """Return the largest value of all processes; of the call before, where there are several.

        Args:
          value: of this process, at least 0.
        """
        if not several():
            return value
        before, self._asked = self._asked, _largest(value)
        return 0 if before is None else int(np.asarray(before.addressable_data(0)))


def _largest(value: int) -> jax.Array:
    """The largest value of all processes, begun and not waited for."""
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    mine = np.full(len(jax.local_devices()), value, np.int32)
    spread, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("all",), ()))
    values = jax.make_array_from_process_local_data(spread, mine)
    return _maximum(values, whole)


@partial(jax.jit, static_argnames="whole")
def _maximum(values: jax.Array, whole: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.max(values), whole)


@contextmanager
def ending() -> Iterator[None]:
    """Around a run: where another process is gone, say so and end; otherwise nothing.

    What is left cannot go on by itself, and would wait for the other at its exit.

    Raises:
      LostProcess: what JAX says of it came up here.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not several() or not any(word in str(error) for word in _GONE):
            raise
        raise LostProcess(
            f"process {jax.process_index()} has lost another one ({str(error).splitlines()[0]}). "
            "The same command, on as many processes or on fewer, goes on from the newest "
            "checkpoint."
        ) from error


_GONE = ("Gloo", "Connection", "connection", "UNAVAILABLE", "heartbeat", "NCCL", "DEADLINE")
