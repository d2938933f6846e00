"""The SAM family against numpy, closed forms, optax and hand-made passes."""

import itertools
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import llqr
from tests.oracle import flat

RHO, BETA, E, RATE = 0.3, 0.7, 1e-12, 0.1
DIRECTIONS = ("ema_grad", "ema_precond_grad", "ema_direction")
NORMS = ("euclidean", "matrix_norm", "layer_euclidean", "layer_matrix_norm")
LEAVES = (("first", "bias"), ("first", "kernel"), ("second", "kernel"))  # flattening order
LAYERS = ((0, 1), (2,))


def data(examples: int = 8) -> tuple[dict[str, Any], dict[str, Any]]:
    r = np.random.default_rng(0)
    params = {
        "first": {"kernel": r.normal(size=(3, 4)), "bias": r.normal(size=4)},
        "second": {"kernel": r.normal(size=(4, 2))},
    }
    batch = {"x": r.normal(size=(examples, 3)), "y": r.normal(size=(examples, 2))}
    return jax.tree.map(jnp.asarray, (params, batch))


def forward(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["second"]["kernel"]


def squares(outputs, batch):
    return jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, -1)) / 2


OBJECTIVE = llqr.Objective(forward, squares)


@cache
def learned(structure: str) -> tuple[Any, Any]:
    params, batch = data()
    tx = optimizer(structure)
    return llqr.refresh(tx, tx.init(params), params, OBJECTIVE.bind(batch))


@cache
def optimizer(structure: str) -> optax.GradientTransformationExtraArgs:
    refit = llqr.Refit(steps=20, learning_rate=0.005, clip_norm=None)
    return llqr.llqr(
        optax.sgd(RATE),
        structure=structure,
        metric="gauss_newton",
        identity_scaling=2.0,
        damping=0.1,
        refit=refit,
    )


# --- numpy: spec 5.2, written out -------------------------------------------------------------


def numpy_gradient(theta: list[np.ndarray], batch: Any) -> tuple[float, list[np.ndarray]]:
    """Loss and gradient of the two-layer net by hand."""
    bias, first, second = theta
    x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
    h = np.tanh(x @ first + bias)
    r = h @ second - y
    d = (r @ second.T) * (1 - h * h) / len(x)
    return float(np.mean(np.sum(r * r, -1)) / 2), [d.sum(0), x.T @ d, h.T @ r / len(x)]


def inner(a, b) -> float:
    return sum(float(np.sum(x * y)) for x, y in zip(a, b, strict=True))


def numpy_perturbation(kind, direction, norm, theta, w, multiply) -> list[np.ndarray]:
    if kind == "asam":
        t = [np.ones_like(theta[0]), *(np.abs(x) + 0.01 for x in theta[1:])]
        length = np.sqrt(sum(float(np.sum((a * g) ** 2)) for a, g in zip(t, w, strict=True)) + E)
        return [RHO * a * a * g / length for a, g in zip(t, w, strict=True)]
    if kind == "fisher_sam":
        f = [g / (g * g + 0.1) for g in w]
        return [RHO * x / np.sqrt(inner(w, f) + E) for x in f]
    z = w if direction == "ema_grad" else multiply(w)
    if direction == "ema_direction":
        z = [x / np.sqrt(inner(z, z) + E) for x in z]
    out = list(z)
    for layer in [range(3)] if not norm.startswith("layer") else LAYERS:
        zs, ws = [z[i] for i in layer], [w[i] for i in layer]
        length = np.sqrt(inner(zs if norm.endswith("euclidean") else ws, zs) + E)
        if norm.startswith("layer"):
            length *= np.sqrt(2)
        for i in layer:
            out[i] = RHO * z[i] / length
    return out


def numpy_run(kind, direction, norm, theta, batch, multiply, steps=3):
    """Train: yields (theta, gbar, g_last, loss, |eps|) after every step."""
    gbar = [np.zeros_like(x) for x in theta]
    last = [np.zeros_like(x) for x in theta]
    for _ in range(steps):
        _, g = numpy_gradient(theta, batch)
        source = last if kind == "past_friendly_sam" else g
        w = source
        if "friendly" in kind:
            w = [a - b for a, b in zip(source, gbar, strict=True)]
        eps = numpy_perturbation(kind, direction, norm, theta, w, multiply)
        there = [a + b for a, b in zip(theta, eps, strict=True)]
        loss, grads = numpy_gradient(there, batch)
        if "friendly" in kind:
            gbar = [BETA * a + (1 - BETA) * b for a, b in zip(gbar, source, strict=True)]
            if direction == "ema_direction" and inner(gbar, gbar) > 0:
                gbar = [x / np.sqrt(inner(gbar, gbar)) for x in gbar]
        last = grads
        step = multiply(grads) if multiply else grads
        theta = [a - RATE * b for a, b in zip(theta, step, strict=True)]
        yield theta, gbar, last, loss, np.sqrt(inner(eps, eps))


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(tree[a][b]) for a, b in LEAVES]


