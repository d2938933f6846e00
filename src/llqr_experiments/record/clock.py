"""Where the time of a run goes: compilation, training, refits, evaluation."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax

_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Clock:
    """Wall time by phase; tracing and compiling inside a phase count as "compile".

    Use it as a context manager, around the run.

    Attributes:
      seconds: phase -> seconds.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._earlier = 0.0
        self._start = time.perf_counter()
        self._compiled: list[tuple[float, float]] = []  # disjoint (start, end), oldest first

    def __enter__(self) -> "Clock":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count the time of the run before an interruption; "total" of it is all its time."""
        for name, value in seconds.items():
            if name != "total":
                self.seconds[name] += value
        self._earlier += seconds.get("total", sum(seconds.values()))

    def elapsed(self) -> float:
        """Seconds since the clock was made, and those before an interruption."""
        return self._earlier + time.perf_counter() - self._start

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`, less what was spent compiling."""
        start, before = time.perf_counter(), self._compile_time()
        try:
            yield
        finally:
            compiled = self._compile_time() - before
            self.seconds[name] += time.perf_counter() - start - compiled
            self.seconds["compile"] += compiled

    def _compile_time(self) -> float:
        return sum(end - start for start, end in self._compiled)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event not in _EVENTS:
            return
        end = time.perf_counter()
        start = end - duration_secs
        # Tracing a function traces those that it calls: an inner event ends before the outer.
        while self._compiled and self._compiled[-1][0] >= start:
            self._compiled.pop()
        if self._compiled:
            start = max(start, self._compiled[-1][1])
        self._compiled.append((start, end))
