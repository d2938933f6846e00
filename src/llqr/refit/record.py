"""What a refit reports."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llqr.typing import Array, Bool, Float, Int

STATUS = ("none", "updated", "kept", "nonfinite", "inverted", "rejected", "flat", "indefinite")
"""What a refit did to a block (here one matrix: a member of a stack, or a part), by the number in
`RefitInfo.status`: not refitted yet; new arrays installed; nothing changed; or old arrays kept by
a guard: new ones were not finite, turned the direction, the objective did not decrease, or the
metric has no curvature at all there (a loss that is linear in the outputs, outputs that do not
depend on the parameters). Last: new arrays installed, but Phi curves down along P h, so that the
step has no minimum (newton, gauss_newton of a loss that is not convex in the outputs): only the
inner steps bound P. More damping helps."""


class RefitInfo(NamedTuple):
    """What the last refit did; zeros before the first, when `refits` is 0.

    Example:
      >>> import jax.numpy as jnp, optax, llqr
      >>> tx = llqr.llqr(optax.sgd(0.1), structure="diagonal")
      >>> info = llqr.find(tx.init({"w": jnp.ones((2, 2)), "b": jnp.ones(2)})).refit
      >>> info.words, int(info.guarded)
      (('none', 'none'), 0)
    """

    refits: Int[Array, ""]  # how many so far
    steps: Int[Array, ""]  # inner steps of the last one
    objective_before: Float[Array, ""]  # Phi at the start of the refit
    objective_after: Float[Array, ""]  # Phi of what the refit proposes to install
    cosine: Float[Array, ""]  # of P h and h, for what was installed
    status: Int[Array, " blocks"]  # what was done to each block: index into `STATUS`
    cosines: Float[Array, " blocks"]  # of P h and h in each block; 0 where h or P h is zero
    dropped: Int[Array, ""]  # steps so far whose gradient was not finite: nothing remembers it

    def after(self, usable: Bool[Array, ""]) -> "RefitInfo":
        """Return the record after one more gradient, `usable` or not."""
        return self._replace(dropped=self.dropped + (~usable).astype(jnp.int32))

    def count(self, *words: str) -> Int[Array, ""]:
        """Return how many blocks have one of these words of `STATUS`.

        Raises:
          ValueError: a word that is not in `STATUS`.
        """
        found = [jnp.sum(self.status == STATUS.index(w), dtype=jnp.int32) for w in words]
        return sum(found, start=jnp.zeros((), jnp.int32))

    @property
    def guarded(self) -> Int[Array, ""]:
        """Blocks that kept their old arrays in the last refit because of a guard."""
        return self.count("nonfinite", "inverted", "rejected", "flat")

    @property
    def words(self) -> tuple[str, ...]:
        """What was done to each block, in words of `STATUS`; waits for the device."""
        return tuple(STATUS[int(number)] for number in jax.device_get(self.status))


def no_refit(blocks: int) -> RefitInfo:
    """Return the record before the first refit, for a number of blocks."""
    # An array of its own for each field: a state that repeats a buffer cannot be donated.
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    # Zeros, not NaN: jax_debug_nans ends a program at the first one that it meets.
    none = lambda *shape: jnp.zeros(shape, jnp.float32)  # noqa: E731
    status = jnp.zeros((blocks,), jnp.int32)
    return RefitInfo(zero(), zero(), none(), none(), none(), status, none(blocks), zero())
