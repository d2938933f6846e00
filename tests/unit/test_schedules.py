"""Schedules: the golden values, a numpy oracle of the formulas, and the contract of a schedule."""

import inspect
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llqr import schedules
from llqr.schedules import SCHEDULES, make

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())


def golden_schedule(entry: dict[str, Any]) -> Callable[[Any], Any]:
    """Build the schedule of a golden entry."""
    arguments = dict(entry["args"])
    for name in ("steps_per_epoch", "total_epochs"):
        if name in inspect.signature(SCHEDULES[entry["function"]]).parameters:
            arguments[name] = entry[name]
    if "boundaries" in arguments:  # JSON has no integer keys
        arguments["boundaries"] = {int(k): v for k, v in arguments["boundaries"].items()}
    return make(entry["function"], entry["base_lr"], **arguments)


def half_cosine(start: float, end: float, fraction: float) -> float:
    """Return the value a fraction of the way along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def oracle_warmup_cosine(s: int) -> float:
    """Base 0.3, 7.5 steps an epoch, warm-up 2 epochs, 9 epochs in all, 0.02 at both ends."""
    if s < 15:
        return 0.02 + 0.28 * s / 15
    return half_cosine(0.3, 0.02, min((s - 15) / (67 - 15), 1))


def oracle_warmup_piecewise(s: int) -> float:
    """Base 0.3, 7.5 steps an epoch, 20 epochs, halved at epochs 5 and 7, warm-up of a tenth."""
    return 0.01 + 0.29 * s / 15 if s < 15 else 0.3 * 0.5 ** ((s >= 37.5) + (s >= 52.5))


# (name, arguments besides the base 0.3, formula): the formula in float64, of one integer step.
ORACLES: list[tuple[str, dict[str, Any], Callable[[int], float]]] = [
    ("constant", {}, lambda s: 0.3),
    (
        "cosine_annealing",
        {"steps_per_epoch": 7.5, "t_max": 5, "eta_min": 0.02},
        lambda s: half_cosine(0.3, 0.02, s / 37.5),
    ),
    (
        "cosine_annealing",
        {"steps_per_epoch": 7.5, "t_max": 5, "eta_min": 0.9, "cycle": False},
        lambda s: half_cosine(0.3, 0.9, min(s / 37.5, 1)),
    ),
    (
        "cosine_decay_with_floor",
        {"steps_per_epoch": 7.5, "t_max": 5, "eta_min": 0.02},
        lambda s: half_cosine(0.3, 0.02, min(s / 37.5, 1)),
    ),
    (
        "warmup_cosine_decay",
        {"steps_per_epoch": 7.5, "init_lr": 0.02, "warmup_epochs": 2, "t_max": 9, "eta_min": 0.02},
        oracle_warmup_cosine,
    ),
    (
        "step_warmup",
        {"steps_per_epoch": 7.5, "total_epochs": 10, "warmup_ratio": 0.5, "init_value": 0.1},
        lambda s: 0.1 + 0.2 * min(s / 37.5, 1),
    ),
    (
        "linear",
        {
            "steps_per_epoch": 7.5,
            "decay_factor": 0.5,
            "transition_begin": 3,
            "transition_epochs": 5,
        },
        lambda s: 0.3 * (1 - 0.5 * min(max((s - 22) / 37, 0), 1)),
    ),
    (
        "piecewise_constant",
        {"steps_per_epoch": 7.5, "boundaries": {7: 0.5, 3: 10}},
        lambda s: 0.3 * (10 if s >= 22.5 else 1) * (0.5 if s >= 52.5 else 1),
    ),
    (
        "warmup_piecewise_decay",
        {
            "steps_per_epoch": 7.5,
            "total_epochs": 20,
            "epoch_decay_bounds": [7, 5],
            "scaling_factor": 0.5,
            "warmup_ratio": 0.1,
            "init_lr": 0.01,
        },
        oracle_warmup_piecewise,
    ),
    (
        "inverse_sqrt",
        {"warmup_updates": 30, "warmup_init_lr": 0.1},
        lambda s: 0.1 + 0.2 * s / 30 if s < 30 else 0.3 * math.sqrt(30 / s),
    ),
    (
        "cosine_ramp_step_increase",
        {
            "init_value": 0.01,
            "ramp_start_step": 5,
            "ramp_end_step": 40,
            "step_start_step": 60,
            "step_interval": 9,
            "step_delta": 0.05,
        },
        lambda s: (
            half_cosine(0.01, 0.3, min(max((s - 5) / 35, 0), 1))
            + 0.05 * ((s - 60) // 9 + 1 if s >= 60 else 0)
        ),
    ),
]
STEPS = np.arange(120, dtype=np.int32)


@pytest.fixture(params=ORACLES, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(ORACLES)])
def case(request: pytest.FixtureRequest) -> tuple[Callable[[Any], Any], np.ndarray]:
    """Return a schedule and its values at STEPS by the formula."""
    name, arguments, formula = request.param
    return make(name, 0.3, **arguments), np.array([formula(int(s)) for s in STEPS])


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    """Run in the width of training, whatever the suite is set to; `x64` overrides it."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def x64(request: pytest.FixtureRequest, float32: None) -> Iterator[bool]:
    """Run a test in both widths."""
    with jax.enable_x64(request.param):
        yield request.param


