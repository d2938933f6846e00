"""Negative curvature along the step: newton, and gauss_newton of a loss that is not convex."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr.refit import solvers
from tests.unit.test_refit_options import Quadratic


def data(seed: int, scale: float) -> tuple[Any, Any]:
    """Parameters, and pairs that belong together."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(12, 5))
    batch = {"x": x, "y": x + 0.1 * rng.normal(size=(12, 5))}
    params = {"a": scale * rng.normal(size=(5, 8)), "b": rng.normal(size=(8, 4)), "c": np.zeros(4)}
    return jax.tree.map(jnp.asarray, (params, batch))


SEARCHES = ["cg_zoom_hz", "cg_back_pr+"]


def embed(p: Any, b: Any) -> Any:
    return tuple(jnp.tanh(b[k] @ p["a"]) @ p["b"] + p["c"] for k in "xy")


def contrastive(z: Any, b: Any) -> Any:
    """Which x belongs to which y: bilinear in the outputs, so that it is not convex in them."""
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(z[0] @ z[1].T)))


def refitted(
    metric: str, drawn: tuple[int, float], damping: float, **options: Any
) -> tuple[Any, ...]:
    """The optimizer, its state after one refit, and the quadratic model it was made on."""
    params, batch = data(*drawn)
    bound = llqr.Objective(embed, contrastive).bind(batch)
    tx = llqr.scale_by_llqr(
        structure="diagonal", metric=metric, damping=damping, refit=llqr.Refit(**options)
    )
    state = llqr.refresh(tx, tx.init(params), params, bound)
    return tx, state, llqr.linearize(bound, params, metric, damping=damping)


@pytest.mark.parametrize("damping", [0.0, 10.0])
@pytest.mark.parametrize("metric", ["newton", "gauss_newton"])
def test_the_status_says_that_phi_curves_down(metric: str, damping: float) -> None:
    """With enough damping it does not, whatever the metric."""
    options = {"solver": "sgd", "steps": 2, "learning_rate": 1e-6}
    tx, state, model = refitted(metric, (11, 0.5), damping, **options)
    u = llqr.precondition(tx, state, model.gradient)
    curved = float(model.bilinear(u, u))
    info = llqr.find(state).refit
    assert set(info.words) == ({"updated"} if damping else {"indefinite"})
    assert (curved < 0) == (damping == 0)
    assert int(info.guarded) == 0
    np.testing.assert_allclose(
        info.objective_after, 0.5 * curved - optax.tree.vdot(model.gradient, u), rtol=1e-5
    )


def test_it_says_so_inside_jit() -> None:
    tx = llqr.llqr(
        optax.sgd(0.0), structure="diagonal", metric="gauss_newton",
        refit=llqr.Refit(every=2, steps=10, solver="cg_zoom_hz"),
    )  # fmt: skip

    params, batch = data(0, 1.0)
    bound = llqr.Objective(embed, contrastive).bind(batch)

    @jax.jit
    def step(state: Any) -> Any:
        return tx.update(jax.grad(bound)(params), state, params, objective=bound)[1]

    state = step(step(tx.init(params)))
    assert int(llqr.find(state).refit.count("indefinite")) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("metric", ["ngd", "gauss_newton"])
def test_a_convex_loss_raises_no_false_alarm(metric: str, dtype: Any) -> None:
    """Nor do saturated classes, whose curvature is rounding."""
    params, batch = jax.tree.map(lambda x: x.astype(dtype), data(0, 1.0))
    params = jax.tree.map(lambda x: 30 * x, params)

    def sure(z: Any, b: Any) -> Any:
        labels = jax.lax.stop_gradient(jnp.argmax(z[0], -1))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z[0], labels))

    for loss in (sure, lambda z, b: jnp.mean((z[0] - b["y"][:, :4]) ** 2)):
        bound = llqr.Objective(embed, loss).bind(batch)
        tx = llqr.scale_by_llqr(metric=metric, refit=llqr.Refit(steps=3, solver="cg_zoom_hz"))
        state = llqr.refresh(tx, tx.init(params), params, bound)
        assert int(llqr.find(state).refit.count("indefinite")) == 0


@pytest.mark.parametrize("solver", SEARCHES)
def test_a_bounded_step_that_lowers_phi_is_installed(solver: str) -> None:
    """Phi has no lower bound, and free arrays would end where a positive P is no copy of them.

    Clamped at the end only, this refit goes from 66 up to 1.7e3 and more, and is lost.
    """
    _, state, _ = refitted("gauss_newton", (1, 2.0), 0.0, solver=solver, steps=10)
    state = llqr.find(state)
    assert int(state.refit.guarded) == 0
    assert float(state.refit.objective_after) < float(state.refit.objective_before)
    assert min(float(x.min()) for x in jax.tree.leaves(state.blocks)) >= 1e-8


@pytest.mark.parametrize("solver", SEARCHES)
def test_a_searched_step_is_clamped_and_halved_until_phi_falls(solver: str) -> None:
    """On 1/2 x.A x - b.x over x >= 1e-8: every step falls, and is the first of its halvings to."""

    def stepper(clamp: Any) -> Any:
        made = solvers.make(solver, (), momentum=0.9, clip_norm=None, clip_value=None, clamp=clamp)
        return made.init, jax.jit(lambda a, b, x, s: made.step(Quadratic(a, b), x, s, 1.0))

    (_, free), (init, step) = stepper(None), stepper(lambda x: jnp.maximum(x, 1e-8))
    rng, halved = np.random.default_rng(0), 0
    for _ in range(20):
        a = rng.normal(size=(6, 6))
        a, b = a @ a.T - np.eye(6), 3 * rng.normal(size=6)
        phi = lambda y, a=a, b=b: 0.5 * y @ a @ y - b @ y  # noqa: E731
        x = jnp.asarray(rng.uniform(0.1, 1.0, size=6))
        state = init(x, None)
        for _ in range(4):
            line = np.asarray(free(a, b, x, state)[0] - x)
            moved, state, _ = step(a, b, x, state)
            x = np.asarray(x)
            path = [np.maximum(x + line / 2**k, 1e-8) for k in range(solvers.HALVINGS + 1)]
            lower = [y for y in path if phi(y) < phi(x)]
            np.testing.assert_allclose(moved, lower[0] if lower else x, rtol=1e-9, atol=1e-12)
            halved += bool(lower) and phi(path[0]) >= phi(x)
            x = moved
    assert halved > 4, "there is nothing to see otherwise"
