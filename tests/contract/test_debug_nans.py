"""jax_debug_nans, which users switch on when training diverges: no NaN is made on the way."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import llqr
from tests.contract import problem as pb


@pytest.fixture(autouse=True)
def _debug_nans() -> Iterator[None]:
    with jax.debug_nans(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    "name", ["scale_by_llqr(kfac)", "scale_by_llqr(probe)", "scale_by_llqr(streaming)",
             "scale_by_llqr(streaming-sides)", "llqr(adam)", "llqr(update)"],
)  # fmt: skip
def test_a_run_makes_no_nan(name: str) -> None:
    """From init over refits, also with a gradient of zero."""
    tx, params, grads = pb.optimizer(name), pb.params(), pb.gradient()
    step = jax.jit(lambda g, s, p, b, due: tx.update(g, s, p, objective=b, refresh=due))
    state = tx.init(params)
    for due, g in ((False, grads), (True, grads), (True, jax.tree.map(jnp.zeros_like, grads))):
        updates, state = step(g, state, params, pb.bound(), jnp.array(due))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))
    llqr.refresh(tx, state, params, pb.bound())


@pytest.mark.parametrize("solver", ["cg", "cg_zoom_hz", "cg_back_pr+"])
def test_solvers_make_no_nan(solver: str) -> None:
    refit = llqr.Refit(steps=2, solver=solver)
    tx, params = llqr.llqr(optax.sgd(0.1), refit=refit, damping=0.1), pb.params()
    llqr.refresh(tx, tx.init(params), params, pb.bound())


@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_exact_steps_make_no_nan(solver: Any) -> None:
    """Also where the loss is at its least, and where no row depends on the parameters."""
    tx, params = llqr.exact(damping=llqr.Trust(), solver=solver), pb.params()
    for scale in (1.0, 0.0):
        at = jax.tree.map(lambda x, scale=scale: scale * x, params)
        updates, _ = jax.jit(lambda s, p: tx.update(p, s, p, objective=pb.bound()))(tx.init(at), at)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("kind", ["sam", "past_friendly_sam"])
def test_sam_makes_no_nan(kind: str) -> None:
    method: Any = getattr(llqr, kind)(0.1, start=1)
    oracle = method(pb.OBJECTIVE)
    params, state = pb.params(), oracle.init(pb.params())
    for active in (False, True):
        _, _, state = oracle.step(params, state, pb.batch(), active=active)
    assert not any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(state))
