"""Checkpoints: all that a run needs to go on to the same bits.

  <run>/checkpoints/latest/<step>    the newest ones
  <run>/checkpoints/best/<step>      the one with the best evaluation
  <run>/checkpoints/damaged/<step>   set aside because it could not be read

Written by orbax, in the background: a folder gets its name when it is complete. An array that is
spread over devices is written by those who hold it, and read onto any number of them. The checksum
of every piece is kept beside it, because a file that is cut off or altered can still be read.
"""

import errno
import logging
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.markup import escape

from llqr.tree import leaf_names
from llqr_experiments import processes
from llqr_experiments.errors import ConfigError, DataError

FORMAT = 2
"""Of the layout below; a newer one is refused. In format 1, an array had one checksum."""

LATEST, BEST, DAMAGED = "latest", "best", "damaged"


class Checkpoint(NamedTuple):
    """What was restored."""

    step: int
    state: Any  # pytree like the one that was given
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Writing one never ends a run: what goes wrong is said, and the ones before stay.

    Args:
      folder: where they are; made when the first one is written.
      keep: how many of the newest to keep.
      say: prints a line for the user.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]):
        self.folder = folder.absolute()
        self._keep, self._say = keep, say
        self._managers: dict[str, Any] = {}
        self._begun: dict[str, int] = {}

    @property
    def newest(self) -> int | None:
        """Step of the newest one on disk."""
        return max(steps(self.folder), default=None)

    def save(self, step: int, state: Any, meta: dict[str, Any], *, kind: str = LATEST) -> None:
        """Begin to write a checkpoint; all of it is copied first.

        Args:
          step: steps made so far.
          state: pytree of arrays.
          meta: JSON-able facts.
          kind: `LATEST` or `BEST`.
        """
        self.wait()  # an earlier one that failed is told as such
        arrays = _flat(state)
        facts = {
            **deepcopy(meta),
            "format": FORMAT,
            "step": step,
            "checksums": _checksums(arrays),
        }
        try:
            size = sum(array.nbytes for array in arrays.values())
            processes.decide(lambda: _check_space(self.folder, size))
            manager = self._manager(kind)
            if step in manager.all_steps():
                return
            import orbax.checkpoint as ocp

            items = {"state": ocp.args.StandardSave(arrays), "meta": ocp.args.JsonSave(facts)}  # type: ignore[call-arg]
            manager.save(step, args=ocp.args.Composite(**items))
            self._begun[kind] = step
        except Exception as error:  # whatever it is, training goes on
            self._failed(step, error)
            self._managers.pop(kind, None)

    def wait(self) -> None:
        """Return when all that was begun is written, or has failed and that was said."""
        for kind, manager in list(self._managers.items()):
            try:
                manager.wait_until_finished()
            except Exception as error:
                self._failed(self._begun.get(kind), error)
                self._managers.pop(kind)

    def close(self) -> None:
        """Wait, and end the threads."""
        self.wait()
        for manager in self._managers.values():
            with suppress(Exception):  # it was told
                manager.close()
        self._managers.clear()

    def restore(self, like: Any, *, kind: str = LATEST, own: bool = True) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, None if there is none.

        One that is not is reported, set aside, and the one before is tried.

        Args:
          like: pytree with the structure, shapes, dtypes and shardings of the state.
          kind: `LATEST` or `BEST`.
          own: False leaves damaged ones where they are.

        Raises:
          ConfigError: it is of another model or optimizer, or of a newer format.
        """
        found = newest_whole(self.folder, self._say, kind=kind, aside=own)
        if found is None:
            return None
        step, arrays, meta = found
        return Checkpoint(step, _unflat(arrays, like), meta)

    def _manager(self, kind: str) -> Any:
        if kind not in self._managers:
            import orbax.checkpoint as ocp  # slow to import: only where checkpoints are written

            # It logs a traceback for each failure; one warning says the same.
            logging.getLogger("absl").setLevel(logging.CRITICAL)
            sys.excepthook = partial(_but_tensorstores, sys.excepthook)
            folder = self.folder / kind
            folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep if kind == LATEST else 1, cleanup_tmp_directories=True
            )
            self._managers[kind] = ocp.CheckpointManager(folder, options=options)
        return self._managers[kind]

    def _failed(self, step: int | None, error: Exception) -> None:
        whole = steps(self.folder, LATEST)
        last = f"the last good one is of step {whole[-1]}" if whole else "there is none yet"
        self._say(
            f"[yellow]warning:[/] the checkpoint of step {step} could not be written "
            f"({_why(error)}); {last}."
        )


def _check_space(folder: Path, size: int) -> None:
    """Raise OSError before a checkpoint is begun that the disk has no space for."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    # Beside the arrays there are tables of them.
    if shutil.disk_usage(there).free < 1.2 * size + 2**18:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _but_tensorstores(before: Callable[..., Any], kind: Any, error: Any, trace: Any) -> None:
    """Leave out what threads of tensorstore print of a write that has failed, which was said."""
    if threading.current_thread() is threading.main_thread() or str(error) != _LOOP_CLOSED:
        before(kind, error, trace)