@cache
def dense_product(structure: str):
    """P as one matrix, column by column."""
    params, _ = data()
    tx, state = optimizer(structure), learned(structure)
    size = sum(x.size for x in leaves(params))
    _, unravel = jax.flatten_util.ravel_pytree(params)
    columns = jax.vmap(lambda v: flat_tree(llqr.precondition(tx, state, unravel(v))))
    matrix = np.asarray(columns(jnp.eye(size))).T
    assert np.abs(matrix - np.eye(size)).max() > 0.05, "a refit moved P"

    def multiply(w: list[np.ndarray]) -> list[np.ndarray]:
        product = matrix @ np.concatenate([x.ravel() for x in w])
        parts = np.split(product, np.cumsum([x.size for x in w])[:-1])
        return [p.reshape(x.shape) for p, x in zip(parts, w, strict=True)]

    return multiply


def flat_tree(tree: Any):
    return jax.flatten_util.ravel_pytree(tree)[0]


METHODS = {
    "sam": llqr.sam,
    "friendly_sam": partial(llqr.friendly_sam, beta=BETA),
    "past_friendly_sam": partial(llqr.past_friendly_sam, beta=BETA),
}
CASES = [
    *itertools.product(METHODS, DIRECTIONS, NORMS, ("diagonal", "e-kfac")),
    ("asam", "ema_grad", "euclidean", "e-kfac"),
    ("fisher_sam", "ema_grad", "euclidean", "diagonal"),
]  # fmt: skip


def method(kind: str, direction: str, norm: str) -> llqr.Sharpness:
    if kind in METHODS:
        return METHODS[kind](RHO, direction=direction, norm=norm)
    return {"asam": llqr.asam, "fisher_sam": llqr.fisher_sam}[kind](RHO)


@pytest.mark.parametrize(("kind", "direction", "norm", "structure"), CASES)
def test_three_steps_equal_numpy(kind, direction, norm, structure) -> None:
    """Perturbation, buffers, value and parameters: every mode x direction x norm x P."""
    params, batch = data()
    tx, multiply = optimizer(structure), dense_product(structure)
    oracle = method(kind, direction, norm)(OBJECTIVE)
    opt_state, state = learned(structure), oracle.init(params)
    product = None if direction == "ema_grad" else partial(llqr.precondition, tx, opt_state)
    wanted = numpy_run(kind, direction, norm, leaves(params), batch, multiply)
    close = partial(np.testing.assert_allclose, rtol=1e-14, atol=2e-14)
    for i, (theta, gbar, last, loss, length) in enumerate(wanted):
        value, grads, state = oracle.step(params, state, batch, precondition=product)
        updates, opt_state = tx.update(grads, opt_state, params, refresh=False)
        params = optax.apply_updates(params, updates)
        close(value, loss)
        for ours, theirs in zip(leaves(params), theta, strict=True):
            close(ours, theirs)
        if state.average is not None:
            for ours, theirs in zip(leaves(state.average), gbar, strict=True):
                close(ours, theirs)
        if state.last is not None:
            for ours, theirs in zip(leaves(state.last), last, strict=True):
                close(ours, theirs)
        np.testing.assert_allclose(state.info.perturbation_norm, length, rtol=1e-6)
        assert int(state.info.active) == i + 1
        passes = 1 if kind == "past_friendly_sam" else 2
        assert int(state.info.evaluations) == passes * (i + 1)


@pytest.mark.parametrize(("kind", "direction", "norm", "structure"), CASES)
def test_one_perturbation_equals_its_formula(kind, direction, norm, structure) -> None:
    params, _ = data()
    tx, multiply = optimizer(structure), dense_product(structure)
    w = jax.tree.map(lambda x: jnp.cos(3 * x), params)
    product = partial(llqr.precondition, tx, learned(structure))
    eps, guarded = method(kind, direction, norm).perturbation(
        params, w, RHO, None if direction == "ema_grad" else product
    )
    wanted = numpy_perturbation(kind, direction, norm, leaves(params), leaves(w), multiply)
    for ours, theirs in zip(leaves(eps), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-14, atol=1e-14)
    assert int(guarded) == 0


