"""What a preconditioner is made of, before it runs."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import optax

from llqr._types import Params
from llqr.structures import matrix as mx
from llqr.transform import plans_of


@dataclass(frozen=True)
class Row:
    """One block of a description."""

    leaf: str  # path of the first leaf
    more: int  # how many other leaves share the block
    shape: tuple[int, ...]  # of the first leaf
    view: tuple[int, ...]  # of the block as P sees it
    structure: str
    parameters: int  # numbers in the block's leaves
    stored: int  # numbers that the structure stores
    bytes: int
    cost: int  # multiply-adds of one product P x


@dataclass(frozen=True)
class Description:
    """Blocks of a preconditioner; `print` it to read the table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("leaf", "shape", "seen as", "structure", "stored", "memory", "multiply-adds")
        lines = [head, *(_cells(row) for row in self.rows), _total(self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(width) if i < 4 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def describe(tx: optax.GradientTransformation, params: Params) -> Description:
    """Return which structure preconditions which leaf, its memory and its cost.

    Args:
      tx: an optimizer with `llqr` or `scale_by_llqr` in it, however it is composed.
      params: the parameters, or their shapes.

    Raises:
      ValueError: there is no LLQR transformation in `tx`.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="e-kfac")
      >>> print(llqr.describe(tx, {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}))
      leaf           shape  seen as  structure  stored  memory  multiply-adds
      -----------------------------------------------------------------------
      b              3      3        diagonal        3    12 B              3
      w              4x3    4x3      e-kfac         37   148 B            180
      -----------------------------------------------------------------------
      15 parameters                                 40   160 B            183
    """
    found = plans_of(tx, params)
    if not found:
        raise ValueError("there is no llqr.llqr or llqr.scale_by_llqr in this optimizer.")
    rows = []
    for plan in found:
        for block in plan:
            shapes = mx.array_shapes(block.structure, block.shape).values()
            stored = sum(math.prod(shape) for shape in shapes)
            rows.append(
                Row(
                    leaf=block.names[0],
                    more=len(block.names) - 1,
                    shape=block.shapes[0],
                    view=block.shape,
                    structure=block.structure.name,
                    parameters=sum(math.prod(shape) for shape in block.shapes),
                    stored=stored,
                    bytes=stored * jnp.dtype(block.dtype).itemsize,
                    cost=mx.cost(block.structure, block.shape),
                )
            )
    return Description(tuple(rows))


def _cells(row: Row) -> tuple[str, ...]:
    leaf = row.leaf + (f" (+{row.more} more)" if row.more else "")
    size = (f"{row.stored:,}", _bytes(row.bytes), f"{row.cost:,}")
    return (leaf, _shape(row.shape), _shape(row.view), row.structure, *size)


def _total(rows: tuple[Row, ...]) -> tuple[str, ...]:
    stored, size, cost = (sum(getattr(r, k) for r in rows) for k in ("stored", "bytes", "cost"))
    count = f"{sum(r.parameters for r in rows):,} parameters"
    return (count, "", "", "", f"{stored:,}", _bytes(size), f"{cost:,}")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _bytes(size: int) -> str:
    value, unit = float(size), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {units[unit]}" if unit == 0 else f"{value:.1f} {units[unit]}"
