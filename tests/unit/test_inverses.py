"""The damped inverse of an exact step: four solvers, chunks, rows of many kinds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from llqr import _linalg, inverses, residuals

ROWS = 7
STAGED = llqr.lqr.stages_from_functions(
    [
        ("hidden", lambda p, x: jnp.tanh(x @ p["w"] + p["b"])),
        ("double", lambda _, x: 2.0 * x),
        ("last", lambda p, x: x @ p["w"]),
    ]
)


def params() -> Any:
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = {"w": jax.random.normal(keys[0], (3, 5)), "b": jnp.zeros(5)}
    return {"hidden": hidden, "last": {"w": jax.random.normal(keys[1], (5, 3)) / 2}}


def batch() -> Any:
    x = jax.random.normal(jax.random.key(1), (ROWS, 3))
    return {
        "x": x, "y": jnp.sin(2 * x), "label": jnp.arange(ROWS) % 3,
        "w": 1.0 + jnp.arange(ROWS, dtype=float), "kept": jnp.arange(ROWS) % 3 > 0,
    }  # fmt: skip


def plain(p: Any, b: Any) -> Any:
    return STAGED(p, b["x"])


def coupled(p: Any, b: Any) -> Any:
    z = plain(p, b)
    return z - 0.1 * z.mean(0)


def tied(p: Any, b: Any) -> Any:
    """The same matrix twice."""
    return jnp.tanh(plain(p, b) @ p["hidden"]["w"]) @ p["last"]["w"]


def stacked(p: Any, b: Any) -> Any:
    """Layers in a scan over the rows of one leaf."""
    layers = jnp.stack([p["hidden"]["w"][:, :3], p["hidden"]["w"][:, 2:]])
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), b["x"], layers)[0]


def several(p: Any, b: Any) -> Any:
    return {"one": plain(p, b)[:, 0], "more": (b["x"] @ p["hidden"]["w"])[:, None, :2]}


def squares(z: Any, b: Any) -> Any:
    return jnp.sum(b["w"][:, None] * (z - b["y"]) ** 2) / 2


def entropy(z: Any, b: Any) -> Any:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, b["label"]))


def masked(z: Any, b: Any) -> Any:
    return jnp.sum((z - b["y"]) ** 2, where=b["kept"][:, None]) / jnp.sum(b["kept"], dtype=float)


def of_two(z: Any, b: Any) -> Any:
    return jnp.mean((z["one"] - b["w"]) ** 2) + jnp.sum(z["more"] ** 2)


OBJECTIVES = {
    "squares": llqr.Objective(STAGED.as_forward(inputs=lambda b: b["x"]), squares),
    "cross-entropy": llqr.Objective(STAGED.as_forward(inputs=lambda b: b["x"]), entropy),
    "coupled": llqr.Objective(coupled, squares),
    "tied": llqr.Objective(tied, squares),
    "stacked": llqr.Objective(stacked, squares),
    "masked": llqr.Objective(plain, masked, mask=lambda b: b["kept"]),
    "several outputs": llqr.Objective(several, of_two),
}
SOLVERS = [("dual", None), ("dual", 2), ("primal", None), ("primal", 3), ("cg", None)]


def step(tx: Any, bound: Any, *, jitted: bool = True) -> tuple[Any, Any]:
    p = params()
    update = lambda s: tx.update(p, s, p, objective=bound)  # noqa: E731
    updates, state = (jax.jit(update) if jitted else update)(tx.init(p))
    return ravel_pytree(updates)[0], state


def dense(bound: Any, metric: str = "gauss_newton") -> tuple[Any, float]:
    """-(C + lambda I)^-1 g at lambda = the largest eigenvalue of C."""
    quadratic = llqr.linearize(bound, params(), metric)
    c, g = quadratic.as_matrix(), ravel_pytree(quadratic.gradient)[0]
    top = np.linalg.eigvalsh(c)[-1]
    return -np.linalg.solve(c + top * np.eye(len(c)), g), top


def inverse(bound: Any, solver: str, metric: Any = "gauss_newton", **ways: Any) -> Any:
    """Residuals, and the inverse by a solver."""
    quadratic = llqr.linearize(bound, params(), metric)
    curvature: Any = quadratic.curvature
    found = residuals.residuals(
        quadratic.outputs, quadratic.cotangent, curvature.output_hessian, jnp.float64
    )

    def regulator() -> Any:
        return llqr.lqr.linearize(
            STAGED, params(), batch()["x"], loss=bound.loss, metric=metric, mask=bound.mask()
        )

    how = inverses.Ways(solver, tolerance=1e-14, **ways)
    name, made = inverses.damped(how, found, quadratic, bound, params(), regulator, jnp.zeros(()))
    assert name == solver
    return found, made


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_solvers_give_the_dense_step(name: str) -> None:
    bound = OBJECTIVES[name].bind(batch())
    expected, top = dense(bound)
    staged = name in ("squares", "cross-entropy")
    for solver, chunk in [*SOLVERS, ("riccati", None)][: None if staged else -1]:
        found, made = inverse(bound, solver, chunk=chunk)
        step, _ = made.at(jnp.asarray(top))(found.r)
        np.testing.assert_allclose(-step, expected, atol=1e-9, err_msg=f"{solver} {chunk}")
        assert made.finite & made.agrees
        estimated = solver == "riccati"
        assert float(made.top) == pytest.approx(top, rel=0.5 if estimated else 1e-6)
        assert float(made.top) <= top * (1 + 1e-6)


@pytest.mark.parametrize("solver", ["dual", "primal", "cg", "riccati"])
def test_steps_by_all_solvers(solver: Any) -> None:
    """The whole transformation, compiled."""
    bound = OBJECTIVES["squares"].bind(batch())
    trust = llqr.Trust(start=1.0, geodesic=False)
    found, state = step(llqr.exact(damping=trust, solver=solver, tolerance=1e-14), bound)
    assert int(state.trust.tries) == 1
    assert inverses.SOLVERS[int(state.trust.solver)] == solver
    quadratic = llqr.linearize(bound, params(), "gauss_newton", damping=float(state.trust.top))
    gradient = ravel_pytree(quadratic.gradient)[0]
    expected = -np.linalg.solve(quadratic.as_matrix(), gradient)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("metric", ["ngd", "gaussian", "renyi"])
def test_metrics_of_their_own(metric: Any) -> None:
    bound = OBJECTIVES["cross-entropy"].bind(batch())
    expected, top = dense(bound, metric)
    for solver in ("dual", "primal", "cg", "riccati"):
        found, made = inverse(bound, solver, metric)
        step, _ = made.at(jnp.asarray(top))(found.r)
        np.testing.assert_allclose(-step, expected, atol=1e-9)


def test_complex_outputs_as_pairs_of_reals() -> None:
    """|z - y|^2 of complex numbers is the sum of two squares: [..., 2] in place of [...]."""

    def pairs(p: Any, b: Any) -> Any:
        z = plain(p, b)
        z = jax.lax.complex(z[:, 0], z[:, 1]) * jnp.exp(jax.lax.complex(0 * z[:, 2], z[:, 2]))
        return jnp.stack([z.real, z.imag], -1)

    def loss(z: Any, b: Any) -> Any:
        return jnp.sum((z - b["y"][:, :2]) ** 2) / 2

    bound = llqr.Objective(pairs, loss).bind(batch())
    expected, top = dense(bound)
    found, made = inverse(bound, "dual")
    d, _ = made.at(jnp.asarray(top))(found.r)
    np.testing.assert_allclose(-d, expected, atol=1e-9)
    split = llqr.Objective(
        lambda p, b: jax.lax.complex(plain(p, b), plain(p, b)),
        lambda z, b: jnp.sum(jnp.abs(z) ** 2),
    )
    with pytest.raises(TypeError, match="real and floating-point"):
        step(llqr.exact(damping=llqr.Trust()), split.bind(batch()))


@pytest.mark.parametrize("name", ["squares", "several outputs", "coupled"])
def test_chunks_are_the_whole(name: str) -> None:
    """Any number of blocks at once, also one that does not divide them."""
    bound = OBJECTIVES[name].bind(batch())
    quadratic = llqr.linearize(bound, params(), "gauss_newton")
    curvature: Any = quadratic.curvature
    found = residuals.residuals(
        quadratic.outputs, quadratic.cotangent, curvature.output_hessian, jnp.float64
    )
    whole = residuals.as_map(quadratic.jacobian, quadratic.outputs, params(), found)
    blocks = residuals.rows(bound, params(), whole, found)
    matrix, flat = blocks.matrix(), ravel_pytree(params())[0]
    np.testing.assert_allclose(matrix.T @ matrix, quadratic.as_matrix(), atol=1e-11)
    v = np.random.default_rng(0).normal(size=matrix.shape[0])
    np.testing.assert_allclose(whole.back(jnp.asarray(v)), matrix.T @ v, atol=1e-12)
    np.testing.assert_allclose(whole.along(flat), matrix @ flat, atol=1e-12)
    for size in (1, 2, 5, blocks.count):
        chunks = blocks.chunks(size)
        assert chunks.size <= size
        np.testing.assert_allclose(chunks.inner(flat), matrix.T @ matrix, atol=1e-11)
        np.testing.assert_allclose(chunks.outer(flat), matrix @ matrix.T, atol=1e-11)


def test_memory_of_chunks() -> None:
    """R of 2,000 rows in 1,700 parameters is never there as a whole."""
    x = jnp.linspace(-1, 1, 2000)[:, None]
    p = {"a": jnp.ones((1, 40)), "c": jnp.ones((40, 40)), "d": jnp.ones((40, 1))}
    bound = llqr.Objective(
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["c"]) @ p["d"],
        lambda z, x: jnp.mean((z - x**2) ** 2),
    ).bind(x)
    sizes = {}
    for chunk in (None, 50):
        tx = llqr.exact(damping=llqr.Trust(chunk=chunk), solver="primal")
        compiled = jax.jit(lambda s, tx=tx: tx.update(p, s, p, objective=bound)).lower(tx.init(p))
        sizes[chunk] = compiled.compile().memory_analysis().temp_size_in_bytes
    held = 2000 * 1680 * 8
    assert sizes[None] > held
    assert sizes[50] < sizes[None] - 0.8 * held


@pytest.mark.parametrize("rank", [3, 10, 30])
def test_the_sketch_preconditions(rank: int) -> None:
    """Of a matrix of rank 10, ten columns are enough for one step."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(30, 10)) * np.logspace(0, -3, 10)
    matrix, damping = jnp.asarray(half @ half.T), jnp.asarray(1e-8)
    found = _linalg.nystroem(lambda v: matrix @ v, 30, rank, matrix.dtype)
    assert found.w.shape == (min(rank, 30),)
    assert (np.diff(found.w) <= 1e-12).all()
    assert float(found.w[0]) <= np.linalg.eigvalsh(matrix)[-1] * (1 + 1e-9)
    b = jnp.asarray(rng.normal(size=30))
    product = lambda v: matrix @ v + damping * v  # noqa: E731
    plain = _linalg.conjugate_gradients(product, b, tolerance=1e-9)[1]
    x, info = _linalg.conjugate_gradients(
        product, b, tolerance=1e-9, precondition=lambda r: found.precondition(damping, r)
    )
    if rank >= 10:
        np.testing.assert_allclose(product(x), b, atol=1e-6)
        assert int(info.steps) <= 5
    else:
        assert int(info.steps) <= int(plain.steps)
    dense = np.linalg.inv(matrix + damping * np.eye(30)) * (found.w[-1] + damping)
    if rank == 30:
        np.testing.assert_allclose(found.precondition(damping, b), dense @ b, rtol=1e-4, atol=1e-6)


