r"""A structured matrix P acting on matrices: two sides and a spectrum.

  symbol   meaning                                           shape
  X        a parameter-shaped vector in its matrix view      [m, n]
  L, R     left and right side (`sides`)                     [m, m], [n, n]
  D        spectrum                                          [m, n], or a g^T, or a number

    without a spectrum   P X = L X R^T
    with a spectrum      P X = L (D * (L^T X R)) R^T

Every structure of the papers is a choice of two sides and a spectrum (`catalogue`). Arrays
live in a dict by slot, so a structure is plain data and all of its functions are pure. A
refit learns what `start` returns: the arrays themselves or, for sides with a memory, fresh
vectors; `install` turns what was learned into arrays again.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llqr.errors import check_choice, unknown
from llqr.structures.sides import SIDES, Side
from llqr.typing import Array, Float, PRNGKeyArray

Spectrum: TypeAlias = Literal["none", "full", "separable", "scalar"]
Extent: TypeAlias = Literal["leaf", "vector", "module"]
Arrays: TypeAlias = dict[str, Float[Array, "..."]]
"""Slot -> array, see `Structure.slots`."""

CLAMP = 1e-8
"""Smallest entry of an elementwise structure after a refit."""
FRESH = 0.1
"""Length of a fresh vector: the papers' 1 changes P by half before anything is learned."""
POSITIVE = 1e-12
"""A positive spectrum is r^2 + POSITIVE."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Which matrix P stands for a block of parameters.

    Args:
      name: shown in tables.
      left: side acting on the rows of the matrix view; a name of `sides.SIDES`, or of a family
        of your own (`llqr.structures.register_side`).
      right: side acting on its columns.
      spectrum: "none"; "full", one number for each entry; "separable", an outer product
        of two vectors; "scalar", one number.
      positive: D is stored as r, D = r^2 + 1e-12.
      normalize: D is divided by its root mean square ("rms") or the largest absolute value of
        its entries ("max"); where that is zero, by 1.
      scaled: a learned number multiplies the normalised D.
      view: what forms a block: "leaf", one leaf in its matrix view; "vector", one leaf as a
        column; "module", all leaves of one parent in the tree, as one column.
      rank: of low-rank sides.
      vocabulary: a side over a vocabulary that is longer than this is diagonal: nothing could hold
        its square. The rows of embeddings are such sides (`Rule.seldom`, or by name), and the
        columns of a head "lm_head". None: sides are as they are.

    Raises:
      ValueError: an unknown word, or a combination that is no matrix family.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> left_only = llqr.Structure(name="left-kfac", left="dense", spectrum="full")
      >>> left_only.slots
      ('left', 'spectrum')
      >>> tx = llqr.llqr(optax.sgd(0.1), structure=left_only)
      >>> llqr.describe(tx, {"w": jnp.zeros((4, 3))}).rows[0].stored
      28

    References:
      Layerwise LQR for Geometry-Aware Optimization of Deep Networks, arXiv 2605.04230, for the
      families of `llqr.STRUCTURES`.
    """

    name: str
    left: str = "identity"
    right: str = "identity"
    spectrum: Spectrum = "none"
    positive: bool = False
    normalize: Literal["rms", "max"] | None = None
    scaled: bool = False
    view: Extent = "leaf"
    rank: int = 8
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        for side in (self.left, self.right):
            if side not in SIDES:
                raise ValueError(unknown("side", side, SIDES))
        check_choice("spectrum", self.spectrum, get_args(Spectrum))
        check_choice("view", self.view, get_args(Extent))
        if self.normalize is not None:
            check_choice("normalize", self.normalize, ("rms", "max"))
        why = None
        if self.left == self.right == "identity" and self.spectrum == "none":
            why = "needs a side or a spectrum"
        elif self.view != "leaf" and self.right != "identity":
            why = f"is one flat column, so that its right side must be 'identity', not {self.right}"
        elif self.positive and self.spectrum == "none":
            why = "has no spectrum that could be positive"
        elif self.normalize and self.spectrum != "full":
            why = "can normalise a full spectrum only"
        elif self.scaled and not self.normalize:
            why = "has a factor of its own only with a normalised spectrum"
        elif self.rank < 1 or int(self.rank) != self.rank:
            why = f"needs a rank >= 1, not {self.rank}"
        if why:
            raise ValueError(f"structure {self.name!r} {why}.")

    def for_vocabulary(self, side: str | None, size: int) -> "Structure":
        """Return the structure of a leaf whose side `side`, of that size, is over a vocabulary.

        Args:
          side: "left", "right", or None for neither.
          size: of that side.
        """
        if side is None or self.vocabulary is None or size <= self.vocabulary:
            return self
        return replace(self, **{side: "diagonal"})

    @cached_property
    def elementwise(self) -> bool:
        """Whether P multiplies entry by entry, without a matrix view."""
        if self.left != "identity" or self.right != "identity":
            return False
        return self.spectrum == "scalar" or (self.spectrum == "full" and self.view == "leaf")

    @cached_property
    def sides(self) -> dict[str, Side]:
        """The sides that are not the identity, by slot."""
        named = {"left": self.left, "right": self.right}
        return {slot: SIDES[name] for slot, name in named.items() if name != "identity"}

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays that this structure stores."""
        return tuple(array_shapes(self, (1, 1)))

    @property
    def learned(self) -> tuple[str, ...]:
        """Slots whose arrays a refit learns: all but memories and constants."""
        fixed = {"sigma"}
        for slot, side in self.sides.items():
            if side.fresh:
                fixed |= {_slot(slot, local) for local in side.shapes(1, 1)}
        return tuple(slot for slot in self.slots if slot not in fixed)

    @property
    def has_memory(self) -> bool:
        """Whether a refit learns fresh vectors that are then folded into the arrays."""
        return any(side.fresh for side in self.sides.values())

    @property
    def linear(self) -> bool:
        """Whether P is linear in what a refit learns."""
        if self.spectrum == "none":
            return len(self.sides) == 1 and all(side.linear for side in self.sides.values())
        plain = not (self.positive or self.normalize) and self.spectrum != "separable"
        return plain and not self.sides

    @property
    def symmetric(self) -> bool:
        """Whether P is always symmetric."""
        return self.spectrum != "none" or all(side.symmetric for side in self.sides.values())

    @property
    def definite(self) -> bool:
        """Whether P is always positive semidefinite."""
        if self.spectrum != "none":
            return self.positive and not self.scaled  # by a factor of either sign
        return all(side.definite for side in self.sides.values())

    @property
    def holds_sigma(self) -> bool:
        """Whether sigma can sit in what is learned; else it is a slot of its own, a constant."""
        if self.spectrum != "none":
            return not self.normalize or self.scaled
        return any(side.scalable for side in self.sides.values())


def array_shapes(structure: Structure, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shape of each slot for a block of the given shape.

    Args:
      structure: the structure.
      shape: [m, n], or any shape for an elementwise structure.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for slot, side in structure.sides.items():
        size = shape[0] if slot == "left" else shape[1]
        shapes |= {_slot(slot, local): s for local, s in side.shapes(size, structure.rank).items()}
    if structure.spectrum == "separable":
        shapes |= {"left_spectrum": (shape[0],), "right_spectrum": (shape[1],)}
    elif structure.spectrum != "none":
        shapes["spectrum"] = () if structure.spectrum == "scalar" else shape
    if structure.scaled:
        shapes["spectrum_factor"] = ()
    if not structure.holds_sigma:
        shapes["sigma"] = ()
    return shapes


def init(structure: Structure, shape: tuple[int, ...], sigma: float, dtype: DTypeLike) -> Arrays:
    """Return the arrays for which P = sigma * identity.

    Args:
      structure: the structure.
      shape: [m, n], or any shape for an elementwise structure.
      sigma: stored parameters scale with it, so it acts as a learning rate for the
        refit; what is applied to gradients is P / sigma.
      dtype: of the arrays.
    """
    # Without a spectrum, all of sigma sits in the sides, shared evenly.
    bearers = sum(side.scalable for side in structure.sides.values())
    share = sigma ** (1 / bearers) if structure.spectrum == "none" and bearers else 1.0
    arrays: Arrays = {}
    for slot, side in structure.sides.items():
        size = shape[0] if slot == "left" else shape[1]
        made = side.init(share, size, structure.rank, dtype)
        arrays |= {_slot(slot, local): array for local, array in made.items()}
    root = lambda v: max(v - POSITIVE, 0.0) ** 0.5 if structure.positive else v  # noqa: E731
    values = {
        "spectrum": 1.0 if structure.normalize else root(sigma),
        "left_spectrum": root(sigma),
        "right_spectrum": root(1.0),
        "spectrum_factor": sigma,
        "sigma": sigma,
    }
    for slot, size in array_shapes(structure, shape).items():
        if slot not in arrays:
            arrays[slot] = jnp.full(size, values[slot], dtype)
    return arrays


def start(
    structure: Structure, arrays: Arrays, shape: tuple[int, ...], key: PRNGKeyArray
) -> Arrays:
    """Return what a refit learns, at its start: slots of `learned`, or fresh vectors.

    Args:
      structure: the structure.
      arrays: from which the refit starts.
      shape: of the block.
      key: of fresh vectors, which change P by about FRESH^2 of itself.
    """
    out = {slot: arrays[slot] for slot in structure.learned}
    for slot, side in structure.sides.items():
        if side.fresh:
            size = shape[0] if slot == "left" else shape[1]
            length = FRESH / size**0.5
            if side.square:  # x x^T is added to the inverse of these arrays
                typical = jnp.mean(jnp.abs(jnp.diagonal(arrays[slot])))
                length = length / jnp.sqrt(jnp.where(typical > 0, typical, 1.0))
            for local, s in side.fresh(size).items():
                key, one = jax.random.split(key)
                dtype = next(iter(arrays.values())).dtype
                vector = jax.random.normal(one, s, dtype)
                out[f"{slot}_fresh_{local}"] = (length * vector).astype(dtype)
    return out


def install(structure: Structure, arrays: Arrays, learned: Arrays) -> Arrays:
    """Return the arrays with what was learned in them, and fresh vectors folded into memories.

    Args:
      structure: the structure.
      arrays: from which the refit started.
      learned: like the result of `start`.
    """
    out = arrays | {slot: learned[slot] for slot in structure.learned}
    for slot, side in structure.sides.items():
        if side.fresh:
            assert side.fold is not None
            prefix = f"{slot}_fresh_"
            fresh = {k.removeprefix(prefix): v for k, v in learned.items() if k.startswith(prefix)}
            folded = side.fold(_local(arrays, slot), fresh)
            out |= {_slot(slot, local): array for local, array in folded.items()}
    return out


def product(
    structure: Structure, arrays: Arrays, x: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Return P X, sigma included.

    Args:
      structure: the structure.
      arrays: its arrays.
      x: X [m, n], or in the block's shape for an elementwise structure.
    """
    if structure.elementwise:
        y = _spectral(structure, arrays, x)
    elif structure.spectrum == "none":
        y = _right(structure, arrays, _left(structure, arrays, x, False), False)
    else:
        y = _right(structure, arrays, _left(structure, arrays, x, True), True)
        y = _spectral(structure, arrays, y)
        y = _right(structure, arrays, _left(structure, arrays, y, False), False)
    return y if structure.holds_sigma else arrays["sigma"] * y


