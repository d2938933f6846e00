"""Perturbations of parameters, as lists of leaves: pure functions of vectors."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax.numpy as jnp

from llqr.tree import divide, vdot
from llqr.typing import Array, Int, Number

Direction: TypeAlias = Literal["ema_grad", "ema_precond_grad", "ema_direction"]
Norm: TypeAlias = Literal["euclidean", "matrix_norm", "layer_euclidean", "layer_matrix_norm"]
Sign: TypeAlias = Literal["ascent", "descent"]
Kind: TypeAlias = Literal["sam", "friendly", "past_friendly", "asam", "fisher"]

GUARD = 1e-12
"""Added under the root of asam's and fisher_sam's norm."""

RIGHT_ANGLE = 1e-6
"""Cosine of w and P w up to which w.Pw is no length: a P > 0 with it has condition 4e12."""


def adaptive(
    names: list[str], params: list[Array], w: list[Array], rho: Number, eta: float
) -> list[Array]:
    """Return rho T T w / |T w| with T = |theta| + eta, and T = 1 for leaves named bias."""
    t = [
        jnp.ones_like(x) if name.split("/")[-1] == "bias" else jnp.abs(x) + eta
        for name, x in zip(names, params, strict=True)
    ]
    tw = [a * b for a, b in zip(t, w, strict=True)]
    scale = rho / jnp.sqrt(vdot(tw, tw) + GUARD)
    return [scale * a * b for a, b in zip(t, tw, strict=True)]


def in_fisher_metric(w: list[Array], rho: Number, eta: float) -> list[Array]:
    """Return rho f / sqrt(w.f) with f = w / (w^2 + eta)."""
    f = [divide(g, g * g + eta) for g in w]
    scale = rho / jnp.sqrt(vdot(w, f) + GUARD)
    return [scale * x for x in f]


def layers(names: list[str], layer_of: Callable[[str], str] | None) -> list[list[int]]:
    """Return the places of each layer's leaves."""
    name = layer_of or (lambda leaf: leaf.split("/")[0])
    found: dict[str, list[int]] = {}
    for i, leaf in enumerate(names):
        found.setdefault(name(leaf), []).append(i)
    return list(found.values())


def of_length(
    groups: list[list[int]],
    w: list[Array],
    z: list[Array],
    rho: Number,
    *,
    matrix: bool,
    epsilon: float,
) -> tuple[list[Array], Int[Array, ""]]:
    """Give z the length rho / sqrt(groups) in every group of leaves.

    Args:
      groups: places of the leaves that have a length together.
      w: base vector.
      z: direction, P w or w.
      rho: radius of all groups together.
      matrix: whether the length is sqrt(w.z), and not |z|; where w.z is no length, the group's
        direction is w, with its own.
      epsilon: added under every root.

    Returns:
      The perturbation, and how many groups gave way to w.
    """
    share = rho / math.sqrt(max(len(groups), 1))
    out, guarded = list(z), jnp.zeros((), jnp.int32)
    for places in groups:
        ws, zs = [w[i] for i in places], [z[i] for i in places]
        square = vdot(zs, zs)
        if matrix:
            inner = vdot(ws, zs)
            bad = ~(inner > RIGHT_ANGLE * jnp.sqrt(vdot(ws, ws) * square)) & (square != 0)
            zs = [jnp.where(bad, a, b) for a, b in zip(ws, zs, strict=True)]
            square = jnp.where(bad, vdot(ws, ws), inner)
            guarded += bad.astype(jnp.int32)
        for i, x in zip(places, zs, strict=True):
            out[i] = share / jnp.sqrt(square + epsilon) * x
    return out, guarded
