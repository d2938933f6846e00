"""Shampoo, SOAP-Muon, NorMuon, steps on a sphere and wrappers, against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.suite.engine import Engine, optax_engine
from benchmarks.suite.methods import muon, shampoo, soap
from benchmarks.suite.methods.hyperball import hyperball
from benchmarks.suite.methods.wrappers import averaged, ema_nesterov

B1, B2, EPS = 0.9, 0.8, 1e-8
CUBIC, LINEAR, QUINTIC = -4.7750, 3.4445, 2.0315
SHAPES = [(4, 3), (2, 2, 3), (3, 7)]


@pytest.fixture(autouse=True)
def precision():
    """Float64, as everywhere, but with promotion: optax's Muon has counts and numbers meet."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def drawn(shape, number=6):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for _ in range(number)]


def as_matrix(x):
    return x.reshape(-1, x.shape[-1])


def newton_schulz(x):
    """Muon's five iterations."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = LINEAR * x + (CUBIC * a + QUINTIC * a @ a) @ x
    return x


def shaped(o):
    """At Muon's length."""
    inputs, neurons = o.shape
    return np.sqrt(max(1, neurons / inputs)) * o


def steps_of(tx, grads, **extra):
    params = {"kernel": jnp.zeros(grads[0].shape)}
    state, found = tx.init(params), []
    for t, g in enumerate(grads):
        more = {name: value(t) for name, value in extra.items()}
        step, state = tx.update({"kernel": jnp.asarray(g)}, state, params, **more)
        found.append(step["kernel"])
    return found


def agree(found, wanted, shape):
    for step, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(step, right.reshape(shape), rtol=1e-6, atol=1e-8)


def inverse_root(s, power, damping):
    values, vectors = np.linalg.eigh(s)
    return vectors @ np.diag((np.maximum(values, 0) + damping * values[-1]) ** -power) @ vectors.T


@pytest.mark.parametrize("power", [0.25, 0.5])
@pytest.mark.parametrize("shape", [*SHAPES, (9, 3), (5,)], ids=str)
def test_shampoo(shape, power):
    grads, frequency, damping = drawn(shape, 8), 3, 1e-3
    m, n = as_matrix(grads[0]).shape if len(shape) > 1 else (1, *shape)
    sides = [len(shape) > 1 and d <= 8 for d in (m, n)]
    mean, square, wanted = np.zeros((m, n)), np.zeros((m, n)), []
    stats, roots = [np.zeros((m, m)), np.zeros((n, n))], [np.eye(m), np.eye(n)]
    for t, g in enumerate(x.reshape(m, n) for x in grads):
        first, second = 1 - B1 ** (t + 1), 1 - B2 ** (t + 1)
        mean, square = B1 * mean + (1 - B1) * g, B2 * square + (1 - B2) * g**2
        for i, outer in enumerate((g @ g.T, g.T @ g)):
            stats[i] = B2 * stats[i] + (1 - B2) * outer
            if sides[i] and t % frequency == 0:
                roots[i] = inverse_root(stats[i] / second, power, damping)
        adam, step = mean / first / (np.sqrt(square / second) + EPS), roots[0] @ mean @ roots[1]
        wanted.append(step * np.linalg.norm(adam) / np.linalg.norm(step) if any(sides) else adam)
    tx = shampoo.scale_by_shampoo(B1, B2, power, damping, EPS, max_dim=8)
    agree(steps_of(tx, grads, refresh=lambda t: t % frequency == 0), wanted, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soap_muon(shape):
    """SOAP has a test of its own: here, what is done to its direction."""
    grads, direction = drawn(shape), soap.scale_by_soap(B1, B2)
    every = {"refresh": lambda t: t % 2 == 0}
    found = steps_of(optax.chain(direction, muon.orthogonalize()), grads, **every)
    plain = steps_of(direction, grads, **every)
    np.testing.assert_array_equal(found[0], 0)
    agree(found[1:], [shaped(newton_schulz(as_matrix(np.asarray(d)))) for d in plain[1:]], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normuon(shape):
    """Algorithm 1, with Muon's momentum and Muon's length."""
    grads, beta, b2, wanted = drawn(shape), 0.9, 0.8, []
    mean, second = np.zeros_like(as_matrix(grads[0])), np.zeros(shape[-1])
    for t, g in enumerate(map(as_matrix, grads)):
        mean = beta * mean + (1 - beta) * g
        # optax corrects biases; a factor of the whole is of no effect.
        look = beta * mean / (1 - beta ** (t + 2)) + (1 - beta) * g / (1 - beta ** (t + 1))
        o = shaped(newton_schulz(look))
        second = b2 * second + (1 - b2) * np.mean(o**2, 0)
        new = o / np.sqrt(second)
        wanted.append(new * np.linalg.norm(o) / np.linalg.norm(new))
    agree(steps_of(muon.scale_by_muon(beta, b2), grads), wanted, shape)


def test_vectors_and_embeddings_get_adam():
    params = {"bias": jnp.ones(3), "embedding": jnp.ones((5, 4)), "kernel": jnp.ones((4, 3))}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    adam = optax.scale_by_adam(nesterov=True)
    wanted, _ = adam.update(grads, adam.init(params))
    for b2 in (None, 0.95):
        tx = muon.scale_by_muon(0.9, b2)
        found, _ = tx.update(grads, tx.init(params), params)
        for name in ("bias", "embedding"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-12)
        assert np.abs(found["kernel"] - wanted["kernel"]).max() > 0.1
    passed, _ = (link := muon.orthogonalize()).update(grads, link.init(params), params)
    np.testing.assert_array_equal(passed["embedding"], grads["embedding"])


@pytest.mark.parametrize("head", [False, True])
def test_matrices_keep_their_norms_on_a_sphere(head):
    rng, rate = np.random.default_rng(0), 0.1
    params = {
        "kernel": jnp.asarray(rng.normal(size=(2, 2, 3))),
        "head": jnp.asarray(rng.normal(size=(4, 3))),
        "zero": jnp.zeros((4, 3)),
        "bias": jnp.asarray(rng.normal(size=3)),
        "embedding": jnp.asarray(rng.normal(size=(5, 4))),
    }
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)
    tx = hyperball(rate, head=head)
    on_sphere = ("kernel", "head") if head else ("kernel",)
    state, now, wanted = tx.init(params), params, {k: np.asarray(x) for k, x in params.items()}
    for _ in range(20):
        updates, state = tx.update(direction, state, now)
        now = optax.apply_updates(now, updates)
        for name, w in wanted.items():
            u, radius = np.asarray(direction[name]), np.linalg.norm(params[name])
            if name in on_sphere:
                moved = w - rate * radius * u / np.linalg.norm(u)
                wanted[name] = radius * moved / np.linalg.norm(moved)
                assert np.linalg.norm(now[name]) == pytest.approx(radius, rel=1e-12)
            else:
                wanted[name] = w - rate * u
            np.testing.assert_allclose(now[name], wanted[name], rtol=1e-11)
    with pytest.raises(ValueError, match="parameters"):
        tx.update(direction, state)


# --- wrappers: on the loss 1/2 |A x - b|^2, whose gradient is known ------------------------------


class Quadratic:
    """As much of a workload as an engine asks for."""

    steps = 20
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(4, 3)), rng.normal(size=4)

    def objective(self, x, batch):
        del batch
        return 0.5 * jnp.sum((jnp.asarray(self.a) @ x - jnp.asarray(self.b)) ** 2)

    def gradient(self, x):
        return self.a.T @ (self.a @ x - self.b)