# --- what it must equal ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llqr.sam, llqr.asam, llqr.fisher_sam])
def test_without_radius_it_is_value_and_grad(make) -> None:
    params, batch = data()
    value, grads = make(0.0)(OBJECTIVE)(params, batch)
    plain, gradient = jax.value_and_grad(OBJECTIVE)(params, batch)
    assert float(value) == float(plain)
    np.testing.assert_array_equal(flat_tree(grads), flat_tree(gradient))


@pytest.mark.parametrize("structure", [None, "kfac"])
def test_on_a_quadratic_it_is_the_closed_form(structure) -> None:
    """f = w.A w / 2: the gradient at w + eps is A w + rho A P A w / |P A w|."""
    r = np.random.default_rng(1)
    root = r.normal(size=(6, 6))
    a, w = root @ root.T, r.normal(size=6)
    p = np.diag(r.uniform(0.5, 2, 6)) if structure else np.eye(6)
    oracle = llqr.sam(RHO, direction="ema_precond_grad")(lambda w: 0.5 * w @ jnp.asarray(a) @ w)
    _, grad = oracle(jnp.asarray(w), precondition=lambda v: jnp.asarray(p) @ v)
    z = p @ a @ w
    np.testing.assert_allclose(grad, a @ w + RHO * a @ z / np.linalg.norm(z), rtol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_identity_makes_it_sam(norm) -> None:
    params, batch = data()
    tx = optimizer("e-kfac")
    product = partial(llqr.precondition, tx, tx.init(params))
    ours = llqr.sam(RHO, direction="ema_precond_grad", norm=norm)(OBJECTIVE)
    plain = llqr.sam(RHO, norm=norm)(OBJECTIVE)
    a, b = ours(params, batch, precondition=product), plain(params, batch)
    np.testing.assert_allclose(flat_tree(a), flat_tree(b), rtol=1e-14)


def test_optax_sam_takes_the_same_steps() -> None:
    params, batch = data()
    base = optax.sgd(RATE, momentum=0.9)
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    theirs = optax.contrib.sam(base, ascent, sync_period=2, opaque_mode=True)
    oracle = llqr.sam(RHO, epsilon=1e-30)(OBJECTIVE)
    a, b = params, params
    state, opt_state = theirs.init(a), base.init(b)
    gradient = jax.grad(OBJECTIVE)
    for _ in range(5):
        updates, state = theirs.update(
            gradient(a, batch), state, a, grad_fn=lambda p, _: gradient(p, batch)
        )
        a = optax.apply_updates(a, updates)
        _, grads = oracle(b, batch)
        updates, opt_state = base.update(grads, opt_state, b)
        b = optax.apply_updates(b, updates)
        np.testing.assert_allclose(flat_tree(a), flat_tree(b), rtol=1e-13)


def test_shared_weights_are_one_parameter() -> None:
    """w used twice: the perturbation is that of f(w) = loss(w, w), and the copies agree."""
    w = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)))
    x = jnp.ones(3)
    tied = lambda w: jnp.sum((w.T @ jnp.tanh(w @ x)) ** 2)  # noqa: E731
    both = lambda u, v: jnp.sum((v.T @ jnp.tanh(u @ x)) ** 2)  # noqa: E731
    g = sum(jax.grad(both, (0, 1))(w, w))
    there = w + RHO * g / jnp.linalg.norm(g)
    wanted = sum(jax.grad(both, (0, 1))(there, there))
    np.testing.assert_allclose(llqr.sam(RHO)(tied)(w)[1], wanted, rtol=1e-12)


@pytest.mark.parametrize("sign", ["ascent", "descent"])
def test_research_switches(sign) -> None:
    """Another base vector, gbar still subtracted from it, and the sign of eps."""
    params, batch = data()
    oracle = llqr.friendly_sam(RHO, beta=BETA, sign=sign)(OBJECTIVE)
    state = oracle.init(params)
    gbar = jax.tree.map(jnp.sin, params)
    vector = jax.tree.map(jnp.cos, params)
    _, grads, new = oracle.step(params, state._replace(average=gbar), batch, base=vector)
    w = jax.tree.map(jnp.subtract, vector, gbar)
    turn = 1 if sign == "ascent" else -1
    scale = turn * RHO / jnp.linalg.norm(flat_tree(w))
    there = jax.tree.map(lambda p, v: p + scale * v, params, w)
    clean = jax.grad(OBJECTIVE)(params, batch)
    np.testing.assert_allclose(
        flat_tree(grads), flat_tree(jax.grad(OBJECTIVE)(there, batch)), rtol=1e-10
    )
    wanted = BETA * flat_tree(gbar) + (1 - BETA) * flat_tree(clean)
    np.testing.assert_allclose(flat_tree(new.average), wanted, rtol=1e-14)


# --- safe --------------------------------------------------------------------------------------


