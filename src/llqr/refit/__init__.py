"""Learning P: what is asked for, the objective Phi, directions, solvers, guards, the loop."""

from llqr.refit.options import Refit
from llqr.refit.record import STATUS, RefitInfo
from llqr.refit.stream import Streaming, StreamState

__all__ = ["STATUS", "Refit", "RefitInfo", "StreamState", "Streaming"]
