r"""Sharpness-aware minimization: gradients taken at a worse point nearby.

A SAM oracle has the contract of `jax.value_and_grad`, so that it feeds any optax optimizer.
With `precondition=` the worse point is sought in the geometry that LLQR has learned.

symbol        meaning                                          here
theta         parameters                                       params
g             gradient at theta                                gradient
gbar          moving average of gradients                      average
w             base vector of the perturbation                  base
P             inverse preconditioner                           precondition
z             direction: w, P w or P w / |P w|                 direction
rho, eps      radius, perturbation                             rho, perturbation
e             guards divisions                                 epsilon
"""

from .oracle import Sharpness, SharpnessInfo, SharpnessOracle, SharpnessState
from .variants import asam, fisher_sam, friendly_sam, past_friendly_sam, sam

__all__ = [
    "Sharpness",
    "SharpnessInfo",
    "SharpnessOracle",
    "SharpnessState",
    "asam",
    "fisher_sam",
    "friendly_sam",
    "past_friendly_sam",
    "sam",
]
