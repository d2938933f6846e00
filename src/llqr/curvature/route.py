"""How the curvature products of a refit are computed."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from llqr._replicas import AxisName
from llqr.errors import check_choice, check_integer

Memory: TypeAlias = Literal["cached", "curvature_recomputed", "recomputed"]
CheckpointPolicy: TypeAlias = Literal["none", "dots_no_batch_dims"]


@dataclass(frozen=True, kw_only=True)
class Route:
    """How curvature products are computed; the numbers are the same up to rounding.

    Args:
      layerwise: stage by stage, as a linear-quadratic regulator, instead of fused; needs an
        objective whose forward comes from a staged model (`StagedModel.as_forward`).
      memory: "cached" keeps the residuals of one linearisation; "curvature_recomputed" keeps
        those of the network but linearises second derivatives again at each product;
        "recomputed" keeps nothing.
      checkpoint_policy: with "recomputed", what a transpose sweep keeps of its own forward
        sweep: "none" keeps all, "dots_no_batch_dims" only products with weights. Staged
        models are cut at their stages.
      chunk_size: examples whose activations are held at once; None: the whole batch. The
        forward function must treat examples one by one, with all outputs example by example
        along their first axis, and a divergence row by row. Outputs whose shape shows that
        examples interact raise, and so does a typed random key that they share. What cannot be
        seen is another loss: batch statistics, attention between examples, a normalisation
        over the batch, keys as plain integers.
      axis_name: of the mapped axis (or a tuple of them) under `jax.pmap` or `jax.shard_map`,
        over whose replicas the batch is spread: losses, gradients, curvature and probes are
        then those of the whole batch, and every replica learns the same P. Gradients that go
        into `update` are averaged by the caller. The loss is taken as a mean of the replicas'
        losses. (): replicas refit on their own; None: the same where there is one, and an
        error where there are more.

    Raises:
      ValueError: an unknown word, or options that exclude each other.
      TypeError: a chunk_size that is no Python int.

    Example:
      >>> import jax.numpy as jnp, llqr
      >>> objective = llqr.Objective(
      ...     forward=lambda w, x: x @ w, loss=lambda z, x: jnp.mean(z**2))
      >>> model = llqr.linearize(
      ...     objective.bind(jnp.ones((4, 2))), jnp.ones((2, 1)), "gaussian",
      ...     route=llqr.Route(chunk_size=2))
      >>> model.product(jnp.ones((2, 1))).tolist()
      [[8.0], [8.0]]
    """

    layerwise: bool = False
    memory: Memory = "cached"
    checkpoint_policy: CheckpointPolicy = "none"
    chunk_size: int | None = None
    axis_name: AxisName = None

    def __post_init__(self) -> None:
        check_choice("Route: memory", self.memory, get_args(Memory))
        check_choice("Route: checkpoint_policy", self.checkpoint_policy, get_args(CheckpointPolicy))
        check_integer("Route: chunk_size", self.chunk_size, low=1)
        if self.checkpoint_policy != "none" and self.memory != "recomputed":
            raise ValueError(
                f"Route: checkpoint_policy={self.checkpoint_policy!r} needs memory='recomputed'; "
                f"with {self.memory!r} the residuals are kept anyway."
            )
        if self.chunk_size is not None and self.memory != "cached":
            raise ValueError(
                "Route: chunks keep nothing between products anyway: leave memory at 'cached' with "
                f"chunk_size, not {self.memory!r}."
            )
        names = (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name or ()
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                "Route: axis_name must be the name of a mapped axis, or a tuple of names, got "
                f"{self.axis_name!r}."
            )
        if self.layerwise and self.axis_name:
            raise ValueError("Route: axis_name needs the fused route, layerwise=False.")
        if self.layerwise and self.chunk_size is not None:
            raise ValueError("Route: chunk_size needs the fused route, layerwise=False.")