def test_auto_takes_the_smaller_matrix_or_none() -> None:
    sizes = inverses.Sizes
    assert inverses.choose("auto", sizes(10, 20)) == "dual"
    assert inverses.choose("auto", sizes(20, 10)) == "primal"
    assert inverses.choose("auto", sizes(10**5, 10**6)) == "cg"
    assert inverses.choose("riccati", sizes(1, 1)) == "riccati"
    _, state = step(llqr.exact(damping=llqr.Trust()), OBJECTIVES["squares"].bind(batch()))
    assert inverses.SOLVERS[int(state.trust.solver)] == "dual"  # 21 residuals, 35 parameters


def test_riccati_needs_stages() -> None:
    tx = llqr.exact(damping=llqr.Trust(), solver="riccati")
    with pytest.raises(ValueError, match="needs the stages of the model"):
        step(tx, OBJECTIVES["coupled"].bind(batch()))


def test_diagonal_curvature_of_wide_rows_needs_no_factorisation() -> None:
    rng = np.random.default_rng(0)
    full = jnp.asarray(rng.normal(size=(4, 6, 6)))
    full = full + jnp.swapaxes(full, 1, 2)
    diagonal = full * jnp.eye(6)
    for x in (full, diagonal):
        q, v = jax.jit(_linalg.eigh_of_each)(x)
        np.testing.assert_allclose(jnp.einsum("rij,rj,rkj->rik", v, q, v), x, atol=1e-12)
    np.testing.assert_array_equal(v, jnp.broadcast_to(jnp.eye(6), v.shape))