def test_asam_takes_a_bias_by_the_name_of_the_leaf_alone() -> None:
    kernel = {"kernel": jnp.array([0.1, 2.0])}
    there, other = (
        llqr.asam(RHO).perturbation({name: kernel}, {name: kernel}, RHO)[0][name]["kernel"]
        for name in ("bias_net", "net")
    )
    np.testing.assert_array_equal(there, other)


def test_zero_gradient_has_no_perturbation() -> None:
    for make in (llqr.sam, llqr.friendly_sam, llqr.asam, llqr.fisher_sam, llqr.past_friendly_sam):
        for options in ({}, {"norm": "layer_matrix_norm"}):
            if options and make in (llqr.asam, llqr.fisher_sam):
                continue
            oracle = make(RHO, **options)(lambda p: jnp.sum(p["w"] ** 2))
            params = {"w": jnp.zeros(3)}
            _, grads, state = oracle.step(params, oracle.init(params))
            assert not np.any(grads["w"]), make
            assert float(state.info.perturbation_norm) == 0.0
    eps, _ = llqr.fisher_sam(RHO, eta=0.0).perturbation(params, params, RHO)
    assert not np.any(eps["w"])


def test_an_indefinite_preconditioner_is_guarded_and_counted() -> None:
    params, batch = data()
    w = jax.grad(OBJECTIVE)(params, batch)
    turned = lambda v: {"first": v["first"], "second": jax.tree.map(jnp.negative, v["second"])}  # noqa: E731
    opposite = lambda v: jax.tree.map(jnp.negative, v)  # noqa: E731
    whole = llqr.sam(RHO, direction="ema_precond_grad", norm="matrix_norm")
    eps, guarded = whole.perturbation(params, w, RHO, opposite)
    euclidean, _ = llqr.sam(RHO).perturbation(params, w, RHO)
    np.testing.assert_allclose(flat_tree(eps), flat_tree(euclidean), rtol=1e-14)
    assert int(guarded) == 1
    layered = llqr.sam(RHO, direction="ema_precond_grad", norm="layer_matrix_norm")
    eps, guarded = layered.perturbation(params, w, RHO, turned)
    wanted, _ = llqr.sam(RHO, norm="layer_euclidean").perturbation(params, w, RHO)
    np.testing.assert_allclose(flat_tree(eps), flat_tree(wanted), rtol=1e-14)
    assert int(guarded) == 1
    oracle = whole(OBJECTIVE)
    _, grads, state = oracle.step(params, oracle.init(params), batch, precondition=opposite)
    assert int(state.info.guarded) == 1
    assert np.all(np.isfinite(flat_tree(grads)))


@pytest.mark.parametrize("corner", [1.0, 1.0000001])
def test_a_right_angle_is_no_length(corner) -> None:
    p = jnp.diag(jnp.array([corner, -1.0]))
    method = llqr.sam(RHO, direction="ema_precond_grad", norm="matrix_norm")
    eps, guarded = method.perturbation(jnp.ones(2), jnp.ones(2), RHO, lambda v: p @ v)
    np.testing.assert_allclose(eps, RHO * np.ones(2) / np.sqrt(2), rtol=1e-12)
    assert int(guarded) == 1


def test_a_layer_without_gradient_is_not_perturbed_by_its_neighbour() -> None:
    """P couples two layers; in the second w = 0 and w.Pw = 0, but P w is not."""
    coupled = lambda v: {"a": 2 * v["a"] + v["b"], "b": v["a"] + 2 * v["b"]}  # noqa: E731
    w = {"a": jnp.ones(1), "b": jnp.zeros(1)}
    method = llqr.sam(RHO, direction="ema_precond_grad", norm="layer_matrix_norm")
    eps, guarded = method.perturbation(w, w, RHO, coupled)
    np.testing.assert_allclose(eps["a"], RHO * 2 / np.sqrt(2 * 2), rtol=1e-12)
    assert float(eps["b"][0]) == 0.0
    assert int(guarded) == 1
    _, guarded = method.perturbation(w, w, RHO, lambda v: v)
    assert int(guarded) == 0, "where P w is zero too, nothing gives way"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", [*METHODS, "asam", "fisher_sam"])
def test_half_precision_steps(kind, dtype) -> None:
    """Under strict promotion, with a late start in one compiled step; gbar is float32."""
    params = {"w": jnp.ones(4, dtype), "bias": jnp.ones(2, dtype)}
    loss = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["bias"] ** 2)  # noqa: E731
    options = {"direction": "ema_direction"} if kind in METHODS else {}
    make = {**METHODS, "asam": llqr.asam, "fisher_sam": llqr.fisher_sam}[kind]
    oracle = make(RHO, start=1, **options)(loss)
    same = (lambda v: v) if options else None
    step = jax.jit(lambda p, s: oracle.step(p, s, precondition=same))
    state = oracle.init(params)
    for _ in range(3):
        _, grads, state = step(params, state)
        assert all(g.dtype == dtype for g in jax.tree.leaves(grads))
    assert int(state.info.active) == 2
    if state.average is not None:
        assert state.average["w"].dtype == jnp.float32


