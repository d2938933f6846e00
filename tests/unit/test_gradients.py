"""Streaming from gradients alone against a numpy loop, in any loop that passes gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llqr
from llqr import _linalg
from llqr.refit.options import Streaming
from tests.oracle import flat
from tests.unit.test_streaming import LAMBDA, OBJECTIVE, batch, parameters, turned

OPTIONS = Streaming(probe="gradient", every=2, warmup=3, signal_decay=0.8)


def newton_schulz(x: Any) -> Any:
    """Muon's polynomial on the singular values, by a factorisation in place of products."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / np.sqrt(np.sum(s**2))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


def as_long(x: Any, like: Any) -> Any:
    return x * np.linalg.norm(like) / np.linalg.norm(x)


def numpy_loop(options: Streaming, structure: str, steps: int, rate: float) -> Any:
    """The whole method, every formula of the module written out."""
    params = jax.tree.map(np.asarray, parameters())
    names = [("first", "bias"), ("first", "kernel"), ("second", "kernel")]
    state: dict[Any, Any] = {}
    for a, b in names:
        shape = params[a][b].shape
        rows, cols = shape if len(shape) == 2 and structure == "e-kfac" else (0, 0)
        state[a, b] = {
            "S": [np.zeros((rows, rows)), np.zeros((cols, cols))],
            "V": [np.eye(rows), np.eye(cols)], "m": 0.0, "q": np.zeros(shape), "d": np.ones(shape),
        }  # fmt: skip
    for step in range(steps):
        gradient = jax.tree.map(np.asarray, jax.grad(OBJECTIVE)(params, batch(step)))
        e = min(options.signal_decay or options.basis_decay, 1 - 1 / (step + 1))
        for a, b in names:
            g, s = gradient[a][b], state[a, b]
            matrix = len(s["V"][0]) > 0

            def inside(x: Any, s: Any = s, matrix: bool = matrix) -> Any:
                return s["V"][0].T @ x @ s["V"][1] if matrix else x

            def outside(x: Any, s: Any = s, matrix: bool = matrix) -> Any:
                return s["V"][0] @ x @ s["V"][1].T if matrix else x

            if matrix:
                moments, decay = (g @ g.T, g.T @ g), options.basis_decay
                s["S"] = [
                    decay * old + (1 - decay) * x for old, x in zip(s["S"], moments, strict=True)
                ]
            m = options.momentum * outside(s["m"]) + g if step else g
            if step < options.warmup or step % options.every == 0:
                if matrix:
                    pairs = zip(s["S"], s["V"], strict=True)
                    s["V"] = [turned(moment, v) for moment, v in pairs]
                c = e * s["q"] + (1 - e) * inside(g) ** 2
                s["d"] = 1 / (c / c.max() + LAMBDA)
            s["m"], s["q"] = inside(m), e * s["q"] + (1 - e) * inside(g) ** 2
            u = s["d"] * (inside(g) + options.momentum * s["m"])
            rms = np.sqrt(np.mean(u**2))
            if matrix and options.orthogonal:
                u = as_long(newton_schulz(u), u)
            u = (0.05 if b == "bias" else 0.2) * u / rms
            if options.signal_decay is not None:
                share = (1 - options.momentum) * np.abs(s["m"]) / np.sqrt(s["q"])
                most = np.sqrt((1 + options.momentum) / (1 - options.momentum))
                u = np.minimum(share, 1) * most * u
            params[a][b] = params[a][b] - rate * outside(u)
    return params


