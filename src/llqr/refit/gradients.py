r"""Streaming from gradients alone: no probe, no objective, exactly one gradient a step.

As `streaming`, but that the curvature is seen in the gradient itself: c = q, the running mean of
g^2 in the bases, which the weights by signal keep anyway (symbols as in `eigen`). It is the
published choice of direction, h = g, averaged over steps. A refit turns the bases and sets the
spectrum, and needs nothing but the gradient, so that it works in any loop that calls
`tx.update(grads, state, params)`: for losses that are no function of outputs, too. Rows that are
seldom in a batch have small squares, and long steps. What P gives of a matrix is orthogonalised by
default (`Streaming.orthogonalize`), and lambda is larger: the squares say less than probes do of
directions in which the gradient has become small.

Sources: Layerwise LQR (arXiv 2605.04230); second moments between bases as in SOAP (2409.11321).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax.numpy as jnp

from llqr.refit import eigen
from llqr.refit.following import (
    Following,
    Memory,
    columns,
    kind_of,
    largest,
    record,
    top_of,
    turned,
)
from llqr.refit.learner import Asked, Defaults, Held
from llqr.refit.momentum import MOMENTUM, is_usable
from llqr.refit.options import Streaming
from llqr.refit.remedies import GRADIENTS, Remedies
from llqr.structures import trees
from llqr.structures.block import Block
from llqr.structures.matrix import Arrays, Structure
from llqr.structures.plan import Plan, each
from llqr.typing import Array

DAMPING = 3e-3
"""Default lambda: squares of gradients, unlike probes, are small where the training has been."""


@dataclass(frozen=True)
class Unprobed(Following):
    """The way without probes. A `Learner`."""

    remedies: ClassVar[Remedies] = GRADIENTS
    defaults: ClassVar[Defaults] = Defaults(damping=DAMPING, reduction="unit", graft="rms")
    remembers: ClassVar[str] = "momentum, second moments and squares"
    needs_objective: ClassVar[bool] = False
    needs: ClassVar[str] = (
        "from gradients alone, which needs one spectrum between two bases: e-kfac, e-kfac-gpt, "
        "diagonal."
    )

    @staticmethod
    def takes(options: Any) -> bool:
        """Whether these are its options."""
        return isinstance(options, Streaming) and options.probe == "gradient"

    def follows(self, structure: Structure) -> bool:
        """Whether it takes a structure: between bases."""
        return kind_of(structure) is eigen

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Of the trees of the state: no curvature besides the squares."""
        sides = {slot for structure in self.setting.structures for slot in structure.slots}
        return (*sorted(sides - {"spectrum"}), MOMENTUM, eigen.SQUARES)

    def slots_of(self, block: Block) -> tuple[str, ...]:
        """Of what is remembered of a block."""
        return (*block.bases, MOMENTUM, eigen.SQUARES)

    def follow(self, plan: Plan, held: Held, asked: Asked) -> Held:
        """Return what is held after all matrices have turned, and have a new spectrum.

        A block that has seen no gradient yet stays as it is.
        """
        options, info = self.options, held.info
        bases = turned(self, plan, held, info.refits + 1)
        arguments: list[Any] = [bases, held.arrays, held.memory.blocks]
        if asked.gradient is not None:
            arguments.append(trees.gather(plan, asked.gradient))

        def turn(
            count: Array, block: Block, bases: Arrays, arrays: Arrays, memory: Arrays, *x: Array
        ) -> tuple[Arrays, Arrays, Arrays, Array]:
            arrays, memory = eigen.turn(bases, arrays, memory)
            c, usable = memory[eigen.SQUARES], jnp.array(True)
            for gradient in x:  # this step's, in bases that know of it
                c = eigen.squares(options, count, c, eigen.project(block, arrays, gradient))
                usable = is_usable(gradient)
            return arrays, memory, {eigen.CURVATURE: c}, usable

        found = each(plan, turn, *arguments, shared=(asked.count,))
        arrays, blocks, curved, usable = columns(found, 4)
        tops = [top_of(self.setting, block, own) for block, own in zip(plan, curved, strict=True)]
        flat = each(plan, lambda _, own: eigen.top(own) == 0, curved)

        def solved(damping: Array, block: Block, *own: Any) -> tuple[Arrays, Array, Array]:
            new = eigen.solved(damping, *own)
            before, after = eigen.objectives(damping, own[0], new, *own[1:])
            return new, before, after

        found = each(plan, solved, arrays, curved, tops, shared=(asked.damping,))
        new, before, after = columns(found, 3)
        values = tuple(jnp.sum(trees.in_order(plan, x)) for x in (before, after))
        kept = [u & ~f for u, f in zip(usable, flat, strict=True)]
        info = record(plan, tuple(new), blocks, info, kept, flat, values)
        return Held(tuple(new), Memory(tuple(blocks), None, largest(tops)), info, [])
