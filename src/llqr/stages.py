"""Staged models: a network as an ordered list of named stages x -> x."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import jax

from llqr.errors import unknown
from llqr.typing import PyTree

StageFunction: TypeAlias = Callable[[Any, PyTree], PyTree]
"""(parameters of the stage or None, state) -> next state; see `Member.reads`."""


class Member(NamedTuple):
    """A named stage.

    Attributes:
      name: under which it has its parameters.
      function: what it does.
      reads: names of earlier stages whose parameters it uses too, such as an embedding that
        is also the output matrix. A stage that reads receives a mapping in place of its own
        parameters: stage name -> parameters, its own under its own name.
    """

    name: str
    function: StageFunction
    reads: tuple[str, ...] = ()

    def parameters(self, params: Mapping[str, PyTree]) -> Any:
        """What of `params`, by stage name, the function receives."""
        if not self.reads:
            return params.get(self.name)
        return {name: params[name] for name in (self.name, *self.reads) if name in params}


@dataclass(frozen=True)
class Segment:
    """Consecutive named stages that form one stage of the LQR.

    Attributes:
      members: in order.
    """

    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """Name of the last member: that of the state which the segment produces."""
        return self.members[-1][0]

    @property
    def shared(self) -> frozenset[str]:
        """Names of the stages outside the segment whose parameters it reads."""
        own = {member.name for member in self.members}
        return frozenset(name for member in self.members for name in member.reads) - own

    def control(self, params: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Parameters that act on the segment, by stage; empty for a passive segment."""
        names = [name for member in self.members for name in (member.name, *member.reads)]
        return {name: params[name] for name in names if name in params}

    def __call__(self, control: Mapping[str, PyTree], state: PyTree) -> PyTree:
        """Run the members in order.

        Args:
          control: parameters by stage name; passive members have none.
          state: what the first member takes.
        """
        for member in self.members:
            state = member.function(member.parameters(control), state)
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
        return tuple(member.name for segment in self.segments for member in segment.members)

    def __call__(self, params: Mapping[str, PyTree], inputs: PyTree) -> PyTree:
        """Return the final state.

        Args:
          params: parameters by stage name.
          inputs: x_0, what the first stage takes.
        """
        for segment in self.segments:
            inputs = segment(segment.control(params), inputs)
        return inputs

    def bind(self, context: Any) -> "StagedModel":
        """Return the model whose functions, `(params, state, context=...)`, have their context.

        A context holds constants of a batch that every stage can see: running statistics of
        batch norm, say. Nothing is differentiated in it.
        """

        def bound(member: Member) -> Member:
            return member._replace(function=partial(cast(Any, member.function), context=context))

        return StagedModel(
            tuple(replace(s, members=tuple(map(bound, s.members))) for s in self.segments)
        )

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
        members = {member.name: member for s in self.segments for member in s.members}
        return StagedModel(
            tuple(Segment(tuple(members[name] for name in group)) for group in groups)
        )

    def rematerialized(self, policy: Callable[..., Any] | None = None) -> "StagedModel":
        """Return the same model with every segment a `jax.checkpoint` of its own.

        Args:
          policy: of `jax.checkpoint_policies`: what is kept; None: nothing.
        """
        return StagedModel(tuple(_Checkpointed(s.members, policy) for s in self.segments))

    def as_forward(
        self,
        inputs: Callable[[Any], PyTree] = lambda batch: batch,
        watch: Sequence[str] = (),
        context: Callable[[Any], Any] | None = None,
    ) -> "StagedForward":
        """Return `(params, batch) -> outputs` for an `llqr.Objective`: the fused route.

        Args:
          inputs: batch -> the first stage's input.
          context: batch -> what `bind` gives to the stages; None: they take none.
          watch: stages whose states are returned as well; outputs are then a dict with the
            key "output" and one for each of these names, so that a metric can be placed on
            any of them.

        Raises:
          ValueError: an unknown stage in `watch`.

        Example:
          >>> import jax.numpy as jnp, llqr
          >>> staged = llqr.stages.stages_from_functions([
          ...     ("dense", lambda w, x: x @ w), ("double", lambda _, x: 2 * x)])
          >>> forward = staged.as_forward(inputs=lambda batch: batch["x"], watch=["dense"])
          >>> seen = forward({"dense": jnp.ones((2, 1))}, {"x": jnp.ones((1, 2))})
          >>> {name: state.tolist() for name, state in seen.items()}
          {'output': [[4.0]], 'dense': [[2.0]]}
        """
        for name in watch:
            if name not in self.names:
                raise ValueError(unknown("stage", name, self.names))
        return StagedForward(self, inputs, tuple(watch), context)


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
    context: Callable[[Any], Any] | None = None

    def bound(self, batch: Any) -> StagedModel:
        """Return the stages with the context of a batch."""
        return self.staged if self.context is None else self.staged.bind(self.context(batch))

    def __call__(self, params: Mapping[str, PyTree], batch: Any) -> PyTree:
        """Return the final state, or a dict with the watched ones.

        Args:
          params: parameters by stage name.
          batch: what `inputs` and `context` take.
        """
        state, staged, seen = self.inputs(batch), self.bound(batch), {}
        if not self.watch:
            return staged(params, state)
        for segment in staged.segments:
            for member in segment.members:
                state = member.function(member.parameters(params), state)
                if member.name in self.watch:
                    seen[member.name] = state
        return {"output": state, **seen}

    def rematerialized(self, policy: Any) -> "StagedForward":
        """Return the same function, each segment a `jax.checkpoint` of its own, with a policy."""
        return replace(self, staged=self.staged.rematerialized(policy))


def stages_from_functions(
    stages: Iterable[tuple[str, StageFunction] | tuple[str, StageFunction, tuple[str, ...]]],
) -> StagedModel:
    """Make a staged model from functions, one segment for each.

    Args:
      stages: (name, f) in order, with f(params[name], x) -> x; a stage whose name is not in
        the parameters is passive and receives None. Or (name, f, reads) with the names of
        earlier stages whose parameters f uses too, see `Member.reads`.

    Raises:
      ValueError: no stage, two of one name, or one that reads what does not come before it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> staged = stages_from_functions([
      ...     ("dense", lambda w, x: x @ w), ("relu", lambda _, x: jax.nn.relu(x))])
      >>> staged({"dense": jnp.ones((2, 3))}, jnp.ones((1, 2))).tolist()
      [[2.0, 2.0, 2.0]]
    """
    members = tuple(Member(*cast(Any, stage)) for stage in stages)
    names = [member.name for member in members]
    if not members or len(set(names)) != len(names):
        raise ValueError(f"give at least one stage, each with a name of its own; got {names}.")
    for i, member in enumerate(members):
        for name in member.reads:
            if name not in names[:i]:
                raise ValueError(
                    f"stage {member.name!r}: {unknown('earlier stage', name, names[:i])}"
                )
    return StagedModel(tuple(Segment((member,)) for member in members))
