"""The quadratic model against dense matrices: every case, metric, reduction and damping."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import llqr
from tests import cases, oracle
from tests.cases import Case
from tests.oracle import close

PSD = ("gauss_newton", "ngd", "reverse_kl", "renyi(0.3)", "renyi(2)", "gaussian", None)
runs = pytest.mark.parametrize(("case", "name"), cases.RUNS, ids=cases.label)


def dense(model: llqr.QuadraticModel) -> jax.Array:
    """Return C + lambda I from one product for each basis vector."""
    theta, unravel = ravel_pytree(model.gradient)
    column = lambda e: ravel_pytree(model.product(unravel(e)))[0]  # noqa: E731
    return jax.vmap(column, out_axes=1)(jnp.eye(theta.size))


def matrix_of(case: Case, metric: Any, **options: Any) -> jax.Array:
    """Return the library's dense C + lambda I."""

    @jax.jit
    def matrix(batch: Any) -> Any:
        return dense(llqr.linearize(case.objective.bind(batch), case.params, metric, **options))

    return matrix(case.batch)


@runs
def test_model_is_the_explicit_quadratic(case: Case, name: Any) -> None:
    metric = cases.metric(name)

    @jax.jit
    def numbers(batch: Any, damping: Any, controls: Any) -> Any:
        model = llqr.linearize(case.objective.bind(batch), case.params, metric, damping=damping)
        _, unravel = ravel_pytree(case.params)
        value = jax.vmap(lambda u: model.value(unravel(u)))(controls)
        both = jax.vmap(lambda u: oracle.value_and_gradient(model, unravel(u)))(controls)
        slopes = jax.vmap(lambda tree: ravel_pytree(tree)[0])(both[1])
        return model.loss, model.gradient, dense(model), value, both[0], slopes

    g, c = oracle.gradient(case), oracle.curvature(case, name)
    # The identity holds for every control, not only for small ones.
    controls = np.random.default_rng(1).normal(size=(3, g.size)) * np.array([[0.1], [1.0], [100.0]])
    for damping in (0.0, 0.3):
        damped = c + damping * np.eye(g.size)
        loss, gradient, matrix, value, value_too, slopes = numbers(case.batch, damping, controls)
        close(loss, oracle.loss(case))
        close(oracle.flat(gradient), g)
        close(matrix, damped)
        close(matrix, matrix.T, np.abs(damped).max())
        for u, j, j_too, slope in zip(controls, value, value_too, slopes, strict=True):
            size = np.abs(g * u).sum() + 0.5 * np.abs(u) @ np.abs(damped) @ np.abs(u)
            close(j, g @ u + 0.5 * u @ damped @ u, size)
            close(j_too, j, size)
            close(slope, g + damped @ u, np.abs(g).max() + (np.abs(damped) @ np.abs(u)).max())


@pytest.mark.parametrize("damping", [0.0, 0.3])
@runs
def test_metrics_are_positive_semidefinite(case: Case, name: Any, damping: float) -> None:
    """Of the oracle's matrices, to which the library's are equal."""
    names = name.values() if isinstance(name, dict) else name if isinstance(name, tuple) else [name]
    low, *_, high = np.linalg.eigvalsh(oracle.curvature(case, name)) + damping
    if all(one in PSD for one in names):
        assert low > damping - 1e-12 * high
    else:
        assert low < -1e-3 + damping  # no promise: these cases do have negative curvature


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case, name in cases.RUNS
        if case in (cases.MLP_TANH, cases.MLP_MASKED, cases.TWO_HEADS, cases.PAIR)
        and name not in ("newton", "gauss_newton")
    ]
    + [(cases.ATTENTION, "ngd")],
    ids=cases.label,
)
def test_mean_divides_by_the_rows_that_count(case: Case, name: Any) -> None:
    with jax.numpy_dtype_promotion("standard"):  # see test_masked_mean_under_strict_promotion
        matrix = matrix_of(case, cases.metric(name), divergence_reduction="mean")
    close(matrix, oracle.curvature(case, name, "mean"))