@pytest.mark.parametrize("key", GOLDEN)
def test_golden_values(key: str, x64: bool) -> None:
    entry = GOLDEN[key]
    schedule = golden_schedule(entry)
    golden = np.array(entry["values"])
    # The goldens are float32 and some rows carry a cancellation: a warm-up from 1e-6 to 0.1 starts
    # at (1e-6 - 0.1) + 0.1 = 9.98e-7. The tolerance is that rounding, an ulp of the largest value;
    # eager float32 values on CPU need none of it.
    atol = np.finfo(np.float32).eps * golden.max()
    eager = [float(schedule(step)) for step in entry["steps"]]
    np.testing.assert_allclose(eager, golden, rtol=1e-6, atol=atol)
    compiled = jax.jit(jax.vmap(schedule))(np.array(entry["steps"], np.int32))
    np.testing.assert_allclose(compiled, golden, rtol=1e-6, atol=atol)


def test_every_schedule_but_constant_has_a_golden() -> None:
    assert {entry["function"] for entry in GOLDEN.values()} == set(SCHEDULES) - {"constant"}
    assert {name for name, _, _ in ORACLES} == set(SCHEDULES)


def test_every_step_equals_the_formula(case: Any, x64: bool) -> None:
    schedule, expected = case
    rtol, atol = (1e-12, 1e-14) if x64 else (2e-6, 5e-8)
    eager = [float(schedule(int(step))) for step in STEPS]
    np.testing.assert_allclose(eager, expected, rtol=rtol, atol=atol)


def test_jit_and_vmap_equal_eager(case: Any) -> None:
    schedule, _ = case
    eager = np.array([float(schedule(int(step))) for step in STEPS])
    compiled = jax.jit(schedule)
    close = {"rtol": 5e-7, "atol": 2e-7}  # an ulp of the angle, up to 3.2 pi, in a cosine
    np.testing.assert_allclose([compiled(int(step)) for step in STEPS], eager, **close)
    np.testing.assert_allclose([compiled(jnp.int32(step)) for step in STEPS], eager, **close)
    np.testing.assert_allclose(jax.vmap(schedule)(STEPS), eager, **close)
    np.testing.assert_allclose(schedule(STEPS), eager, **close)


def test_values_have_one_type_and_the_shape_of_the_step(case: Any, x64: bool) -> None:
    schedule, _ = case
    dtype = jnp.float64 if x64 else jnp.float32
    for step in (3, jnp.int32(3), jnp.arange(4, dtype=jnp.int32)):
        value = schedule(step)
        assert (value.shape, value.dtype) == (jnp.shape(step), dtype)
        assert not value.weak_type  # or a jitted consumer compiles once for each kind of step
    assert jax.eval_shape(schedule, jax.ShapeDtypeStruct((2, 3), jnp.int32)).shape == (2, 3)


def test_one_trace_serves_every_step(case: Any) -> None:
    schedule, _ = case
    traces = []
    compiled = jax.jit(lambda step: (traces.append(step), schedule(step))[1])
    for step in range(3):
        compiled(jnp.int32(step))
    assert len(traces) == 1


def test_strict_promotion_and_no_nan(case: Any) -> None:
    schedule, _ = case
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.debug_infs(True),
    ):
        assert np.isfinite(schedule(jnp.arange(120, dtype=jnp.int32))).all()
        assert np.isfinite(jax.jit(schedule)(jnp.int32(0)))


def test_cosine_rises_again_only_with_the_cycle() -> None:
    arguments = {"steps_per_epoch": 10, "t_max": 4, "eta_min": 0.2}
    cycling = schedules.cosine_annealing(1.0, **arguments)
    stopped = schedules.cosine_annealing(1.0, **arguments, cycle=False)
    np.testing.assert_allclose([cycling(s) for s in (40, 60, 80)], [0.2, 0.6, 1.0], rtol=1e-6)
    np.testing.assert_array_equal([stopped(s) for s in (40, 60, 80)], np.float32(0.2))


