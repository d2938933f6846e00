"""A run on four virtual devices against the same run on one: cases, in a process of their own.

    python tests/devices.py JSON        # a list of [mesh, axes, way, structure, shard]

It prints one JSON object for each case: the largest difference, relative to the largest number.
"""

import json
import os
import sys
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

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
    # From statistics of full rank: what is left of a basis is chosen by rounding.
    "streaming": {"refit": llqr.Streaming(every=2, warmup=0, start=3)},
}  # fmt: skip
STEPS = {"streaming": 6}
RNG = np.random.default_rng(0)
N = 8


def parameters() -> Any:
    """Four like matrices, two of them in one leaf; two like modules; one matrix of its own."""
    draw = lambda *shape: jnp.asarray(0.4 * RNG.normal(size=shape))  # noqa: E731
    return {
        "stack": {"kernel": draw(2, N, N)},
        "one": {"kernel": draw(N, N), "bias": draw(N)},
        "two": {"kernel": draw(N, N), "bias": draw(N)},
        "out": {"kernel": draw(N, 4)},
    }


def whole(w: Any) -> Any:
    """A parameter as a layer needs it: gathered."""
    if AxisType.Explicit in jax.typeof(w).sharding.mesh.axis_types:
        return jax.sharding.reshard(w, P(*[None] * w.ndim))
    return w


def forward(p: Any, batch: Any) -> Any:
    x, stack = batch["x"], whole(p["stack"]["kernel"])
    for i in range(2):
        x = x + jnp.tanh(x @ stack[i])
    for name in ("one", "two"):
        x = x + jnp.tanh(x @ whole(p[name]["kernel"]) + whole(p[name]["bias"]))
    return x @ whole(p["out"]["kernel"])


def loss(z: Any, batch: Any) -> Any:
    log = z - jax.nn.logsumexp(z, axis=-1, keepdims=True)
    return -jnp.sum(log * batch["y"]) / len(z)


OBJECTIVE = llqr.Objective(forward, loss)


def optimizer(way: str, structure: str, shard: str | None) -> Any:
    """Of one case."""
    rules = [
        llqr.Rule(match="stack/kernel", structure=structure, rows=(-2,), columns=(-1,)), ("*", structure),
    ]  # fmt: skip
    base = optax.sgd(0.1) if way == "streaming" else optax.sgd(0.1, momentum=0.9)
    return llqr.llqr(base, structure=rules, shard=shard, **WAYS[way])


def specs(params: Any) -> Any:
    """As the runner does: the longest axis of a matrix along fsdp, the last along tensor."""
    return jax.tree.map(lambda p: P(*[None] * (p.ndim - 2), "fsdp", "tensor") if p.ndim > 1 else P(None), params)


def run(way: str, structure: str, shard: str | None, mesh: Any = None) -> Any:
    """Return the parameters after some steps, and the statuses of the last refit."""
    params = PARAMS
    tx = optimizer(way, structure, shard)
    batches = BATCHES[: STEPS.get(way, 3)]
    state, onto = None, None
    if mesh is not None:
        where = jax.tree.map(lambda s: NamedSharding(mesh, s), specs(params))
        params = jax.device_put(params, where)
        batches = jax.device_put(batches, NamedSharding(mesh, P(("data", "fsdp"), None)))
        onto = llqr.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=onto)(params)
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(OBJECTIVE)(params, batch)
        updates, state = tx.update(grads, state, params, objective=OBJECTIVE.bind(batch))
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        if mesh is not None and mesh.axis_types[0] == AxisType.Auto:
            params, state = jax.lax.with_sharding_constraint((params, state), (where, onto))
        return params, state

    for batch in batches:
        params, state = step(params, state, batch)
    if mesh is not None:
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(onto), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim), (x.sharding, s)
    info = llqr.find(state).refit
    assert int(info.refits) >= 1
    return jax.device_get((params, info.cosines, info.objective_after, info.status))


def difference(case: list[Any]) -> float:
    """Return how far a case is from one device, relative to the largest number of each array."""
    mesh, kind, way, structure, shard = case
    expected = run(way, structure, shard and "params")
    made = jax.make_mesh(MESHES[mesh], AXES, axis_types=(KINDS[kind],) * 3)
    with jax.set_mesh(made):
        found = run(way, structure, shard, made)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found[0], jax.device_get(PARAMS))
    assert min(jax.tree.leaves(moved)) > 1e-4, "nothing moves"
    assert (found[-1] == expected[-1]).all(), (found[-1], expected[-1])
    apart = jax.tree.map(
        lambda a, b: np.abs(a - b).max() / max(1e-3, np.abs(b).max()), found[:2], expected[:2]
    )
    return float(max(jax.tree.leaves(apart)))


def main() -> None:
    """Print the difference of each case, or why there is none."""
    for case in json.loads(sys.argv[1]):
        try:
            print(json.dumps({"case": case, "apart": difference(case)}), flush=True)
        except Exception as error:  # noqa: BLE001
            if "-v" in sys.argv: raise
            why = f"{type(error).__name__}: {error}"[:500]
            print(json.dumps({"case": case, "error": why}), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    PARAMS = parameters()
    BATCHES = [
        {"x": jnp.asarray(RNG.normal(size=(32, N))), "y": jax.nn.one_hot(RNG.integers(0, 4, 32), 4)}
        for _ in range(8)
    ]
    main()
