"""Exact steps in a trust region: roots, factorisations, the geodesic term, the whole path."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from llqr import residuals

ROWS = 7


def params() -> Any:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a": jax.random.normal(keys[0], (3, 5)), "b": jnp.zeros(5),
        "c": jax.random.normal(keys[1], (5, 3)) / 2,
    }  # fmt: skip


def batch() -> Any:
    x = jax.random.normal(jax.random.key(1), (ROWS, 3))
    return {
        "x": x,
        "y": jnp.sin(2 * x),
        "label": jnp.arange(ROWS) % 3,
        "w": 1.0 + jnp.arange(ROWS, dtype=float),
    }


def forward(p: Any, b: Any) -> Any:
    return jnp.tanh(b["x"] @ p["a"] + p["b"]) @ p["c"]


def coupled(p: Any, b: Any) -> Any:
    z = forward(p, b)
    return z - 0.1 * z.mean(0)


def two_outputs(p: Any, b: Any) -> Any:
    return {"one": forward(p, b)[:, 0], "more": (b["x"] @ p["a"])[:, None, :2]}


LOSSES = {
    "squares": lambda z, b: jnp.mean((z - b["y"]) ** 2),
    "weighted squares": lambda z, b: jnp.sum(b["w"][:, None] * (z - b["y"]) ** 2),
    "cross-entropy": lambda z, b: jnp.mean(
        -jnp.take_along_axis(jax.nn.log_softmax(z), b["label"][:, None], 1)
    ),
    "bernoulli": lambda z, b: jnp.mean(jnp.logaddexp(0.0, z) - z * (b["y"] > 0).astype(float)),
    "poisson": lambda z, b: jnp.mean(jnp.exp(z) - z * b["label"][:, None].astype(float)),
    "log cosh": lambda z, b: jnp.mean(jnp.log(jnp.cosh(z - b["y"]))),
}
MODELS = {"apart": forward, "coupled": coupled}


def matrix_of(bound: Any, quadratic: Any, found: Any) -> Any:
    whole = residuals.as_map(quadratic.jacobian, quadratic.outputs, params(), found)
    return residuals.rows(bound, params(), whole, found).matrix()


def parts(model: Any, loss: Any, metric: str = "gauss_newton") -> Any:
    bound = llqr.Objective(model, loss).bind(batch())
    quadratic = llqr.linearize(bound, params(), metric)
    curvature: Any = quadratic.curvature
    found = residuals.residuals(
        quadratic.outputs, quadratic.cotangent, curvature.output_hessian, jnp.float64
    )
    return bound, quadratic, found, matrix_of(bound, quadratic, found)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_residuals_are_a_root_of_the_model(loss: str, model: str) -> None:
    """R^T R is the curvature and R^T r the gradient, by rows of their own or not."""
    _, quadratic, found, matrix = parts(MODELS[model], LOSSES[loss])
    assert found.convex
    assert found.separable
    assert not found.rest
    np.testing.assert_allclose(matrix.T @ matrix, quadratic.as_matrix(), atol=1e-11)
    gradient = ravel_pytree(quadratic.gradient)[0]
    np.testing.assert_allclose(matrix.T @ found.r, gradient, atol=1e-11)


@pytest.mark.parametrize("metric", ["ngd", "gaussian", "bernoulli", "renyi"])
def test_other_metrics_have_roots_too(metric: str) -> None:
    _, quadratic, _, matrix = parts(forward, LOSSES["cross-entropy"], metric)
    np.testing.assert_allclose(matrix.T @ matrix, quadratic.as_matrix(), atol=1e-11)


def test_outputs_of_several_shapes() -> None:
    def loss(z: Any, b: Any) -> Any:
        return jnp.mean((z["one"] - b["w"]) ** 2) + jnp.sum(z["more"] ** 2)

    _, quadratic, found, matrix = parts(two_outputs, loss)
    np.testing.assert_allclose(matrix.T @ matrix, quadratic.as_matrix(), atol=1e-10)
    np.testing.assert_allclose(matrix.T @ found.r, ravel_pytree(quadratic.gradient)[0], atol=1e-10)


def step_of(tx: Any, state: Any, p: Any, bound: Any) -> tuple[Any, Any]:
    updates, state = tx.update(p, state, p, objective=bound)
    return ravel_pytree(updates)[0], state


def numpy_path(steps: int, options: llqr.Trust) -> Any:
    """The method for squares, written out: J by differences of nothing, a by differences of r."""
    flat, unravel = ravel_pytree(params())
    data = batch()

    def residual(theta: Any) -> Any:
        z = forward(unravel(jnp.asarray(theta)), data)
        return np.asarray((z - data["y"]).ravel() * np.sqrt(2 / z.size))

    slope = jax.jacobian(
        lambda t: (forward(unravel(t), data) - data["y"]).ravel() * np.sqrt(2 / (3 * ROWS))
    )
    theta, lam, growth, path = np.asarray(flat), 0.0, 2.0, []
    for _ in range(steps):
        r, jac = residual(theta), np.asarray(slope(jnp.asarray(theta)))
        w, u = np.linalg.eigh(jac @ jac.T)
        w = np.maximum(w, 0)
        floor = 50 * np.finfo(float).eps * w[-1]
        lam = lam if lam > 0 else options.start * w[-1]
        for _ in range(options.tries):
            lam = max(lam, floor)
            solve = lambda v, lam=lam, u=u, w=w, jac=jac: jac.T @ (u @ (u.T @ v / (w + lam)))  # noqa: E731
            d = -solve(r)
            predicted = 0.5 * (r @ r - (r + jac @ d) @ (r + jac @ d))
            step = d
            if options.geodesic:
                h = 1e-3
                a = (residual(theta + h * d) - 2 * r + residual(theta - h * d)) / h**2
                b = -0.5 * solve(a)
                step = d + b if np.linalg.norm(b) < 0.75 * np.linalg.norm(d) else d
            after = residual(theta + step)
            rho = 0.5 * (r @ r - after @ after) / predicted
            if rho > 1e-4:
                theta, growth = theta + step, 2.0
                lam *= max(0.2, 1 - (2 * rho - 1) ** 3)
                break
            lam, growth = lam * growth, 2 * growth
        path.append((theta, max(lam, floor)))
    return path


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (llqr.Trust(geodesic=False), 1e-9),
        (llqr.Trust(geodesic=False, start=1e-9, tries=20), 1e-7),  # steps are refused at first
        (llqr.Trust(), 1e-4),  # a is taken by differences
    ],
)
def test_the_whole_path_is_the_numpy_loop(options: llqr.Trust, tolerance: float) -> None:
    tx, p = llqr.exact(damping=options), params()
    bound = llqr.Objective(forward, LOSSES["squares"]).bind(batch())
    state, traced = tx.init(p), []

    @jax.jit
    def step(p: Any, state: Any) -> Any:
        traced.append(None)
        updates, state = tx.update(p, state, p, objective=bound)
        return optax.apply_updates(p, updates), state

    losses = [float(bound(p))]
    for theta, lam in numpy_path(6, options):
        p, state = step(p, state)
        np.testing.assert_allclose(ravel_pytree(p)[0], theta, atol=tolerance)
        np.testing.assert_allclose(state.trust.damping, lam, rtol=1e3 * tolerance)
        losses.append(float(bound(p)))
    assert len(traced) == 1
    assert losses == sorted(losses, reverse=True), "a step that raises the loss is never taken"
    assert losses[-1] < 0.05 * losses[0]


def test_a_scan_of_steps_is_as_many_calls() -> None:
    tx, p = llqr.exact(damping=llqr.Trust()), params()
    bound = llqr.Objective(forward, LOSSES["squares"]).bind(batch())

    def step(carry: Any, _: Any) -> Any:
        p, state = carry
        updates, state = tx.update(p, state, p, objective=bound)
        return (optax.apply_updates(p, updates), state), None

    carry = (p, tx.init(p))
    (scanned, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 20))(carry)
    once = jax.jit(step)
    for _ in range(20):
        carry, _ = once(carry, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), scanned, carry[0])


def drawn(seed: int) -> Any:
    """Another batch of the same problem."""
    x = jax.random.normal(jax.random.key(seed), (ROWS, 3))
    return batch() | {"x": x, "y": jnp.sin(2 * x)}


def numpy_momentum(seeds: list[int], mu: float, radius: float) -> Any:
    """SPRING for squares, each step on other points, its length in the metric bounded."""
    flat, unravel = ravel_pytree(params())
    theta, last, lam, growth = np.asarray(flat), np.zeros(flat.size), 0.0, 2.0
    for seed in seeds:
        data = drawn(seed)

        def residual(t: Any, data: Any = data) -> Any:
            z = forward(unravel(jnp.asarray(t)), data)
            return (z - data["y"]).ravel() * np.sqrt(2 / z.size)

        r, jac = np.asarray(residual(theta)), np.asarray(jax.jacobian(residual)(theta))
        gram = jac @ jac.T
        top = np.linalg.eigvalsh(gram)[-1]
        lam = lam if lam > 0 else 1e-2 * top
        for attempt in range(8):
            matrix, kept = gram + lam * np.eye(len(gram)), mu * last * (attempt == 0)
            d = kept - jac.T @ np.linalg.solve(matrix, r + jac @ kept)
            rd = jac @ d
            share = min(1.0, radius / np.linalg.norm(rd))
            predicted = 0.5 * (r @ r - np.sum((r + share * rd) ** 2))
            after = np.asarray(residual(theta + share * d))
            rho = 0.5 * (r @ r - after @ after) / predicted
            if rho > 1e-4:
                last, growth = share * d, 2.0
                theta = theta + last
                lam *= max(0.2, 1 - (2 * rho - 1) ** 3)
                break
            lam, growth = lam * growth, 2 * growth
        yield theta, lam, np.linalg.norm(share * rd)


def test_momentum_and_radius_are_the_numpy_loop() -> None:
    seeds = list(range(10, 16))
    tx = llqr.exact(damping=llqr.Trust(start=1e-2, geodesic=False, momentum=0.8, radius=0.3))
    objective, p = llqr.Objective(forward, LOSSES["squares"]), params()
    state, lengths = tx.init(p), []
    update = jax.jit(lambda s, p, b: tx.update(p, s, p, objective=objective.bind(b)))
    for seed, (theta, lam, length) in zip(seeds, numpy_momentum(seeds, 0.8, 0.3), strict=True):
        updates, state = update(state, p, drawn(seed))
        p = optax.apply_updates(p, updates)
        np.testing.assert_allclose(ravel_pytree(p)[0], theta, atol=1e-10)
        np.testing.assert_allclose(state.trust.damping, lam, rtol=1e-8)
        last = ravel_pytree(state.trust.last)[0]
        np.testing.assert_array_equal(last, ravel_pytree(updates)[0])
        lengths.append(length)
    assert max(lengths) == pytest.approx(0.3), "the bound held a step back"


def test_noise_raises_the_damping() -> None:
    """Where the loss of other examples rises at the end of steps; by the rule, number by number."""
    tx = llqr.exact(damping=llqr.Trust(noisy=True))
    objective, p = llqr.Objective(forward, LOSSES["squares"]), params()
    state: Any = tx.init(p)
    slope: Any = None
    last: Any = None
    update = jax.jit(lambda s, p, b: tx.update(p, s, p, objective=objective.bind(b)))
    rooms = []
    for seed in range(30):
        noise = jax.random.normal(jax.random.key(100 + seed), (ROWS, 3))
        data = drawn(seed) | {"y": 3 * noise}
        gradient = ravel_pytree(jax.grad(objective)(p, data))[0]
        damping = float(state.trust.damping)
        updates, state = update(state, p, data)
        now = state.trust
        if slope is not None and slope > 0:
            room = -float(gradient @ last) / slope
            assert float(now.room) == pytest.approx(room, rel=1e-9)
            rooms.append(room)
            if int(now.tries) == 1:
                own = max(0.2, 1 - (2 * float(now.ratio) - 1) ** 3) ** np.clip(4 * room, 0, 1)
                expected = damping * 2 ** np.clip(-4 * room, 0, 1) * own
                assert float(now.damping) == pytest.approx(expected, rel=1e-6)
        slope, last = float(now.slope), ravel_pytree(updates)[0]
        p = optax.apply_updates(p, updates)
    assert min(rooms) < 0 < max(rooms)
    first = float(llqr.exact(damping=llqr.Trust()).init(p).trust.damping)
    assert float(state.trust.damping) > 0.1 * float(state.trust.top) > first
    plain = llqr.exact(damping=llqr.Trust())
    q, state = params(), plain.init(params())
    update = jax.jit(lambda s, p, b: plain.update(p, s, p, objective=objective.bind(b)))
    for seed in range(30):
        noise = jax.random.normal(jax.random.key(100 + seed), (ROWS, 3))
        updates, state = update(state, q, drawn(seed) | {"y": 3 * noise})
        q = optax.apply_updates(q, updates)
    size = lambda t: np.linalg.norm(ravel_pytree(t)[0])  # noqa: E731
    assert size(p) < size(q), "without it, parameters follow each batch"


def test_the_geodesic_term_is_the_second_difference() -> None:
    bound, quadratic, found, _ = parts(forward, LOSSES["cross-entropy"])
    del quadratic
    flat, unravel = ravel_pytree(params())
    d = np.random.default_rng(0).normal(size=flat.size)
    exact = residuals.acceleration(bound, params(), unravel(jnp.asarray(d)), found)
    h = 1e-4
    z = [found.whitened(bound.outputs(unravel(flat + s * h * d))) for s in (1, 0, -1)]
    np.testing.assert_allclose(exact, (z[0] - 2 * z[1] + z[2]) / h**2, rtol=1e-5, atol=1e-6)


def test_saturated_rows_keep_their_gradient() -> None:
    """A softmax that is sure of the wrong class: its curvature is lost in rounding."""

    def sure(p: Any, b: Any) -> Any:
        return 60 * forward(p, b)

    bound, quadratic, found, matrix = parts(sure, LOSSES["cross-entropy"])
    gradient = ravel_pytree(quadratic.gradient)[0]
    assert found.convex & ~found.rest
    np.testing.assert_allclose(matrix.T @ found.r, gradient, atol=1e-9 * np.abs(gradient).max())
    tx, p = llqr.exact(damping=llqr.Trust(tries=30)), params()
    updates, state = tx.update(p, tx.init(p), p, objective=bound)
    assert int(state.trust.outcome) == 1
    assert float(bound(optax.apply_updates(p, updates))) < float(bound(p))


def test_resumed_to_the_same_bits() -> None:
    """A state is arrays alone: through numpy and back, steps are the same."""
    tx, p = llqr.exact(damping=llqr.Trust(momentum=0.5, noisy=True)), params()
    objective = llqr.Objective(forward, LOSSES["squares"])
    update = jax.jit(lambda s, p, b: tx.update(p, s, p, objective=objective.bind(b)))

    def run(carry: Any, seeds: range) -> Any:
        for seed in seeds:
            updates, state = update(carry[1], carry[0], drawn(seed))
            carry = optax.apply_updates(carry[0], updates), state
        return carry

    whole = run((p, tx.init(p)), range(6))
    saved = jax.tree.map(np.asarray, run((p, tx.init(p)), range(3)))
    resumed = run(jax.tree.map(jnp.asarray, saved), range(3, 6))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.parametrize("parameters", ["float64", "float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("data", ["float64", "float32"])
@pytest.mark.parametrize("labels", ["float64", "float32"])
def test_dtypes(parameters: str, data: str, labels: str) -> None:
    """Two steps in a scan: what is carried keeps its types, and the loss falls."""
    kinds = {"a": "float32", "b": "float64", "c": "float32"}
    p = {
        name: x.astype(kinds[name] if parameters == "mixed" else parameters)
        for name, x in params().items()
    }
    given = {"x": batch()["x"].astype(data), "y": batch()["y"].astype(labels)}
    with jax.numpy_dtype_promotion("standard"):
        bound = llqr.Objective(forward, lambda z, b: jnp.mean((z - b["y"]) ** 2)).bind(given)
        for solver in ("dual", "cg"):
            tx: Any = llqr.exact(damping=llqr.Trust(momentum=0.5, noisy=True), solver=solver)  # type: ignore

            def step(carry: Any, _: Any, tx: Any = tx) -> Any:
                p, state = carry
                updates, state = tx.update(p, state, p, objective=bound)
                return (optax.apply_updates(p, updates), state), None

            (after, state), _ = jax.lax.scan(step, (p, tx.init(p)), None, 2)
            assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in p.values()]
            assert int(state.trust.refused) == 0
            assert float(bound(after)) < 0.9 * float(bound(p))


@pytest.mark.parametrize("loss", ["cross-entropy", "bernoulli", "poisson", "weighted squares"])
def test_a_row_of_nan_is_told_as_that(loss: str) -> None:
    tx, p = llqr.exact(damping=llqr.Trust()), params()
    bound = llqr.Objective(forward, LOSSES[loss]).bind(
        batch() | {"x": batch()["x"].at[2].set(jnp.nan)}
    )
    with pytest.raises(ValueError, match=r"not finite.*NaN in the batch"):
        tx.update(p, tx.init(p), p, objective=bound)
    updates, state = jax.jit(lambda s: tx.update(p, s, p, objective=bound))(tx.init(p))
    assert not np.any(ravel_pytree(updates)[0])
    assert int(state.trust.outcome) == 6


def test_metrics_of_the_scale_of_the_loss_predict_it() -> None:
    """The ratio comes to 1; where the scale is another, inspect says so."""
    cases = {
        "ngd": ("cross-entropy", 1.0), "gauss_newton": ("cross-entropy", 1.0),
        "gaussian": ("half the squares", 1.0),
    }  # fmt: skip
    halves = lambda z, b: jnp.mean(jnp.sum((z - b["y"]) ** 2, -1)) / 2  # noqa: E731
    for metric, (loss, scale) in cases.items():
        function = halves if loss == "half the squares" else LOSSES[loss]
        bound, p = llqr.Objective(forward, function).bind(batch()), params()
        tx = llqr.exact(metric=metric, damping=llqr.Trust(start=10.0))
        _, state = tx.update(p, tx.init(p), p, objective=bound)
        assert float(state.trust.ratio) == pytest.approx(scale, abs=0.2), metric
    tx = llqr.exact(metric="ngd", damping=llqr.Trust(), divergence_reduction="sum")
    bound, p = llqr.Objective(forward, LOSSES["cross-entropy"]).bind(batch()), params()
    update, state = jax.jit(lambda s, p: tx.update(p, s, p, objective=bound)), tx.init(p)
    for _ in range(8):
        updates, state = update(state, p)
        p = optax.apply_updates(p, updates)
    assert "divergence_reduction='mean'" in " ".join(llqr.inspect(tx, state, params()).advice)


@jax.custom_vjp
def _twisted(x: Any) -> Any:
    return jnp.sin(x)


_twisted.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def test_a_model_without_second_derivatives_goes_without_the_geodesic_term() -> None:
    def model(p: Any, b: Any) -> Any:
        return _twisted(forward(p, b))

    p, bound = params(), llqr.Objective(model, LOSSES["squares"]).bind(batch())
    with pytest.warns(UserWarning, match="go without their geodesic term"):
        found, _ = step_of(tx := llqr.exact(damping=llqr.Trust()), tx.init(p), p, bound)
    tx = llqr.exact(damping=llqr.Trust(geodesic=False))
    plain, _ = step_of(tx, tx.init(p), p, bound)
    np.testing.assert_allclose(found, plain, rtol=1e-12)


def test_a_momentum_that_leads_astray_is_dropped() -> None:
    """However large the damping, it would stay: so it is tried once."""
    tx, p = llqr.exact(damping=llqr.Trust(momentum=0.9, tries=3)), params()
    bound = llqr.Objective(forward, LOSSES["squares"]).bind(batch())
    state = tx.init(p)
    far = jax.tree.map(lambda x: jnp.full_like(x, 50.0), p)
    state = state._replace(trust=state.trust._replace(last=far))
    updates, state = tx.update(p, state, p, objective=bound)
    assert int(state.trust.tries) == 2
    assert int(state.trust.outcome) == 1
    assert float(bound(optax.apply_updates(p, updates))) < float(bound(p))


def test_many_refused_steps_stay_finite() -> None:
    """At a minimum in float32: damping and its growth have bounds, and a new batch goes on."""
    p = jax.tree.map(lambda x: x.astype(jnp.float32), params())
    data = {"x": batch()["x"].astype(jnp.float32)}
    data["y"] = forward(p, data)
    objective = llqr.Objective(forward, lambda z, b: jnp.mean((z - b["y"]) ** 2))
    tx = llqr.exact(damping=llqr.Trust())
    update = jax.jit(lambda s, p, b: tx.update(p, s, p, objective=objective.bind(b)))
    state, near = tx.init(p), data | {"y": data["y"] * (1 + 1e-7)}
    for _ in range(60):
        updates, state = update(state, p, near)
        p = optax.apply_updates(p, updates)
    assert int(state.trust.refused) > 30
    assert np.isfinite(float(state.trust.damping))
    assert float(state.trust.growth) <= 2.0**10
    other = data | {"y": data["y"] + 1}
    for _ in range(8):
        updates, state = update(state, p, other)
        p = optax.apply_updates(p, updates)
    assert float(objective(p, other)) < 0.5


def test_compositions() -> None:
    """A rate behind it, a chain, wrappers of optax; a fixed damping on a schedule."""
    p, bound = params(), llqr.Objective(forward, LOSSES["squares"]).bind(batch())

    def first(tx: Any) -> Any:
        tx = optax.with_extra_args_support(tx)
        return ravel_pytree(tx.update(p, tx.init(p), p, objective=bound)[0])[0]

    trust = llqr.Trust()
    whole = first(llqr.exact(damping=trust))
    half = first(llqr.exact(optax.sgd(0.5), damping=trust))
    np.testing.assert_allclose(half, whole / 2, rtol=1e-12)
    chained = first(optax.chain(llqr.exact(damping=trust), optax.scale(0.5)))
    np.testing.assert_allclose(chained, half, rtol=1e-12)
    wrapped = first(optax.apply_if_finite(llqr.exact(damping=trust), 3))
    np.testing.assert_allclose(wrapped, whole, rtol=1e-12)
    falling: Any = optax.inject_hyperparams(llqr.exact)(
        damping=optax.exponential_decay(2.0, 1, 0.5)
    )
    state, grads = falling.init(p), jax.grad(bound)(p)
    for damping in (2.0, 1.0, 0.5):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = falling.update(grads, state, p, objective=bound)
        fixed = llqr.exact(damping=damping)
        expected = fixed.update(grads, fixed.init(p), p, objective=bound)[0]
        np.testing.assert_allclose(
            ravel_pytree(updates)[0], ravel_pytree(expected)[0], rtol=1e-6, atol=1e-9
        )


def test_half_precision_parameters() -> None:
    """Solved for in float32; what is returned is in the parameters' dtype."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    data = {name: jnp.asarray(batch()[name], jnp.bfloat16) for name in ("x", "y")}
    bound = llqr.Objective(forward, lambda z, b: jnp.mean((z - b["y"]) ** 2)).bind(data)
    tx = llqr.exact(damping=llqr.Trust(momentum=0.5))
    updates, state = tx.update(half, tx.init(half), half, objective=bound)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((updates, state.trust.last)))
    assert state.trust.damping.dtype == jnp.float32
    assert np.any(np.asarray(ravel_pytree(updates)[0], np.float32))


