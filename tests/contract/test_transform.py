"""The contract that every optimizer made by the library keeps."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import llqr
from llqr import schedules
from tests.contract import problem as pb

every_optimizer = pytest.mark.parametrize("name", pb.NAMES)


@pytest.fixture(autouse=True)
def _standard_promotion_for_adam(request: pytest.FixtureRequest) -> Iterator[None]:
    """Relax conftest's strict promotion where optax itself mixes dtypes."""
    with jax.numpy_dtype_promotion("standard" if "adam" in request.node.name else "strict"):
        yield


@cache
def compiled(name: str, mode: str) -> pb.Counted:
    """Return a jitted update: refresh=False ("never"), None ("schedule"), an array ("array")."""
    tx = pb.optimizer(name)
    if mode == "never":
        return pb.Counted(lambda g, state, params: tx.update(g, state, params, refresh=False))
    if mode == "schedule":
        return pb.Counted(
            lambda g, state, params, bound: tx.update(g, state, params, objective=bound)
        )
    return pb.Counted(
        lambda g, state, params, bound, due: tx.update(
            g, state, params, objective=bound, refresh=due
        )
    )


def blocks(state: Any) -> Any:
    return llqr.find(state).blocks


def refits(state: Any) -> int:
    return int(llqr.find(state).refit.refits)


def count(state: Any) -> int:
    return int(llqr.find(state).count)


