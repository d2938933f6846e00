"""Names for the types that appear in every signature."""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Int",
    "Number",
    "PRNGKeyArray",
    "Params",
    "PyTree",
    "Schedule",
]

Params: TypeAlias = PyTree[Float[Array, "..."]]
"""Parameters, gradients, updates, controls: one pytree of inexact arrays."""

Number: TypeAlias = float | int | Array

Schedule: TypeAlias = Callable[[Any], Any]
"""step -> value, as in optax."""
