"""LLQR inside, around and between other optax transformations, and under JAX's own."""

import itertools
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from tests.contract import problem as pb

KFAC = pb.optimizer("scale_by_llqr(kfac)")


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For parts of optax that mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def record(state: Any) -> llqr.RefitInfo:
    return llqr.find(state).refit


# --- chains ---------------------------------------------------------------------------------


def test_chain_before_and_after() -> None:
    """clip, P, weight decay, momentum: the same as the four by hand."""
    parts = (
        optax.clip_by_global_norm(0.1),
        KFAC,
        optax.add_decayed_weights(0.01),
        optax.sgd(0.1, momentum=0.9),
    )
    tx, params, grads, bound = optax.chain(*parts), pb.params(), pb.gradient(), pb.bound()
    state = tx.init(params)
    clip, kfac, decay, sgd = (part.init(params) for part in parts)
    for i in range(4):
        refit = i == 1
        updates, state = tx.update(grads, state, params, objective=bound, refresh=refit)
        x, clip = parts[0].update(grads, clip, params)
        x, kfac = parts[1].update(x, kfac, params, objective=bound, refresh=refit)
        x, decay = parts[2].update(x, decay, params)
        x, sgd = parts[3].update(x, sgd, params)
        pb.assert_bitwise(updates, x)
    pb.assert_bitwise(state, (clip, kfac, decay, sgd))
    assert int(record(state).refits) == 1


def test_refresh_reaches_every_llqr_in_a_chain_and_nothing_else() -> None:
    tx = optax.chain(
        optax.trace(0.9), KFAC, optax.chain(optax.trace(0.5), pb.optimizer("llqr(momentum)"))
    )
    params, grads = pb.params(), pb.gradient()
    state = tx.init(params)
    _, state = tx.update(grads, state, params, refresh=False)
    new = llqr.refresh(tx, state, params, pb.bound())
    pb.assert_bitwise(
        (new[0], new[2][0], new[2][1].base), (state[0], state[2][0], state[2][1].base)
    )
    for inner in (new[1], new[2][1].preconditioner):
        assert (int(inner.refit.refits), int(inner.count)) == (1, 1)


# --- inject_hyperparams ---------------------------------------------------------------------


def test_injected_numbers_of_the_base_optimizer() -> None:
    inject = optax.inject_hyperparams(optax.sgd)
    tx = llqr.llqr(inject(learning_rate=0.1, momentum=0.9), **pb.options())
    params, grads = pb.params(), pb.gradient()
    state = llqr.refresh(tx, tx.init(params), params, pb.bound())
    step = pb.Counted(lambda g, s, p: tx.update(g, s, p, refresh=False))
    first, _ = step(grads, state, params)
    state.base.hyperparams["learning_rate"] = jnp.asarray(0.4, jnp.float64)
    second, _ = step(grads, state, params)
    pb.assert_close(second, jax.tree.map(lambda u: 4 * u, first))
    assert step.traces == 1


INJECTED = optax.inject_hyperparams(llqr.scale_by_llqr, static_args=("identity_scaling", "max_dim"))


def test_injected_damping_reaches_the_next_refit_without_recompilation() -> None:
    tx, params, bound = INJECTED(**pb.options()), pb.params(), pb.bound()
    state = tx.init(params)
    assert set(state.hyperparams) == {"damping"}
    step = pb.Counted(lambda g, s, p, bound: tx.update(g, s, p, objective=bound, refresh=True))
    found = []
    for damping in (0.1, 2.0):
        state.hyperparams["damping"] = jnp.asarray(damping, jnp.float64)
        updates, new = step(pb.gradient(), state, params, bound)
        eager = llqr.refresh(tx, state, params, bound)
        pb.assert_close(llqr.find(eager).blocks, llqr.find(new).blocks)
        assert int(eager.count) == 0
        fixed = llqr.scale_by_llqr(**pb.options(damping=damping))
        expected, fixed_state = fixed.update(
            pb.gradient(), fixed.init(params), params, objective=bound, refresh=True
        )
        pb.assert_close(updates, expected)
        np.testing.assert_allclose(
            record(new).objective_before, fixed_state.refit.objective_before, rtol=1e-6
        )
        found.append(updates)
    assert pb.moved(*found)
    assert step.traces == 1


