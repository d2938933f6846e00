"""A progress bar for work that may be over in a moment."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

DELAY_SECONDS = 2.0


@contextmanager
def progress(
    what: str, total: int | None, *, in_bytes: bool = True, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error, if that is a terminal and the work takes over two seconds.

    Args:
      what: is being done.
      total: how much there is to do; None: not known.
      in_bytes: whether it is counted in bytes.
      console: where the bar goes.

    Yields:
      A function to call with the amount that was done since the last call.
    """
    console = console or Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task(what, total=total)
    timer = threading.Timer(DELAY_SECONDS, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda count: bar.advance(task, count)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