def test_a_base_of_zero_still_rises() -> None:
    ema = schedules.cosine_annealing(0.0, steps_per_epoch=1, t_max=10, eta_min=0.9, cycle=False)
    np.testing.assert_allclose([ema(s) for s in (0, 5, 10)], [0.0, 0.45, 0.9], atol=1e-7)


def test_warmups_end_on_their_last_step() -> None:
    for schedule in (  # W = 10
        schedules.warmup_cosine_decay(1.0, 10.9, warmup_epochs=1, t_max=20),
        schedules.step_warmup(1.0, 10, 10, warmup_ratio=0.1),
        schedules.warmup_piecewise_decay(1.0, 10.98, 20, warmup_ratio=0.05),
        schedules.inverse_sqrt(1.0, warmup_updates=10),
    ):
        assert float(schedule(10)) == pytest.approx(1.0, rel=1e-6)
        assert float(schedule(9)) == pytest.approx(0.9, rel=1e-4)
    without = schedules.warmup_cosine_decay(1.0, 10, warmup_epochs=0, t_max=4)
    assert float(without(0)) == 1.0


def test_a_boundary_is_the_first_step_at_or_past_its_epoch() -> None:
    fractional = schedules.piecewise_constant(100, 390.625, {15: 10, 30: 0.5})
    assert [float(fractional(s)) for s in (5859, 5860, 11718, 11719)] == [100, 1000, 1000, 500]
    whole = schedules.piecewise_constant(100, 100, {15: 10})
    assert [float(whole(s)) for s in (1499, 1500)] == [100.0, 1000.0]
    # 15 epochs of 50000 / 3 steps are 250000 steps, and a last bit more in floating point.
    assert 15 * (50000 / 3) > 250_000
    with jax.enable_x64(True):
        thirds = schedules.piecewise_constant(100, 50000 / 3, {15: 10})
        assert [float(thirds(s)) for s in (249_999, 250_000)] == [100.0, 1000.0]


def test_boundaries_within_one_step_both_count() -> None:
    schedule = schedules.piecewise_constant(1.0, 1, {1.2: 3, 1.5: 5})
    assert [float(schedule(s)) for s in (1, 2)] == [1.0, 15.0]
    decay = schedules.warmup_piecewise_decay(1.0, 10, 10, [3, 3], 0.5)
    assert float(decay(30)) == 0.25


def test_a_decay_inside_the_warmup_applies_at_its_end() -> None:
    schedule = schedules.warmup_piecewise_decay(1.0, 10, 100, [1], 0.5, warmup_ratio=0.05)
    assert float(schedule(49)) == pytest.approx(0.98, rel=1e-5)
    assert float(schedule(50)) == 0.5


@pytest.mark.parametrize("interval", [41, 61, 50_000])
def test_no_stair_is_lost_to_rounding(interval: int) -> None:
    # XLA compiles a division by a constant to a product with its reciprocal, and float32 has
    # 41 * (1 / 41) < 1.
    schedule = schedules.cosine_ramp_step_increase(
        1.0, 0.0, None, 0, 1, step_start_step=10, step_interval=interval, step_delta=1.0
    )
    edges = 10 + interval * np.arange(200, dtype=np.int32)
    compiled = jax.jit(schedule)
    np.testing.assert_array_equal(compiled(edges), 2.0 + np.arange(200))
    np.testing.assert_array_equal(compiled(edges - 1), 1.0 + np.arange(200))


def test_ramp_target_is_the_base_unless_given() -> None:
    assert float(schedules.cosine_ramp_step_increase(0.1)(150_000)) == pytest.approx(0.1)
    given = schedules.cosine_ramp_step_increase(0.1, target_value=0.2)
    assert float(given(150_000)) == pytest.approx(0.2)


