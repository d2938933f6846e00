"""Learning P: what is asked for, the objective Phi, directions, solvers, guards, the loop."""

from llqr.refit.following import StreamState
from llqr.refit.options import Refit, Streaming
from llqr.refit.record import STATUS, RefitInfo

__all__ = ["STATUS", "Refit", "RefitInfo", "StreamState", "Streaming"]
