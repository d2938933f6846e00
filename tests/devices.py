"""A run on four virtual devices against the same run on one: cases, in a process of their own.

    python tests/devices.py JSON        # a list of [mesh, axes, way, structure, shard]

It prints one JSON object for each case: the largest difference, relative to the largest number.
"""

import json
import os
import sys
import time
from functools import lru_cache
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = (  # see conftest.py
        "--xla_force_host_platform_device_count=4"
        " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    )

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import llqr

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
MESHES = {"data": (4, 1, 1), "fsdp": (1, 4, 1), "tensor": (1, 1, 4), "2x2": (1, 2, 2)}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
RATE = {"steps": 2, "learning_rate": 0.05}
WAYS: dict[str, dict[str, Any]] = {
    "published": {"refit": llqr.Refit(every=1, start=1, **RATE)},
    "probe": {
        "refit": llqr.Refit(every=1, start=1, probe="fisher", probes=2, **RATE),
        "divergence_reduction": "unit",
        "damping": 0.1,
    },
    "chunks": {
        "refit": llqr.Refit(every=1, start=1, **RATE), "route": llqr.Route(chunk_size=8)
    },
    "cut": {"refit": llqr.Refit(every=1, start=1, **RATE), "block_size": 3},
    # From statistics of full rank: what is left of a basis is chosen by rounding.
    "streaming": {"refit": llqr.Streaming(every=2, warmup=0, start=5)},
}  # fmt: skip
STEPS = {"streaming": 8}
STREAMED = ("diagonal", "e-kfac", "e-kfac-gpt", "kfac")
RNG = np.random.default_rng(0)
N = 4


def draw(*shape: int) -> Any:
    """Some numbers."""
    return jnp.asarray(0.5 * RNG.normal(size=shape))


def parameters(structures: list[str]) -> Any:
    """For each structure four like layers, two of them in one leaf."""

    def layers() -> Any:
        return {
            "stack": {"kernel": draw(2, N, N), "bias": draw(2, N)},
            "one": {"kernel": draw(N, N), "bias": draw(N)},
            "two": {"kernel": draw(N, N), "bias": draw(N)},
        }

    return {name: layers() for name in structures} | {"out": {"kernel": draw(N, 2 * N)}}


def whole(w: Any) -> Any:
    """A parameter as a layer needs it: gathered."""
    if AxisType.Explicit in jax.typeof(w).sharding.mesh.axis_types:
        return jax.sharding.reshard(w, P(*[None] * w.ndim))
    return w


def forward(params: Any, batch: Any) -> Any:
    """The sum of all layers."""
    x, params = batch["x"], jax.tree.map(whole, params)
    out = params.pop("out")["kernel"]
    z = x
    for layers in params.values():
        members = [jax.tree.map(lambda w, i=i: w[i], layers["stack"]) for i in range(2)]
        for layer in (*members, layers["one"], layers["two"]):
            z = z + jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return z @ out


def loss(z: Any, batch: Any) -> Any:
    """Cross-entropy."""
    log = z - jax.nn.logsumexp(z, axis=-1, keepdims=True)
    return -jnp.sum(log * batch["y"]) / len(z)


OBJECTIVE = llqr.Objective(forward, loss)


def optimizer(way: str, structures: list[str], shard: str | None) -> Any:
    """Of one case."""
    rules: list[Any] = []
    for name in structures:
        # Of a vector's basis, what one gradient a step leaves undetermined, rounding would decide.
        bias = name if llqr.STRUCTURES[name].view == "module" else "diagonal"
        for part, stack, structure in (("stack/bias", (0,), bias), ("stack/", (0,), name),
                                       ("bias", (), bias), ("", (), name)):  # fmt: skip
            match = f"^{name}/.*{part}"
            rules.append(llqr.Rule(match=match, structure=structure, stack=stack))
    base = optax.sgd(0.1) if way == "streaming" else optax.sgd(0.1, momentum=0.9)
    return llqr.llqr(base, structure=[*rules, ("*", "e-kfac")], shard=shard, **WAYS[way])


def specs(params: Any) -> Any:
    """Of a matrix the rows along fsdp and the columns along tensor."""
    columns = {"kernel": ("fsdp", "tensor"), "bias": (None,)}
    return {
        group: jax.tree_util.tree_map_with_path(
            lambda path, p: P(
                *[None] * (p.ndim - len(columns[path[-1].key])), *columns[path[-1].key]
            ),
            layers,
        )
        for group, layers in params.items()
    }


def batches(count: int) -> Any:
    """Inputs and labels."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2 * N, (count, 32))
    return [
        {"x": jnp.asarray(rng.normal(size=(32, N))), "y": jax.nn.one_hot(own, 2 * N)}
        for own in labels
    ]


@lru_cache
def run(way: str, structures: tuple[str, ...], shard: str | None, mesh: Any = None) -> Any:
    """Return the parameters after some steps, and what the last refit did."""
    params = parameters(list(structures))
    tx, given = optimizer(way, list(structures), shard), batches(STEPS.get(way, 3))
    start, where, onto = jax.device_get(params), None, None
    if mesh is not None:
        where = jax.tree.map(lambda s: NamedSharding(mesh, s), specs(params))
        params = jax.device_put(params, where)
        given = jax.device_put(given, NamedSharding(mesh, P(("data", "fsdp"), None)))
        onto = llqr.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=onto)(params)
    else:
        state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(OBJECTIVE)(params, batch)
        updates, state = tx.update(grads, state, params, objective=OBJECTIVE.bind(batch))
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        if mesh is not None and mesh.axis_types[0] == AxisType.Auto:
            params, state = jax.lax.with_sharding_constraint((params, state), (where, onto))
        return params, state

    for batch in given:
        params, state = step(params, state, batch)
    if mesh is not None:  # what comes out lies where it should
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(onto), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim), (x.sharding, s)
    info = llqr.find(state).refit
    learned = {w: info.words.count(w) for w in set(info.words)}
    return start, *jax.device_get((params, info.cosines, info.objective_after)), learned


def difference(case: list[Any]) -> dict[str, Any]:
    """Return how far a case is from one device, relative to the largest number of each array."""
    mesh, kind, way, shard, structures = case
    reset = lambda: globals().update(RNG=np.random.default_rng(0))  # noqa: E731
    reset()
    *expected, words = run(way, tuple(structures), "params")
    made = jax.make_mesh(MESHES[mesh], AXES, axis_types=(KINDS[kind],) * 3)
    reset()
    with jax.set_mesh(made):
        *found, others = run(way, tuple(structures), shard, made)
    assert words == others, (words, others)
    assert words.get("updated", 0) > 0.5 * sum(words.values()), words
    apart = jax.tree.map(
        lambda a, b: np.abs(a - b).max() / max(1e-3, np.abs(b).max()), found, expected
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected[1], expected[0])
    assert min(jax.tree.leaves(moved)) > 1e-5, moved
    return {"apart": float(max(jax.tree.leaves(apart))), "words": words}


def main() -> None:
    """Print the difference of each case, or why there is none."""
    for case in json.loads(sys.argv[1]):
        began = time.process_time()
        try:
            found = difference(case)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
            if "-v" in sys.argv:
                raise
        print(json.dumps({"case": case, "s": time.process_time() - began, **found}), flush=True)
        jax.clear_caches()  # a process may have about 65,000 memory mappings


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    main()