def test_injected_schedule_of_the_damping() -> None:
    """The way to schedule the damping; it counts optax's steps."""

    def damping(step: Any) -> Any:
        return jnp.where(step > 1, 2.0, 0.1)

    tx, params, bound = INJECTED(**pb.options(damping=damping)), pb.params(), pb.bound()
    state = tx.init(params)
    before = []
    for _ in range(3):
        _, new = tx.update(pb.gradient(), state, params, objective=bound, refresh=True)
        before.append(float(record(new).objective_before))
        _, state = tx.update(pb.gradient(), state, params, refresh=False)
    norm = float(optax.tree.norm(pb.gradient(), squared=True))
    assert before[0] == before[1]  # counts 0 and 1
    np.testing.assert_allclose(before[2] - before[0], 0.5 * (2.0 - 0.1) * norm, rtol=1e-5)


def test_injecting_what_is_static_says_how() -> None:
    """Without static_args optax turns every number into an array, sigma and max_dim too."""
    tx = optax.inject_hyperparams(llqr.scale_by_llqr)(**pb.options())
    with pytest.raises(TypeError, match=r"identity_scaling must be a Python number.*static_args"):
        tx.init(pb.params())


def test_inject_into_llqr() -> None:
    tx = optax.inject_hyperparams(llqr.llqr, static_args=("identity_scaling", "max_dim"))(
        optax.sgd(0.1), **pb.options()
    )
    state = tx.init(pb.params())
    assert "damping" in state.hyperparams


# --- apply_if_finite ------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_apply_if_finite(jitted: bool) -> None:
    """A finite gradient refits inside optax's cond; a NaN gradient changes nothing."""
    tx = optax.apply_if_finite(pb.optimizer("llqr(momentum)"), max_consecutive_errors=3)
    plain = pb.optimizer("llqr(momentum)")
    params, grads, bound = pb.params(), pb.gradient(), pb.bound()

    def step(g: Any, state: Any, params: Any, bound: Any) -> Any:
        return tx.update(g, state, params, objective=bound)

    step = jax.jit(step) if jitted else step
    updates, state = step(grads, tx.init(params), params, bound)
    expected, plain_state = plain.update(grads, plain.init(params), params, objective=bound)
    pb.assert_close(updates, expected)
    pb.assert_close(llqr.find(state).blocks, llqr.find(plain_state).blocks)
    assert int(record(state).refits) == 1

    state = state._replace(inner_state=_at_count(state.inner_state, 3))  # a refit is due
    bad = {**grads, "temperature": jnp.array(jnp.nan)}
    updates, rejected = step(bad, state, params, bound)
    pb.assert_bitwise(updates, jax.tree.map(jnp.zeros_like, grads))
    pb.assert_bitwise(rejected.inner_state, state.inner_state)
    assert (int(rejected.notfinite_count), int(rejected.total_notfinite)) == (1, 1)


def _at_count(state: Any, count: int) -> Any:
    ours = state.preconditioner._replace(count=jnp.array(count, jnp.int32))
    return state._replace(preconditioner=ours)


def test_refresh_inside_apply_if_finite() -> None:
    tx = optax.apply_if_finite(pb.optimizer("llqr(momentum)"), max_consecutive_errors=3)
    params = pb.params()
    state = tx.init(params)
    new = llqr.refresh(tx, state, params, pb.bound())
    plain = pb.optimizer("llqr(momentum)")
    expected = llqr.refresh(plain, plain.init(params), params, pb.bound())
    pb.assert_close(llqr.find(new).blocks, expected.preconditioner.blocks)
    outside = (new.notfinite_count, new.last_finite, new.total_notfinite, new.inner_state.base)
    pb.assert_bitwise(
        outside,
        (state.notfinite_count, state.last_finite, state.total_notfinite, state.inner_state.base),
    )


# --- line search ----------------------------------------------------------------------------


