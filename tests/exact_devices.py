"""Exact steps on four virtual devices against the same steps on one, in a process of their own.

    python tests/exact_devices.py

It prints one JSON object for each case: the largest difference of the parameters.
"""

import itertools
import json
import os
from functools import partial
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import llqr

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
CASES = [("dual", None), ("dual", 3), ("primal", None), ("primal", 3), ("cg", None)]


def forward(params: Any, batch: Any) -> Any:
    """Rows of their own."""
    return jnp.tanh(batch["x"] @ params["a"] + params["b"]) @ params["c"]


def coupled(params: Any, batch: Any) -> Any:
    """Rows that meet."""
    z = forward(params, batch)
    return z - 0.1 * z.mean(0)


def steps(tx: Any, objective: Any, params: Any, state: Any, batch: Any) -> Any:
    """Three steps."""
    for _ in range(3):
        updates, state = tx.update(params, state, params, objective=objective.bind(batch))
        params = optax.apply_updates(params, updates)
    return params


def main() -> None:
    """Print the results."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (5,), "c": (5, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(8, 3)))
    batch = {"x": x, "y": jnp.sin(2 * x)}
    for model, (solver, chunk) in itertools.product((forward, coupled), CASES):
        objective = llqr.Objective(model, lambda z, b: jnp.mean((z - b["y"]) ** 2))
        options = llqr.Trust(chunk=chunk, momentum=0.3)
        tx: Any = llqr.exact(damping=options, solver=solver, tolerance=1e-13)  # type: ignore

        run = jax.jit(partial(steps, tx, objective))
        one = run(params, tx.init(params), batch)
        for name, kind in KINDS.items():
            mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
            everywhere = NamedSharding(mesh, PartitionSpec())
            placed = jax.device_put((params, tx.init(params)), everywhere)
            with jax.set_mesh(mesh):
                rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d")))
                four = jax.block_until_ready(run(*placed, rows))
            pairs = zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True)
            apart = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
            case = [model.__name__, solver, chunk, name]
            print(json.dumps({"case": case, "apart": apart}), flush=True)


if __name__ == "__main__":
    main()
