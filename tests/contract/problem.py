"""One tiny problem for the contract suite: it compiles fast and has leaves of rank 2, 1 and 0."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import llqr

TRACES: list[None] = []
"""One entry for each time that `forward` was traced (or run outside jit)."""


def forward(params: Any, batch: Any) -> Any:
    TRACES.append(None)
    x = batch["x"] @ params["layer"]["kernel"] + params["layer"]["bias"]
    return params["temperature"] * jnp.tanh(x)


def loss(logits: Any, batch: Any) -> Any:
    target = jax.nn.one_hot(batch["y"], 3, dtype=logits.dtype)
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), axis=-1))


OBJECTIVE = llqr.Objective(forward, loss)

REFIT = llqr.Refit(every=3, steps=2, learning_rate=0.05)
"""Due at counts 0, 3, 6, ...; two inner steps that move P visibly."""


def params(dtype: Any = np.float64) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tree = {
        "layer": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
        "temperature": np.array(1.3),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def batch(dtype: Any = np.float64, seed: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(rng.normal(size=(6, 4)), dtype),
        "y": jnp.asarray(rng.integers(0, 3, 6), jnp.int32),
    }


def bound(dtype: Any = np.float64, seed: int = 1) -> llqr.BoundObjective:
    return OBJECTIVE.bind(batch(dtype, seed))


@cache
def gradient() -> dict[str, Any]:
    """Return the float64 gradient of the default batch at the default parameters."""
    return jax.jit(jax.grad(OBJECTIVE))(params(), batch())


def options(**changes: Any) -> dict[str, Any]:
    """Return keywords of `scale_by_llqr`; the defaults are those of every contract test."""
    return {"structure": "kfac", "damping": 0.1, "refit": REFIT} | changes


BASES = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01),
}

KINDS = (
    "scalar", "diagonal", "dense", "kfac", "e-kfac", "psd-sym-kfac", "asym_swm_kfac",
)  # fmt: skip
"""Structures of every kind: the whole contract; each of the 25 names is checkpointed."""

PROBE = {
    "divergence_reduction": "unit",
    "graft": "block",
    "refit": llqr.Refit(every=4, steps=3, probe="fisher", probes=2, solver="relative"),
}

STREAMING = {
    "divergence_reduction": "unit",
    "graft": "none",
    "refit": llqr.Streaming(every=3, warmup=0, momentum=0.0),
}
"""P = I and no momentum before the first refit, as for the others."""

NAMES = (
    *(f"scale_by_llqr({s})" for s in KINDS),
    "scale_by_llqr(probe)",
    "scale_by_llqr(streaming)",
    "scale_by_llqr(streaming-sides)",
    "scale_by_llqr(streaming-gradient)",
    *(f"llqr({b})" for b in BASES),
    "llqr(update)",
)
"""Every optimizer-like object that the contract holds for."""

STRUCTURES = tuple(f"scale_by_llqr({s})" for s in llqr.STRUCTURES)


@cache
def optimizer(name: str) -> optax.GradientTransformationExtraArgs:
    kind, inside = name.rstrip(")").split("(")
    if inside == "probe":
        return llqr.scale_by_llqr(**options(**PROBE))
    if inside.startswith("streaming"):
        structure = "kfac" if inside == "streaming-sides" else "e-kfac"
        probe = "gradient" if inside == "streaming-gradient" else "fisher"
        refit = dataclasses.replace(STREAMING["refit"], probe=probe)
        return llqr.scale_by_llqr(**options(**STREAMING | {"refit": refit}, structure=structure))
    if inside == "update":
        return llqr.llqr(BASES["momentum"], **options(precondition="update"))
    if kind == "scale_by_llqr":
        # Fresh vectors are random: they need more steps than others to lower the objective.
        memory = llqr.STRUCTURES[inside].has_memory
        changes = (
            {"refit": dataclasses.replace(REFIT, steps=10, solver="relative")} if memory else {}
        )
        return llqr.scale_by_llqr(**options(structure=inside, **changes))
    return llqr.llqr(BASES[inside], **options())


def base(name: str) -> optax.GradientTransformation:
    """Return the optimizer that an object equals before the first refit."""
    if name == "llqr(update)":
        return BASES["momentum"]
    return BASES.get(name.rstrip(")").split("(")[1], optax.identity())


class Counted:
    """A jitted function that counts how often it is traced."""

    def __init__(self, function: Any, **options: Any) -> None:
        self.traces = 0

        def traced(*args: Any) -> Any:
            self.traces += 1
            return function(*args)

        self._call = jax.jit(traced, **options)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def assert_bitwise(tree: Any, expected: Any) -> None:
    """Assert that two trees are the same to the bit: structure, dtypes, values, NaN."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def assert_close(tree: Any, expected: Any, rtol: float = 1e-12) -> None:
    """Assert that two trees agree up to rounding relative to the largest entry of the tree."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    leaves = [np.asarray(x) for x in jax.tree.leaves(expected)]
    scale = max(np.abs(x).max() for x in leaves)
    for x, y in zip(jax.tree.leaves(tree), leaves, strict=True):
        np.testing.assert_allclose(np.asarray(x), y, rtol=rtol, atol=rtol * scale)


def moved(tree: Any, other: Any) -> bool:
    """Whether any leaf differs."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return any(not np.array_equal(x, y) for x, y in pairs)