def test_a_slow_average_moves_in_half_precision() -> None:
    oracle = llqr.friendly_sam(0.0, beta=0.999)(lambda w: jnp.sum(w))
    w = jnp.ones(2, jnp.bfloat16)
    state = oracle.init(w)
    for _ in range(200):
        state = state._replace(average=oracle._averaged(state.average, jnp.ones_like(w)))
    np.testing.assert_allclose(state.average, 1 - 0.999**200, rtol=1e-4)


def test_half_precision_parameters_are_measured_in_float32() -> None:
    w = {"w": jnp.full(70_000, 1e-3, jnp.bfloat16)}
    eps, _ = llqr.sam(1.0).perturbation(w, w, 1.0)
    assert eps["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(eps["w"], float), 1 / np.sqrt(70_000), rtol=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: llqr.sam(-0.1), r"rho must lie in \[0, inf\), got -0.1"),
        (lambda: llqr.sam(direction="ema_precond"), "did you mean 'ema_precond_grad'"),
        (lambda: llqr.sam(norm="layer_matrix"), "did you mean 'layer_matrix_norm'"),
        (lambda: llqr.sam(epsilon=0.0), "epsilon must lie"),
        (lambda: llqr.friendly_sam(beta=1.5), r"beta must lie in \[0, 1\], got 1.5"),
        (lambda: llqr.asam(eta=-1.0), "eta must lie"),
        (lambda: llqr.Sharpness(kind="frendly", rho=0.1), "did you mean 'friendly'"),
        (lambda: llqr.Sharpness(kind="asam", rho=0.1, norm="matrix_norm"), "of its own"),
        (lambda: llqr.past_friendly_sam()(OBJECTIVE, second_pass=lambda a: a), "has one pass"),
        (lambda: llqr.sam()(OBJECTIVE, weight=lambda b: 1.0), "weight is of groups"),
        (lambda: llqr.sam(groups=0), "groups must be >= 1"),
        (lambda: llqr.Sharpness(kind="past_friendly", rho=0.1, groups=2), "same for every group"),
    ],
)
def test_bad_options(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_misuse_is_told() -> None:
    params, batch = data()
    product = lambda v: v  # noqa: E731
    with pytest.raises(ValueError, match=r"needs precondition=functools\.partial"):
        llqr.sam(direction="ema_precond_grad")(OBJECTIVE)(params, batch)
    with pytest.raises(ValueError, match="nothing uses it"):
        llqr.sam()(OBJECTIVE)(params, batch, precondition=product)
    with pytest.raises(ValueError, match="this oracle has a state"):
        llqr.friendly_sam()(OBJECTIVE)(params, batch)
    oracle = llqr.asam()(OBJECTIVE)
    with pytest.raises(ValueError, match="base is for sam and friendly_sam"):
        oracle.step(params, oracle.init(params), batch, base=params)
    with pytest.raises(TypeError, match="needs a loss function"):
        llqr.sam()("loss")
    with pytest.raises(ValueError, match="cannot cut 8 examples"):
        llqr.sam(groups=3)(OBJECTIVE)(params, batch)
    with pytest.raises(TypeError, match="dtype int32"):
        llqr.sam()(OBJECTIVE).init({"w": jnp.ones(2, jnp.int32)})


# --- model state, keys, schedules, late starts ---------------------------------------------------


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=False, momentum=0.9)(linen.Dense(5)(x))
        return linen.Dense(2)(jnp.tanh(x))


def batch_norm():
    _, batch = data()
    batch = jax.tree.map(lambda x: x.astype(jnp.float32), batch)
    variables = Net().init(jax.random.key(0), batch["x"])

    def loss(params, stats, batch):
        outputs, new = Net().apply(
            {"params": params, "batch_stats": stats}, batch["x"], mutable=["batch_stats"]
        )
        return squares(outputs, batch), new["batch_stats"]

    return loss, variables["params"], variables["batch_stats"], batch


