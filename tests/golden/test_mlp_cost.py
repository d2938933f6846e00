"""Costs measured on the papers' code (tests/golden/mlp_cost_f64.*), to 1e-12.

The MLP is 6-5-4-3 with ReLU, batch 8; numbers are flat in the order b0, W0, b1, W1, b2, W2.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llqr
from tests import oracle

HERE = Path(__file__).parent
NAMES = ("b0", "W0", "b1", "W1", "b2", "W2")
ROWS = json.loads((HERE / "mlp_cost_f64.json").read_text())["rows"]
# The others are reduced over the batch jointly there, and row by row here.
SAME = ("ngd", "newton", "reverse_kl", "renyi_zero")
CASES = [row for row in ROWS if row["div"] in SAME]


@pytest.fixture(scope="module")
def stored():
    with np.load(HERE / "mlp_cost_f64.npz") as file:
        return {name: file[name] for name in file.files}


def forward(params, batch):
    x = batch["x"]
    for i in (0, 1):
        x = jax.nn.relu(x @ params[f"W{i}"] + params[f"b{i}"])
    return jax.nn.log_softmax(x @ params["W2"] + params["b2"])


def loss(outputs, batch):
    return -jnp.mean(jnp.sum(batch["target"] * outputs, -1))


def bound(stored, smoothing):
    target = (1 - smoothing) * np.eye(3)[stored["y"]] + smoothing / 3
    batch = {"x": jnp.asarray(stored["x"], float), "target": jnp.asarray(target)}
    return llqr.Objective(forward, loss).bind(batch)


def params_of(stored):
    return {name: jnp.asarray(stored[name], float) for name in NAMES}


def unflatten(stored, flat):
    sizes = [stored[name].size for name in NAMES]
    parts = np.split(np.asarray(flat, float), np.cumsum(sizes)[:-1])
    return {n: jnp.asarray(p.reshape(stored[n].shape)) for n, p in zip(NAMES, parts, strict=True)}


def flatten(tree):
    return np.concatenate([np.ravel(tree[name]) for name in NAMES])


def close(found, stored):
    np.testing.assert_allclose(found, stored, rtol=1e-12, atol=1e-12 * np.abs(stored).max())


def key(row):
    return f"{row['div']}/ls{row['label_smoothing']}/damp{row['damping']}/{row['u']}"


@pytest.mark.parametrize("row", CASES, ids=key)
def test_cost_and_its_gradient(stored, row):
    suffix = "" if row["label_smoothing"] == 0 else f"_ls{row['label_smoothing']}"
    u = stored[f"u/{row['u']}"]
    if row["u"] == "neg_grad":
        u = -stored[f"grad_flat{suffix}"]
    model = llqr.linearize(
        bound(stored, row["label_smoothing"]), params_of(stored), row["div"],
        damping=row["damping"],
    )  # fmt: skip
    value, gradient = oracle.value_and_gradient(model, unflatten(stored, u))
    close(value, row["cost"])
    close(flatten(gradient), stored[f"control_grad/{key(row)}"])


def test_every_combination_is_covered():
    seen = {(row["div"], row["label_smoothing"], row["damping"]) for row in CASES}
    for name in ("ngd", "newton", "reverse_kl"):
        smoothings = (0.0,) if name == "reverse_kl" else (0.0, 0.1)
        assert {(name, s, d) for s in smoothings for d in (0.0, 0.1)} <= seen


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_and_matrices(stored, smoothing):
    suffix = "" if smoothing == 0 else f"_ls{smoothing}"
    params, objective = params_of(stored), bound(stored, smoothing)
    close(flatten(llqr.linearize(objective, params).gradient), stored[f"grad_flat{suffix}"])
    for metric, name in (("newton", f"hessian_mean_ce{suffix}"), ("ngd", "fisher_sum")):
        product = llqr.linearize(objective, params, metric).product
        columns = [flatten(product(unflatten(stored, e))) for e in np.eye(stored[name].shape[0])]
        close(np.stack(columns), stored[name])


def test_renyi_of_one_row_is_the_order_times_fisher(stored):
    """Where there is one row, joint and per-row reduction agree: half the Fisher matrix."""
    params, objective = params_of(stored), bound(stored, 0.0)
    one = objective.objective.bind(jax.tree.map(lambda x: x[:1], objective.batch))
    u = unflatten(stored, stored["u/rand1"])
    half = llqr.linearize(one, params, "renyi").product(u)
    fisher = llqr.linearize(one, params, "ngd").product(u)
    close(2 * flatten(half), flatten(fisher))


STAGED = llqr.lqr.stages_from_functions(
    [
        ("0", lambda p, x: x @ p["W"] + p["b"]),
        ("relu0", lambda _, x: jax.nn.relu(x)),
        ("1", lambda p, x: x @ p["W"] + p["b"]),
        ("relu1", lambda _, x: jax.nn.relu(x)),
        ("2", lambda p, x: x @ p["W"] + p["b"]),
        ("log-softmax", lambda _, x: jax.nn.log_softmax(x)),
    ]
)


@pytest.mark.parametrize(
    "row", [row for row in CASES if row["u"] in ("neg_grad", "rand2")], ids=key
)
def test_cost_and_its_gradient_layer_by_layer(stored, row):
    suffix = "" if row["label_smoothing"] == 0 else f"_ls{row['label_smoothing']}"
    flat = -stored[f"grad_flat{suffix}"] if row["u"] == "neg_grad" else stored[f"u/{row['u']}"]
    staged = lambda tree: {i: {"W": tree[f"W{i}"], "b": tree[f"b{i}"]} for i in "012"}  # noqa: E731
    objective = bound(stored, row["label_smoothing"])
    problem = llqr.lqr.linearize(
        STAGED, staged(params_of(stored)), objective.batch["x"], loss=objective.loss,
        metric=row["div"], damping=row["damping"],
    )  # fmt: skip
    value, gradient = llqr.lqr.cost_and_gradient(problem, staged(unflatten(stored, flat)))
    close(value, row["cost"])
    found = np.concatenate([np.r_[gradient[i]["b"], np.ravel(gradient[i]["W"])] for i in "012"])
    close(found, stored[f"control_grad/{key(row)}"])