def test_said_axes_that_are_wrong_are_found_out() -> None:
    """batch_axes says that examples are apart, and the model mixes them."""
    told = llqr.Objective(coupled, squares, batch_axes=lambda b: jax.tree.map(lambda _: 0, b))
    bound, tx = told.bind(batch()), llqr.exact(damping=llqr.Trust())
    with pytest.raises(ValueError, match="examples are not apart"):
        step(tx, bound, jitted=False)
    updates, state = step(tx, bound)
    assert not updates.any()
    assert int(state.trust.outcome) == 8
    p = params()
    assert "takes the rows from the whole" in llqr.inspect(tx, state, p).advice[0]
    honest = llqr.Objective(plain, squares, batch_axes=lambda b: jax.tree.map(lambda _: 0, b))
    _, state = step(tx, honest.bind(batch()))
    assert int(state.trust.outcome) == 1


def by_count(p: Any, b: Any) -> Any:
    """Asks how many examples there are."""
    return plain(p, b) / len(b["x"]) ** 0.5


def by_place(p: Any, b: Any) -> Any:
    """Asks which of them an example is."""
    places = jnp.arange(len(b["x"]), dtype=float) / len(b["x"])
    return plain(p, b) + places[:, None] * p["hidden"]["b"][:3]


def time_major(p: Any, b: Any) -> Any:
    """Rows of an example are not one after the other."""
    x = jnp.stack([b["x"], jnp.cos(b["x"])], 1)
    return (x.transpose(1, 0, 2) @ p["hidden"]["w"]).reshape(2 * len(b["x"]), -1)