@pytest.mark.parametrize(
    ("structure", "more"),
    [
        ("e-kfac", {}),
        ("e-kfac", {"signal_decay": None}),
        ("e-kfac", {"orthogonalize": False}),
        ("diagonal", {}),
    ],
)
def test_the_library_is_the_numpy_loop(structure: str, more: Any) -> None:
    given = {"probe": "gradient", "every": 2, "warmup": 3, "signal_decay": 0.8, **more}
    options = Streaming(**given)
    tx = llqr.llqr(optax.sgd(0.1), structure=structure, damping=LAMBDA, refit=options)
    params, state = parameters(), tx.init(parameters())

    @jax.jit
    def step(params: Any, state: Any, data: Any) -> Any:
        updates, state = tx.update(jax.grad(OBJECTIVE)(params, data), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(11):
        params, state = step(params, state, batch(i))
    expected = numpy_loop(options, structure, 11, 0.1)
    np.testing.assert_allclose(flat(params), flat(expected), rtol=0, atol=1e-8)
    assert int(llqr.find(state).refit.refits) == 7  # at 0, 1, 2, 4, .., 10
    assert llqr.find(state).refit.words == ("updated",) * 3


def test_nothing_but_gradients_is_needed() -> None:
    """Neither an objective, nor parameters, nor a metric; a refresh from outside turns too."""
    params = parameters()
    tx = llqr.streaming(0.1, refit=OPTIONS, metric="newton")
    state = tx.init(params)
    grads = jax.grad(OBJECTIVE)(params, batch(0))
    _, state = tx.update(grads, state)
    assert int(llqr.find(state).refit.refits) == 1
    _, state = tx.update(grads, state, params, objective=OBJECTIVE.bind(batch(0)))
    state = llqr.refresh(tx, state, params, None)  # pyright: ignore
    assert int(llqr.find(state).refit.refits) == 3
    assert int(llqr.find(state).count) == 2


def test_it_remembers_squares_in_place_of_curvature() -> None:
    params = {"embedding": jnp.ones((6, 4)), "kernel": jnp.ones((4, 3))}
    state = llqr.streaming(0.1, refit=OPTIONS).init(params)
    found = llqr.find(state).stream.statistics
    assert set(found) == {"left", "right", "momentum", "squares"}
    assert found["squares"]["embedding"].shape == (6, 4)
    text = str(llqr.describe(llqr.streaming(0.1, refit=OPTIONS), params))
    assert text.endswith("of momentum, second moments and squares")


def test_rows_that_are_seldom_are_not_weighed() -> None:
    params = {"embedding": jnp.ones((6, 4)), "kernel": jnp.ones((6, 4))}
    tx = llqr.scale_by_llqr(structure="diagonal", refit=OPTIONS)
    state, rms = tx.init(params), {}
    for i in range(5):
        g = jnp.cos(7 * jnp.arange(24.0) + 3 * i).reshape(6, 4)
        updates, state = tx.update({"embedding": g, "kernel": g}, state, params)
        rms = {k: float(jnp.sqrt(jnp.mean(u**2))) for k, u in updates.items()}
    assert rms["embedding"] == pytest.approx(0.2 * np.sqrt(19))
    assert rms["kernel"] < 0.9 * rms["embedding"]


def test_what_is_not_finite_is_not_installed() -> None:
    params = parameters()
    tx = llqr.scale_by_llqr(structure="e-kfac", refit=OPTIONS)
    step = jax.jit(partial(tx.update, refresh=True))
    grads = jax.grad(OBJECTIVE)(params, batch(0))
    _, state = step(grads, tx.init(params), params)
    bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.nan), grads)
    _, after = step(bad, state, params)
    assert np.isfinite(flat((after.blocks, after.stream.statistics))).all()
    updates, _ = step(grads, after, params)
    assert np.isfinite(flat(updates)).all()


def test_refusals_name_the_way_out() -> None:
    params = parameters()
    for structure in ("kfac", "psd-e-kfac"):
        with pytest.raises(ValueError, match="from gradients alone"):
            llqr.scale_by_llqr(structure=structure, refit=OPTIONS)
    with pytest.raises(ValueError, match="did you mean 'gradient'"):
        Streaming(probe="gradients")  # pyright: ignore
    with pytest.raises(ValueError, match="identity_scaling"):
        llqr.scale_by_llqr(identity_scaling=2.0, refit=OPTIONS)
    with pytest.raises(ValueError, match=r"needs objective=.*probe=\"gradient\""):
        llqr.streaming(0.1).update(params, llqr.streaming(0.1).init(params), params)
    probed = llqr.streaming(0.1)
    alone = llqr.streaming(0.1, refit=OPTIONS)
    for tx, other in ((probed, alone), (alone, probed)):
        with pytest.raises(ValueError, match="another `probe`"):
            tx.update(params, other.init(params), params, refresh=False)


def test_embeddings_vectors_and_diagonals_are_not_orthogonalised() -> None:
    """By the length of each entry: a step of theirs is D v, entry by entry."""
    params = {
        "embedding": jnp.ones((6, 4)), "bias": jnp.ones(6), "thin": jnp.ones((6, 1)),
        "plain": jnp.ones((6, 4)), "kernel": jnp.ones((6, 4)),
    }  # fmt: skip
    rules = [
        llqr.Rule(match="plain|bias|thin", structure="diagonal"), ("*", "e-kfac"),
    ]  # fmt: skip
    rng, steps = np.random.default_rng(0), {}
    grads = {name: jnp.asarray(rng.normal(size=p.shape)) for name, p in params.items()}
    for on in (False, True):
        tx = llqr.scale_by_llqr(
            structure=rules,
            refit=Streaming(probe="gradient", orthogonalize=on, signal_decay=None),
        )
        steps[on], _ = tx.update(grads, tx.init(params))
    for name in params:
        same = bool(jnp.allclose(steps[False][name], steps[True][name], atol=1e-12))
        assert same == (name != "kernel"), name
    found, was = (np.asarray(steps[on]["kernel"]) for on in (True, False))
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(was))
    values = np.linalg.svd(found, compute_uv=False)
    assert values.min() > 0.5 * values.max()


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e20])
def test_newton_schulz_is_the_polynomial_of_singular_values(
    shape: tuple[int, int], scale: float
) -> None:
    x = np.random.default_rng(1).normal(size=shape)
    found = _linalg.newton_schulz(jnp.asarray(scale * x))
    np.testing.assert_allclose(found, newton_schulz(x), atol=1e-12)
    zero = _linalg.newton_schulz(jnp.zeros(shape))
    np.testing.assert_array_equal(zero, np.zeros(shape))
