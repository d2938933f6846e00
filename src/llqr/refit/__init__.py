"""Learning P: what is asked for, the objective Phi, directions, solvers, guards, the loop."""

from llqr.refit.options import Refit, Streaming
from llqr.refit.record import STATUS, RefitInfo
from llqr.refit.streaming import StreamState

__all__ = ["STATUS", "Refit", "RefitInfo", "StreamState", "Streaming"]