def as_matrix(
    structure: Structure, arrays: Arrays, shape: tuple[int, ...]
) -> Float[Array, "size size"]:
    """Return P as a dense matrix on row-major flattened blocks: for tests and small problems.

    Args:
      structure: the structure.
      arrays: its arrays.
      shape: of the block; its product is the size of the matrix.
    """
    dtype = next(iter(arrays.values())).dtype
    if structure.elementwise:
        matrix = jnp.diag(_spectral(structure, arrays, jnp.ones(shape, dtype)).ravel())
    else:
        left, right = (
            SIDES[name].times(_local(arrays, slot), jnp.eye(size, dtype=dtype), False)
            for name, slot, size in zip(
                (structure.left, structure.right), ("left", "right"), shape, strict=True
            )
        )
        matrix = jnp.kron(left, right)
        if structure.spectrum != "none":
            spectrum = _spectral(structure, arrays, jnp.ones(shape, dtype)).ravel()
            matrix = matrix @ (spectrum[:, None] * matrix.T)
    return matrix if structure.holds_sigma else arrays["sigma"] * matrix


def project(structure: Structure, arrays: Arrays, *, allow_inversion: bool) -> Arrays:
    """Return legal arrays in standard form; a second projection changes nothing.

    Entries of an elementwise P become at least 1e-8. Everything else changes how P is
    written, never P: the unused triangle of a symmetric side becomes zero, a normalised
    spectrum gets its norm.

    Args:
      structure: the structure.
      arrays: after a refit.
      allow_inversion: leave negative entries (`allow_grad_inversion`).
    """
    out = dict(arrays) if allow_inversion else clamp(structure, arrays)
    if structure.normalize:
        out["spectrum"] = _normalize(structure, out["spectrum"])
    for slot, side in structure.sides.items():
        fixed = side.project(_local(arrays, slot))
        out |= {_slot(slot, local): array for local, array in fixed.items()}
    return out


