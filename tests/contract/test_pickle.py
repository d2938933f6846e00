"""Ray, Dask, submitit and joblib ship closures by cloudpickle, also to processes begun anew."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import jax
import jax.numpy as jnp
import optax
import pytest

import llqr
from llqr import schedules
from tests.contract import problem as pb

OBJECTIVE = llqr.Objective(lambda w, x: jnp.tanh(x @ w), lambda z, x: jnp.mean(z**2))
STAGED = llqr.stages.stages_from_functions([("w", lambda w, x: x @ w)])
W, X = jnp.ones((3, 2)), jnp.eye(3)
THINGS: dict[str, Any] = {
    "llqr": lambda: llqr.llqr(optax.adam(1e-3), structure="kfac"),
    "update": lambda: llqr.llqr(optax.adam(1e-3), precondition="update", metric="bernoulli"),
    "streaming": lambda: llqr.streaming(1e-3, metric="gaussian"),
    "exact": lambda: llqr.exact(optax.sgd(1.0), metric=llqr.metrics.renyi(0.3)),
    "trust": lambda: llqr.exact(damping=llqr.Trust(momentum=0.9), solver="cg"),
    "rules": lambda: llqr.scale_by_llqr(
        structure=[(lambda path, shape: len(shape) == 2, "kfac"), ("*", "diagonal")]
    ),
    "solver": lambda: llqr.scale_by_llqr(
        refit=llqr.Refit(solver=optax.adam(0.1), every=lambda count: 5)
    ),
    "sam": lambda: llqr.sam(0.1)(OBJECTIVE),
    "friendly": lambda: llqr.friendly_sam(0.1)(OBJECTIVE),
    "microbatched": lambda: llqr.microbatched(2)(OBJECTIVE),
    "objective": lambda: OBJECTIVE.bind(X),
    "staged": lambda: llqr.Objective(STAGED.as_forward(), OBJECTIVE.loss),
    "schedule": lambda: schedules.warmup_cosine_decay(0.1, 5),
}  # fmt: skip


@pytest.mark.parametrize("kind", THINGS)
def test_everything_goes_through_cloudpickle(kind: str) -> None:
    again = cloudpickle.loads(cloudpickle.dumps(THINGS[kind]()))
    assert type(again) is type(THINGS[kind]())


def test_an_optimizer_that_was_pickled_makes_the_same_steps() -> None:
    tx, params, grads = pb.optimizer("llqr(momentum)"), pb.params(), pb.gradient()
    again, bound = cloudpickle.loads(cloudpickle.dumps((tx, pb.bound())))
    found = again.update(grads, again.init(params), params, objective=bound)
    pb.assert_bitwise(found, tx.update(grads, tx.init(params), params, objective=pb.bound()))
    pb.assert_bitwise(
        llqr.refresh(again, found[1], params, bound), llqr.refresh(tx, found[1], params, bound)
    )


def test_a_process_begun_anew_takes_a_step(tmp_path: Path) -> None:
    def job() -> list[list[float]]:
        tx = llqr.llqr(optax.sgd(0.1), metric="gaussian", refit=llqr.Refit(steps=2))
        grads = jax.grad(OBJECTIVE)(W, X)
        return tx.update(grads, tx.init(W), W, objective=OBJECTIVE.bind(X))[0].tolist()

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as if it were a script
    try:
        (tmp_path / "job").write_bytes(cloudpickle.dumps(job))
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    script = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))())"
    command = [sys.executable, "-c", script, str(tmp_path / "job")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    with jax.enable_x64(False):
        assert jnp.allclose(jnp.asarray(eval(done.stdout)), jnp.asarray(job()), rtol=1e-5)