def test_lbfgs_gets_its_arguments_and_not_ours() -> None:
    """The line search calls value_fn; LLQR's own keywords would make it fail."""
    with jax.numpy_dtype_promotion("standard"):  # optax's line search mixes dtypes
        tx = llqr.llqr(optax.lbfgs(memory_size=3), **pb.options(structure="diagonal"))
        params, bound = pb.params(), pb.bound()

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            value, grads = jax.value_and_grad(bound)(params)
            updates, state = tx.update(
                grads, state, params, value=value, grad=grads, value_fn=bound, refresh=False
            )
            return optax.apply_updates(params, updates), state, value

        state = tx.init(params)
        base_before = state.base
        values = []
        for i in range(8):
            if i == 4:
                refreshed = llqr.refresh(tx, state, params, bound)
                pb.assert_bitwise(refreshed.base, state.base)
                assert int(record(refreshed).refits) == 1
                state = refreshed
            params, state, value = step(params, state)
            values.append(float(value))
        assert all(new < old for old, new in itertools.pairwise(values))
        assert pb.moved(state.base, base_before)


def test_base_gets_all_other_keywords_and_none_of_ours() -> None:
    seen = []

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.append((params, extra))
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, params, grads = llqr.llqr(base, **pb.options()), pb.params(), pb.gradient()
    state = tx.init(params)
    extra = {"value": jnp.array(1.0), "value_fn": pb.bound(), "grad": grads}
    for refresh in (False, True, None):
        tx.update(grads, state, params, objective=pb.bound(), refresh=refresh, **extra)
    assert len(seen) == 3
    assert all(given[0] is params for given in seen)
    for _, given in seen:
        assert given.keys() == extra.keys()
        assert all(given[key] is extra[key] for key in extra)
    llqr.refresh(tx, state, params, pb.bound())
    assert len(seen) == 3  # a refresh does not run the base optimizer


def test_line_search_in_a_chain_rejects_our_keywords() -> None:
    """optax.chain hands every keyword to every part: use llqr.llqr around a line search."""
    with jax.numpy_dtype_promotion("standard"):
        search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=2)
        tx, params, bound = optax.chain(KFAC, search), pb.params(), pb.bound()
        value, grads = jax.value_and_grad(bound)(params)
        extra = {"value": value, "grad": grads, "value_fn": bound}
        with pytest.raises(TypeError, match="objective"):
            tx.update(grads, tx.init(params), params, objective=bound, **extra)


# --- partition ------------------------------------------------------------------------------

LABELS = {"layer": "matrices", "temperature": "rest"}


def partition(inner: Any) -> Any:
    return optax.partition({"matrices": inner, "rest": optax.sgd(0.01)}, LABELS)


def test_llqr_around_a_partition() -> None:
    """The way to give groups of parameters their own optimizers."""
    tx = llqr.llqr(partition(optax.adam(0.01)), **pb.options())
    with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes dtypes
        params, grads = pb.params(), pb.gradient()
        state = tx.init(params)
        updates, state = tx.update(grads, state, params, objective=pb.bound())
        scaled, _ = KFAC.update(grads, KFAC.init(params), params, objective=pb.bound())
        adam, sgd = optax.adam(0.01), optax.sgd(0.01)
        expected = {
            "layer": adam.update(scaled["layer"], adam.init(params["layer"]))[0],
            "temperature": sgd.update(scaled["temperature"], sgd.init(params["temperature"]))[0],
        }
        pb.assert_close(updates, expected)


def test_llqr_inside_a_partition_cannot_refit() -> None:
    """optax hides the other groups' parameters, and the objective needs all of them."""
    tx, params, grads = partition(pb.optimizer("llqr(sgd)")), pb.params(), pb.gradient()
    state = tx.init(params)
    updates, state = tx.update(grads, state, params, refresh=False)  # the identity works
    pb.assert_close(updates["layer"], jax.tree.map(lambda g: -0.1 * g, grads["layer"]))
    for refit in (
        lambda: tx.update(grads, state, params, objective=pb.bound(), refresh=True),
        lambda: llqr.refresh(tx, state, params, pb.bound()),
    ):
        with pytest.raises(ValueError, match=r"masked|partition"):
            refit()


# --- JAX's transformations ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scale_by_llqr(e-kfac)", "llqr(momentum)"])
def test_state_can_be_donated(name: str) -> None:
    tx = pb.optimizer(name)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params, refresh=False)
        return optax.apply_updates(params, updates), state

    expected_params, expected = pb.params(), tx.init(pb.params())
    params, state = pb.params(), tx.init(pb.params())
    donating, keeping = jax.jit(step, donate_argnums=(0, 1)), jax.jit(step)
    for i in range(3):
        if i == 1:
            state = llqr.refresh(tx, state, params, pb.bound())
            expected = llqr.refresh(tx, expected, expected_params, pb.bound())
        params, state = donating(params, state, pb.gradient())
        expected_params, expected = keeping(expected_params, expected, pb.gradient())
    pb.assert_bitwise((params, state), (expected_params, expected))