def clamps(structure: Structure) -> bool:
    """Whether `clamp` may change P."""
    return structure.elementwise and not structure.positive


def clamp(structure: Structure, arrays: Arrays) -> Arrays:
    """Return arrays in which the entries of an elementwise P are at least 1e-8.

    Args:
      structure: the structure.
      arrays: of P, or what a refit learns of them.
    """
    if not clamps(structure):
        return dict(arrays)
    return arrays | {"spectrum": jnp.maximum(arrays["spectrum"], CLAMP)}


def cost(structure: Structure, shape: tuple[int, ...]) -> int:
    """Multiply-adds of one product P X.

    Args:
      structure: the structure.
      shape: of the block.
    """
    size = 1
    for side in shape:
        size *= side
    if structure.elementwise:
        return size
    lengths = {"left": shape[0], "right": shape[1]}
    once = size * sum(
        side.cost(lengths[slot], structure.rank) for slot, side in structure.sides.items()
    )
    spectra = {"none": 0, "separable": 2}.get(structure.spectrum, 1)
    return (1 if spectra == 0 else 2) * once + spectra * size


def _slot(side: str, local: str) -> str:
    return side if local == "main" else f"{side}_{local}"


def _local(arrays: Arrays, slot: str) -> Arrays:
    """Arrays of one side by their local names."""
    reserved = (f"{slot}_spectrum", f"{slot}_fresh_")
    out = {
        name.removeprefix(f"{slot}_"): array
        for name, array in arrays.items()
        if name.startswith(f"{slot}_") and not name.startswith(reserved)
    }
    return out | ({"main": arrays[slot]} if slot in arrays else {})


