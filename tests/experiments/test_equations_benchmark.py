"""The benchmark of equations: its problems, its methods, a run in small that is kept and told."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from benchmarks.equations import methods, problems, report, trials
from benchmarks.suite.workloads import physics
from llqr_experiments.data import equations
from llqr_experiments.data import problems as known


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def tiny():
    rows = equations.grid(known.POISSON, (4, 4), (2,) * 4)
    return problems.of_rows("tiny", known.POISSON, rows, (4,))


PROBLEM = problems.Problem("tiny", tiny, 0.01, 3)


@pytest.mark.parametrize("name", ["report", "trials"])
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"benchmarks.equations.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize(
    ("name", "parameters", "rows"),
    [
        ("poisson", 697, 320),
        ("burgers", 697, 464),
        ("wave", 2241, 608),
        ("poisson-runner", 1185, 1152),
        ("burgers-dense", 697, 6464),
        ("poisson-5d", 10065, 640),
    ],
)
def test_problems_have_their_sizes(name, parameters, rows):
    workload = problems.PROBLEMS[name].make()
    assert (workload.size(), len(workload.train["label"])) == (parameters, rows)
    assert all(x.dtype == np.float64 for x in workload.train.values())


def test_burgers_of_the_runner_is_that_of_the_suite():
    theirs = physics.burgers()
    rows = equations.grid(known.BURGERS, (24, 16), (48, 16, 16))
    ours = problems.of_rows("burgers", known.BURGERS, rows, (24, 24))
    params = theirs.initial(0)
    for a, b in zip(*(jax.tree.leaves(x) for x in (params, ours.initial(0))), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(
        ours.objective(params, ours.train), theirs.objective(params, theirs.train), rtol=1e-12
    )
    np.testing.assert_allclose(ours.test_loss(params, theirs.test),
                               theirs.test_loss(params, theirs.test), rtol=1e-12)  # fmt: skip


def test_fresh_points_are_others_in_every_step_and_the_same_for_a_seed():
    workload = problems.PROBLEMS["poisson-5d"].make()
    (one, two), again = (
        [next(stream) for _ in range(2)] for stream in (workload.batches(3), workload.batches(3))
    )
    assert not np.any(one["x"][:512] == two["x"][:512])
    np.testing.assert_array_equal(one["x"], again[0]["x"])


def test_a_run_is_kept_is_that_of_a_plain_loop_and_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "pace", lambda program: 0.01 / 3)
    said = []
    bench = trials.Bench(PROBLEM, ["exact", "AdamW"], tmp_path, said.append)
    bench.run([0])
    tuning = bench.records["AdamW"].kept["tuning"]
    assert len(said) == len(tuning) + 2
    assert len(tuning) >= trials.TIER.rates
    columns = {name: r.trial(0)["columns"] for name, r in bench.records.items()}
    assert columns["exact"]["step"] == columns["AdamW"]["step"] == [0, 1, 2, 3]
    assert columns["AdamW"]["gradients"] == [0, 1, 2, 3]

    workload = tiny()
    params, tx = workload.initial(0), llqr.exact(damping=llqr.Trust(), solver="primal")
    bound, state = workload.objective.bind(workload.train), tx.init(params)
    errors = [float(workload.test_loss(params, workload.test))]
    for _ in range(3):
        updates, state = jax.jit(tx.update)(params, state, params, objective=bound)
        params = optax.apply_updates(params, updates)
        errors.append(float(workload.test_loss(params, workload.test)))
    np.testing.assert_allclose(columns["exact"]["error"], errors, rtol=1e-4)
    assert errors[-1] < errors[0]

    # What is there is not run again; another seed is.
    del said[:]
    trials.Bench(PROBLEM, ["exact", "AdamW"], tmp_path, said.append).run([0])
    assert said == []
    trials.Bench(PROBLEM, ["exact"], tmp_path, said.append).run([0, 1])
    assert len(said) == 1

    results = report.read(tmp_path, ["tiny", "poisson"], list(methods.ENTRIES))
    assert [(r.name, list(r.methods)) for r in results] == [("tiny", ["exact", "AdamW"])]
    page = report.write(results, tmp_path).read_text()
    assert f"{errors[-1]:.1e}" in page  # the one or the other end of two seeds
    assert "seconds to" not in page  # no target is reached
    assert (tmp_path / report.PICTURE).stat().st_size > 1000


def test_a_method_that_is_refused_is_left_out(tmp_path, monkeypatch):
    def refuse(workload, **_):
        raise ValueError("not yet")

    entry = methods.Entry(methods.Method("exact", refuse, None), exact=True)
    monkeypatch.setitem(methods.ENTRIES, "exact", entry)
    said = []
    bench = trials.Bench(PROBLEM, ["exact"], tmp_path, said.append)
    bench.run([0, 1])
    assert bench.skipped == {"exact": "not yet"}
    assert len(said) == 1
    assert report.read(tmp_path, ["tiny"], ["exact"]) == []


def test_adamw_then_lbfgs_turns_where_it_should():
    workload = tiny()
    engine = methods.ENTRIES["AdamW then L-BFGS"].method.build(workload, switch=2, memory_size=5)
    assert [engine.kind(i) for i in range(4)] == ["first", "first", "plain", "plain"]
    carry = engine.start(workload.initial(0), workload.train, None)
    counts, losses = [], []
    for i in range(4):
        carry = jax.jit(engine.step(engine.kind(i)))(carry, workload.train, jnp.asarray(1e-2))
        counts.append(int(engine.counted(carry)))
        losses.append(float(workload.objective(engine.parameters(carry), workload.train)))
    assert counts[:2] == [1, 1]
    assert min(counts[2:]) >= 1
    assert losses[3] < losses[2] < losses[1]


def test_solvers_of_optimistix_are_stepped_as_they_step_themselves():
    optimistix = pytest.importorskip("optimistix")
    workload = tiny()
    engine = methods.ENTRIES["optimistix LM"].method.engine(workload)
    carry = engine.start(workload.initial(0), workload.train, None)
    step = jax.jit(engine.step("plain"))
    for _ in range(4):
        carry = step(carry, workload.train, 0.0)
    flat, unravel = ravel_pytree(workload.initial(0))
    n = len(workload.train["label"])

    def residuals(x, args):
        outputs = workload.forward(unravel(x), workload.train)
        return (outputs - workload.train["label"]) / n**0.5

    solver = optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0)
    found = optimistix.least_squares(residuals, solver, flat, max_steps=4, throw=False)
    np.testing.assert_allclose(carry[0], found.value, rtol=1e-6)
    np.testing.assert_allclose(
        0.5 * jnp.sum(residuals(flat, None) ** 2), workload.objective(unravel(flat), workload.train)
    )


def test_scipy_tells_its_iterates():
    optimize = pytest.importorskip("scipy.optimize")
    workload = tiny()
    _, seen = methods.ENTRIES["SciPy trf"].course(workload, 0, 0.5)
    assert [at.step for at in seen] == list(range(1, len(seen) + 1))
    losses = [float(workload.objective(at.params, workload.train)) for at in seen[:4]]
    flat, unravel = ravel_pytree(workload.initial(0))
    n = len(workload.train["label"])
    residuals = jax.jit(
        lambda x: (workload.forward(unravel(x), workload.train) - workload.train["label"]) / n**0.5
    )
    jacobian = jax.jit(jax.jacrev(residuals))
    plain = []
    optimize.least_squares(
        lambda x: np.asarray(residuals(x)), np.asarray(flat), jac=lambda x: np.asarray(jacobian(x)),
        max_nfev=12, callback=lambda intermediate_result: plain.append(intermediate_result.cost),
    )  # fmt: skip
    np.testing.assert_allclose(losses, plain[:4], rtol=1e-6)