@pytest.mark.parametrize("name", ["newton", "gauss_newton"])
def test_reduction_does_not_touch_metrics_of_the_loss(name: str) -> None:
    case = cases.MLP_MASKED
    for reduction in ("sum", "mean"):
        matrix = matrix_of(case, name, divergence_reduction=reduction)
        close(matrix, oracle.curvature(case, name))


def test_newton_against_finite_differences() -> None:
    case = cases.MLP_TANH
    close(matrix_of(case, "newton"), oracle.hessian_by_differences(case), rtol=1e-9)


@pytest.mark.parametrize("case", [cases.MLP_TANH, cases.CNN, cases.ATTENTION], ids=cases.label)
def test_divergences_are_multiples_of_the_fisher(case: Case) -> None:
    """The table of the metrics: ngd and reverse_kl F, renyi of order p p F."""
    f = oracle.fisher_sum(case)
    for name, factor in {"ngd": 1, "reverse_kl": 1, "renyi(0.3)": 0.3, "renyi(2)": 2}.items():
        close(oracle.curvature(case, name), factor * f)
    if case.objective.mask is None:  # cross-entropy over logits: its Gauss-Newton is the mean F
        close(oracle.curvature(case, "gauss_newton"), f / len(case.batch["x"]))


def hellinger(z: Any, r: Any) -> Any:
    """Return one minus the affinity of the two distributions, for each row."""
    return 1.0 - jnp.sum(jnp.sqrt(jax.nn.softmax(z) * jax.nn.softmax(r)), axis=-1)


def test_user_defined_divergence() -> None:
    case = cases.MLP_MASKED
    expected = oracle.curvature(case, hellinger)
    close(expected, 0.25 * oracle.fisher_sum(case))
    # The full Hessian is the same: the potential's gradient vanishes at the current point.
    for metric in (hellinger, llqr.Metric(hellinger), llqr.Metric(hellinger, full=True)):
        close(matrix_of(case, metric), expected)

    tree = {"class": hellinger, "value": "gaussian"}
    close(matrix_of(cases.TWO_HEADS, tree), oracle.curvature(cases.TWO_HEADS, tree))


def test_one_metric_serves_every_output() -> None:
    case = cases.PAIR
    close(matrix_of(case, "gaussian"), oracle.curvature(case, ("gaussian", "gaussian")))


# --- masked rows ----------------------------------------------------------------------------


def _numbers(objective: llqr.Objective, params: Any, name: Any, *batches: Any) -> list[Any]:
    """Return loss, J(u) and its gradient at a fixed u, on each batch, with means over rows."""

    @jax.jit
    def run(batch: Any) -> Any:
        model = llqr.linearize(
            objective.bind(batch), params, cases.metric(name), divergence_reduction="mean"
        )
        value, slope = oracle.value_and_gradient(model, jax.tree.map(jnp.cos, params))
        return jnp.concatenate([model.loss[None], value[None], ravel_pytree(slope)[0]])

    with jax.numpy_dtype_promotion("standard"):
        return [run(batch) for batch in batches]


@pytest.mark.parametrize("name", ["newton", "gauss_newton", "ngd", "renyi_2"])
def test_masked_rows_are_as_if_removed(name: str) -> None:
    case = cases.MLP_MASKED
    keep = np.asarray(case.batch["mask"])
    removed = {"x": case.batch["x"][keep], "y": case.batch["y"][keep]}
    garbage = {
        "x": jnp.where(keep[:, None], case.batch["x"], 1e6),
        "y": jnp.where(keep, case.batch["y"], -100),
        "mask": case.batch["mask"],
    }
    [expected] = _numbers(cases.MLP_TANH.objective, case.params, name, removed)
    for got in _numbers(case.objective, case.params, name, case.batch, garbage):
        close(got, expected)


@pytest.mark.parametrize("name", cases.CATEGORICAL)
def test_masked_outputs_may_be_nan(name: str) -> None:
    """Outputs, not inputs: a NaN input reaches every weight's gradient, in `jax.grad` too."""
    case = cases.MLP_MASKED
    forward = case.objective.forward
    objective = replace(case.objective, forward=lambda p, batch: forward(p, batch) + batch["add"])
    mask = case.batch["mask"][:, None]
    batches = [{**case.batch, "add": jnp.where(mask, 0.0, x)} for x in (0.0, np.nan, np.inf)]
    expected, *got = _numbers(objective, case.params, name, *batches)
    assert np.all(np.isfinite(expected))
    for numbers in got:
        close(numbers, expected)