def test_defaults_are_those_of_the_specification() -> None:
    expected = {
        "constant": {},
        "cosine_annealing": {"t_max": 200, "eta_min": 0, "cycle": True},
        "cosine_decay_with_floor": {"t_max": 200, "eta_min": 0},
        "warmup_cosine_decay": {"init_lr": 1e-5, "warmup_epochs": 5, "t_max": 200, "eta_min": 0},
        "step_warmup": {"warmup_ratio": 1e-4, "init_value": 0},
        "linear": {"decay_factor": 0.01, "transition_begin": 0, "transition_epochs": 2},
        "piecewise_constant": {"boundaries": None},
        "warmup_piecewise_decay": {
            "epoch_decay_bounds": (30, 70, 90),
            "scaling_factor": 0.1,
            "warmup_ratio": 0.05,
            "init_lr": 1e-6,
        },
        "inverse_sqrt": {"warmup_updates": 4000, "warmup_init_lr": 0},
        "cosine_ramp_step_increase": {
            "init_value": 0.005,
            "target_value": None,
            "ramp_start_step": 4000,
            "ramp_end_step": 150_000,
            "step_start_step": 200_000,
            "step_interval": 50_000,
            "step_delta": 0.05,
        },
    }
    for name, factory in SCHEDULES.items():
        parameters = inspect.signature(factory).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        assert defaults == expected[name], name
    default = schedules.piecewise_constant(100, steps_per_epoch=10)
    assert [float(default(s)) for s in (149, 150)] == [100.0, 1000.0]


BAD = [
    ("constant", {"base": -1}, "base must be a finite number >= 0, got -1"),
    ("constant", {"base": math.nan}, "base must be a finite number >= 0, got nan"),
    ("constant", {"base": "0.1"}, "base must be a finite number >= 0, got '0.1'"),
    ("constant", {"base": None}, "base must be a finite number >= 0, got None"),
    ("cosine_annealing", {"t_max": 0}, "t_max must be a finite number > 0, got 0"),
    ("cosine_annealing", {"eta_min": math.inf}, "eta_min must be a finite number >= 0, got inf"),
    ("cosine_decay_with_floor", {"t_max": None}, "t_max must be a finite number > 0, got None"),
    (
        "warmup_cosine_decay",
        {"warmup_epochs": 5, "t_max": 4},
        "t_max = 4 less warmup_epochs, in whole steps, must be at least 1, got -10",
    ),
    ("step_warmup", {"warmup_ratio": 0}, "warmup_ratio must be a number in (0, 1], got 0"),
    ("step_warmup", {"warmup_ratio": 1.5}, "warmup_ratio must be a number in (0, 1], got 1.5"),
    ("step_warmup", {"total_epochs": -3}, "total_epochs must be a finite number > 0, got -3"),
    ("linear", {"steps_per_epoch": 0}, "steps_per_epoch must be a finite number > 0, got 0"),
    (
        "linear",
        {"steps_per_epoch": 0.4},
        "transition_epochs = 2, in whole steps, must be at least 1, got 0",
    ),
    (
        "piecewise_constant",
        {"boundaries": {15: 0}},
        "boundaries[15] must be a finite number > 0, got 0",
    ),
    (
        "piecewise_constant",
        {"boundaries": {"15": 10}},
        "an epoch of boundaries must be a finite number >= 0, got '15'",
    ),
    (
        "warmup_piecewise_decay",
        {"epoch_decay_bounds": [30, -70]},
        "epoch_decay_bounds[1] must be a finite number >= 0, got -70",
    ),
    ("inverse_sqrt", {"warmup_updates": 0}, "warmup_updates must be a finite number > 0, got 0"),
    (
        "cosine_ramp_step_increase",
        {"target_value": -0.2},
        "target_value must be a finite number >= 0, got -0.2",
    ),
    (
        "cosine_ramp_step_increase",
        {"ramp_end_step": 4000},
        "ramp_end_step = 4000 less ramp_start_step must be a finite number > 0, got 0",
    ),
]


@pytest.mark.parametrize(("name", "wrong", "message"), BAD)
def test_a_bad_argument_is_named_with_its_value(
    name: str, wrong: dict[str, Any], message: str
) -> None:
    good = {"base": 0.1, "steps_per_epoch": 10, "total_epochs": 10}
    parameters = inspect.signature(SCHEDULES[name]).parameters
    arguments = {k: v for k, v in good.items() if k in parameters}
    make(name, **arguments)
    with pytest.raises(ValueError) as error:
        make(name, **(arguments | wrong))
    assert str(error.value) == message


def test_every_number_has_a_range() -> None:
    for name, factory in SCHEDULES.items():
        for parameter in inspect.signature(factory).parameters.values():
            checked = hasattr(parameter.annotation, "__metadata__")
            exempt = parameter.name in ("cycle", "boundaries", "epoch_decay_bounds")
            assert checked != exempt, (name, parameter.name)


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule 'cosine_anealing'.*'cosine_annealing'"):
        make("cosine_anealing", 0.1, steps_per_epoch=10)
    with pytest.raises(ValueError, match=r"argument of linear 'decay_facto'.*'decay_factor'"):
        make("linear", 0.1, steps_per_epoch=10, decay_facto=0.1)
