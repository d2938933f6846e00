"""The Jacobian of a network, the curvature of a metric, and the quadratic model of a step.

`whole`, `chunked` and (in `llqr.lqr`) layerwise are ways to compute one thing; a `Route` chooses.
"""

from llqr.curvature.model import POWER_STEPS, QuadraticModel, linearize
from llqr.curvature.route import Route
from llqr.operators import FunctionOperator, LinearOperator, SymmetricOperator

__all__ = [
    "POWER_STEPS",
    "FunctionOperator",
    "LinearOperator",
    "QuadraticModel",
    "Route",
    "SymmetricOperator",
    "linearize",
]
