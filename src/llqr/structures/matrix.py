r"""A structured matrix P acting on matrices: two sides and a spectrum.

  symbol   meaning                                           shape
  X        a parameter-shaped vector in its matrix view      [m, n]
  L, R     left and right side                               [m, m], [n, n]
  D        spectrum                                          [m, n], or a g^T, or a number

    without a spectrum   P X = L X R^T
    with a spectrum      P X = L (D * (L^T X R)) R^T

A side is the identity, diagonal or dense; every structure of the papers is a choice of
two sides and a spectrum (`catalogue`). Arrays live in a dict by slot, so a structure is
plain data and all of its functions are pure.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp

from llqr._errors import unknown
from llqr._types import Array, Float

Side: TypeAlias = Literal["identity", "diagonal", "dense"]
Spectrum: TypeAlias = Literal["none", "full", "separable", "scalar"]
Arrays: TypeAlias = dict[str, Array]
"""Slot -> array. Slots: left, right, spectrum, left_spectrum, right_spectrum."""

CLAMP = 1e-8
"""Smallest entry of an elementwise structure after a refit."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Which matrix P stands for a block of parameters.

    Args:
      name: shown in tables.
      left: side acting on the rows of the matrix view.
      right: side acting on its columns.
      spectrum: "none"; "full", one number for each entry; "separable", an outer product
        of two vectors; "scalar", one number.
      joint: whether the block is a whole module (all leaves of one parent in the tree),
        flattened to one vector, rather than one leaf.
    """

    name: str
    left: Side = "identity"
    right: Side = "identity"
    spectrum: Spectrum = "none"
    joint: bool = False

    def __post_init__(self) -> None:
        for side in (self.left, self.right):
            if side not in get_args(Side):
                raise ValueError(unknown("side", side, get_args(Side)))
        if self.spectrum not in get_args(Spectrum):
            raise ValueError(unknown("spectrum", self.spectrum, get_args(Spectrum)))
        if self.joint and self.right != "identity":
            raise ValueError(
                f"structure {self.name!r}: a joint block is one flat vector, so its right side "
                f"must be 'identity', got {self.right!r}."
            )

    @property
    def elementwise(self) -> bool:
        """Whether P multiplies entry by entry, without a matrix view."""
        return self.left == "identity" and self.right == "identity"

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays that this structure stores."""
        sides = [s for s in ("left", "right") if getattr(self, s) != "identity"]
        spectra = {
            "none": [],
            "full": ["spectrum"],
            "scalar": ["spectrum"],
            "separable": ["left_spectrum", "right_spectrum"],
        }
        return tuple(sides + spectra[self.spectrum])


def array_shapes(structure: Structure, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shape of each slot for a block of the given shape.

    Args:
      structure: the structure.
      shape: [m, n], or any shape for an elementwise structure.
    """
    full = {"diagonal": lambda d: (d,), "dense": lambda d: (d, d)}
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in structure.slots:
        if slot == "left":
            shapes[slot] = full[structure.left](shape[0])
        elif slot == "right":
            shapes[slot] = full[structure.right](shape[1])
        elif slot == "spectrum":
            shapes[slot] = () if structure.spectrum == "scalar" else shape
        else:
            shapes[slot] = (shape[0],) if slot == "left_spectrum" else (shape[1],)
    return shapes


def init(structure: Structure, shape: tuple[int, ...], scale: float, dtype: jnp.dtype) -> Arrays:
    """Return the arrays for which P = scale * identity.

    Args:
      structure: the structure.
      shape: [m, n], or any shape for an elementwise structure.
      scale: sigma. Stored parameters scale with it, so it acts as a learning rate for the
        refit; what is applied to gradients is P / sigma.
      dtype: of the arrays.
    """
    sides = [slot for slot in structure.slots if slot in ("left", "right")]
    values: dict[str, float]
    if structure.spectrum == "none":
        # All of sigma sits in the sides, shared evenly.
        share = scale ** (1.0 / max(len(sides), 1))
        values = {side: share for side in sides}  # noqa: C420 (fromkeys loses the type)
    else:
        values = {"spectrum": scale, "left_spectrum": scale}
    arrays = {}
    for slot, size in array_shapes(structure, shape).items():
        value = values.get(slot, 1.0)
        if slot in sides and len(size) == 2:
            arrays[slot] = value * jnp.eye(size[0], dtype=dtype)
        else:
            arrays[slot] = jnp.full(size, value, dtype)
    return arrays


def multiply(structure: Structure, arrays: Arrays, x: Float[Array, "*shape"]) -> Array:
    """Return P X, sigma included, in the shape of `x`."""
    if structure.elementwise:
        return arrays["spectrum"] * x
    if structure.spectrum == "none":
        return _right(structure, arrays, _left(structure, arrays, x), transpose=True)
    inner = _right(structure, arrays, _left(structure, arrays, x, transpose=True))
    inner = _scale(structure, arrays, inner)
    return _right(structure, arrays, _left(structure, arrays, inner), transpose=True)


def as_matrix(
    structure: Structure, arrays: Arrays, shape: tuple[int, ...]
) -> Float[Array, "size size"]:
    """Return P as a dense matrix on row-major flattened blocks: for tests and small problems."""
    if structure.elementwise:
        return jnp.diag(jnp.broadcast_to(arrays["spectrum"], shape).ravel())
    sides = jnp.kron(
        _side_matrix(structure.left, arrays.get("left"), shape[0]),
        _side_matrix(structure.right, arrays.get("right"), shape[1]),
    )
    if structure.spectrum == "none":
        return sides
    spectrum = _scale(structure, arrays, jnp.ones(shape, sides.dtype)).ravel()
    return sides @ (spectrum[:, None] * sides.T)


def project(structure: Structure, arrays: Arrays, *, allow_inversion: bool) -> Arrays:
    """Return the nearest legal arrays: entries of an elementwise P are at least 1e-8.

    Args:
      structure: the structure.
      arrays: after a refit.
      allow_inversion: leave negative entries (`allow_grad_inversion`).
    """
    if allow_inversion or not structure.elementwise:
        return arrays
    return {slot: jnp.maximum(value, CLAMP) for slot, value in arrays.items()}


def cost(structure: Structure, shape: tuple[int, ...]) -> int:
    """Multiply-adds of one product P X."""
    size = 1
    for side in shape:
        size *= side
    if structure.elementwise:
        return size
    m, n = shape
    sides = {"identity": 0, "diagonal": 1}
    once = size * (sides.get(structure.left, m) + sides.get(structure.right, n))
    spectra = {"none": 0, "separable": 2}.get(structure.spectrum, 1)
    return (1 if spectra == 0 else 2) * once + spectra * size


def _left(structure: Structure, arrays: Arrays, x: Array, transpose: bool = False) -> Array:
    if structure.left == "identity":
        return x
    side = arrays["left"]
    if structure.left == "diagonal":
        return side[:, None] * x
    return (side.T if transpose else side) @ x


def _right(structure: Structure, arrays: Arrays, x: Array, transpose: bool = False) -> Array:
    if structure.right == "identity":
        return x
    side = arrays["right"]
    if structure.right == "diagonal":
        return x * side
    return x @ (side.T if transpose else side)


def _scale(structure: Structure, arrays: Arrays, x: Array) -> Array:
    if structure.spectrum == "separable":
        return arrays["left_spectrum"][:, None] * x * arrays["right_spectrum"]
    return arrays["spectrum"] * x


def _side_matrix(side: Side, array: Array | None, size: int) -> Array:
    if array is None:
        return jnp.eye(size)
    return jnp.diag(array) if side == "diagonal" else array
