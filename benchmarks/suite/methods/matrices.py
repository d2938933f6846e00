"""Leaves as matrices: all axes but the last are rows, of inputs; columns are of neurons.

Muon and what descends from it step by matrices, and leave vectors and embeddings to another rule.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def as_matrix(x: Any) -> Any:
    """Return a leaf as a matrix, a vector as one row."""
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)


def identities(x: Any, max_dim: int) -> tuple[Any, Any]:
    """Return the identity for each side of a leaf, None for a vector's and for longer ones."""
    sizes = [d if x.ndim > 1 and d <= max_dim else None for d in as_matrix(x).shape]
    return both(lambda d: jnp.eye(d, dtype=x.dtype), sizes)


def both(function: Callable[..., Any], first: Any, *rest: Any) -> tuple[Any, Any]:
    """Apply a function to the left and the right side's arguments, None where there is none."""
    left, right = (None if s[0] is None else function(*s) for s in zip(first, *rest, strict=True))
    return left, right


def is_matrix(path: Any, x: Any) -> bool:
    """Whether a leaf is a matrix that maps inputs to outputs: not a vector, not an embedding.

    Or a stack of them: layers in a scan are matrices each.
    """
    name = jax.tree_util.keystr(path)
    return x.ndim == 3 if "layers" in name else x.ndim > 1 and "embedding" not in name


def mask(params: Any) -> Any:
    """Return which leaves are such matrices."""
    return jax.tree.map_with_path(is_matrix, params)


def heads(params: Any) -> Any:
    """Return which leaves are of the last layer: named head, or the last of a list of layers."""

    def one(path: Any, x: Any) -> bool:
        del x
        if isinstance(params, list):
            return path[0].idx == len(params) - 1
        return "head" in jax.tree_util.keystr(path)

    return jax.tree.map_with_path(one, params)


def dimensions(params: Any) -> Any:
    """Return the axes of each matrix in optax's form, None for other leaves."""

    def one(path: Any, x: Any) -> Any:
        if not is_matrix(path, x):
            return None
        first = 1 if "layers" in jax.tree_util.keystr(path) else 0
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, x.ndim - 1)), x.ndim - 1)

    return jax.tree.map_with_path(one, params)


def by_kind(
    matrices: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Return one transformation for matrices and another one for vectors and embeddings."""
    return optax.partition({True: matrices, False: others}, lambda params: mask(params))


def on_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return a transformation of matrices alone."""
    return optax.masked(inner, mask)