def test_inspect_speaks() -> None:
    tx, p = llqr.exact(damping=llqr.Trust()), params()
    bound = llqr.Objective(forward, LOSSES["squares"]).bind(batch())
    assert "no step was made yet" in llqr.inspect(tx, tx.init(p), p).advice[0]
    update = jax.jit(lambda s, p: tx.update(p, s, p, objective=bound))
    updates, state = update(tx.init(p), p)
    report = llqr.inspect(tx, state, p)
    assert isinstance(report, llqr.TrustReport)
    assert (report.solver, report.residuals, report.parameters) == ("dual", 21, 35)
    assert report.outcome == "taken"
    assert report.advice == ()
    assert "21 residuals in 35 parameters, which can meet all of them" in str(report)
    for _ in range(60):
        p = optax.apply_updates(p, updates)
        updates, state = update(state, p)
    assert float(bound(p)) < 1e-20
    words = " ".join(llqr.inspect(tx, state, p).advice)
    assert "no step lowers the loss, however short: the loss is at a minimum" in words
    chained = optax.chain(optax.clip(1.0), tx)
    assert isinstance(llqr.inspect(chained, chained.init(p), p), llqr.TrustReport)


def test_float32_is_told_where_it_stops() -> None:
    single = lambda t: jax.tree.map(lambda x: x.astype(jnp.float32), t)  # noqa: E731
    data = {name: jnp.asarray(batch()[name], jnp.float32) for name in ("x", "y")}
    tx, p = llqr.exact(damping=llqr.Trust()), single(params())
    bound = llqr.Objective(forward, lambda z, b: jnp.mean((z - b["y"]) ** 2)).bind(data)
    state = tx.init(p)
    update = jax.jit(lambda s, p: tx.update(p, s, p, objective=bound))
    for _ in range(40):
        updates, state = update(state, p)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))
        p = optax.apply_updates(p, updates)
    assert float(bound(p)) < 1e-6
    assert "float32 has no more digits" in " ".join(llqr.inspect(tx, state, p).advice)


