"""What each of four devices does and holds with P, counted in compiled programs: nothing is timed.

    uv run python benchmarks/device_share.py

A network of eight like layers and a head, on four virtual CPU devices along one mesh axis: bytes
of P on each device and floating-point operations of each, as shares of those of one device; and
the collectives of a refit, and of a step beyond those of plain SGD.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

if __name__ == "__main__":  # before JAX is there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from reporting import show

import llqr
from llqr.sharding import Shard

P = PartitionSpec
WIDTH, LAYERS, ROWS = 64, 8, 256
AXES = ("data", "fsdp")
MESHES = {"data=4": (4, 1), "fsdp=4": (1, 4)}
METRIC: dict[str, Any] = {"metric": "gaussian"}
REFIT = llqr.Refit(steps=2, every=None)
WAYS: dict[str, dict[str, Any]] = {
    "plain SGD": {},
    "diagonal": {"structure": "diagonal", "refit": REFIT},
    "e-kfac": {"structure": "e-kfac", "refit": REFIT},
    "e-kfac in chunks": {
        "structure": "e-kfac", "refit": REFIT, "route": llqr.Route(chunk_size=64)
    },
    "streaming e-kfac": {"structure": "e-kfac", "refit": llqr.Streaming(every=None)},
}  # fmt: skip


def shapes() -> Any:
    """The parameters."""
    layer = {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)}
    found = {str(i): layer for i in range(LAYERS)} | {"head": {"kernel": (WIDTH, 8)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), found, is_leaf=is_shape)


def forward(params: Any, x: Any) -> Any:
    """The layers and the head."""
    for i in range(LAYERS):
        x = jnp.tanh(x @ params[str(i)]["kernel"] + params[str(i)]["bias"])
    return x @ params["head"]["kernel"]


OBJECTIVE = llqr.Objective(forward, lambda z, x: jnp.mean((z - 1) ** 2))


def placed(mesh: Mesh | None) -> tuple[Any, Any]:
    """The shapes of the parameters and of a batch, with where they lie."""
    params, x = shapes(), jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    if mesh is None:
        return params, x
    rows = lambda s: P("fsdp", None) if len(s.shape) > 1 else P()  # noqa: E731
    at = lambda s, spec: jax.ShapeDtypeStruct(  # noqa: E731
        s.shape, s.dtype, sharding=NamedSharding(mesh, spec)
    )
    return jax.tree.map(lambda s: at(s, rows(s)), params), at(x, P(AXES, None))


class Program:
    """A step, or a refit, of one optimizer on one mesh, compiled."""

    def __init__(self, way: str, shard: Shard | None, mesh: Mesh | None, what: str) -> None:
        params, x = placed(mesh)
        plain = optax.with_extra_args_support(optax.sgd(0.1))
        options = METRIC | WAYS[way]
        tx = plain if way == "plain SGD" else llqr.llqr(plain, shard=shard, **options)
        state, onto = jax.eval_shape(tx.init, params), None
        if mesh is not None:
            onto = llqr.state_shardings(tx, params)
            state = jax.tree.map(
                lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), state, onto
            )

        def step(params: Any, state: Any, x: Any) -> Any:
            grads = jax.grad(OBJECTIVE)(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def refit(params: Any, state: Any, x: Any) -> Any:
            return params, llqr.refresh(tx, state, params, OBJECTIVE.bind(x))

        out = None if mesh is None else (jax.tree.map(lambda p: p.sharding, params), onto)
        run = jax.jit({"step": step, "refit": refit}[what], out_shardings=out)
        compiled = run.lower(params, state, x).compile()
        self.flops = (compiled.cost_analysis() or {})["flops"]
        self.text = compiled.as_text() or ""
        blocks = [] if way == "plain SGD" else jax.tree.leaves(llqr.find(state).blocks)
        total = sum(x.size for x in blocks)
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in blocks) if mesh else total
        self.held = held / total if total else 0.0

    def count(self, operation: str) -> int:
        """How often a collective is called."""
        return len(re.findall(rf" {operation}(?:-start)?\(", self.text))


SHARDS: tuple[Shard, ...] = ("params", "blocks")


def rows(ways: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each mesh, way and place of P."""
    for name, sizes in MESHES.items():
        mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2)
        plain = Program("plain SGD", None, mesh, "step")
        alone = Program("plain SGD", None, None, "step")
        yield row(name, "plain SGD", "", "step", plain, alone, plain)
        for way in ways:
            for shard in SHARDS:
                for what in ("step", "refit"):
                    one, four = (Program(way, shard, m, what) for m in (None, mesh))
                    yield row(name, way, shard, what, four, one, plain)


def row(
    mesh: str, way: str, shard: str, what: str, four: Program, one: Program, plain: Program
) -> dict[str, Any]:
    """One row of the table."""
    found: dict[str, Any] = {"devices": mesh, "P": way, "shard": shard, "of a": what}
    found |= {"bytes of P": round(four.held, 3), "flops": round(four.flops / one.flops, 3)}
    for operation in ("all-gather", "all-to-all", "all-reduce"):
        found[f"{operation}s"] = four.count(operation) - (what == "step") * plain.count(operation)
    return found


def main() -> None:
    """Print the table."""
    ways = [way for way in WAYS if way != "plain SGD"]
    parser = argparse.ArgumentParser(description="Work and bytes of P on each of four devices.")
    parser.add_argument("ways", nargs="*", default=ways, help=", ".join(ways))
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    found = list(rows(given.ways))
    if given.json:
        print(json.dumps(found))
    else:
        show("shares of one device, and collectives", found)


if __name__ == "__main__":
    main()