@pytest.mark.parametrize("name", ["newton", "ngd"])
def test_padding_a_batch_of_sequences_changes_nothing(name: str) -> None:
    case = cases.ATTENTION
    x = jnp.pad(case.batch["x"], ((0, 1), (0, 2)), constant_values=cases.PAD)
    y = jnp.pad(case.batch["y"], ((0, 1), (0, 2)), constant_values=3)
    batches = case.batch, {"x": x, "y": y}
    expected, padded = _numbers(case.objective, case.params, name, *batches)
    close(padded, expected)


def test_no_row_that_counts() -> None:
    case = cases.MLP_MASKED
    batch = {**case.batch, "mask": jnp.zeros(6, bool)}
    for name in ("newton", "ngd", "gauss_newton"):
        [numbers] = _numbers(case.objective, case.params, name, batch)
        assert np.all(np.asarray(numbers) == 0)


def test_masked_mean_under_strict_promotion() -> None:
    case = cases.MLP_MASKED
    llqr.linearize(case.bound, case.params, "ngd", divergence_reduction="mean")


# --- the object -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["newton", "ngd", "renyi_2"])
def test_model_crosses_jit_and_follows_its_damping(name: str) -> None:
    case = cases.MLP_TANH
    model = llqr.linearize(case.bound, case.params, name, damping=0.1)
    traces = []

    @jax.jit
    def product(model: llqr.QuadraticModel, u: Any) -> Any:
        traces.append(None)
        return model.product(u)

    u = case.control(0)
    flat = oracle.flat(u)
    c = oracle.curvature(case, name)
    close(oracle.flat(product(model, u)), c @ flat + 0.1 * flat)
    close(oracle.flat(product(replace(model, damping=0.7), u)), c @ flat + 0.7 * flat)
    assert len(traces) == 1


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 5e-6), (jnp.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", ["newton", "ngd", "renyi_zero"])
def test_low_precision(name: str, dtype: Any, rtol: float) -> None:
    """Everything keeps the dtype of the parameters, and the numbers are right to its precision."""
    case = cases.MLP_TANH
    lower = lambda x: np.asarray(x).astype(dtype if x.dtype == float else np.int32)  # noqa: E731
    params, batch, u = jax.tree.map(lower, (case.params, case.batch, case.control(0)))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):

        @jax.jit
        def trees(params: Any, batch: Any, u: Any) -> Any:
            model = llqr.linearize(case.objective.bind(batch), params, name, damping=0.1)
            return model.product(u), model.gradient, oracle.value_and_gradient(model, u)[1]

        got = trees(params, batch, u)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    flat = oracle.flat(case.control(0))
    expected = oracle.curvature(case, name) @ flat + 0.1 * flat
    close(oracle.flat(got[0]).astype(float), expected, rtol=rtol)


@pytest.mark.wrong_type
def test_errors() -> None:
    case = cases.MLP_MASKED
    integers = {**case.params, "steps": jnp.arange(3)}
    with pytest.raises(TypeError, match="parameter 'steps' has dtype int"):
        llqr.linearize(case.bound, integers)
    wrong = replace(case.objective, mask=lambda batch: batch["mask"][:, None])
    with pytest.raises(ValueError, match=r"mask has shape \(6, 1\).*rows of shape \(6,\)"):
        llqr.linearize(wrong.bind(case.batch), case.params)
    with pytest.raises(TypeError, match="loss must be a function"):
        llqr.Objective(case.objective.forward, 3)


@pytest.mark.wrong_type
def test_unknown_reduction_is_an_error() -> None:
    case = cases.MLP_TANH
    with pytest.raises(ValueError, match="divergence_reduction"):
        llqr.linearize(case.bound, case.params, divergence_reduction="average")


def test_negative_damping_is_an_error() -> None:
    case = cases.MLP_TANH
    with pytest.raises(ValueError, match="damping"):
        llqr.linearize(case.bound, case.params, damping=-1.0)