_LOOP_CLOSED = "Event loop is closed"


def newest_whole(
    folder: Path, say: Callable[[str], None], *, kind: str = LATEST, aside: bool
) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
    """Return step, arrays and facts of the newest checkpoint that is whole; None: there is none.

    Where a run has several processes, the first one finds it, and the others read the same.

    Args:
      folder: of checkpoints.
      say: prints a line for the user: those that are damaged are reported.
      kind: `LATEST` or `BEST`.
      aside: whether to move the damaged ones to `DAMAGED`.

    Raises:
      ConfigError: it is of a newer format.
    """
    found = None

    def look() -> int | None:
        nonlocal found
        found = _newest_whole(folder, say, kind, aside)
        return None if found is None else found[0]

    step = processes.decide(look)
    if step is None or found is not None:
        return found
    return step, *read(folder, step, kind)


def _newest_whole(
    folder: Path, say: Callable[[str], None], kind: str, aside: bool
) -> tuple[int, dict[str, np.ndarray], dict[str, Any]] | None:
    for step in reversed(steps(folder, kind)):
        try:
            return step, *read(folder, step, kind)
        except ConfigError:
            raise
        except Exception as error:
            why, moved = _first_line(error), ""
            if aside:
                target = folder / DAMAGED / str(step)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(folder / kind / str(step), target)
                moved = f", and is now {target}"
            say(f"[yellow]warning:[/] the checkpoint of step {step} is damaged ({why}){moved}.")
    return None


def steps(folder: Path, kind: str = LATEST) -> list[int]:
    """Return the steps with a complete checkpoint, in order; names without a step are not one."""
    found = (folder / kind).glob("*") if (folder / kind).is_dir() else ()
    return sorted(int(path.name) for path in found if path.is_dir() and path.name.isdigit())


