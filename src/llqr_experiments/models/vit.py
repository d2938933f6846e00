"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929) of the sizes Ti and S."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx

from llqr.errors import check_integer, check_range
from llqr.typing import Array
from llqr_experiments.models.images import image_shape
from llqr_experiments.models.staged import Part, Staged, fork, log_softmax, main

_gelu = partial(nnx.gelu, approximate=True)
_xavier = nnx.initializers.xavier_uniform()
MLP_RATIO = 4


def vit(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
    dropout: float = 0.1,
    patch: int | None = None,
    rngs: nnx.Rngs,
) -> Staged:
    """Return a pre-norm transformer over patches, read out at a class token.

    The classifier's kernel starts at zero: until its first step, no gradient reaches what is
    in front of it. Segments are the stem, each block and the head.

    Args:
      shape: (height, width, channels) of an image.
      classes: number of outputs.
      width: of a token.
      depth: number of blocks.
      heads: of attention; they share the width.
      dropout: rate, of tokens and of attention's weights.
      patch: side of a patch; None: 16 for images of 224x224 or 1000 classes, else 4.
      rngs: random streams.

    Raises:
      ValueError: images that are no whole number of patches, or a width that is no multiple
        of the heads.
    """
    height, length, channels = image_shape(shape)
    if patch is None:
        patch = 16 if (height, length) == (224, 224) or classes == 1000 else 4
    for name, value in (("width", width), ("depth", depth), ("heads", heads), ("patch", patch)):
        check_integer(name, value, low=1)
    check_range("dropout", dropout, low=0, high=1)
    if height % patch or length % patch:
        both = [n for n in range(1, min(height, length) + 1) if height % n == length % n == 0]
        raise ValueError(
            f"images of {height}x{length} pixels are no whole number of patches of side "
            f"patch={patch}: choose one of {', '.join(map(str, both))}."
        )
    if width % heads:
        raise ValueError(
            f"width={width} must be a multiple of heads={heads}, which share it: choose "
            f"{(width // heads + 1) * heads}, say."
        )
    tokens = (height // patch) * (length // patch) + 1
    cut = nnx.Conv(channels, width, (patch, patch), patch, padding="VALID", rngs=rngs)
    drop = nnx.Dropout(dropout, rngs=rngs)
    stem: list[Part] = [cut, _as_tokens, ClassToken(width), Positions(tokens, width, rngs), drop]
    blocks = [_block(width, heads, dropout, rngs) for _ in range(depth)]
    classifier = nnx.Linear(width, classes, kernel_init=nnx.initializers.zeros, rngs=rngs)
    head: list[Part] = [_norm(width, rngs), _class_token, pre_logits, classifier, log_softmax]
    return Staged([stem, *blocks, head])


class ClassToken(nnx.Module):
    """Put a learned token in front of [batch, tokens, width]."""

    def __init__(self, width: int):
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))

    def __call__(self, x: Array) -> Array:
        """Return [batch, 1 + tokens, width]."""
        token = self.class_token[...].astype(jnp.result_type(x, self.class_token[...]))
        return jnp.concatenate([jnp.broadcast_to(token, (len(x), *token.shape[1:])), x], axis=1)


class Positions(nnx.Module):
    """Add a learned vector to each token."""

    def __init__(self, tokens: int, width: int, rngs: nnx.Rngs):
        start = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(start(rngs.params(), (1, tokens, width)))

    def __call__(self, x: Array) -> Array:
        """Return x with its positions."""
        return x + self.positions[...]


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)


def _block(width: int, heads: int, dropout: float, rngs: nnx.Rngs) -> list[Part]:
    """Attention and a perceptron, each on a residual branch."""
    attention = nnx.MultiHeadAttention(
        heads, width, kernel_init=_xavier, dropout_rate=dropout, broadcast_dropout=False,
        deterministic=False, decode=False, rngs=rngs,
    )  # fmt: skip
    dense = partial(
        nnx.Linear, kernel_init=_xavier, bias_init=nnx.initializers.normal(1e-6), rngs=rngs
    )
    drop = lambda: nnx.Dropout(dropout, rngs=rngs)  # noqa: E731
    return [
        (_norm(width, rngs), fork),
        (attention, main),
        (drop(), _add_dropped),
        (_norm(width, rngs), fork),
        (dense(width, MLP_RATIO * width), main),
        (_gelu, main),
        (drop(), main),
        (dense(MLP_RATIO * width, width), main),
        (drop(), _add_dropped),
    ]


def _add_dropped(drop: nnx.Dropout, x: tuple[Array, Array]) -> Array:
    """End of a residual branch, with dropout on it."""
    return drop(x[0]) + x[1]


def _as_tokens(x: Array) -> Array:
    """Patches in a row: [batch, tokens, width]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _class_token(x: Array) -> Array:
    """The class token alone: [batch, width]."""
    return x[:, 0]


def pre_logits(x: Array) -> Array:
    """The identity: the representation under the name that the reference implementation gives it.

    It keeps the numbers of stages, by which parameters are named, those of the papers.
    """
    return x