def test_batch_statistics_are_those_of_the_perturbed_pass() -> None:
    with jax.numpy_dtype_promotion("standard"):
        loss, params, stats, batch = batch_norm()
        (value, new), grads = llqr.sam(RHO)(loss, has_aux=True)(params, stats, batch)
        g = jax.grad(loss, has_aux=True)(params, stats, batch)[0]
        scale = RHO / jnp.linalg.norm(flat_tree(g))
        there = jax.tree.map(lambda p, v: p + scale * v, params, g)
        (wanted, once), gradient = jax.value_and_grad(loss, has_aux=True)(there, stats, batch)
    np.testing.assert_allclose(flat_tree(new), flat_tree(once), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(flat_tree(grads), flat_tree(gradient), rtol=1e-4, atol=1e-6)
    clean = loss(params, stats, batch)[1]
    assert np.abs(flat_tree(new) - flat_tree(clean)).max() > 1e-3, "the passes differ"


def test_microbatches_thread_batch_statistics_through_each_pass() -> None:
    """Both passes start from the statistics before the step."""
    with jax.numpy_dtype_promotion("standard"):
        loss, params, stats, batch = batch_norm()
        parts = llqr.microbatched(2, in_axes=(None, 0), thread=lambda args, stats: (stats, args[1]))
        oracle = llqr.sam(RHO)(loss, has_aux=True, value_and_grad=parts)
        (value, new), _ = jax.jit(lambda *args: oracle(*args))(params, stats, batch)

        def acc(params):
            total, s = 0.0, stats
            for i in range(2):
                part = jax.tree.map(lambda x: x[i::2], batch)  # noqa: B023
                one, s = loss(params, s, part)
                total += one / 2
            return total, s

        g = jax.grad(acc, has_aux=True)(params)[0]
        scale = RHO / jnp.linalg.norm(flat_tree(g))
        wanted, once = acc(jax.tree.map(lambda p, v: p + scale * v, params, g))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(flat_tree(new), flat_tree(once), rtol=1e-5, atol=1e-6)


def test_the_second_pass_may_have_another_key() -> None:
    seen = []

    def loss(w, key):
        jax.debug.callback(lambda k: seen.append(int(k)), jax.random.key_data(key)[-1])
        return jnp.sum(w**2)

    def advance(args):
        return (jax.random.fold_in(args[0], 1),)

    key = jax.random.key(7)
    llqr.sam(RHO)(loss, second_pass=advance)(jnp.ones(2), key)
    jax.effects_barrier()
    wanted = [int(jax.random.key_data(k)[-1]) for k in (key, jax.random.fold_in(key, 1))]
    assert sorted(set(seen)) == sorted(wanted)


def test_rho_follows_a_schedule_of_the_step() -> None:
    params, batch = data()
    oracle = llqr.sam(optax.linear_schedule(0.1, 0.3, 2))(OBJECTIVE)
    state = oracle.init(params)
    for i in range(3):
        _, _, state = oracle.step(params, state, batch)
        np.testing.assert_allclose(state.info.perturbation_norm, 0.1 * (i + 1), rtol=1e-6)


def test_the_steps_before_a_late_start_count_for_the_schedule_of_rho() -> None:
    params, batch = data()
    oracle = llqr.sam(optax.linear_schedule(0.1, 0.4, 3), start=2)(OBJECTIVE)
    state = oracle.init(params)
    for i in range(4):
        _, _, state = oracle.step(params, state, batch)
        expected = 0.1 * (i + 1) if i >= 2 else 0.0
        np.testing.assert_allclose(state.info.perturbation_norm, expected, rtol=1e-6)


def test_a_late_start_compiles_once_or_is_chosen_by_the_caller() -> None:
    """`cond` inside one step, and two static steps: the same numbers; buffers wait."""
    params, batch = data()
    oracle = llqr.friendly_sam(RHO, start=2)(OBJECTIVE)
    inside = jax.jit(lambda p, s, b: oracle.step(p, s, b))
    chosen = jax.jit(lambda p, s, b, active: oracle.step(p, s, b, active=active), static_argnums=3)
    a = b = oracle.init(params)
    for i in range(4):
        value, grads, a = inside(params, a, batch)
        other, same, b = chosen(params, b, batch, i >= 2)
        np.testing.assert_allclose(value, other, rtol=1e-14)
        np.testing.assert_allclose(flat_tree(grads), flat_tree(same), rtol=1e-12)
        assert int(a.info.active) == max(0, i - 1)
        assert int(a.info.evaluations) == (i + 1 if i < 2 else 2 + 2 * (i - 1))
        plain, gradient = jax.value_and_grad(OBJECTIVE)(params, batch)
        assert np.isinf(a.info.perturbed_loss) == (i < 2)
        np.testing.assert_allclose(a.info.clean_loss, plain, rtol=1e-6)
        if i < 2:
            np.testing.assert_allclose(flat_tree(grads), flat_tree(gradient), rtol=1e-12)
            assert not np.any(flat_tree(a.average))
    assert np.any(flat_tree(a.average))
    assert inside._cache_size() == 1
    assert chosen._cache_size() == 2


def test_a_late_start_outside_jit_compiles_no_cond(monkeypatch) -> None:
    monkeypatch.setattr(jax.lax, "cond", None)
    params, batch = data()
    oracle = llqr.sam(RHO, start=1)(OBJECTIVE)
    state = oracle.init(params)
    for i in range(3):
        _, _, state = oracle.step(params, state, batch)
        assert int(state.info.active) == i


@pytest.mark.parametrize("kind", METHODS)
def test_a_fresh_state_can_be_donated(kind) -> None:
    params, batch = data()
    oracle = METHODS[kind](RHO)(OBJECTIVE)
    step = jax.jit(oracle.step, donate_argnums=1)
    _, _, state = step(params, oracle.init(params), batch)
    assert int(state.count) == 1


def test_inside_scan_and_vmap() -> None:
    params, batch = data()
    oracle = llqr.friendly_sam(RHO, start=1)(OBJECTIVE)

    def train(scale):
        def one(carry, _):
            p, state = carry
            value, grads, state = oracle.step(p, state, batch)
            return (jax.tree.map(lambda a, g: a - RATE * g, p, grads), state), value

        start = jax.tree.map(lambda x: scale * x, params)
        return jax.lax.scan(one, (start, oracle.init(start)), length=3)[1]

    both = jax.vmap(train)(jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(both[0], train(jnp.array(1.0)), rtol=1e-12)


def test_the_contract_of_value_and_grad() -> None:
    """Keyword arguments, Python flags, Python numbers, arrays as radius."""

    def loss(w, x, square, *, scale=1.0):
        return scale * (w * jnp.sum(x)) ** (2 if square else 1)

    x = jnp.arange(4.0)
    wanted = jax.value_and_grad(loss)(3.0, x, True, scale=2.0)
    for oracle in (
        llqr.sam(jnp.asarray(0.0))(loss),
        llqr.asam(0.0)(loss),
        llqr.sam(0.0)(loss, value_and_grad=llqr.microbatched(1)),
    ):
        np.testing.assert_allclose(oracle(3.0, x, True, scale=2.0), wanted)
    hash(llqr.sam(jnp.asarray(0.1))(loss, in_axes=[0, None]))
    parts = llqr.microbatched(2)(loss)(3.0, x, True)
    one, other = (
        jax.value_and_grad(loss)(3.0, x[::2], True),
        jax.value_and_grad(loss)(3.0, x[1::2], True),
    )
    np.testing.assert_allclose(parts, (np.asarray(one) + np.asarray(other)) / 2)


# --- parts of a batch ------------------------------------------------------------------------


def test_microbatches_are_the_whole_batch() -> None:
    params, batch = data()
    whole = llqr.sam(RHO)(OBJECTIVE)(params, batch)
    parts = llqr.sam(RHO)(OBJECTIVE, value_and_grad=llqr.microbatched(4))(params, batch)
    np.testing.assert_allclose(flat_tree(whole), flat_tree(parts), rtol=1e-12)


def test_microbatches_may_count_by_their_valid_targets() -> None:
    params, batch = data()
    batch["valid"] = jnp.asarray([1, 1, 0, 1, 1, 1, 0, 1], bool)  # none in the third part

    def loss(params, batch):
        rows = jnp.sum((forward(params, batch) - batch["y"]) ** 2, -1)
        valid = batch["valid"].astype(rows.dtype)
        return jnp.sum(rows * valid) / jnp.sum(valid)  # NaN without targets

    count = lambda params_free_batch: jnp.sum(params_free_batch["valid"])  # noqa: E731
    parts = llqr.microbatched(4, weight=count)(loss)(params, batch)
    whole = jax.value_and_grad(loss)(params, batch)
    np.testing.assert_allclose(flat_tree(parts), flat_tree(whole), rtol=1e-12)
    batch["valid"] = jnp.zeros(8, bool)
    assert not np.any(flat_tree(llqr.microbatched(4, weight=count)(loss)(params, batch)))


def test_microbatches_in_a_loop_or_unrolled(monkeypatch) -> None:
    params, batch = data()
    run = lambda: llqr.microbatched(4)(lambda p, b: (OBJECTIVE(p, b), b["y"]), has_aux=True)  # noqa: E731
    (value, aux), grads = run()(params, batch)
    assert aux.shape == (4, 2, 2)
    np.testing.assert_array_equal(aux[1], batch["y"][1::4])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (looped, _), same = run()(params, batch)
    np.testing.assert_allclose(value, looped, rtol=1e-14)
    np.testing.assert_allclose(flat_tree(grads), flat_tree(same), rtol=1e-12)


@pytest.mark.parametrize("kind", ["sam", "friendly_sam"])
def test_groups_are_perturbed_on_their_own(kind) -> None:
    params, batch = data()
    oracle = METHODS[kind](RHO, groups=4)(OBJECTIVE)
    state = oracle.init(params)
    if state.average is not None:
        state = state._replace(average=jax.tree.map(jnp.sin, params))
    value, grads, new = oracle.step(params, state, batch)
    values, gradients, clean = [], [], []
    for i in range(4):
        part = jax.tree.map(lambda x: x[i::4], batch)  # noqa: B023
        g = jax.grad(OBJECTIVE)(params, part)
        w = g if state.average is None else jax.tree.map(jnp.subtract, g, state.average)
        scale = RHO / jnp.linalg.norm(flat_tree(w))
        there = jax.tree.map(lambda p, v: p + scale * v, params, w)  # noqa: B023
        v, g2 = jax.value_and_grad(OBJECTIVE)(there, part)
        values.append(v)
        gradients.append(flat_tree(g2))
        clean.append(flat_tree(g))
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-12)
    np.testing.assert_allclose(flat_tree(grads), np.mean(gradients, 0), rtol=1e-10)
    if state.average is not None:
        wanted = BETA * flat_tree(state.average) + (1 - BETA) * np.mean(clean, 0)
        np.testing.assert_allclose(flat_tree(new.average), wanted, rtol=1e-12)


def test_groups_count_by_their_weight() -> None:
    params, batch = data()
    weight = lambda b: jnp.sum(b["x"][:, 0] > -1, dtype=jnp.float32)  # noqa: E731
    found = llqr.sam(RHO, groups=2)(OBJECTIVE, weight=weight)(params, batch)
    parts = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    shares = [float(weight(part)) for part in parts]
    assert shares[0] != shares[1]
    each = [llqr.sam(RHO)(OBJECTIVE)(params, part) for part in parts]
    for ours, *theirs in zip(*map(jax.tree.leaves, (found, *each)), strict=True):
        np.testing.assert_allclose(ours, np.average(theirs, axis=0, weights=shares), rtol=1e-12)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_groups_do_not_depend_on_the_devices(kind) -> None:
    params, batch = data()
    oracle = llqr.sam(RHO, groups=4)(OBJECTIVE)
    one = oracle(params, batch)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        two = jax.block_until_ready(jax.jit(lambda p, b: oracle(p, b))(everywhere, split))
    np.testing.assert_allclose(flat_tree(one), flat_tree(jax.device_get(two)), rtol=1e-12)


@pytest.mark.parametrize("how", ["groups", "micro-batches"])
def test_parts_with_parameters_sharded_over_explicit_axes(how) -> None:
    loss = lambda w, x: jnp.mean(jnp.sum((x * w) ** 2, -1))  # noqa: E731
    w, x = jnp.arange(1.0, 5.0), data()[1]["x"] @ jnp.ones((3, 4))
    oracle = llqr.sam(RHO, groups=8)(loss)
    if how == "micro-batches":
        oracle = llqr.sam(RHO)(loss, value_and_grad=llqr.microbatched(4))
    one = oracle(w, x)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        split = jax.device_put(w, NamedSharding(mesh, PartitionSpec("d")))
        everywhere = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
        two = jax.block_until_ready(jax.jit(lambda w, x: oracle(w, x))(split, everywhere))
    np.testing.assert_allclose(flat_tree(one), flat_tree(jax.device_get(two)), rtol=1e-12)


# --- P left out of a step --------------------------------------------------------------------


def test_apply_false_hands_the_gradient_to_the_base() -> None:
    params, batch = data()
    tx, opt_state = optimizer("e-kfac"), learned("e-kfac")
    grads = jax.grad(OBJECTIVE)(params, batch)
    updates, new = tx.update(grads, opt_state, params, refresh=False, apply=False)
    np.testing.assert_allclose(flat_tree(updates), -RATE * flat_tree(grads), rtol=1e-14)
    assert int(llqr.find(new).count) == int(llqr.find(opt_state).count) + 1
    np.testing.assert_array_equal(flat(llqr.find(new).blocks), flat(llqr.find(opt_state).blocks))
    masked = optax.masked(tx, {"first": True, "second": False})
    with pytest.raises(ValueError, match="hide parameters"):
        llqr.precondition(masked, masked.init(params), params)
    with pytest.raises(ValueError, match="no LLQR state found"):
        llqr.precondition(optax.sgd(0.1), (), params)
