"""Where the time of a run goes: what compiles inside a phase is no time of the phase."""

import time

import jax

from llqr_experiments.record.clock import Clock

COMPILED = "/jax/core/compile/backend_compile_duration"


def test_the_time_of_a_phase_is_split_and_counted_once():
    began = time.perf_counter()
    with Clock() as clock:
        with clock.phase("training"):
            time.sleep(0.05)
            jax.monitoring.record_event_duration_secs(COMPILED, 0.04)
        elapsed = time.perf_counter() - began
    assert clock.seconds["compile"] > 0.0399
    assert clock.seconds["training"] > 0
    assert sum(clock.seconds.values()) <= elapsed


def test_a_function_that_is_compiled_inside_another_counts_once():
    """JAX tells of the inner one first, whose time is part of the outer one's."""
    with Clock() as clock, clock.phase("training"):
        time.sleep(0.05)
        jax.monitoring.record_event_duration_secs(COMPILED, 0.01)
        jax.monitoring.record_event_duration_secs(COMPILED, 0.03)
    assert 0.0299 < clock.seconds["compile"] < 0.04


def test_a_run_that_goes_on_has_the_time_before_too():
    clock = Clock()
    clock.add({"training": 7.0, "compile": 1.0, "total": 9.0})
    assert dict(clock.seconds) == {"training": 7.0, "compile": 1.0}
    assert 9.0 <= clock.elapsed() < 10.0
