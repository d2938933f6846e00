"""The toy functions, as staged models with known minima.

The input of each model is the row of its constants, so that the same code serves the exact
layerwise solver, the fused route and the learned preconditioner.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

import llqr
from llqr import lqr
from llqr.typing import Array, Float


@dataclass(frozen=True, eq=False)  # equal by identity, hence hashable: static to jit
class Toy:
    """A function to minimise.

    Attributes:
      staged: the model; its output [1, 1] is the value.
      widths: stage -> number of its variables.
      constants: the model's input.
      minimum: the global minimiser.
      value: f there.
      start: where a run starts by default.
      view: ((left, right), (bottom, top)) of the picture, in the first two variables.
    """

    staged: lqr.StagedModel
    widths: dict[str, int]
    constants: tuple[float, ...]
    minimum: tuple[float, ...]
    value: float
    start: tuple[float, ...]
    view: tuple[tuple[float, float], tuple[float, float]]

    def params(self, theta: Array) -> dict[str, dict[str, Array]]:
        """Return the variables as parameters, kernels of shape [1, width] by stage."""
        ends = np.cumsum(list(self.widths.values()))[:-1]
        parts = jnp.split(jnp.asarray(theta), ends)
        return {n: {"kernel": p[None]} for n, p in zip(self.widths, parts, strict=True)}

    def theta(self, params: dict[str, dict[str, Array]]) -> Array:
        """Return parameters as variables [d], in the order of the stages."""
        return jnp.concatenate([params[name]["kernel"][0] for name in self.widths])

    @property
    def inputs(self) -> Array:
        """The model's input [1, constants], in the current precision."""
        return jnp.array([self.constants])

    def objective(self) -> llqr.BoundObjective:
        """Return f as an objective over parameters."""
        return llqr.Objective(self.staged.as_forward(_inputs), _output_sum).bind(self.inputs)

    def __call__(self, theta: Any) -> Float[Array, ""]:
        """Return f(theta)."""
        return self.objective()(self.params(theta))


def _inputs(batch: Array) -> Array:
    return batch


def _output_sum(outputs: Array, _: Any) -> Array:
    return jnp.sum(outputs)


def rosenbrock(params: dict[str, Array], constants: Array) -> Array:
    """A curved valley: b (y - x^2)^2 + (a - x)^2 with (a, b) = constants."""
    x, y = params["kernel"].T
    a, b = constants.T
    return (b * (y - x**2) ** 2 + (a - x) ** 2)[:, None]


def rosenbrock_first(params: dict[str, Array], constants: Array) -> Array:
    """The half of x: state (a^2 - 2 a x, x^2, b)."""
    (x,) = params["kernel"].T
    a, b = constants.T
    return jnp.stack([a**2 - 2 * a * x, x**2, b], axis=1)


def rosenbrock_second(params: dict[str, Array], state: Array) -> Array:
    """The half of y: z_1 + z_2 + z_3 (y - z_2)^2."""
    (y,) = params["kernel"].T
    z1, z2, z3 = state.T
    return (z1 + z2 + z3 * (y - z2) ** 2)[:, None]


def ackley(params: dict[str, Array], constants: Array) -> Array:
    """A funnel with ripples, and a kink at its minimum, where no derivative exists.

    -a exp(-b sqrt(sum theta^2 / d)) - exp(sum cos(c theta) / d) + a + e, (a, b, c) = constants.
    """
    theta = params["kernel"]
    a, b, c = constants.T
    root = jnp.sqrt(jnp.mean(theta**2, axis=1))
    ripple = jnp.mean(jnp.cos(c[:, None] * theta), axis=1)
    return (-a * jnp.exp(-b * root) - jnp.exp(ripple) + a + math.e)[:, None]


def goldstein_price(params: dict[str, Array], constants: Array) -> Array:
    """A product of two polynomials with four local minima; the constants do not enter."""
    x, y = params["kernel"].T
    first = 1 + (x + y + 1) ** 2 * (19 - 14 * x + 3 * x**2 - 14 * y + 6 * x * y + 3 * y**2)
    second = 30 + (2 * x - 3 * y) ** 2 * (18 - 32 * x + 12 * x**2 + 48 * y - 36 * x * y + 27 * y**2)
    return (first * second + 0 * constants[:, 0])[:, None]


def _toy(stages: list[tuple[str, Any, int]], *rest: Any) -> Toy:
    staged = lqr.stages_from_functions([(name, function) for name, function, _ in stages])
    return Toy(staged, {name: width for name, _, width in stages}, *rest)


# constants, minimiser, least value, start, view
_VALLEY = ((1.0, 100.0), (1.0, 1.0), 0.0, (-1.2, 1.0), ((-1.7, 1.6), (-0.5, 1.9)))

FUNCTIONS: dict[str, Toy] = {
    "rosenbrock": _toy([("rosenbrock", rosenbrock, 2)], *_VALLEY),
    "split_rosenbrock": _toy(
        [("first", rosenbrock_first, 1), ("second", rosenbrock_second, 1)], *_VALLEY
    ),
    "ackley": _toy(
        [("ackley", ackley, 3)],
        (20.0, 0.2, 2 * math.pi),
        (0.0, 0.0, 0.0),
        0.0,
        (0.4, -0.3, 0.2),
        ((-0.6, 0.6), (-0.6, 0.6)),
    ),
    "goldstein_price": _toy(
        [("goldstein_price", goldstein_price, 2)],
        (1.0, 100.0),
        (0.0, -1.0),
        3.0,
        (-0.4, -0.7),
        ((-1.0, 0.8), (-1.6, -0.1)),
    ),
}
