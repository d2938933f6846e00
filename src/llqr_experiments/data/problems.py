r"""The differential equations of the runner, each with a solution that is known.

  name        equation                                        box                solution
  poisson     -u_xx - u_yy = f                                [0, 1]^2           sin pi x sin pi y
  burgers     u_t + u u_x = nu u_xx, u(x, 0) = -sin pi x      [-1, 1] x [0, 1]   Cole and Hopf's
  wave        u_tt = c^2 u_xx, u_t(x, 0) = 0                  [0, 1]^2           two standing waves
  helmholtz   u_xx + u_yy + k^2 u = f                         [-1, 1]^2          sin pi x sin 4 pi y
  heat        u_t = Laplacian u / 4                           [0, 1]^5           e^-t sum sin 2 x_i
  poisson_5d  -Laplacian u = pi^2 sum cos pi x_i              [0, 1]^5           sum cos pi x_i
  diffusion   -div(k grad u) = f: k from measurements of u    [0, 1]^2           see `DIFFUSION`

The weights of conditions are by what a residual of the equation counts, which is 1.

Sources: Dangel et al., K-FAC for physics-informed networks (arXiv 2405.15603), for `heat` and
`poisson_5d`; Wang, Yu and Perdikaris (arXiv 2007.14527) for `wave`, there with c = 2; Wang, Teng
and Perdikaris (arXiv 2001.04536) for `helmholtz`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from llqr_experiments.data.equations import Equation, Face, Function, Measurements

VISCOSITY = 0.05
"""Of Burgers' equation: nu."""


def _zero(x: np.ndarray) -> np.ndarray:
    return np.zeros(len(x))


def _column(i: int, count: int, weight: float = 1.0) -> tuple[float, ...]:
    """Coefficients that ask for one term."""
    return tuple(weight if j == i else 0.0 for j in range(count))


def _scaled(weight: float, value: Function) -> Function:
    return lambda x: weight * value(x)


def _all_faces(dim: int, columns: int, weight: float, value: Function) -> tuple[Face, ...]:
    """The first unknown on every face of a box."""
    asked, scaled = _column(0, columns, weight), _scaled(weight, value)
    return tuple(Face(axis, end, asked, scaled) for end in (0, 1) for axis in reversed(range(dim)))


# --- Poisson's equation -----------------------------------------------------------------------

BOUNDARY = 10.0
"""What a residual on the boundary counts, next to one of f inside, which goes up to 20."""


def _bump(x: np.ndarray) -> np.ndarray:
    return np.sin(np.pi * x).prod(-1)


POISSON = Equation(
    "Poisson's equation on the unit square, -Laplacian u = f",
    ("x", "y"),
    ((0.0, 1.0), (0.0, 1.0)),
    (0.0, 0.0, 0.0, -1.0, -1.0),
    lambda x: 2 * np.pi**2 * _bump(x),
    _all_faces(2, 5, BOUNDARY, _zero),
    _bump,
    _column(0, 5),
)


# --- Burgers' equation ------------------------------------------------------------------------


