"""Physics-informed networks in float64: a row asks for a residual of an equation at a point.

Every batch has all points. The test loss is the error of the solution in L2, relative to it.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from llqr_experiments.data import equations, problems

from . import networks
from .problem import Batch, Workload, rows, squared_error

VISCOSITY = 0.05
_WIDTHS = (2, 24, 24, 1)


def _error(params: Any, batch: Batch) -> Any:
    u = networks.jets(params, batch["x"])[0]
    return jnp.sqrt(jnp.mean((u - batch["label"]) ** 2) / jnp.mean(batch["label"] ** 2))


def _workload(name: str, forward: Any, train: Batch, test: Batch, told: str) -> Workload:
    return Workload(
        name,
        partial(networks.perceptron_parameters, widths=_WIDTHS),
        forward,
        squared_error,
        train=train,
        fixed=train,
        test=test,
        batch=rows(train),
        steps=600,
        metric="gaussian",
        measure="test",
        test_loss=_error,
        float64=True,
        told=told,
    )


# --- Poisson's equation -------------------------------------------------------------------------


def _poisson(params: Any, batch: Batch) -> Any:
    value, _, second = networks.jets(params, batch["x"])
    a, b = batch["operator"].T
    return a * value - b * second.sum(-1)


def poisson() -> Workload:
    """-Laplacian u = f on the unit square, u = 0 on its boundary, in units of the largest f."""
    train = equations.grid(problems.POISSON, (16, 16), (16,) * 4)
    test, unit = equations.solution_rows(problems.POISSON), 2 * np.pi**2
    told = train.gather(np.arange(len(train)))
    value, *_, second = told["operator"].T  # all second derivatives alike
    scaled = {"operator": np.stack([value, -second], -1) / unit, "label": told["label"] / unit}
    return _workload(
        "poisson",
        _poisson,
        told | scaled,
        test.gather(np.arange(0, len(test), 4)),
        "Poisson's equation on the unit square, tanh 2-24-24-1, float64",
    )


# --- Burgers' equation --------------------------------------------------------------------------


def _burgers(params: Any, batch: Batch) -> Any:
    """u_t + u u_x - nu u_xx inside, u on the boundary."""
    value, first, second = networks.jets(params, batch["x"])
    inside = first[:, 1] + value * first[:, 0] - VISCOSITY * second[:, 0]
    return jnp.where(batch["inside"] > 0, inside, batch["weight"] * value)


def burgers() -> Workload:
    """u_t + u u_x = nu u_xx for x in [-1, 1], t in [0, 1], u(x, 0) = -sin(pi x), u(+-1, t) = 0."""
    x, t = np.meshgrid((np.arange(24) + 0.5) / 12 - 1, (np.arange(16) + 0.5) / 16, indexing="ij")
    inside = np.stack([x.ravel(), t.ravel()], -1)
    places, times = (np.arange(48) + 0.5) / 24 - 1, (np.arange(16) + 0.5) / 16
    begin = np.stack([places, 0 * places], -1)
    ends = [np.stack([np.full(16, end), times], -1) for end in (-1.0, 1.0)]
    points = np.concatenate([inside, begin, *ends])
    weight, count = 2.0, len(inside)
    label = np.zeros(len(points))
    label[count : count + 48] = -weight * np.sin(np.pi * places)
    train = {
        "x": points,
        "inside": (np.arange(len(points)) < count).astype(float),
        "weight": np.full(len(points), weight),
        "label": label,
    }
    x, t = np.meshgrid(np.linspace(-1, 1, 33), np.linspace(0, 1, 17)[1:], indexing="ij")
    test = {"x": np.stack([x.ravel(), t.ravel()], -1)}
    test["label"] = burgers_solution(test["x"])
    return _workload(
        "burgers",
        _burgers,
        train,
        test,
        "Burgers' equation, viscosity 0.05, tanh 2-24-24-1, float64",
    )


def burgers_solution(points: np.ndarray) -> np.ndarray:
    """Return u at (x, t), (n, 2) with t > 0, by the transformation of Cole and Hopf.

    u = -integral sin(pi y) f(y) w(x - y) dy / integral f(y) w(x - y) dy with
    f(y) = exp(-cos(pi y) / (2 pi nu)) and w the normal density of variance 2 nu t.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(80)
    x, t = points[:, :1], points[:, 1:]
    y = x - np.sqrt(4 * VISCOSITY * t) * nodes
    f = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * VISCOSITY))
    return -np.sum(f * np.sin(np.pi * y), 1) / np.sum(f, 1)
