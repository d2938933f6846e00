"""Divergences as potentials: values, curvature at the current point, masks, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llqr
from llqr import metrics

Z = np.array([[0.3, -1.2, 2.0], [1.0, 0.5, -0.4]])
R = np.array([[0.1, -1.0, 1.5], [-1.0, 0.2, 0.9]])


def softmax(v):
    e = np.exp(v - v.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rows(metric, z, r):
    return metrics.resolve(metric).divergence(jnp.asarray(z), jnp.asarray(r))


def test_values_are_those_of_the_two_distributions():
    s, q = softmax(R), softmax(Z)
    np.testing.assert_allclose(rows("ngd", Z, R), -(s * np.log(q)).sum(-1), rtol=1e-13)
    np.testing.assert_allclose(
        rows("reverse_kl", Z, R), (q * np.log(q / s)).sum(-1), rtol=1e-13, atol=1e-15
    )
    for order in (0.3, 0.5, 2.0, 5.0):
        expected = np.log((s**order * q ** (1 - order)).sum(-1)) / (order - 1)
        found = rows(metrics.renyi(order), Z, R)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        rows(metrics.renyi(1), Z, R), (s * np.log(s / q)).sum(-1), rtol=1e-13
    )
    np.testing.assert_allclose(rows("gaussian", Z, R), ((Z - R) ** 2).sum(-1) / 2, rtol=1e-14)


@pytest.mark.parametrize(
    ("metric", "factor"),
    [("ngd", 1), ("reverse_kl", 1), *((metrics.renyi(p), p) for p in (0.3, 0.5, 1, 2, 5))],
)
def test_curvature_of_a_row_is_a_multiple_of_its_fisher_matrix(metric, factor):
    """Row by row, at any order; and the gradient vanishes: it is a metric at this point."""
    potential = lambda z: metrics.potential(  # noqa: E731
        metrics.resolve(metric), z, jnp.asarray(R), None, "sum"
    )
    hessian = jax.hessian(potential)(jnp.asarray(R))
    s = softmax(R)
    for i in range(2):
        for j in range(2):
            fisher = np.diag(s[i]) - np.outer(s[i], s[i]) if i == j else np.zeros((3, 3))
            np.testing.assert_allclose(hessian[i, :, j], factor * fisher, atol=1e-13)
    np.testing.assert_allclose(jax.grad(potential)(jnp.asarray(R)), 0, atol=1e-14)


def test_kl_is_the_limit_of_the_orders():
    near = rows(metrics.renyi(1 + 1e-6), Z, R)
    np.testing.assert_allclose(near, rows(metrics.renyi(1), Z, R), rtol=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_masked_rows_add_nothing_and_are_not_counted(reduction):
    mask = jnp.array([True, False, True, False])
    z = jnp.asarray(np.stack([Z[0], [np.nan] * 3, Z[1], [np.inf] * 3]))
    r = jnp.asarray(np.stack([R[0], [np.nan] * 3, R[1], [0.0] * 3]))
    value, slope = jax.value_and_grad(
        lambda z: metrics.potential(metrics.resolve("ngd"), z, r, mask, reduction)
    )(z)
    expected, part = jax.value_and_grad(
        lambda z: metrics.potential(metrics.resolve("ngd"), z, jnp.asarray(R), None, reduction)
    )(jnp.asarray(Z))
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(slope[jnp.array([0, 2])], part, rtol=1e-14)
    np.testing.assert_array_equal(slope[jnp.array([1, 3])], 0)


def test_a_mask_of_another_shape_is_refused():
    mask = jnp.ones((2, 1), bool)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1\)"):
        metrics.potential(metrics.resolve("ngd"), jnp.asarray(Z), jnp.asarray(R), mask, "sum")


def test_a_tree_of_metrics_leaves_out_none():
    outputs = {"a": jnp.asarray(Z), "b": jnp.asarray(Z)}
    reference = {"a": jnp.asarray(R), "b": jnp.asarray(R)}
    tree = metrics.resolve({"a": "gaussian", "b": None})
    value = metrics.potential(tree, outputs, reference, None, "sum")
    np.testing.assert_allclose(value, ((Z - R) ** 2).sum() / 2, rtol=1e-14)


def test_a_function_is_a_divergence():
    double = metrics.resolve(lambda z, r: jnp.sum((z - r) ** 2, -1))
    value = metrics.potential(double, jnp.asarray(Z), jnp.asarray(R), None, "mean")
    np.testing.assert_allclose(value, ((Z - R) ** 2).sum(-1).mean(), rtol=1e-14)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        ("ngdd", ValueError, r"unknown divergence 'ngdd': did you mean 'ngd'\?"),
        ("renyi_inf", ValueError, r"renyi_inf is undefined: .* kink"),
        (3, TypeError, "metric must be a name"),
        ({"a": "newton"}, TypeError, "'newton' belongs to the whole model"),
        ({"a": "gauss_newton"}, TypeError, "'gauss_newton' belongs to the whole model"),
    ],
)
@pytest.mark.wrong_type
def test_messages(metric, error, message):
    with pytest.raises(error, match=message):
        metrics.resolve(metric)


@pytest.mark.parametrize("order", [0.0, -1.0, float("inf"), float("nan")])
def test_orders_without_curvature_are_refused(order):
    with pytest.raises(ValueError, match="order must be a positive finite number"):
        metrics.renyi(order)


def test_the_order_is_honoured_by_both_names():
    for name in ("renyi", "stable_renyi"):
        found = metrics.resolve(name, order=3.0).divergence(jnp.asarray(Z), jnp.asarray(R))
        np.testing.assert_array_equal(found, rows(metrics.renyi(3.0), Z, R))


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


@pytest.mark.parametrize("shape", [(3, 2), (6, 1), (6,)])
def test_bernoulli_takes_every_entry_as_a_prediction_of_its_own(shape):
    z, r = Z.reshape(shape), R.reshape(shape)
    p, q = sigmoid(r), sigmoid(z)
    entries = -p * np.log(q) - (1 - p) * np.log(1 - q)
    expected = entries.sum(-1) if len(shape) > 1 else entries
    np.testing.assert_allclose(rows("bernoulli", z, r), expected, rtol=1e-13)
    potential = lambda z: metrics.potential(  # noqa: E731
        metrics.resolve("bernoulli"), z, jnp.asarray(r), None, "sum"
    )
    hessian = jax.hessian(potential)(jnp.asarray(r)).reshape(6, 6)
    np.testing.assert_allclose(hessian, np.diag((p * (1 - p)).ravel()), atol=1e-14)
    np.testing.assert_allclose(jax.grad(potential)(jnp.asarray(r)), 0, atol=1e-14)


def test_labels_drawn_for_bernoulli_have_its_curvature_as_covariance():
    z, number = jnp.asarray([[-1.5], [0.3]]), 4000
    draw = lambda key: metrics.sample(metrics.resolve("bernoulli"), key, z, None, "sum")  # noqa: E731
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), number)))[..., 0]
    p = sigmoid(np.asarray(z))[:, 0]
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), np.diag(p * (1 - p)), atol=0.01)


@pytest.mark.parametrize("shape", [(6, 1), (6,)])
@pytest.mark.parametrize(
    "metric", ["ngd", "reverse_kl", "renyi", metrics.renyi(1), "renyi_zero", "renyi_2"]
)
def test_one_column_is_no_categorical_distribution(metric, shape):
    objective = llqr.Objective(lambda w, x: (x @ w).reshape(shape), lambda z, x: jnp.mean(z**2))
    bound, w = objective.bind(jnp.ones((6, 2))), jnp.ones((2, 1))
    with pytest.raises(ValueError, match=r"shape \(6,.*metric='bernoulli'"):
        llqr.linearize(bound, w, metric)


@pytest.mark.parametrize(
    ("metric", "factor"),
    [("ngd", 1), ("reverse_kl", 1), *((metrics.renyi(p), p) for p in (0.5, 1, 4))],
)
def test_classes_drawn_have_the_curvature_as_covariance(metric, factor):
    z, number = jnp.asarray(R), 4000
    draw = lambda key: metrics.sample(metrics.resolve(metric), key, z, None, "sum")  # noqa: E731
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), number)))
    s = softmax(R)
    for i in range(2):
        fisher = np.diag(s[i]) - np.outer(s[i], s[i])
        np.testing.assert_allclose(np.cov(drawn[:, i].T) / factor, fisher, atol=0.02)


def test_each_output_has_draws_of_its_own():
    """Drawn alike, two of them would be correlated."""
    outputs = {"a": jnp.zeros((5, 3)), "b": jnp.zeros((5, 3))}
    tree = metrics.resolve({"a": "gaussian", "b": "gaussian"})
    drawn = metrics.sample(tree, jax.random.key(0), outputs, None, "sum")
    assert np.abs(drawn["a"] - drawn["b"]).min() > 1e-6
