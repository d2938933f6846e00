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

_WIDTHS = (2, 24, 24, 1)


def solution_error(params: Any, batch: Batch) -> Any:
    """Return the error of the solution in L2, relative to it."""
    u = networks.jets(params, batch["x"])[0]
    return jnp.sqrt(jnp.mean((u - batch["label"]) ** 2) / jnp.mean(batch["label"] ** 2))


def equation(
    name: str, forward: Any, train: Batch, test: Batch, told: str,
    widths: tuple[int, ...] = _WIDTHS, *, held_out: bool = False,
) -> Workload:  # fmt: skip
    """An equation on all of its points, by the error of the solution."""
    return Workload(
        name,
        partial(networks.perceptron_parameters, widths=widths),
        forward,
        squared_error,
        train=train,
        fixed=train,
        test=test,
        batch=rows(train),
        steps=600,
        metric="gaussian",
        measure="test",
        test_loss=solution_error,
        float64=True,
        held_out=held_out,
        told=told,
    )


# --- Poisson's equation -------------------------------------------------------------------------


def _poisson(params: Any, batch: Batch) -> Any:
    value, _, second = networks.jets(params, batch["x"])
    a, b = batch["operator"][:, 0], -batch["operator"][:, -1]
    return a * value - b * second.sum(-1)


def poisson() -> Workload:
    """-Laplacian u = f on the unit square, u = 0 on its boundary, in units of the largest f."""
    train = equations.grid(problems.POISSON, (16, 16), (16,) * 4)
    test = equations.solution_rows(problems.POISSON)
    told = train.gather(np.arange(len(train)))
    scaled = {name: told[name] / (2 * np.pi**2) for name in ("operator", "label")}
    return equation(
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
    inside = first[:, 1] + value * first[:, 0] - problems.VISCOSITY * second[:, 0]
    return jnp.where(batch["inside"] > 0, inside, batch["weight"] * value)


def burgers() -> Workload:
    """u_t + u u_x = nu u_xx for x in [-1, 1], t in [0, 1], u(x, 0) = -sin(pi x), u(+-1, t) = 0."""
    rows = equations.grid(problems.BURGERS, (24, 16), (48, 16, 16))
    weight = np.max([face.operator[0] for face in problems.BURGERS.faces])
    train = {
        "x": rows.x,
        "inside": (rows.operator[:, 0] == 0).astype(float),
        "weight": np.full(len(rows), weight),
        "label": rows.label,
    }
    x, t = np.meshgrid(np.linspace(-1, 1, 33), np.linspace(0, 1, 17)[1:], indexing="ij")
    test = {"x": np.stack([x.ravel(), t.ravel()], -1)}
    test["label"] = problems.burgers_solution(test["x"])
    return equation(
        "burgers",
        _burgers,
        train,
        test,
        "Burgers' equation, viscosity 0.05, tanh 2-24-24-1, float64",
    )
