"""Staged models: a network as an ordered list of named stages x -> x."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from llqr._errors import unknown
from llqr._types import PyTree

StageFunction: TypeAlias = Callable[[Any, PyTree], PyTree]
"""(parameters of the stage or None, state) -> next state."""


@dataclass(frozen=True)
class Segment:
    """Consecutive named stages that form one stage of the LQR.

    Attributes:
      members: (name, function) in order.
    """

    members: tuple[tuple[str, StageFunction], ...]

    @property
    def name(self) -> str:
        """Name of the last member: that of the state which the segment produces."""
        return self.members[-1][0]

    def control(self, params: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Parameters of the members that have some; empty for a passive segment."""
        return {name: params[name] for name, _ in self.members if name in params}

    def __call__(self, control: Mapping[str, PyTree], state: PyTree) -> PyTree:
        """Run the members in order."""
        for name, function in self.members:
            state = function(control.get(name), state)
        return state


@dataclass(frozen=True)
class StagedModel:
    """An ordered list of segments. Static and hashable: the parameters live outside.

    Order is that of the list, never that of the parameters' keys.
    """

    segments: tuple[Segment, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all stages, in order."""
        return tuple(name for segment in self.segments for name, _ in segment.members)

    def __call__(self, params: Mapping[str, PyTree], inputs: PyTree) -> PyTree:
        """Return the final state."""
        for segment in self.segments:
            inputs = segment(segment.control(params), inputs)
        return inputs

    def grouped(self, groups: Sequence[Sequence[str]]) -> "StagedModel":
        """Return the same model with consecutive stages grouped into segments.

        Grouping changes what is stored and computed at once, never a value.

        Args:
          groups: names of the stages of each segment, in order; together, all stages.

        Raises:
          ValueError: a stage is missing, repeated or out of order.
        """
        if tuple(name for group in groups for name in group) != self.names or not all(groups):
            raise ValueError(
                f"groups must name every stage once, in order, {list(self.names)}; got "
                f"{[list(group) for group in groups]}."
            )
        functions = dict(member for segment in self.segments for member in segment.members)
        return StagedModel(
            tuple(Segment(tuple((name, functions[name]) for name in group)) for group in groups)
        )

    def rematerialized(self, policy: Callable[..., Any] | None = None) -> "StagedModel":
        """Return the same model with every segment a `jax.checkpoint` of its own.

        Args:
          policy: of `jax.checkpoint_policies`: what is kept; None: nothing.
        """
        return StagedModel(tuple(_Checkpointed(s.members, policy) for s in self.segments))

    def as_forward(
        self, inputs: Callable[[Any], PyTree] = lambda batch: batch, watch: Sequence[str] = ()
    ) -> "StagedForward":
        """Return `(params, batch) -> outputs` for an `llqr.Objective`: the fused route.

        Args:
          inputs: batch -> the first stage's input.
          watch: stages whose states are returned as well; outputs are then a dict with the
            key "output" and one for each of these names, so that a metric can be placed on
            any of them.
        """
        for name in watch:
            if name not in self.names:
                raise ValueError(unknown("stage", name, self.names))
        return StagedForward(self, inputs, tuple(watch))


@dataclass(frozen=True)
class _Checkpointed(Segment):
    """A segment whose activations are computed again in its transpose sweep."""

    policy: Callable[..., Any] | None = None

    def __call__(self, control: Mapping[str, PyTree], state: PyTree) -> PyTree:
        """Run the members in order."""
        run = jax.checkpoint(super().__call__, policy=self.policy)
        return run(dict(control), state)


@dataclass(frozen=True)
class StagedForward:
    """A staged model as a forward function; see `StagedModel.as_forward`."""

    staged: StagedModel
    inputs: Callable[[Any], PyTree]
    watch: tuple[str, ...] = ()

    def __call__(self, params: Mapping[str, PyTree], batch: Any) -> PyTree:
        """Return the final state, or a dict with the watched ones."""
        state, seen = self.inputs(batch), {}
        if not self.watch:
            return self.staged(params, state)
        for segment in self.staged.segments:
            for name, function in segment.members:
                state = function(params.get(name), state)
                if name in self.watch:
                    seen[name] = state
        return {"output": state, **seen}

    def rematerialized(self, policy: Any) -> "StagedForward":
        """Return the same function, each segment a `jax.checkpoint` of its own."""
        return StagedForward(self.staged.rematerialized(policy), self.inputs, self.watch)


def stages_from_functions(stages: Iterable[tuple[str, StageFunction]]) -> StagedModel:
    """Make a staged model from functions, one segment for each.

    Args:
      stages: (name, f) in order, with f(params[name], x) -> x; a stage whose name is not in
        the parameters is passive and receives None.

    Raises:
      ValueError: no stage, or two of one name.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> staged = stages_from_functions([
      ...     ("dense", lambda w, x: x @ w), ("relu", lambda _, x: jax.nn.relu(x))])
      >>> staged({"dense": jnp.ones((2, 3))}, jnp.ones((1, 2))).tolist()
      [[2.0, 2.0, 2.0]]
    """
    members = tuple(stages)
    names = [name for name, _ in members]
    if not members or len(set(names)) != len(names):
        raise ValueError(f"give at least one stage, each with a name of its own; got {names}.")
    return StagedModel(tuple(Segment((member,)) for member in members))
