"""Exact steps on an equation of jinns: its residuals are the rows."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jinns
import optax
from with_jinns import Poisson, solution

import llqr

jax.config.update("jax_enable_x64", True)

layers = (eqx.nn.Linear, 2, 24), (jnp.tanh,), (eqx.nn.Linear, 24, 24), (jnp.tanh,)
network, weights = jinns.nn.PINN_MLP.create(
    key=jax.random.key(0), eq_type="PDEStatio", eqx_list=(*layers, (eqx.nn.Linear, 24, 1))
)


def rows(weights: Any, points: Any) -> Any:
    params = jinns.parameters.Params(nn_params=weights, eq_params={})
    inside = jax.vmap(lambda x: Poisson().equation(x, network, params))(points["inside"])
    border = jax.vmap(lambda x: network(x, params))(points["border"])
    return {"inside": inside, "border": border}


def loss(rows: Any, points: Any) -> Any:
    return jnp.mean(rows["inside"] ** 2) + 100 * jnp.mean(rows["border"] ** 2)


objective = llqr.Objective(rows, loss)
side, middles = jnp.linspace(0.0, 1.0, 17), (jnp.arange(16) + 0.5) / 16
grid = lambda x: jnp.stack(jnp.meshgrid(x, x), axis=-1).reshape(-1, 2)  # noqa: E731
ends = [
    jnp.stack(pair, -1) for end in (0 * side, 0 * side + 1) for pair in ((side, end), (end, side))
]
points = {"inside": grid(middles), "border": jnp.concatenate(ends)}


def error(weights: Any) -> float:
    params = jinns.parameters.Params(nn_params=weights, eq_params={})
    found = jax.vmap(lambda x: network(x, params)[0])(grid(side))
    return float(jnp.sqrt(jnp.mean((found - jax.vmap(solution)(grid(side))) ** 2)))


tx, bound = llqr.exact(damping=llqr.Trust()), objective.bind(points)


@jax.jit
def step(weights: Any, state: Any) -> Any:
    updates, state = tx.update(weights, state, weights, objective=bound)
    return optax.apply_updates(weights, updates), state


if __name__ == "__main__":
    before, state = error(weights), tx.init(weights)
    for _ in range(100):
        weights, state = step(weights, state)
    print(json.dumps([before, error(weights)]))
