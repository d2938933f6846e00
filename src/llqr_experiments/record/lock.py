"""One run in a folder at a time: a lock that ends with the process that holds it.

The kernel holds it (POSIX `fcntl`, which network file systems carry across machines, and which a
forked child does not inherit): a run that is killed leaves nothing that has to be removed. The file
says who holds it. Where a file system keeps no locks between machines, the owner's sign of life
decides: it touches the file every few seconds.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from llqr_experiments.errors import ConfigError

NAME = ".lock"

ELSEWHERE = "give another folder (hydra.run.dir=..., hydra.sweep.dir=... in a sweep)"
"""What to do where a folder will not do."""

BEAT = 5.0
"""Seconds between signs of life; an owner on another machine is dead after three without one."""

_held: set[Path] = set()
"""Locks of this process, which the kernel does not keep apart."""


@contextmanager
def hold(folder: Path, command: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold a folder, which is made if missing, and removed again if it stays empty.

    Args:
      folder: of a run.
      command: as typed, for whoever is refused.
      say: prints a line for the user.

    Raises:
      ConfigError: another process holds it, or it cannot be written.
    """
    path = folder.absolute() / NAME
    file = _open(path, folder, say)
    _held.add(path)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now(), "command": command}
    ended = threading.Event()
    try:
        with suppress(OSError):  # a full disk: the kernel holds the lock all the same
            file.truncate(0)
            file.write(json.dumps(owner).encode())
            file.flush()
        threading.Thread(target=_beat, args=(path, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        with suppress(OSError):
            path.unlink(missing_ok=True)  # held until here: nobody has opened another
        file.close()
        _held.discard(path)
        with suppress(OSError):
            folder.rmdir()  # only if it is empty


def _open(path: Path, folder: Path, say: Callable[[str], None]) -> BinaryIO:
    while True:
        if path in _held:
            raise _refused(folder, {"pid": os.getpid()})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written ({error.strerror}): {ELSEWHERE}.") from (
                error
            )
        try:
            _lock(file, folder, say)
            # The one before may have removed the file between opening and locking it.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: BinaryIO, folder: Path, say: Callable[[str], None]) -> None:
    """Take the lock of an open file, or raise."""
    kept = True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise _refused(folder, _owner(file)) from error
    except OSError:  # a file system without locks
        kept = False
    owner = _owner(file)
    if not owner or (kept and owner.get("host") == socket.gethostname()):
        return  # what a killed run has left
    say(f"waiting {3 * BEAT:.0f} s: {_words(owner)} held {folder}, and may be running")
    before, until = os.stat(file.name).st_mtime_ns, time.monotonic() + 3 * BEAT
    while time.monotonic() < until:
        time.sleep(BEAT / 5)
        with suppress(FileNotFoundError):
            if os.stat(file.name).st_mtime_ns != before:
                raise _refused(folder, owner)


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)


def _owner(file: BinaryIO) -> dict[str, Any]:
    try:
        file.seek(0)
        found = json.loads(file.read() or b"{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refused(folder: Path, owner: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"{folder} is in use: {_words(owner)} is running there. Wait for its end, or {ELSEWHERE}."
    )


def _words(owner: dict[str, Any]) -> str:
    told = f"process {owner.get('pid', '(unknown)')}"
    told += f" on {owner['host']}" if "host" in owner else ""
    told += f" since {owner['since']}" if "since" in owner else ""
    return told + (f" ({owner['command']})" if owner.get("command") else "")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
