"""Where metrics go: metrics.jsonl always, Aim when it is there. A tracker never ends a run."""

import atexit
import json
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from llqr_experiments.config.options import Config


class Tracker(Protocol):
    """A place for numbers."""

    def log(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Record values at a step, `seconds` after the start."""
        ...

    def position(self) -> Any:
        """What to go on from after an interruption, JSON-able."""
        ...

    def close(self) -> None:
        """Flush."""
        ...


class Jsonl:
    """One JSON object a line, flushed line by line, so that a killed run keeps its record.

    Args:
      path: the file.
      position: bytes of it that belong to the run so far. What a killed run wrote after its
        last checkpoint is made again, and is set aside in <name>.lost, as is a line that is cut
        off. None: all of it.
      say: prints a line for the user: where the file is shorter than that.
    """

    def __init__(
        self, path: Path, position: int | None = 0, say: Callable[[str], None] = lambda _: None
    ):
        kept = _keep_lines(path, position)
        if position is not None and kept < position:
            say(
                f"[yellow]warning:[/] {path} has {kept:,} of the {position:,} bytes that the "
                "checkpoint knows of: the rows that are missing stay so, and the record goes on.\n"
            )
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Append a line; numbers that JSON does not have become null."""
        row = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **row, "seconds": round(seconds, 3)}) + "\n")
        self._file.flush()

    def position(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _keep_lines(path: Path, position: int | None) -> int:
    """Cut a file after the last whole line before a position, and set aside what follows."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        content = file.read()
        kept = content.rfind(b"\n", 0, position) + 1
        if kept < len(content):
            with path.with_name(path.name + ".lost").open("ab") as aside:
                aside.write(content[kept:])
            file.truncate(kept)
    return kept


class TensorBoard:
    """Event files for TensorBoard.

    Args:
      folder: of the events.
      position: the last step of the run so far; later ones of an interrupted run are dropped.
    """

    def __init__(self, folder: Path, position: int | None = None):
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]

        purge = None if position is None else position + 1
        self._writer, self._last = SummaryWriter(str(folder), purge_step=purge), position or 0

    def log(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Write every value."""
        del seconds
        self._last = max(self._last, step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def position(self) -> int:
        """The last step."""
        self._writer.flush()
        return self._last

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Aim:
    """A run in an Aim repository.

    Args:
      repo: its folder; None: the current one.
      experiment: name of the experiment.
      config: of the run.
      position: hash of the Aim run that goes on; None: a new one.
    """

    def __init__(
        self, repo: str | None, experiment: str, config: Config, position: str | None = None
    ):
        import aim

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._run = aim.Run(
                position,
                repo=repo,
                experiment=experiment,
                system_tracking_interval=None,
                log_system_params=False,
                capture_terminal_logs=False,
            )
        self._run["config"] = asdict(config)

    def log(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Track every value, and again over time: name|t, with 100 x seconds as its axis."""
        for name, value in values.items():
            self._run.track(value, name=name, step=step)
            self._run.track(value, name=f"{name}|t", step=int(100 * seconds))

    def position(self) -> str:
        """Hash of the run."""
        return str(self._run.hash)

    def close(self) -> None:
        """Finish the run."""
        from aim.ext.cleanup import AutoClean

        self._run.close()
        # Aim cleans up again at exit, in a new thread, which Python 3.12 forbids there: now.
        atexit.unregister(AutoClean.cleanup)
        AutoClean.cleanup()


class Trackers:
    """All trackers of a run; one that fails is reported once and dropped.

    Args:
      say: prints a line for the user.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._live: list[Tracker] = []

    def add(self, name: str, make: Callable[[], Tracker]) -> bool:
        """Add a tracker; say why in one line, and go on, if it cannot be made."""
        try:
            self._live.append(make())
        except ModuleNotFoundError:
            self._say(f"{name} is not installed: metrics go to metrics.jsonl only.")
        except Exception as error:
            self._say(f"{name} cannot be used ({error}): metrics go to metrics.jsonl only.")
        else:
            return True
        return False

    def log(self, step: int, values: dict[str, float], seconds: float) -> None:
        """Send values to every tracker."""
        self._each(lambda tracker: tracker.log(step, values, seconds))

    def positions(self) -> dict[str, Any]:
        """Where every tracker is, by its class, for a checkpoint."""
        found: dict[str, Any] = {}

        def note(tracker: Tracker) -> None:
            found[type(tracker).__name__] = tracker.position()

        self._each(note)
        return found

    def close(self) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Any], None]) -> None:
        for tracker in list(self._live):
            try:
                act(tracker)
            except Exception as error:
                self._live.remove(tracker)
                with suppress(Exception):  # what is in its buffers has no place to go
                    tracker.close()
                self._say(f"{type(tracker).__name__} failed and is dropped: {error}")