def dropped(p: Any, b: Any) -> Any:
    """One example by itself would draw other numbers."""
    kept = jax.random.bernoulli(b["key"], 0.5, b["x"].shape)
    return plain(p, {"x": jnp.where(kept, b["x"], 0.0)})


def seeded(p: Any, b: Any) -> Any:
    """The same, from a number."""
    return dropped(p, b | {"key": jax.random.key(b["seed"])})


@pytest.mark.parametrize("model", [by_count, by_place, time_major, dropped, seeded])
def test_rows_that_are_not_those_of_the_whole_are_found_out(model: Any) -> None:
    """And taken from the whole where it is said that there are no examples."""
    data = batch() | {"key": jax.random.key(0), "seed": jnp.array(1)}
    loss = lambda z, b: jnp.sum(z**2) / 2  # noqa: E731
    tx = llqr.exact(damping=llqr.Trust(start=1.0, geodesic=False))
    with pytest.raises(ValueError, match=r"not apart.*batch_axes=lambda batch: None"):
        step(tx, llqr.Objective(model, loss).bind(data), jitted=False)
    told = llqr.Objective(model, loss, batch_axes=lambda batch: None).bind(data)
    found, made = inverse(told, "dual")
    expected, top = dense(told)
    np.testing.assert_allclose(-made.at(jnp.asarray(top))(found.r)[0], expected, atol=1e-9)


def test_a_model_that_names_the_size_of_its_batch() -> None:
    def sized(p: Any, b: Any) -> Any:
        return plain(p, b).reshape(ROWS, 3)

    bound = llqr.Objective(sized, squares).bind(batch())
    found, made = inverse(bound, "dual")
    expected, top = dense(bound)
    np.testing.assert_allclose(-made.at(jnp.asarray(top))(found.r)[0], expected, atol=1e-9)


def test_cg_beyond_its_sketch() -> None:
    """700 parameters, a sketch of 20: to 1e-9 of the dense step, or as far as it is let."""
    keys = jax.random.split(jax.random.key(0), 3)
    p = {"a": jax.random.normal(keys[0], (3, 25)), "c": jax.random.normal(keys[1], (25, 25)) / 5}
    x = jax.random.normal(keys[2], (40, 3))
    bound = llqr.Objective(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"], lambda z, x: jnp.mean((z - 1) ** 2)
    ).bind(x)
    quadratic = llqr.linearize(bound, p, "gauss_newton")
    curvature: Any = quadratic.curvature
    roots = residuals.residuals(
        quadratic.outputs, quadratic.cotangent, curvature.output_hessian, jnp.float64
    )
    dual = inverses.damped(
        inverses.Ways("dual"), roots, quadratic, bound, p, lambda: None, jnp.zeros(())
    )[1]
    lam = 1e-2 * dual.top
    expected, _ = dual.at(lam)(roots.r)
    steps = []
    for sketch in (5, 400):
        ways = inverses.Ways("cg", sketch=sketch, tolerance=1e-12, max_steps=2000)
        _, made = inverses.damped(ways, roots, quadratic, bound, p, lambda: None, jnp.zeros(()))
        found, effort = jax.jit(lambda lam, r, made=made: made.at(lam)(r))(lam, roots.r)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        steps.append(int(effort.steps))
    assert steps[1] < 0.8 * steps[0]
    few = inverses.Ways("cg", sketch=5, tolerance=1e-12, max_steps=3)
    _, made = inverses.damped(few, roots, quadratic, bound, p, lambda: None, jnp.zeros(()))
    _, effort = made.at(lam)(roots.r)
    assert int(effort.steps) == 3
    assert float(effort.residual) > 1e-6