def burgers_solution(points: np.ndarray) -> np.ndarray:
    """Return u at (x, t), (n, 2), by the transformation of Cole and Hopf.

    u = -integral sin(pi y) f(y) w(x - y) dy / integral f(y) w(x - y) dy with
    f(y) = exp(-cos(pi y) / (2 pi nu)) and w the normal density of variance 2 nu t.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(80)
    x, t = points[:, :1], points[:, 1:]
    y = x - np.sqrt(4 * VISCOSITY * t) * nodes
    f = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * VISCOSITY))
    return -np.sum(f * np.sin(np.pi * y), 1) / np.sum(f, 1)


def _advection(value: Any, gradient: Any, second: Any) -> Any:
    """U u_x."""
    del second
    return value[:, :1] * gradient[:, 0, :1]


BURGERS = Equation(
    "Burgers' equation, u_t + u u_x = 0.05 u_xx",
    ("x", "t"),
    ((-1.0, 1.0), (0.0, 1.0)),
    (0.0, 0.0, 1.0, -VISCOSITY, 0.0, 1.0),
    _zero,
    (
        Face(1, 0, _column(0, 6, 2.0), lambda x: -2.0 * np.sin(np.pi * x[:, 0])),
        Face(0, 0, _column(0, 6, 2.0), _zero),
        Face(0, 1, _column(0, 6, 2.0), _zero),
    ),
    burgers_solution,
    _column(0, 6),
    terms=_advection,
)


# --- the wave equation ------------------------------------------------------------------------

SPEED = 1.0
"""Of the waves: c. The usual benchmark has 2."""


def _waves(points: np.ndarray) -> np.ndarray:
    x, t = np.pi * points[:, 0], np.pi * SPEED * points[:, 1]
    return np.sin(x) * np.cos(t) + 0.5 * np.sin(4 * x) * np.cos(4 * t)


WAVE_SHARE = 0.01
"""What a residual of the wave equation counts: u_tt goes up to 80."""

WAVE = Equation(
    "the wave equation, u_tt = u_xx, two standing waves",
    ("x", "t"),
    ((0.0, 1.0), (0.0, 1.0)),
    (0.0, 0.0, 0.0, -WAVE_SHARE * SPEED**2, WAVE_SHARE),
    _zero,
    (
        Face(1, 0, _column(0, 5), _waves),
        Face(1, 0, _column(2, 5, 0.1), _zero),
        Face(0, 0, _column(0, 5), _zero),
        Face(0, 1, _column(0, 5), _zero),
    ),
    _waves,
    _column(0, 5),
)


# --- Helmholtz' equation ----------------------------------------------------------------------

_WAVES = (1, 4)


def _ripples(x: np.ndarray) -> np.ndarray:
    return np.sin(np.pi * x * np.array(_WAVES)).prod(-1)


HELMHOLTZ = Equation(
    "Helmholtz' equation, Laplacian u + u = f",
    ("x", "y"),
    ((-1.0, 1.0), (-1.0, 1.0)),
    (1.0, 0.0, 0.0, 1.0, 1.0),
    lambda x: (1 - np.pi**2 * sum(a**2 for a in _WAVES)) * _ripples(x),
    _all_faces(2, 5, BOUNDARY, _zero),
    _ripples,
    _column(0, 5),
)


# --- five variables, fresh points ---------------------------------------------------------------


def _cooling(x: np.ndarray) -> np.ndarray:
    return np.exp(-x[:, -1]) * np.sin(2 * x[:, :-1]).sum(-1)


HEAT = Equation(
    "the heat equation in four variables and time, u_t = Laplacian u / 4",
    ("x_1", "x_2", "x_3", "x_4", "t"),
    ((0.0, 1.0),) * 5,
    (*(0.0,) * 5, 1.0, *(-0.25,) * 4, 0.0),
    _zero,
    (
        Face(4, 0, _column(0, 11), _cooling),
        *(Face(axis, end, _column(0, 11), _cooling) for end in (0, 1) for axis in range(4)),
    ),
    _cooling,
    _column(0, 11),
)


def _cosines(x: np.ndarray) -> np.ndarray:
    return np.cos(np.pi * x).sum(-1)


POISSON_5D = Equation(
    "Poisson's equation in five variables, -Laplacian u = f",
    ("x_1", "x_2", "x_3", "x_4", "x_5"),
    ((0.0, 1.0),) * 5,
    (*(0.0,) * 6, *(-1.0,) * 5),
    _scaled(np.pi**2, _cosines),
    _all_faces(5, 11, BOUNDARY, _cosines),
    _cosines,
    _column(0, 11),
)


# --- a coefficient from measurements ------------------------------------------------------------


def _logarithm(x: np.ndarray) -> np.ndarray:
    """The logarithm of k."""
    return 0.5 * np.sin(2 * np.pi * x[:, 0]) * np.cos(np.pi * x[:, 1])


def _source(x: np.ndarray) -> np.ndarray:
    """-div(k grad u) of u = sin pi x sin pi y."""
    (a, b), pi = np.pi * x.T, np.pi
    u = np.sin(a) * np.sin(b)
    slopes = pi * np.cos(a) * np.sin(b), pi * np.sin(a) * np.cos(b)
    log_slopes = pi * np.cos(2 * a) * np.cos(b), -0.5 * pi * np.sin(2 * a) * np.sin(b)
    along = sum(p * q for p, q in zip(slopes, log_slopes, strict=True))
    return -np.exp(_logarithm(x)) * (along - 2 * pi**2 * u)


def _flow(value: Any, gradient: Any, second: Any) -> Any:
    """-div(k grad u), and k: the second unknown is its logarithm."""
    k = jnp.exp(value[:, 1])
    along = jnp.sum(gradient[:, 0] * gradient[:, 1], -1)
    return jnp.stack([-k * (along + jnp.sum(second[:, 0], -1)), k], -1)


DIFFUSION = Equation(
    "k of -div(k grad u) = f, from measurements of u",
    ("x", "y"),
    ((0.0, 1.0), (0.0, 1.0)),
    _column(5, 7),
    _source,
    _all_faces(2, 7, BOUNDARY, _zero),
    lambda x: np.exp(_logarithm(x)),
    _column(6, 7),
    unknowns=2,
    terms=_flow,
    measured=Measurements(_column(0, 7, BOUNDARY), _scaled(BOUNDARY, _bump)),
)
"""u = sin pi x sin pi y and k = exp(sin(2 pi x) cos(pi y) / 2). All lines along which u falls start
at its one maximum, so that u and f determine k."""

EQUATIONS = {
    "poisson": POISSON, "burgers": BURGERS, "wave": WAVE, "helmholtz": HELMHOLTZ, "heat": HEAT,
    "poisson_5d": POISSON_5D, "diffusion": DIFFUSION,
}  # fmt: skip
"""Every equation, by name."""