def test_an_empty_batch_and_a_model_without_parameters_in_it() -> None:
    tx, p = llqr.exact(damping=llqr.Trust()), params()
    none = {name: x[:0] for name, x in batch().items()}
    with pytest.raises(ValueError, match="the outputs have no rows"):
        tx.update(p, tx.init(p), p, objective=llqr.Objective(forward, LOSSES["squares"]).bind(none))
    still = llqr.Objective(lambda p, b: b["y"] + 0 * p["b"][0], LOSSES["weighted squares"])
    updates, state = tx.update(
        p, tx.init(p), p, objective=still.bind(batch() | {"y": batch()["x"]})
    )
    assert not np.any(ravel_pytree(updates)[0])
    assert "no row depends on the parameters" in llqr.inspect(tx, state, p).advice[0]


def test_a_derivative_that_is_not_finite_moves_nothing() -> None:
    """A root at 0: the loss is finite, its derivative is not."""

    def root(p: Any, b: Any) -> Any:
        return forward(p, b) + jnp.sqrt(p["b"][:3])

    bound, p = llqr.Objective(root, LOSSES["squares"]).bind(batch()), params()
    for solver in ("dual", "primal", "cg"):
        tx = llqr.exact(damping=llqr.Trust(), solver=solver)
        updates, state = jax.jit(lambda s, tx=tx: tx.update(p, s, p, objective=bound))(tx.init(p))
        assert not np.any(ravel_pytree(updates)[0])
        assert int(state.trust.outcome) == 6
        assert "derivatives that are infinite" in llqr.inspect(tx, state, p).advice[0]


