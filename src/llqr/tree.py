"""Pytrees of parameters: names of leaves, inner products, random directions, where leaves lie."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llqr.typing import Array, Float, PyTree

_WRAPPER_KEYS = {"value", "raw_value"}  # how Flax NNX variables spell "the array in me"


def leaf_names(tree: PyTree) -> list[str]:
    """Name every leaf by its path, "encoder/layers/0/kernel", in flattening order.

    The attribute by which a Flax variable holds its array is left out, so that a tree
    of variables and the same tree of plain arrays give the same names.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [_name(path) for path, _ in paths]


def _name(path: tuple[Any, ...]) -> str:
    if path and getattr(path[-1], "name", None) in _WRAPPER_KEYS:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_inexact(params: PyTree) -> None:
    """Raise TypeError, naming the leaf, if a leaf is not real and floating-point."""
    for i, leaf in enumerate(jax.tree.leaves(params)):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        name = leaf_names(params)[i]
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise TypeError(
                f"parameter {name!r} is no array but a {type(leaf).__name__}: pass the parameters "
                "alone, without the functions and options of a model (of an Equinox module, "
                "eqx.filter(model, eqx.is_inexact_array))."
            )
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"parameter {name!r} has dtype {dtype}: only real floating-point leaves can be "
                "preconditioned. Hold it as a pair of real leaves, {'real': x.real, 'imag': "
                "x.imag}, which the model puts together; without an objective, optax.contrib."
                "split_real_and_imaginary(tx) makes such pairs."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"parameter {name!r} has dtype {dtype}: only real floating-point leaves can be "
                "preconditioned. Leave other leaves out of `params` (pass them in the batch, or "
                "partition the model first)."
            )


def check_alike(tree: PyTree, like: PyTree, what: str, of_what: str) -> None:
    """Raise ValueError, naming the leaf, if two trees differ in their leaves' paths or shapes.

    Args:
      tree: the tree to check.
      like: what it should be like.
      what: name of the tree in the message.
      of_what: name of the other.
    """
    if jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, like):
        return
    shapes, expected = (
        dict(zip(leaf_names(x), map(jnp.shape, jax.tree.leaves(x)), strict=True))
        for x in (tree, like)
    )
    for name in expected.keys() | shapes.keys():
        if name not in shapes:
            raise ValueError(f"{what} lack the leaf {name!r}, which {of_what} have.")
        if name not in expected:
            raise ValueError(f"{what} have a leaf {name!r}, which {of_what} lack.")
        if shapes[name] != expected[name]:
            raise ValueError(
                f"leaf {name!r} has the shape {shapes[name]} in {what} and {expected[name]} in "
                f"{of_what}."
            )


def check_outputs(outputs: PyTree) -> None:
    """Raise TypeError, naming the output, if one has no derivative."""
    for name, leaf in zip(leaf_names(outputs), jax.tree.leaves(outputs), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"output {name!r} of forward has dtype {leaf.dtype}: outputs must be real and "
                "floating-point. Leave predictions, counts and the like out of what forward "
                "returns, or compute them from the outputs in the loss."
            )


def vdot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Inner product of two trees of one structure.

    Sums of products, not `optax.tree.vdot`: the latter raises on arrays sharded over
    explicit mesh axes.
    """
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.asarray(sum((jnp.sum(x * y) for x, y in pairs), start=0.0))


def sums(*terms: Array) -> tuple[Array, ...]:
    """The sum of each of some arrays of one shape and dtype, in one pass."""
    zeros = tuple(jnp.zeros((), x.dtype) for x in terms)
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))  # noqa: E731
    return tuple(jax.lax.reduce(terms, zeros, add, tuple(range(terms[0].ndim))))


def accurate_dtype(tree: PyTree) -> Any:
    """The widest dtype of a tree, float32 at least: in which to sum half-precision numbers."""
    widest = jnp.dtype(jnp.float32)
    for leaf in jax.tree.leaves(tree):
        kind = jnp.result_type(leaf)
        widest = kind if kind.itemsize > widest.itemsize else widest
    return widest


def widen(tree: PyTree) -> PyTree:
    """Each leaf in float32 at least."""
    return jax.tree.map(lambda x: jnp.asarray(x, accurate_dtype(x)), tree)


def norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean length of all entries of a tree together."""
    return jnp.sqrt(vdot(tree, tree))


