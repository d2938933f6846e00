"""llqr: layerwise LQR, a learned second-order preconditioner around any optax optimizer.

Example:
  >>> import optax, llqr
  >>> tx = llqr.llqr(optax.sgd(0.05, momentum=0.9), structure="e-kfac", metric="ngd")
"""

from llqr import diagnostics as diagnostics
from llqr import errors as errors
from llqr import lqr as lqr
from llqr import metrics as metrics
from llqr import operators as operators
from llqr import schedules as schedules
from llqr import stages as stages
from llqr import structures as structures
from llqr import tree as tree
from llqr import typing as typing
from llqr.access import blocks, install, precondition, preconditioner, refresh, restore
from llqr.accumulation import microbatched
from llqr.approximation import Quality, quality
from llqr.curvature import QuadraticModel, Route, linearize
from llqr.curvature import model as quadratic
from llqr.diagnostics import Description, Report, describe, inspect
from llqr.exact import ExactState, exact
from llqr.metrics import Metric
from llqr.objective import BoundObjective, Objective
from llqr.refit import STATUS, Refit, RefitInfo, Streaming, StreamState
from llqr.refit import solvers as solvers
from llqr.sharding import state_shardings
from llqr.sharpness import (
    Sharpness,
    SharpnessInfo,
    SharpnessOracle,
    SharpnessState,
    asam,
    fisher_sam,
    friendly_sam,
    past_friendly_sam,
    sam,
)
from llqr.state import LLQRState, find
from llqr.structures import STRUCTURES, Rule, Structure, stacked
from llqr.transform import llqr, scale_by_llqr
from llqr.transform import streaming_llqr as streaming
from llqr.trust import Trust, TrustReport, TrustState

__all__ = [
    "STATUS",
    "STRUCTURES",
    "BoundObjective",
    "Description",
    "ExactState",
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
    "Sharpness",
    "SharpnessInfo",
    "SharpnessOracle",
    "SharpnessState",
    "StreamState",
    "Streaming",
    "Structure",
    "Trust",
    "TrustReport",
    "TrustState",
    "asam",
    "blocks",
    "describe",
    "diagnostics",
    "errors",
    "exact",
    "find",
    "fisher_sam",
    "friendly_sam",
    "inspect",
    "install",
    "linearize",
    "llqr",
    "lqr",
    "metrics",
    "microbatched",
    "operators",
    "past_friendly_sam",
    "precondition",
    "preconditioner",
    "quadratic",
    "quality",
    "refresh",
    "restore",
    "sam",
    "scale_by_llqr",
    "schedules",
    "solvers",
    "stacked",
    "stages",
    "state_shardings",
    "streaming",
    "structures",
    "tree",
    "typing",
]