@pytest.mark.parametrize("name", dict.fromkeys((*pb.NAMES, *pb.STRUCTURES)))
def test_state_survives_a_checkpoint(name: str) -> None:
    """Leaves to numpy and back: the same bits, and the same next step."""
    with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes dtypes
        tx, params, grads = pb.optimizer(name), pb.params(), pb.gradient()
        state = llqr.refresh(tx, tx.init(params), params, pb.bound())
        _, state = tx.update(grads, state, params, refresh=False)
        saved = [np.array(x) for x in jax.tree.leaves(state)]
        treedef = jax.tree.structure(jax.eval_shape(tx.init, params))
        restored = jax.tree.unflatten(treedef, [jnp.asarray(x) for x in saved])
        pb.assert_bitwise(restored, state)
        for due in (False, True):
            pb.assert_bitwise(
                tx.update(grads, restored, params, objective=pb.bound(), refresh=due),
                tx.update(grads, state, params, objective=pb.bound(), refresh=due),
            )


@cache
def _train(seeds: int) -> Any:
    tx = pb.optimizer("llqr(momentum)")

    def train(scale: Any) -> Any:
        params = jax.tree.map(lambda p: scale * p, pb.params())
        state = tx.init(params)
        for _ in range(2):  # refits at count 0
            grads = jax.grad(pb.OBJECTIVE)(params, pb.batch())
            updates, state = tx.update(grads, state, params, objective=pb.bound())
            params = optax.apply_updates(params, updates)
        return params, record(state)

    return jax.jit(jax.vmap(train) if seeds else train)


def test_vmap_over_seeds() -> None:
    scales = jnp.array([0.5, 1.0])
    params, info = _train(2)(scales)
    for i, scale in enumerate(scales):
        expected, expected_info = _train(0)(scale)
        pb.assert_close(jax.tree.map(lambda x, i=i: x[i], params), expected, rtol=1e-11)
        np.testing.assert_allclose(
            info.objective_after[i], expected_info.objective_after, rtol=1e-6
        )
    assert info.refits.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["llqr", "stream"])
def test_an_ensemble_refits_when_it_is_due_and_not_at_every_step(kind: str) -> None:
    """The branch of a refit stays a branch under vmap; members that are not due keep their P."""
    calls = []

    def forward(params: Any, x: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return jnp.tanh(x @ params["w"])

    bound = llqr.Objective(forward, lambda z, x: jnp.mean((z - x) ** 2)).bind(jnp.eye(3))
    refits = {
        "llqr": llqr.Refit(every=3, steps=2, learning_rate=0.1),
        "stream": llqr.Streaming(every=3, warmup=0, wide=2),
    }
    tx = llqr.llqr(optax.sgd(0.1), structure="e-kfac", metric="gaussian", refit=refits[kind])
    params = {"w": jnp.stack([jnp.ones((3, 3)), 2 * jnp.ones((3, 3))])}
    grads = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    @jax.vmap
    def step(g: Any, s: Any, p: Any) -> Any:
        return tx.update(g, s, p, objective=bound)

    state, seen = jax.vmap(tx.init)(params), []
    for _ in range(4):
        before = len(calls)
        _, state = jax.block_until_ready(step(grads, state, params))
        jax.effects_barrier()
        seen.append(len(calls) - before)
    assert seen[0] == seen[3] > 0
    assert seen[1] == seen[2] == 0
    assert record(state).refits.tolist() == [2, 2]

    one = state.preconditioner._replace(count=jnp.array([3, 4], jnp.int32))  # due, and not
    _, mixed = step(grads, state._replace(preconditioner=one), params)
    assert record(mixed).refits.tolist() == [3, 2]
    old, new = llqr.find(state).blocks, llqr.find(mixed).blocks
    for i, same in ((0, False), (1, True)):
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
        assert pb.moved(pick(old), pick(new)) != same


# --- describe -------------------------------------------------------------------------------

COMPOSED = {
    "chain": lambda: optax.chain(optax.clip(1.0), KFAC, optax.sgd(0.1)),
    "llqr": lambda: pb.optimizer("llqr(adam)"),
    "apply_if_finite": lambda: optax.apply_if_finite(pb.optimizer("llqr(sgd)"), 3),
    "inject base": lambda: llqr.llqr(
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), **pb.options()
    ),
    "inject ours": lambda: INJECTED(**pb.options()),
    "around a partition": lambda: llqr.llqr(partition(optax.sgd(0.1)), **pb.options()),
}


