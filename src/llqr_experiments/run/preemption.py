"""Signals that ask a run to end: it saves first; a second one ends it at once."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from llqr_experiments.errors import RunError

ECHO = 2.0
"""Seconds in which a signal is the same one again: `uv run` passes on to its child what the
terminal or the scheduler has sent to the whole group."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(RunError):
    """A signal ended the run, and everything is saved: run the same command again to go on."""

    title = "Interrupted"
    everywhere = True
    code = 75  # EX_TEMPFAIL: a scheduler may requeue the job


class Interrupts:
    """While it is entered, SIGTERM, SIGUSR1 and Ctrl-C only set `requested`.

    Only the main thread can do this; elsewhere (a run inside a notebook's thread) nothing changes.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            os._exit(128 + number)