def _left(
    structure: Structure, arrays: Arrays, x: Float[Array, "m n"], transpose: bool
) -> Float[Array, "m n"]:
    return SIDES[structure.left].times(_local(arrays, "left"), x, transpose)


def _right(
    structure: Structure, arrays: Arrays, x: Float[Array, "m n"], transpose: bool
) -> Float[Array, "m n"]:
    """X R^T, or X R with `transpose`: the side acts on the columns of X^T."""
    if structure.right == "identity":
        return x
    return SIDES[structure.right].times(_local(arrays, "right"), x.T, transpose).T


def _root(structure: Structure, stored: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return stored * stored + POSITIVE if structure.positive else stored


def _spectral(
    structure: Structure, arrays: Arrays, x: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """D * x, in the shape of x."""
    if structure.spectrum == "separable":
        left, right = (_root(structure, arrays[f"{s}_spectrum"]) for s in ("left", "right"))
        return left[:, None] * x * right
    spectrum = _root(structure, arrays["spectrum"])
    if structure.normalize:
        spectrum = _normalize(structure, spectrum)
    if structure.scaled:
        spectrum = arrays["spectrum_factor"] * spectrum
    return spectrum * x


def _normalize(structure: Structure, d: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    rms = structure.normalize == "rms"
    size = jnp.mean(d * d) if rms else jnp.max(jnp.abs(d))
    size = jnp.where(size > 0, size, 1)  # before the root, whose slope at zero is infinite
    return d / (jnp.sqrt(size) if rms else size)