def read(
    folder: Path, step: int, kind: str = LATEST
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays by name and the facts of one checkpoint, on the host and whole.

    Raises:
      ConfigError: it is of a newer format.
      DataError: an array is not what was written.
    """
    import orbax.checkpoint as ocp

    path, me = (folder / kind / str(step)).absolute(), processes.index()
    # Every process for itself: it waits for no other.
    alone = ocp.options.MultiprocessingOptions(me, {me}, f"reader{me}")
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)
    meta = reader.restore(path, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]  # type: ignore[call-arg]
    if meta["format"] > FORMAT:
        raise ConfigError(
            f"{path} has format {meta['format']}, and this version of llqr reads up to {FORMAT}."
        )
    checksums = meta["checksums"]
    onto = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in checksums}
    items = {"state": ocp.args.PyTreeRestore(restore_args=onto)}  # type: ignore[call-arg]
    found = reader.restore(path, ocp.args.Composite(**items))["state"]
    reader.close()
    arrays = {name: np.asarray(array) for name, array in found.items()}
    if set(arrays) != set(checksums):
        raise DataError("arrays are missing.")
    for name, array in arrays.items():
        _check_pieces(name, array, checksums[name])
    return {_today(name): array for name, array in arrays.items()}, meta


def _today(name: str) -> str:
    """The name of an array, where a slot of P was called otherwise when it was written."""
    return _SLOT.sub(lambda match: f".blocks.{_RENAMED[match[1]]}", name)


_RENAMED = {
    "left_scale": "left_values",
    "right_scale": "right_values",
    "spectrum_scale": "spectrum_factor",
    "scale": "sigma",
}
_SLOT = re.compile(rf"\.blocks\.({'|'.join(_RENAMED)})(?=\.|$)")


def load_fields(
    folder: Path, like: dict[str, Any], say: Callable[[str], None], kind: str | None = None
) -> tuple[dict[str, Any], int]:
    """Return fields of the state in the newest checkpoint, and its step.

    Args:
      folder: of checkpoints.
      like: by the name of a field, a tree with its structure, shapes and dtypes.
      say: prints a line for the user.
      kind: LATEST or BEST; None: the latest if there is one.

    Raises:
      ConfigError: it is of another model, or none can be read.
    """
    if kind is None:
        kind = LATEST if steps(folder) else BEST
    newest = newest_whole(folder, say, kind=kind, aside=False)
    if newest is None:
        raise ConfigError(f"{folder}: no checkpoint there can be read.")
    step, arrays, _ = newest
    found = {name.partition(".")[2]: array for name, array in arrays.items()}  # without numbers
    wanted = [name.replace("/", ".") for name in leaf_names(like)]
    leaves, treedef = jax.tree.flatten(like)
    for name, leaf in zip(wanted, leaves, strict=True):
        have = found[name].shape if name in found else None
        if have != jnp.shape(leaf):
            raise ConfigError(
                f"{folder} is of another model: {name} is {have or 'not there'}, and "
                f"{jnp.shape(leaf)} here."
            )
    placed = [_like(found[name], leaf) for name, leaf in zip(wanted, leaves, strict=True)]
    return treedef.unflatten(placed), step


def find(run: Path) -> Path:
    """Return the folder of checkpoints of a run, or the folder itself if it is one.

    Raises:
      ConfigError: there is no checkpoint.
    """
    for folder in (run / "checkpoints", run):
        if steps(folder, LATEST) or steps(folder, BEST):
            return folder
    raise ConfigError(f"{run} holds no checkpoint: give the folder of a run that has written one.")


def _flat(state: Any) -> dict[str, Any]:
    """Copies of all leaves, by a name that tells its place: later steps reuse the buffers.

    What is spread over devices stays so; the rest is on the host.
    """
    spread = [
        isinstance(leaf, jax.Array) and not leaf.is_fully_replicated
        for leaf in jax.tree.leaves(state)
    ]
    leaves = zip(jax.tree.leaves(state), spread, strict=True)
    host = iter(jax.device_get([leaf for leaf, kept in leaves if not kept]))
    leaves = zip(_names(state), jax.tree.leaves(state), spread, strict=True)
    return {
        name: jnp.copy(leaf) if kept else np.array(next(host), copy=True)
        for name, leaf, kept in leaves
    }


def _names(state: Any) -> list[str]:
    return [f"{i:04d}.{name.replace('/', '.')}" for i, name in enumerate(leaf_names(state))]


def _unflat(arrays: dict[str, np.ndarray], like: Any) -> Any:
    leaves, treedef = jax.tree.flatten(like)
    names = _names(like)
    if missing := [name for name in names if name not in arrays]:
        raise ConfigError(
            f"the checkpoint is of another model or optimizer: it has no {missing[0]!r}."
        )
    if more := [name for name in arrays if name not in names]:
        raise ConfigError(
            f"the checkpoint is of another model or optimizer: here is no {more[0]!r}."
        )
    for name, leaf in zip(names, leaves, strict=True):
        have, want = arrays[name], (jnp.shape(leaf), jnp.result_type(leaf))
        if (have.shape, have.dtype) != want:
            raise ConfigError(
                f"the checkpoint is of another model or optimizer: {name!r} is "
                f"{have.dtype}{list(have.shape)} there, {want[1]}{list(want[0])} here."
            )
    return treedef.unflatten(
        [_like(arrays[name], leaf) for name, leaf in zip(names, leaves, strict=True)]
    )


def _like(array: np.ndarray, leaf: Any) -> jax.Array:
    """An array where `leaf` lies."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


Pieces = dict[str, int]
"""Checksums of an array, by the pieces in which it was written: "0:4,8:16"."""


def _checksums(arrays: dict[str, Any]) -> dict[str, Pieces]:
    """The checksum of every piece of every array; each is taken by a process that holds it."""
    mine: dict[str, Pieces] = {}
    for name, array in arrays.items():
        pieces = [(np.s_[()], array)] if isinstance(array, np.ndarray) else [
            (shard.index, np.asarray(shard.data))
            for shard in array.addressable_shards
            if shard.replica_id == 0
        ]  # fmt: skip
        mine[name] = {_place(index, array.shape): _checksum(piece) for index, piece in pieces}
    found: dict[str, Pieces] = {name: {} for name in arrays}
    for theirs in processes.gather(mine):
        for name, pieces in theirs.items():
            found[name] |= pieces
    return found


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A piece of an array in words."""
    whole = [slice(None)] * (len(shape) - len(index))
    ranges = [s.indices(n) for s, n in zip((*index, *whole), shape, strict=True)]
    return ",".join(f"{start}:{stop}" for start, stop, _ in ranges)


def _check_pieces(name: str, array: np.ndarray, expected: Pieces | int) -> None:
    """Raise DataError if a piece of an array is not what was written, or none is known of it."""
    if isinstance(expected, int):  # format 1
        expected = {_place((), array.shape): expected}
    known = 0
    for place, checksum in expected.items():
        ends = [part.split(":") for part in place.split(",") if part]
        piece = array[tuple(slice(int(start), int(stop)) for start, stop in ends)]
        known += piece.size
        if _checksum(piece) != checksum:
            where = "" if len(expected) == 1 else f", in its part {place},"
            raise DataError(f"{name}{where} is not what was written.")
    if known != array.size:
        raise DataError(f"{name}: not all of it has a checksum.")


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _why(error: Exception) -> str:
    """A failed write in a word, where it is the disk."""
    full = os.strerror(errno.ENOSPC)
    return full if full in str(error) else _first_line(error)


def _first_line(error: Exception) -> str:
    return escape((str(error) or type(error).__name__).splitlines()[0][:160])
