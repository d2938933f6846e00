"""Models as ordered lists of stages, and what training and curvature make of one.

A state between two stages is an array, or (main, skip) inside a residual block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from llqr.integrations import nnx as staging
from llqr.stages import StagedModel
from llqr.typing import Array, Params, PyTree

Part: TypeAlias = Any
"""What a stage does: a module or function x -> x, or (one of them, how) with how(it, x) -> x."""


class Staged(nnx.Module):
    """Modules and functions that run one after the other.

    Stages are named `layers_0`, `layers_1`, ... and those without parameters count. A module
    that comes twice has its parameters where it comes first.

    Args:
      segments: the stages, in groups: what is kept or computed again together, and one stage
        of the regulator on the layerwise route.
    """

    def __init__(self, segments: Sequence[Sequence[Part]]):
        order, groups, owners = [], [], {}
        for segment in segments:
            group = []
            for part in segment:
                part, how = part if isinstance(part, tuple) else (part, call)
                name = f"layers_{len(order)}"
                if isinstance(part, nnx.Module):
                    owner = owners.setdefault(id(part), name)
                    if owner == name:
                        setattr(self, name, part)
                    order.append((name, owner, how))
                else:
                    order.append((name, part, how))
                group.append(name)
            groups.append(tuple(group))
        self.order = nnx.static(tuple(order))
        self.groups = nnx.static(tuple(groups))

    def __call__(self, x: PyTree) -> PyTree:
        """Run all stages."""
        for _, part, how in self.stages():
            x = how(part, x)
        return x

    def stages(self) -> list[tuple[str, Any, Callable[[Any, PyTree], PyTree]]]:
        """Return (name, module or function, how it is applied) in order."""
        named = lambda part: getattr(self, part) if isinstance(part, str) else part  # noqa: E731
        return [(name, named(part), how) for name, part, how in self.order]


@dataclass(frozen=True)
class Network:
    """A staged model as pure functions, one for inference and one for training.

    Attributes:
      model: inference: running statistics, which are the stages' context, and no dropout.
      params: by stage.
      statistics: of batch norm before training, by stage; empty without.
      training: (params, statistics, key, inputs) -> (outputs, statistics): statistics of the
        batch, and dropout drawn from the key.
    """

    model: StagedModel
    params: Params
    statistics: PyTree
    training: Callable[[Params, PyTree, Array, PyTree], tuple[PyTree, PyTree]]


def network(model: Staged) -> Network:
    """Return the functions of a model; both twins have the parameters of the one definition."""
    model.eval()
    staged, params, statistics = staging.stages(model.stages())
    model.train()
    graphdef, _, _, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    rest = nnx.as_pure(rest)

    def training(params: Params, statistics: PyTree, key: Array, inputs: PyTree) -> Any:
        whole = nnx.merge(graphdef, nnx.State(params), nnx.State(statistics), reseeded(rest, key))
        outputs = whole(inputs)
        return outputs, nnx.to_pure_dict(nnx.state(whole, nnx.BatchStat))

    return Network(staged.grouped(model.groups), params, statistics, training)


def reseeded(state: PyTree, key: Array) -> PyTree:
    """Return the random state of a model's layers with a key of its own for each of them."""
    leaves, treedef = jax.tree.flatten(state)
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    keys = iter(jax.random.split(key, max(sum(is_key), 1)))
    fresh = [next(keys) if k else jnp.zeros_like(x) for x, k in zip(leaves, is_key, strict=True)]
    return treedef.unflatten(fresh)


# --- how a part is applied ----------------------------------------------------------------------


def call(part: Any, x: PyTree) -> PyTree:
    """The whole state."""
    return part(x)


def fork(part: Any, x: Array) -> tuple[Array, Array]:
    """Start of a residual block: (part(x), x)."""
    return part(x), x


def main(part: Any, x: tuple[Array, Array]) -> tuple[Array, Array]:
    """The main branch."""
    return part(x[0]), x[1]


def skip(part: Any, x: tuple[Array, Array]) -> tuple[Array, Array]:
    """The skip branch."""
    return x[0], part(x[1])


def twice(part: Any, x: Array) -> tuple[Array, Array]:
    """Start of a residual block whose branches share their first stage."""
    y = part(x)
    return y, y


def add(x: tuple[Array, Array]) -> Array:
    """End of a residual block."""
    return x[0] + x[1]


def add_relu(x: tuple[Array, Array]) -> Array:
    """End of a residual block, with an activation."""
    return nnx.relu(x[0] + x[1])


def flat(part: Any, x: Array) -> Array:
    """Each example as one vector."""
    return part(x.reshape(x.shape[0], -1))


def classify(linear: nnx.Linear, x: Array) -> Array:
    """Log-probabilities."""
    return log_softmax(linear(x))


def pool_and_classify(linear: nnx.Linear, x: Array) -> Array:
    """Log-probabilities from the mean over all places."""
    return log_softmax(linear(jnp.mean(x, (1, 2))))


def log_softmax(logits: Array) -> Array:
    """Log-probabilities, in float32 at least: near certainty, half precision rounds them to 0."""
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