REFUSED = {
    "not convex in the outputs": lambda z, b: jnp.mean(jnp.cos(z)),
    "couples rows": lambda z, b: jnp.sum(jnp.mean(z, 0) ** 2),
    "is linear along": lambda z, b: jnp.mean(z),
    "not finite": lambda z, b: jnp.mean((z - jnp.nan) ** 2),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_residuals_is_refused_in_words_and_counted_in_jit(why: str) -> None:
    tx, p = llqr.exact(damping=llqr.Trust()), params()
    bound = llqr.Objective(forward, REFUSED[why]).bind(batch())
    state = tx.init(p)
    with pytest.raises(ValueError, match=why):
        tx.update(p, state, p, objective=bound)
    updates, state = jax.jit(lambda s: tx.update(p, s, p, objective=bound))(state)
    assert not np.any(ravel_pytree(updates)[0])
    assert int(state.trust.refused) == 1


def test_options_that_do_not_go_together() -> None:
    trust = llqr.Trust()
    for options, why in (
        ({"solver": "dual", "damping": 0.1}, r"goes with damping=llqr\.Trust"),
        ({"metric": "newton", "damping": trust}, "positive metric"),
        ({"axis_name": "d", "damping": trust}, "the whole batch"),
    ):
        with pytest.raises(ValueError, match=why):
            llqr.exact(**options)
    with pytest.raises(ValueError, match="tries must be >= 1"):
        llqr.Trust(tries=0)
    with pytest.raises(ValueError, match="momentum must lie in"):
        llqr.Trust(momentum=1.0)
    with pytest.raises(ValueError, match="radius must lie in"):
        llqr.Trust(radius=0.0)
    with pytest.raises(ValueError, match="start must lie in"):
        llqr.Trust(start=0.0)