def divide(a: Array, b: Array, zero: float = 0.0) -> Array:
    """Return a / b, and `zero` where b is 0; neither is NaN in the derivative."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), zero)


def cosine(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """Cosine of the angle between two trees; 0 where one of them is zero."""
    return cosine_of(vdot(a, b), vdot(a, a), vdot(b, b))


def cosine_of(ab: Array, aa: Array, bb: Array) -> Array:
    """Cosine of the angle between vectors with these products; 0 where one of them is zero."""
    lengths = jnp.sqrt(aa) * jnp.sqrt(bb)
    return jnp.where(lengths > 0, divide(ab, lengths), 0.0)


def normal_like(tree: PyTree, key: Array) -> PyTree:
    """Standard normal numbers in the shapes and dtypes of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))

    def draw(key: Array, x: Array) -> Array:  # where the leaf lies, each device its part
        where = jax.typeof(x).sharding if _is_explicit(x) else None
        return jax.random.normal(key, x.shape, x.dtype, out_sharding=where)

    return treedef.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=False)])


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros to begin a sum with.

    Over explicit mesh axes sharded as the tree is, under `jax.shard_map` each replica's own.
    """
    return jax.tree.map(lambda x: jnp.where(jnp.zeros((), bool), x, jnp.zeros_like(x)), tree)


def all_finite(tree: PyTree) -> Array:
    """Whether no entry of any leaf is NaN or infinite: bool[]."""
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


def is_traced(tree: PyTree) -> bool:
    """Whether a caller is tracing us: by these leaves, or around us (the branch of a cond)."""
    return any(isinstance(x, Tracer) for x in [jnp.zeros(()) + 0, *jax.tree.leaves(tree)])


def replicate(x: Array) -> Array:
    """Gather an array that is sharded over explicit mesh axes; others stay as they are.

    Over explicit axes, JAX refuses operations whose result's sharding it cannot tell, such
    as reshapes that merge a sharded axis; over automatic axes the compiler sees to it.
    """
    return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim)) if _is_explicit(x) else x


def shard_like(x: Array, like: Array) -> Array:
    """Give `x` the sharding of `like` if that is over explicit mesh axes.

    Over automatic ones too where nothing is traced, so that no compiler sees to it.
    """
    if _is_explicit(like):
        return jax.sharding.reshard(x, jax.typeof(like).sharding.spec)
    if isinstance(x, Tracer) or not isinstance(getattr(like, "sharding", None), NamedSharding):
        return x
    same = x.sharding.is_equivalent_to(like.sharding, x.ndim)
    return x if same else jax.device_put(x, like.sharding)


def all_like(tree: PyTree, like: PyTree) -> PyTree:
    """Give the arrays of a tree the shardings of another's over explicit mesh axes."""
    return jax.tree.map(shard_like, tree, like)


def axis_devices(x: Array) -> int:
    """How many devices the explicit mesh around an array has; 0 where there is none."""
    return jax.typeof(x).sharding.mesh.size if _is_explicit(x) else 0


def _is_explicit(x: Array) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def is_key(x: Any) -> bool:
    """Whether x is an array of typed random keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_legacy_key(x: Any) -> bool:
    """Whether x may be one random key of the old kind: two numbers, uint32."""
    return jnp.shape(x) == (2,) and jnp.result_type(x) == jnp.uint32


def is_none(x: Any) -> bool:
    """Whether x is None: as `is_leaf`, None is a leaf of its own."""
    return x is None


def spread(prefix: PyTree, tree: PyTree) -> list[Any]:
    """The leaves of a prefix tree, one for each leaf of `tree`; None is a leaf of both.

    Raises:
      ValueError: `prefix` is no prefix of `tree`.
    """
    return jax.tree.leaves(jax.tree.broadcast(prefix, tree, is_leaf=is_none), is_leaf=is_none)


@dataclass(frozen=True)
class Frozen:
    """A pytree of hashable leaves, made hashable."""

    leaves: tuple[Any, ...]
    treedef: Any

    @property
    def tree(self) -> PyTree:
        """The pytree again."""
        return jax.tree.unflatten(self.treedef, self.leaves)


def freeze(tree: PyTree) -> Frozen:
    """Make a pytree of hashable leaves a static value; None stays a leaf."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_none)
    return Frozen(tuple(leaves), treedef)
