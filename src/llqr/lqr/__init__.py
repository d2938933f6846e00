"""The exact layerwise LQR: the reference against which every fast path is proven."""

from llqr.errors import NonConvexError
from llqr.lqr import layerwise as _layerwise  # registers the layerwise route  # noqa: F401
from llqr.lqr.cost import cost, cost_and_gradient, gradient
from llqr.lqr.linearization import linearize
from llqr.lqr.problem import LQRProblem, Stage
from llqr.lqr.riccati import (
    MAX_SIZE,
    Feedback,
    Solution,
    riccati,
    solve,
    solve_cg,
)
from llqr.stages import Segment, StagedForward, StagedModel, stages_from_functions

__all__ = [
    "MAX_SIZE",
    "Feedback",
    "LQRProblem",
    "NonConvexError",
    "Segment",
    "Solution",
    "Stage",
    "StagedForward",
    "StagedModel",
    "cost",
    "cost_and_gradient",
    "gradient",
    "linearize",
    "riccati",
    "solve",
    "solve_cg",
    "stages_from_functions",
]