def layout(tree: Any) -> Any:
    """Return the treedef, and shape, dtype and weak type of every leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, jax.typeof(x).weak_type) for x in leaves]


# --- init -----------------------------------------------------------------------------------


@every_optimizer
def test_init_is_abstract_and_data_free(name: str) -> None:
    tx, params = pb.optimizer(name), pb.params()
    state = tx.init(params)
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    # ... and P does not depend on the values of the parameters.
    pb.assert_bitwise(blocks(tx.init(jax.tree.map(jnp.zeros_like, params))), blocks(state))


@every_optimizer
def test_state_is_arrays_in_trees_shaped_like_params(name: str) -> None:
    params = pb.params()
    state = pb.optimizer(name).init(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    is_none = lambda x: x is None  # noqa: E731
    for tree in blocks(state).values():
        assert jax.tree.structure(tree, is_leaf=is_none) == jax.tree.structure(params)
    assert llqr.find(state).count.dtype == jnp.int32
    assert (count(state), refits(state)) == (0, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("structure", llqr.STRUCTURES)
@pytest.mark.parametrize("sigma", [1.0, 4.0, 0.3])
def test_identity_before_the_first_refit(structure: str, sigma: float) -> None:
    tx = llqr.scale_by_llqr(**pb.options(structure=structure, identity_scaling=sigma))
    params, grads = pb.params(), pb.gradient()
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, refresh=False)
        if sigma == 1.0 and structure in pb.KINDS:
            pb.assert_bitwise(updates, grads)
        else:  # roots and reflections round
            pb.assert_close(updates, grads, rtol=1e-14)


@pytest.mark.parametrize("name", [n for n in pb.NAMES if n.startswith("llqr")])
def test_equals_the_base_optimizer_before_the_first_refit(name: str) -> None:
    tx, base = pb.optimizer(name), pb.base(name)
    params, grads = pb.params(), pb.gradient()
    state, base_state = tx.init(params), base.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params, refresh=False)
        expected, base_state = base.update(grads, base_state, params)
        pb.assert_bitwise(updates, expected)
    pb.assert_bitwise(state.base, base_state)


# --- update ---------------------------------------------------------------------------------


@every_optimizer
def test_unknown_keywords_are_ignored(name: str) -> None:
    tx, params, grads = pb.optimizer(name), pb.params(), pb.gradient()
    state = tx.init(params)
    extra = {"value": jnp.float32(1), "value_fn": lambda p: 0.0, "not_a_keyword": "text"}
    pb.assert_bitwise(
        tx.update(grads, state, params, refresh=False, **extra),
        tx.update(grads, state, params, refresh=False),
    )


@every_optimizer
def test_compiles_once_without_refits(name: str) -> None:
    params, grads = pb.params(), pb.gradient()
    step = compiled(name, "never")
    state = pb.optimizer(name).init(params)
    start = layout(state)
    for i in range(3):
        updates, state = step(grads, state, params)
        assert count(state) == i + 1
        assert layout(state) == start
        assert layout(updates) == layout(grads)
    assert step.traces == 1
    assert refits(state) == 0


@every_optimizer
def test_compiles_once_with_refits_decided_at_run_time(name: str) -> None:
    tx, params, grads, bound = pb.optimizer(name), pb.params(), pb.gradient(), pb.bound()
    step = compiled(name, "array")
    state = tx.init(params)
    start = layout(state)
    for due, number in ((False, 0), (True, 1), (False, 1), (True, 2)):
        before = state
        _, state = step(grads, state, params, bound, jnp.array(due))
        assert refits(state) == number
        assert pb.moved(blocks(state), blocks(before)) == due
        assert layout(state) == start
    assert step.traces == 1
    assert count(state) == 4
    info = llqr.find(state).refit
    assert float(info.objective_after) < float(info.objective_before)
    assert int(info.guarded) == 0


@pytest.mark.parametrize("name", ["scale_by_llqr(kfac)", *(f"llqr({b})" for b in pb.BASES)])
def test_compiles_once_on_schedule(name: str) -> None:
    params, grads, bound = pb.params(), pb.gradient(), pb.bound()
    step = compiled(name, "schedule")
    state = pb.optimizer(name).init(params)
    seen = []
    for _ in range(7):
        _, state = step(grads, state, params, bound)
        seen.append(refits(state))
    assert seen == [1, 1, 1, 2, 2, 2, 3]  # REFIT.every = 3
    assert step.traces == 1


@every_optimizer
def test_second_refresh_does_not_recompile(name: str) -> None:
    tx, params, grads = pb.optimizer(name), pb.params(), pb.gradient()
    state = llqr.refresh(tx, tx.init(params), params, pb.bound())
    first = len(pb.TRACES)
    assert first > 0  # of this optimizer, or of an earlier one that has the same refit
    params = jax.tree.map(lambda p: 1.01 * p, params)
    _, state = compiled(name, "never")(grads, state, params)
    state = llqr.refresh(tx, state, params, pb.bound(seed=2))
    assert len(pb.TRACES) == first
    assert refits(state) == 2
    assert layout(state) == layout(tx.init(params))


@every_optimizer
def test_jit_equals_eager_and_refresh_equals_refresh_true(name: str) -> None:
    """Routes to one refit; an update applies the P that it has just learned."""
    tx, params, grads, bound = pb.optimizer(name), pb.params(), pb.gradient(), pb.bound()
    start = tx.init(params)
    eager = tx.update(grads, start, params, objective=bound, refresh=True)
    if "streaming" not in name:  # there, a step's own gradient is part of what P follows
        learned = llqr.refresh(tx, start, params, bound)
        pb.assert_bitwise(blocks(learned), blocks(eager[1]))
        pb.assert_bitwise(tx.update(grads, learned, params, refresh=False), eager)
    jitted = compiled(name, "array")(grads, start, params, bound, jnp.array(True))
    pb.assert_close(jitted[0], eager[0])
    pb.assert_close(blocks(jitted[1]), blocks(eager[1]))


@pytest.mark.parametrize("base", pb.BASES)
def test_llqr_is_the_base_optimizer_on_preconditioned_gradients(base: str) -> None:
    tx, inner, outer = (
        pb.optimizer(f"llqr({base})"),
        pb.optimizer("scale_by_llqr(kfac)"),
        pb.BASES[base],
    )
    params, grads, bound = pb.params(), pb.gradient(), pb.bound()
    state, inner_state, outer_state = tx.init(params), inner.init(params), outer.init(params)
    for i in range(4):
        refresh = i % 2 == 0
        updates, state = tx.update(grads, state, params, objective=bound, refresh=refresh)
        expected, inner_state = inner.update(
            grads, inner_state, params, objective=bound, refresh=refresh
        )
        expected, outer_state = outer.update(expected, outer_state, params)
        pb.assert_bitwise(updates, expected)
    assert refits(state) == 2


@pytest.mark.parametrize("structure", pb.KINDS)
def test_update_is_linear_in_the_gradient(structure: str) -> None:
    name = f"scale_by_llqr({structure})"
    tx, params, grads = pb.optimizer(name), pb.params(), pb.gradient()
    state = llqr.refresh(tx, tx.init(params), params, pb.bound())

    def apply(x: Any) -> Any:
        return compiled(name, "never")(x, state, params)[0]

    other = jax.tree.map(jnp.cos, params)
    mixed = jax.tree.map(lambda x, y: 2.0 * x - 3.0 * y, grads, other)
    expected = jax.tree.map(lambda x, y: 2.0 * x - 3.0 * y, apply(grads), apply(other))
    pb.assert_close(apply(mixed), expected)
    assert pb.moved(apply(grads), grads)


# --- what update needs ----------------------------------------------------------------------

NEEDS_OBJECTIVE = (
    "update() needs objective=objective.bind(batch) where a refit can happen, and none "
    "arrived. Pass it, or pass refresh=False and refit with "
    "llqr.refresh(tx, state, params, objective)."
)


@pytest.mark.parametrize("name", [n for n in pb.NAMES if "gradient" not in n])
def test_missing_inputs_are_named(name: str) -> None:
    tx, params, grads = pb.optimizer(name), pb.params(), pb.gradient()
    state = tx.init(params)
    for refresh in (None, True, jnp.array(False)):
        with pytest.raises(ValueError, match=re.escape(NEEDS_OBJECTIVE)):
            tx.update(grads, state, params, refresh=refresh)
    with pytest.raises(
        TypeError, match=r"bound to a batch, objective.bind\(batch\); got Objective"
    ):
        tx.update(grads, state, params, objective=pb.OBJECTIVE)
    with pytest.raises(TypeError, match=r"bound to a batch.*got function"):
        tx.update(grads, state, params, objective=pb.forward)
    with pytest.raises(ValueError, match="needs params where a refit can happen"):
        tx.update(grads, state, objective=pb.bound())
    with pytest.raises(ValueError, match="needs params"):
        tx.update(grads, state, None, objective=pb.bound())


@every_optimizer
def test_params_are_optional_without_a_refit(name: str) -> None:
    tx, params, grads = pb.optimizer(name), pb.params(), pb.gradient()
    state = tx.init(params)
    pb.assert_bitwise(
        tx.update(grads, state, refresh=False), tx.update(grads, state, params, refresh=False)
    )


@pytest.mark.parametrize("refresh", ["yes", "no", "False"])
def test_refresh_is_no_string(refresh: str) -> None:
    tx, params = pb.optimizer("llqr(sgd)"), pb.params()
    with pytest.raises((TypeError, ValueError), match="refresh"):
        tx.update(pb.gradient(), tx.init(params), params, objective=pb.bound(), refresh=refresh)


# --- when a refit is due --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("due", "number"),
    [
        pytest.param(True, 1, id="True"),
        pytest.param(False, 0, id="False"),
        pytest.param(lambda: jnp.array(True), 1, id="array(True)"),
        pytest.param(lambda: jnp.array(False), 0, id="array(False)"),
        pytest.param(lambda: np.bool_(True), 1, id="numpy True"),
        pytest.param(lambda: np.bool_(False), 0, id="numpy False"),
    ],
)
@pytest.mark.parametrize("at", [0, 1])
def test_refresh_overrules_the_schedule(due: Any, number: int, at: int) -> None:
    """By the schedule a refit is due at count 0, not at 1."""
    tx, params = pb.optimizer("scale_by_llqr(kfac)"), pb.params()
    state = tx.init(params)._replace(count=jnp.array(at, jnp.int32))
    due = due() if callable(due) else due
    _, state = tx.update(pb.gradient(), state, params, objective=pb.bound(), refresh=due)
    assert (refits(state), count(state)) == (number, at + 1)


SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "every": ({"every": 3}, [0, 3, 6, 9, 12]),
    "always": ({"every": 1}, list(range(13))),
    "longer than the run": ({"every": 1000}, [0]),
    "start": ({"every": 4, "start": 2}, [2, 6, 10]),
    "until": ({"every": 2, "until": 6}, [0, 2, 4]),
    "start and until": ({"every": 2, "start": 3, "until": 8}, [3, 5, 7]),
    "until 0": ({"every": 1, "until": 0}, []),
    "start at until": ({"every": 1, "start": 5, "until": 5}, []),
    "function": (
        {"every": lambda c: jnp.where(c < 6, jnp.int32(2), jnp.int32(3))},
        [0, 2, 4, 6, 9, 12],
    ),
    "function with start": (
        {"every": lambda c: jnp.where(c < 6, jnp.int32(2), jnp.int32(3)), "start": 1},
        [1, 3, 5, 7, 10],
    ),
    "llqr.schedules": (
        {"every": schedules.piecewise_constant(2, 1, boundaries={5: 2})},
        [0, 2, 4, 8, 12],
    ),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_when_a_refit_is_due_against_a_list(case: str) -> None:
    changes, expected = SCHEDULES[case]
    refit = llqr.Refit(**changes)
    due = [i for i in range(13) if bool(refit.is_due(jnp.array(i, jnp.int32)))]
    assert due == expected
    traced = jax.jit(jax.vmap(refit.is_due))(jnp.arange(13, dtype=jnp.int32))
    assert np.flatnonzero(traced).tolist() == expected


@pytest.mark.parametrize("case", ["start and until", "function with start"])
def test_update_refits_when_due(case: str) -> None:
    changes, expected = SCHEDULES[case]
    refit = llqr.Refit(steps=1, learning_rate=0.01, **changes)
    tx = llqr.scale_by_llqr(**pb.options(structure="scalar", refit=refit))
    params, grads, bound = pb.params(), pb.gradient(), pb.bound()
    step = pb.Counted(lambda state: tx.update(grads, state, params, objective=bound)[1])
    state, due = tx.init(params), []
    for i in range(13):
        before, state = refits(state), step(state)
        due += [i] if refits(state) > before else []
    assert due == expected
    assert step.traces == 1


def test_eager_updates_follow_the_schedule_too() -> None:
    tx, params = pb.optimizer("scale_by_llqr(kfac)"), pb.params()
    state, due = tx.init(params), []
    for i in range(7):
        before = refits(state)
        _, state = tx.update(pb.gradient(), state, params, objective=pb.bound())
        due += [i] if refits(state) > before else []
    assert due == [0, 3, 6]


def test_cadence_of_a_float32_schedule_is_rounded() -> None:
    """100 x 0.3 is 30.000002 in float32; a refit is still due at every 30th count."""
    with jax.enable_x64(False):
        every = schedules.piecewise_constant(100, 1, boundaries={10: 0.3})
        assert float(every(30)) != 30.0
        refit = llqr.Refit(every=every)
        counts = (0, 15, 30, 45, 60, 300, 301)
        due = [c for c in counts if bool(refit.is_due(jnp.array(c, jnp.int32)))]
    assert due == [0, 30, 60, 300]


# --- llqr.refresh ---------------------------------------------------------------------------


@every_optimizer
def test_refresh_touches_nothing_but_blocks(name: str) -> None:
    tx, params, grads = pb.optimizer(name), pb.params(), pb.gradient()
    state = tx.init(params)
    for _ in range(2):
        _, state = compiled(name, "never")(grads, state, params)
    new = llqr.refresh(tx, state, params, pb.bound())
    assert refits(new) == 1
    assert pb.moved(blocks(new), blocks(state))
    assert count(new) == 2
    if isinstance(state, llqr.LLQRState):
        return
    pb.assert_bitwise(new.base, state.base)
    assert pb.moved(state.base, tx.init(params).base) or name == "llqr(sgd)"  # not trivial


NO_LLQR = "no LLQR state found: the optimizer must contain llqr.llqr or llqr.scale_by_llqr."


@pytest.mark.parametrize("base", ["sgd", "adam", "lbfgs"])
def test_refresh_needs_llqr(base: str) -> None:
    tx, params = getattr(optax, base)(0.1), pb.params()
    with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match=re.escape(NO_LLQR)):
        llqr.refresh(tx, tx.init(params), params, pb.bound())
    with pytest.raises(ValueError, match=re.escape(NO_LLQR)):
        llqr.find(tx.init(params))
    with pytest.raises(ValueError, match=re.escape("no llqr.llqr or llqr.scale_by_llqr in this")):
        llqr.describe(tx, params)


def test_refresh_inside_jit_and_vmap() -> None:
    tx, params = pb.optimizer("llqr(momentum)"), pb.params()
    state = tx.init(params)
    expected = llqr.refresh(tx, state, params, pb.bound())

    def refresh(state: Any, params: Any, bound: Any) -> Any:
        return llqr.refresh(tx, state, params, bound)

    jitted = jax.jit(refresh)(state, params, pb.bound())
    pb.assert_close(blocks(jitted), blocks(expected))
    one = jax.tree.map(lambda x: x[None], (state, params, pb.bound()))
    mapped = jax.vmap(refresh)(*one)
    pb.assert_close(jax.tree.map(lambda x: x[0], blocks(mapped)), blocks(expected))


# --- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "e-kfca"}, "unknown structure 'e-kfca': did you mean 'e-kfac'? Legal: "),
        ({"structure": [("*", "kafc")]}, "unknown structure 'kafc': did you mean 'kfac'?"),
        ({"structure": [("kernel", "kfac")]}, "the last rule must be a catch-all"),
        ({"structure": []}, "the last rule must be a catch-all"),
        ({"metric": "ndg"}, "unknown divergence 'ndg': did you mean 'ngd'? Legal: "),
        ({"metric": "renyi_inf"}, "renyi_inf is undefined"),
        ({"damping": -0.1}, "damping must lie in [0, inf), got -0.1."),
        ({"damping": float("nan")}, "damping must lie in [0, inf), got nan."),
        ({"identity_scaling": 0.0}, "identity_scaling must lie in (0, inf), got 0.0."),
        ({"identity_scaling": -1.0}, "identity_scaling must lie in (0, inf), got -1.0."),
        ({"max_dim": 0}, "max_dim must be >= 1, got 0."),
        (
            {"divergence_reduction": "avg"},
            "unknown divergence_reduction 'avg'. Legal: mean, sum",
        ),
    ],
)
def test_illegal_options_fail_at_construction(changes: dict[str, Any], message: str) -> None:
    makers: list[Callable[..., Any]] = [
        llqr.scale_by_llqr,
        lambda **options: llqr.llqr(optax.sgd(0.1), **options),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=re.escape(message)):
            make(**changes)


def test_misspelt_option_and_metric_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match="dampning"):
        llqr.llqr(optax.sgd(0.1), dampning=0.1)
    with pytest.raises(TypeError, match="metric must be a name"):
        llqr.scale_by_llqr(metric=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"refit": {"every": 5}},
        {"damping": lambda count: 0.1},
    ],
    ids=["refit a dict", "damping a function"],
)
def test_options_of_a_wrong_type_fail_at_construction(changes: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(changes))):
        llqr.scale_by_llqr(**changes)


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [(np.arange(3, dtype=np.int32), "int32"), (np.ones(2, np.complex64), "complex64")],
)
def test_leaves_that_cannot_be_preconditioned_are_named(leaf: Any, dtype: str) -> None:
    params = {"layer": {"kernel": jnp.ones((2, 2)), "steps": jnp.asarray(leaf)}}
    tx = llqr.scale_by_llqr()
    with pytest.raises(TypeError, match=f"parameter 'layer/steps' has dtype {dtype}: only real"):
        tx.init(params)
    with pytest.raises(TypeError, match="parameter 'layer/steps' has dtype"):
        jax.eval_shape(tx.init, params)


# --- optax.tree.map_params ------------------------------------------------------------------


@every_optimizer
def test_map_params_sees_only_the_blocks(name: str) -> None:
    """Slots that a leaf does not have are None and stay None."""
    tx, params = pb.optimizer(name), pb.params()
    state = tx.init(params)
    seen = []

    def double(x: jax.Array) -> jax.Array:
        seen.append(x.shape)
        return 2 * x

    mapped = optax.tree.map_params(tx, double, state, transform_non_params=lambda _: "other")
    expected = jax.tree.map(lambda x: 2 * x, blocks(state))
    pb.assert_bitwise(blocks(mapped), expected)
    ours = llqr.find(mapped)
    assert ours.count == "other"
    assert set(ours.refit) == {"other"}
    assert len(seen) >= len(jax.tree.leaves(blocks(state)))


def test_map_params_with_another_tree() -> None:
    """A tree beside the state, such as shardings, meets None where a leaf has no such slot."""
    tx, params = pb.optimizer("scale_by_llqr(kfac)"), pb.params()
    state = tx.init(params)
    names = {"layer": {"kernel": "K", "bias": "b"}, "temperature": "t"}
    paired = optax.tree.map_params(
        tx,
        lambda x, leaf: x if x is None else (leaf, x.shape),
        state,
        names,
        is_leaf=lambda x: x is None,
    )
    assert paired.blocks == {
        "left": {"layer": {"kernel": ("K", (4, 4)), "bias": None}, "temperature": None},
        "right": {"layer": {"kernel": ("K", (3, 3)), "bias": None}, "temperature": None},
        "spectrum": {"layer": {"kernel": None, "bias": ("b", (3,))}, "temperature": ("t", ())},
    }
    # Without is_leaf optax (jax.tree.map) refuses: None is no leaf.
    with pytest.raises(ValueError, match=r"different types at key path|Expected None"):
        optax.tree.map_params(tx, lambda x, leaf: x, state, names)


# --- dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_low_precision_parameters_have_float32_blocks(dtype: Any) -> None:
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        tx, params, batch = pb.optimizer("scale_by_llqr(kfac)"), pb.params(dtype), pb.batch(dtype)
        state = tx.init(params)
        start = layout(state)
        grads = jax.jit(jax.grad(pb.OBJECTIVE))(params, batch)
        bound = pb.OBJECTIVE.bind(batch)
        updates, state = tx.update(grads, state, params, objective=bound, refresh=True)
        assert layout(state) == start
        assert {x.dtype for x in jax.tree.leaves(blocks(state))} == {jnp.dtype(jnp.float32)}
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert int(state.refit.guarded) == 0
        # The step is the float32 step to the precision of the parameters.
        params, grads, batch = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, (params, grads, batch)
        )
        expected, wide = tx.update(
            grads, tx.init(params), params, objective=pb.OBJECTIVE.bind(batch), refresh=True
        )
        assert int(wide.refit.guarded) == 0
        updates = jax.tree.map(lambda x: x.astype(jnp.float32), updates)
        pb.assert_close(updates, expected, rtol=8 * float(jnp.finfo(dtype).eps))
        assert pb.moved(expected, grads)


# --- sharding -------------------------------------------------------------------------------

SHARDED = {"layer": {"kernel": P("d", None), "bias": P(None)}, "temperature": P()}


@pytest.mark.parametrize(
    ("structure", "split"),
    [("dense", "params"), ("e-kfac", "params"), ("kfac", "batch")],
)
@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_equals_unsharded(structure: str, split: str, axis: AxisType) -> None:
    assert jax.device_count() >= 2, "conftest asks for two CPU devices"
    name = f"scale_by_llqr({structure})"
    tx = pb.optimizer(name)

    def run(params: Any, batch: Any) -> tuple[list[Any], Any]:
        state, seen = tx.init(params), []
        for i in range(2):
            grads = jax.jit(jax.grad(pb.OBJECTIVE))(params, batch)
            step = compiled(name, "array")
            bound = pb.OBJECTIVE.bind(batch)
            updates, state = step(grads, state, params, bound, jnp.array(i == 0))
            params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
            jax.block_until_ready((params, state))
            seen.append(updates)
        return seen, state

    expected, _ = run(pb.params(), pb.batch())
    mesh = jax.make_mesh((2,), ("d",), axis_types=(axis,))
    specs, batch_specs = jax.tree.map(lambda p: P(), (pb.params(), pb.batch()))
    if split == "params":
        specs = SHARDED
    else:
        batch_specs = {"x": P("d", None), "y": P("d")}

    def place(tree: Any, specs: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    with jax.set_mesh(mesh):
        params = place(pb.params(), specs)
        updates, state = run(params, place(pb.batch(), batch_specs))
        for step, wanted in zip(updates, expected, strict=True):
            pb.assert_close(step, wanted, rtol=1e-11)
            for u, p in zip(jax.tree.leaves(step), jax.tree.leaves(params), strict=True):
                if axis == AxisType.Explicit:
                    assert u.sharding.is_equivalent_to(p.sharding, u.ndim)
        assert refits(state) == 1
        assert int(state.refit.guarded) == 0
