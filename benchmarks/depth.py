"""How large a refit's program is, by depth: equations, seconds to trace and to lower.

    uv run python benchmarks/depth.py [e-kfac kfac streaming] [--quick]

An unrolled transformer, each layer of which has leaves of its own: fused query, key and value, the
output, two dense layers, two scales. Equations count those of all functions inside, and nothing is
compiled or run.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import reporting
from jax.extend.core import jaxprs_in_params

import llqr

WIDTH, HEADS, VOCABULARY = 32, 2, 50
REFIT = llqr.Refit(steps=3)
METHODS = {
    "e-kfac": llqr.llqr(optax.sgd(0.1), structure="e-kfac", damping=0.1, refit=REFIT),
    "kfac": llqr.llqr(optax.sgd(0.1), structure="kfac", damping=0.1, refit=REFIT),
    "streaming": llqr.streaming(0.01),
}


def shapes(layers: int) -> Any:
    """The parameters' shapes."""

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def layer() -> dict[str, Any]:
        d = WIDTH
        sides = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
        kernels = {name: {"kernel": leaf(*shape)} for name, shape in sides.items()}
        return kernels | {"ln1": {"scale": leaf(d)}, "ln2": {"scale": leaf(d)}}

    return {
        "embedding": leaf(VOCABULARY, WIDTH),
        "layers": {f"{i:02d}": layer() for i in range(layers)},
        "head": leaf(WIDTH, VOCABULARY),
    }


def forward(params: Any, tokens: Any) -> Any:
    """Logits [batch, time, vocabulary]."""

    def norm(own: Any, x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return own["scale"] * centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    x = params["embedding"][tokens]
    for own in params["layers"].values():
        batch, length, _ = x.shape
        qkv = (norm(own["ln1"], x) @ own["qkv"]["kernel"]).reshape(batch, length, 3, HEADS, -1)
        scores = jnp.einsum("bthd,bshd->bhts", qkv[:, :, 0], qkv[:, :, 1])
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), qkv[:, :, 2])
        x = x + mixed.reshape(x.shape) @ own["out"]["kernel"]
        x = x + jax.nn.gelu(norm(own["ln2"], x) @ own["up"]["kernel"]) @ own["down"]["kernel"]
    return x @ params["head"]


def loss(logits: Any, tokens: Any) -> Any:
    """Mean cross-entropy; which token follows is of no interest here."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


OBJECTIVE = llqr.Objective(forward, loss)


def equations(jaxpr: Any) -> int:
    """How many there are, those of functions inside counted."""
    return sum(1 + sum(map(equations, jaxprs_in_params(e.params))) for e in jaxpr.eqns)


def measure(method: str, layers: int) -> dict[str, Any]:
    """One row."""
    tx, params = METHODS[method], shapes(layers)
    tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    # A lambda of its own: JAX would know a function again that it has traced.
    refit = jax.jit(lambda s, p, b: llqr.refresh(tx, s, p, OBJECTIVE.bind(b)))
    traced = refit.trace(state, params, tokens)
    middle = time.perf_counter()
    traced.lower()
    end = time.perf_counter()
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, refresh=False)).trace(params, state, params)
    gradient = jax.jit(jax.value_and_grad(OBJECTIVE)).trace(params, tokens)
    return {
        "method": method,
        "layers": layers,
        "leaves": len(jax.tree.leaves(params)),
        "gradient": equations(gradient.jaxpr.jaxpr),
        "step": equations(step.jaxpr.jaxpr),
        "refit": equations(traced.jaxpr.jaxpr),
        "trace (s)": round(middle - start, 2),
        "lower (s)": round(end - middle, 2),
    }


def main() -> None:
    """Measure, show and write."""
    names, _, quick = reporting.ask(__doc__ or "", METHODS, repeats=1, quick="2 and 4 layers")
    measure(names[0], 1)  # what JAX does once
    rows = [measure(name, layers) for name in names for layers in ((2, 4) if quick else (2, 48))]
    reporting.show("Equations", rows)
    if not quick:
        reporting.write("depth", reporting.environment(), rows)


if __name__ == "__main__":
    main()
