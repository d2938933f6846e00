"""Exact steps on four virtual devices against the same steps on one, in a process of their own.

    python tests/exact_devices.py FIRST LAST        # of the cases

It prints one JSON object for each case: the largest difference of the parameters.
"""

import json
import os
import sys
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
CASES = [
    ("forward", "dual", None, "auto"), ("forward", "dual", None, "explicit"),
    ("forward", "primal", 3, "auto"), ("forward", "cg", None, "explicit"),
    ("several", "dual", 3, "explicit"), ("coupled", "primal", None, "explicit"),
]  # fmt: skip


def forward(params: Any, batch: Any) -> Any:
    """Rows of their own."""
    return jnp.tanh(batch["x"] @ params["a"] + params["b"]) @ params["c"]


def coupled(params: Any, batch: Any) -> Any:
    """Rows that meet."""
    z = forward(params, batch)
    return z - 0.1 * z.mean(0)


def several(params: Any, batch: Any) -> Any:
    """Two outputs, one of them with a cross-entropy."""
    return {"one": forward(params, batch), "more": batch["x"] @ params["a"]}


def squares(z: Any, batch: Any) -> Any:
    """Of one output, or of two beside a cross-entropy."""
    if not isinstance(z, dict):
        return jnp.mean((z - batch["y"]) ** 2)
    own = optax.softmax_cross_entropy_with_integer_labels(z["more"], batch["label"])
    return squares(z["one"], batch) + jnp.mean(own)


MODELS = {"forward": forward, "several": several, "coupled": coupled}


def step(tx: Any, objective: Any, params: Any, state: Any, batch: Any) -> Any:
    """One step."""
    updates, state = tx.update(params, state, params, objective=objective.bind(batch))
    return optax.apply_updates(params, updates), state


def trained(run: Any, params: Any, state: Any, batch: Any) -> Any:
    """Parameters after three steps, each waited for."""
    for _ in range(3):
        params, state = jax.block_until_ready(run(params, state, batch))
    return params


def main() -> None:
    """Print the results."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (5,), "c": (5, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(8, 3)))
    batch = {"x": x, "y": jnp.sin(2 * x), "label": jnp.arange(8) % 5}
    first, last = map(int, sys.argv[1:])
    for model, solver, chunk, kind in CASES[first:last]:
        options = llqr.Trust(chunk=chunk, momentum=0.3)
        tx: Any = llqr.exact(damping=options, solver=solver, tolerance=1e-13)  # type: ignore
        run = jax.jit(partial(step, tx, llqr.Objective(MODELS[model], squares)))
        one = trained(run, params, tx.init(params), batch)
        mesh = jax.make_mesh((4,), ("d",), axis_types=(KINDS[kind],))
        everywhere = NamedSharding(mesh, PartitionSpec())
        placed = jax.device_put((params, tx.init(params)), everywhere)
        with jax.set_mesh(mesh):
            rows = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d")))
            four = trained(run, *placed, rows)
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True)
        apart = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
        case = [model, solver, chunk, kind]
        print(json.dumps({"case": case, "apart": apart}), flush=True)


if __name__ == "__main__":
    main()