def momentum_engine(workload, **options):
    return optax_engine(workload, lambda rate: optax.sgd(rate, **options))


def evaluated(build, **options):
    """What is evaluated after each step, from ones, at the rates of `rate`."""
    engine = build(Quadratic(), momentum=0.5, **options)
    carry, found = engine.start(jnp.ones(3), None, jax.random.key(0)), []
    for t in range(Quadratic.steps):
        carry = jax.jit(engine.step("plain"))(carry, None, jnp.asarray(rate(t)))
        found.append(np.asarray(engine.parameters(carry)))
    return found


def rate(t):
    return 0.05 * (1 - t / Quadratic.steps)


def test_the_end_is_averaged():
    plain, found = evaluated(momentum_engine), evaluated(averaged(momentum_engine))
    for t in range(16):
        np.testing.assert_array_equal(found[t], plain[t])
    for t in range(16, 20):
        np.testing.assert_allclose(found[t], np.mean(plain[16 : t + 1], 0), rtol=1e-12)


def test_look_ahead_from_a_moving_average():
    decay, ahead, wanted = 0.7, 0.4, []
    y, z, e, trace = np.ones(3), np.ones(3), np.ones(3), np.zeros(3)
    for t in range(Quadratic.steps):
        trace = 0.5 * trace + Quadratic().gradient(y)
        z = z - rate(t) * trace
        e = decay * e + (1 - decay) * z
        y = z + ahead * (z - e)
        wanted.append(z)
    found = evaluated(ema_nesterov(momentum_engine), decay=decay, ahead=ahead)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    both = evaluated(averaged(ema_nesterov(momentum_engine)), decay=decay, ahead=ahead)
    np.testing.assert_allclose(both[-1], np.mean(wanted[16:], 0), rtol=1e-12)


def test_without_an_average_the_look_ahead_is_the_method_itself():
    plain = evaluated(momentum_engine)
    found = evaluated(ema_nesterov(momentum_engine), decay=0.0)
    np.testing.assert_allclose(found, plain, rtol=1e-12)


def test_what_is_evaluated_by_the_method_is_what_is_averaged():
    def evaluates_twice(workload, **options):
        return optax_engine(
            workload,
            lambda rate: optax.sgd(rate, **options),
            evaluated=lambda state, params: 2 * params,
            counted=lambda state: 3,
        )

    plain = evaluated(momentum_engine)
    found = evaluated(averaged(evaluates_twice))
    np.testing.assert_allclose(found[-1], 2 * np.mean(plain[16:], 0), rtol=1e-12)
    engine: Engine = averaged(ema_nesterov(evaluates_twice))(Quadratic())
    carry = engine.start(jnp.ones(3), None, jax.random.key(0))
    assert engine.counted is not None
    assert engine.counted(carry) == 3
