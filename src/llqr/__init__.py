"""llqr: layerwise LQR, a learned second-order preconditioner around any optax optimizer.

Example:
  >>> import optax, llqr
  >>> tx = llqr.llqr(optax.sgd(0.05, momentum=0.9), structure="e-kfac", metric="ngd")
"""

from llqr import diagnostics as diagnostics
from llqr import lqr as lqr
from llqr import metrics as metrics
from llqr import solvers as solvers
from llqr.diagnostics import Description, Quality, Report, describe, inspect, quality
from llqr.exact_steps import exact
from llqr.learning import Refit, RefitInfo
from llqr.metrics import Metric
from llqr.objective import BoundObjective, Objective
from llqr.quadratic import QuadraticModel, Route, linearize
from llqr.structures import STRUCTURES, Rule, Structure
from llqr.transform import LLQRState, find, llqr, refresh, scale_by_llqr

__all__ = [
    "STRUCTURES",
    "BoundObjective",
    "Description",
    "LLQRState",
    "Metric",
    "Objective",
    "QuadraticModel",
    "Quality",
    "Refit",
    "RefitInfo",
    "Report",
    "Route",
    "Rule",
    "Structure",
    "describe",
    "diagnostics",
    "exact",
    "find",
    "inspect",
    "linearize",
    "llqr",
    "lqr",
    "metrics",
    "quality",
    "refresh",
    "scale_by_llqr",
    "solvers",
]
