"""The suite's baselines reach what independent implementations of them reach; every method trains.

scikit-learn has its own Adam and SGD with Nesterov's momentum, scipy L-BFGS; kfac-jax has an
optimizer of its own around the preconditioner that the suite uses.
"""

import importlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier

from benchmarks.suite import methods, workloads
from benchmarks.suite.training import compiled, trial

pytestmark = [
    pytest.mark.slow,
    # kfac-jax 0.0.8 was written for an older JAX.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SEEDS = range(3)


def ours(workload, method, rate):
    """Final training losses of a method with a constant rate, after a warm-up."""
    program = compiled(workload, replace(method, decays=False))
    return [trial(program, rate, seed, 1)["train"][-1] for seed in SEEDS]


@pytest.mark.parametrize(
    ("name", "options", "theirs", "rate"),
    [
        ("AdamW", {"weight_decay": 0.0}, {"solver": "adam"}, 1e-3),
        ("SGD Nesterov", {}, {"solver": "sgd", "nesterovs_momentum": True, "momentum": 0.9}, 0.03),
    ],
    ids=["adam", "sgd"],
)
@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_against_scikit_learn(name, options, theirs, rate):
    workload, epochs = workloads.load("digits"), 10
    image = workload.train["image"].reshape(len(workload.train["image"]), -1)
    label = workload.train["label"]
    found = []
    for seed in SEEDS:
        network = MLPClassifier((100, 100), alpha=0.0, batch_size=64, max_iter=epochs, tol=0.0,
                                learning_rate_init=rate, random_state=seed, **theirs)  # fmt: skip
        network.fit(image, label)
        found.append(log_loss(label[:1000], network.predict_proba(image[:1000])))
    method = methods.METHODS[name]
    method = replace(method, options={**method.options, **options})
    steps = epochs * -(-len(label) // 64)
    losses = ours(replace(workload, steps=steps), method, rate)
    assert np.mean(losses) == pytest.approx(np.mean(found), rel=0.4)


def test_lbfgs_against_scipy():
    workload = replace(workloads.load("autoencoder-full-batch"), steps=300)
    both = jax.jit(jax.value_and_grad(workload.objective))
    found = []
    for seed in SEEDS:
        start, unravel = ravel_pytree(workload.initial(seed))

        def flat(x, unravel=unravel):
            loss, grads = both(unravel(jnp.asarray(x, jnp.float32)), workload.train)
            return float(loss), np.asarray(ravel_pytree(grads)[0], float)

        limits = {"maxcor": 10, "maxfun": 300, "maxiter": 10_000, "ftol": 0.0, "gtol": 0.0}
        end = minimize(flat, start, jac=True, method="L-BFGS-B", options=limits)
        found.append(end.fun)
    losses = ours(workload, methods.METHODS["L-BFGS"], 0.0)
    assert np.mean(losses) == pytest.approx(np.mean(found), rel=0.25)


def test_kfac_against_its_own_optimizer():
    pytest.importorskip("kfac_jax")
    kfac = importlib.import_module("benchmarks.suite.methods.kfac")
    workload, rate = replace(workloads.load("digits"), steps=100), 0.03
    method = methods.METHODS["K-FAC"]
    losses = ours(workload, method, rate)
    made = kfac.preconditioner(workload, damping=method.options["damping"], every=5)

    def value(params, batch):
        return made.estimator.func(params, batch)

    found = []
    for seed in SEEDS:
        optimizer = kfac.kfac_jax.Optimizer(
            jax.value_and_grad(value), l2_reg=0.0,
            learning_rate_schedule=lambda step: rate * jnp.minimum(1, (step + 1) / 5),
            momentum_schedule=lambda step: method.options["momentum"],
            damping_schedule=lambda step: method.options["damping"],
            norm_constraint=method.options["constraint"], inverse_update_period=5,
            num_burnin_steps=0, estimation_mode="fisher_gradients",
        )  # fmt: skip
        stream, params = workload.batches(seed), workload.initial(seed)
        state = optimizer.init(params, jax.random.key(seed), next(stream))
        for step in range(100):
            params, state, _ = optimizer.step(
                params, state, jax.random.key(step), batch=next(stream), global_step_int=step
            )
        found.append(float(workload.objective(params, workload.fixed)))
    assert np.mean(losses) == pytest.approx(np.mean(found), rel=0.5)


def test_kfac_by_its_own_rules_makes_the_steps_of_its_own_loop():
    pytest.importorskip("kfac_jax")
    kfac = importlib.import_module("benchmarks.suite.methods.kfac")
    workload, method, damping = workloads.load("digits"), methods.METHODS["K-FAC adaptive"], 0.3
    engine, stream = method.engine(workload), workload.batches(0)
    optimizer = kfac.adaptive_optimizer(workload, damping=damping, **method.options)
    params, key = workload.initial(0), jax.random.key(0)
    state = optimizer.init(params, key, next(stream))
    carry = engine.start(workload.initial(0), next(stream), key)
    steps = {kind: jax.jit(engine.step(kind)) for kind in {engine.kind(t) for t in range(12)}}
    for t in range(12):
        batch, (key, probe) = next(stream), jax.random.split(key)
        params, state, _ = optimizer.step(params, state, probe, batch=batch, global_step_int=t)
        carry = steps[engine.kind(t)](carry, batch, damping)
        for wanted, found in zip(jax.tree.leaves(params), jax.tree.leaves(carry[0]), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    assert float(carry[1].damping) == pytest.approx(float(state.damping))
    assert float(state.damping) != damping


@pytest.mark.parametrize("method", methods.METHODS.values(), ids=lambda m: m.name)
def test_every_method_trains(method):
    if not methods.is_installed(method):
        pytest.skip(f"{method.package} is not installed")
    name = "autoencoder-full-batch" if method.rate is None else "digits"
    workload = replace(workloads.load(name), steps=150)
    columns = trial(compiled(workload, method), method.rate or 0.0, 0, 1)
    assert columns["train"][-1] < 0.7 * columns["train"][0]


@pytest.mark.parametrize("name", [name for makers in workloads.SETS.values() for name in makers])
def test_every_workload_trains(name):
    with jax.enable_x64(name in workloads.FLOAT64):
        workload = replace(workloads.load(name), steps=60)
        program = compiled(workload, methods.METHODS["AdamW"])
        columns = trial(program, 3e-3, 0, 1)
        assert columns["train"][-1] < 0.9 * columns["train"][0]
        params = workload.initial(0)
        wanted = np.float64 if workload.float64 else np.float32
        assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(wanted)}