@pytest.mark.parametrize("kind", COMPOSED)
def test_describe_sees_through_compositions(kind: str) -> None:
    params = pb.params()
    expected = llqr.describe(KFAC, params)
    assert [row.leaf for row in expected.rows] == ["layer/bias", "layer/kernel", "temperature"]
    assert llqr.describe(COMPOSED[kind](), params) == expected
    shapes = jax.eval_shape(lambda: params)
    assert llqr.describe(COMPOSED[kind](), shapes) == expected


def test_describe_several_and_parts() -> None:
    params = pb.params()
    inside = llqr.describe(partition(pb.optimizer("llqr(sgd)")), params)
    assert [row.leaf for row in inside.rows] == ["layer/bias", "layer/kernel"]
    both = llqr.describe(optax.chain(KFAC, pb.optimizer("scale_by_llqr(diagonal)")), params)
    assert [row.structure for row in both.rows] == ["diagonal", "kfac", *["diagonal"] * 4]
    message = "there is no llqr.llqr or llqr.scale_by_llqr in this optimizer."
    with pytest.raises(ValueError, match=re.escape(message)):
        llqr.describe(optax.chain(optax.clip(1.0), optax.sgd(0.1)), params)


# --- refresh through wrappers ---------------------------------------------------------------


def dropping(inner: Any) -> Any:
    """A wrapper as one writes it for other optimizers: it knows no keywords."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return inner.update(updates, state, params, refresh=False)

    return optax.GradientTransformation(inner.init, update)


HELD_BACK = {
    "plain wrapper": dropping,
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda n: n > 5),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "one of two": lambda tx: optax.chain(tx, dropping(pb.optimizer("scale_by_llqr(diagonal)"))),
}


@pytest.mark.parametrize("kind", HELD_BACK)
def test_a_refresh_that_reaches_no_refit_raises(kind: str) -> None:
    tx, params = HELD_BACK[kind](KFAC), pb.params()
    with pytest.raises(ValueError, match=r"reached no refit.*MultiSteps"):
        llqr.refresh(tx, tx.init(params), params, pb.bound())


def test_a_refresh_that_is_dropped_raises_inside_jit_too() -> None:
    tx, params = dropping(KFAC), pb.params()
    with pytest.raises(ValueError, match="reached no refit"):
        jax.jit(lambda state: llqr.refresh(tx, state, params, pb.bound()))(tx.init(params))


@pytest.mark.usefixtures("standard_promotion")
def test_a_refresh_of_what_multisteps_accumulates_for() -> None:
    """Refit what is inside, with its own part of the state."""
    single = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    inner, params, grads = pb.optimizer("llqr(sgd)"), single(pb.params()), single(pb.gradient())
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    state = tx.init(params)
    bound = pb.bound(np.float32)
    refitted = llqr.refresh(inner, state.inner_opt_state, params, bound)
    state = state._replace(inner_opt_state=refitted)
    for i in range(2):
        updates, state = tx.update(grads, state, params, refresh=False)
        assert bool(jnp.all(updates["temperature"] == 0)) == (i == 0)
    expected, _ = inner.update(grads, refitted, params, refresh=False)
    pb.assert_close(updates, expected, rtol=1e-6)
    assert int(record(state.inner_opt_state).refits) == 1


@pytest.mark.usefixtures("standard_promotion")
def test_lookahead_around_refits_from_outside() -> None:
    """Fast steps are those of what is inside; every second one ends halfway to the slow ones."""
    inner = llqr.llqr(optax.sgd(0.1), **pb.options(refit=llqr.Refit(every=None, steps=2)))
    tx = optax.lookahead(inner, sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(pb.params())
    state, bound = tx.init(params), pb.bound()
    with pytest.raises(ValueError, match=r"the updates (have|lack)"):  # fast and slow
        llqr.refresh(tx, state, params, bound)
    refitted = llqr.refresh(inner, state.fast_state, params.fast, bound)
    state, step, fast = state._replace(fast_state=refitted), jax.jit(tx.update), pb.params()
    for _ in range(2):
        updates, state = step(jax.grad(bound)(params.fast), state, params)
        params = optax.apply_updates(params, updates)
        by_hand, _ = inner.update(jax.grad(bound)(fast), refitted, fast)
        fast = optax.apply_updates(fast, by_hand)
    halfway = jax.tree.map(lambda slow, fast: (slow + fast) / 2, pb.params(), fast)
    pb.assert_close(params.fast, halfway)
    pb.assert_close(params.slow, halfway)
    assert int(record(state.fast_state).refits) == 1


# --- loops that pass no keywords on ---------------------------------------------------------


@pytest.mark.parametrize(
    "refit", [llqr.Refit(every=None, steps=2), llqr.Streaming(every=None)], ids=["llqr", "stream"]
)
def test_refits_from_outside_only(refit: Any) -> None:
    """`update` as any loop calls it, with three arguments; the refit by `llqr.refresh`."""
    tx = llqr.llqr(optax.sgd(0.1), structure="kfac", damping=0.1, refit=refit)
    params, grads = pb.params(), pb.gradient()
    step = jax.jit(tx.update)
    _, state = step(grads, tx.init(params), params)
    refitted = llqr.refresh(tx, state, params, pb.bound())
    updates, new = step(grads, refitted, params)
    assert (int(record(state).refits), int(record(new).refits)) == (0, 1)
    expected, _ = tx.update(grads, refitted, params, refresh=False)
    pb.assert_close(updates, expected)
    assert pb.moved(updates, step(grads, state, params)[0])


def test_a_loop_that_passes_nothing_on_is_told_of_refits_from_outside() -> None:
    with pytest.raises(ValueError, match=r"TrainState.*every=None.*llqr.refresh"):
        KFAC.update(pb.gradient(), KFAC.init(pb.params()), pb.params())


def test_a_wrapper_written_by_hand_passes_everything_on() -> None:
    inner = pb.optimizer("llqr(sgd)")

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        doubled = jax.tree.map(lambda g: 2 * g, updates)
        return inner.update(doubled, state, params, **extra)

    tx, params = optax.GradientTransformationExtraArgs(inner.init, update), pb.params()
    state = llqr.refresh(tx, tx.init(params), params, pb.bound())
    pb.assert_bitwise(state, llqr.refresh(inner, inner.init(params), params, pb.bound()))


@pytest.mark.parametrize("refit", [llqr.Streaming(), llqr.Streaming(probe="gradient")])
def test_numbers_of_streaming_are_data_under_inject_hyperparams(refit: Any) -> None:
    """Rate, weight decay and damping change between steps, and nothing compiles again."""
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    objective = llqr.Objective(lambda p, x: x @ p["w"] + p["b"], lambda z, x: jnp.mean(z**2))
    x = jnp.cos(jnp.arange(12.0).reshape(4, 3))
    make = optax.inject_hyperparams(llqr.streaming, static_args=("max_dim", "block_size"))
    options = {"metric": "gaussian", "refit": refit}
    tx = make(learning_rate=0.1, weight_decay=0.0, damping=1e-3, **options)
    traced = []

    @jax.jit
    def step(state: Any, params: Any) -> Any:
        traced.append(None)
        return tx.update(jax.grad(objective)(params, x), state, params, objective=objective.bind(x))

    state = jax.jit(tx.init)(params)
    for rate, decay, damping in ((0.1, 0.0, 1e-3), (0.2, 0.5, 1e-3), (0.1, 0.0, 1e-1)):
        state.hyperparams.update(
            learning_rate=jnp.asarray(rate), weight_decay=jnp.asarray(decay),
            damping=jnp.asarray(damping),
        )  # fmt: skip
        plain = llqr.streaming(rate, weight_decay=decay, damping=damping, **options)
        bare = plain.init(params)
        # A chain without a decay has one link less.
        inner = state.inner_state if decay else state.inner_state._replace(base=bare.base)
        expected, _ = plain.update(
            jax.grad(objective)(params, x), inner, params, objective=objective.bind(x)
        )
        updates, state = step(state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
    assert len(traced) == 1
