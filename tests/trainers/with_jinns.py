"""jinns's solve: a physics-informed network for Poisson's equation on the unit square."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jinns
import optax
from compare import compare
from jinns.loss import laplacian_rev


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    """Return the root mean squared error of the solution on a grid before and after."""
    keys = jax.random.split(jax.random.key(seed), 2)
    layers = (eqx.nn.Linear, 2, 32), (jnp.tanh,), (eqx.nn.Linear, 32, 32), (jnp.tanh,)
    network, weights = jinns.nn.PINN_MLP.create(
        key=keys[0], eq_type="PDEStatio", eqx_list=(*layers, (eqx.nn.Linear, 32, 1))
    )
    params = jinns.parameters.Params(nn_params=weights, eq_params={})
    points = jinns.data.CubicMeshPDEStatio(
        key=keys[1], n=1024, omega_batch_size=256, nb=256, omega_border_batch_size=64,
        dim=2, min_pts=(0.0, 0.0), max_pts=(1.0, 1.0),
    )  # fmt: skip

    loss = jinns.loss.LossPDEStatio(
        u=network, params=params, dynamic_loss=Poisson(),
        boundary_condition=jinns.loss.Dirichlet(),
        loss_weights=jinns.loss.LossWeightsPDEStatio(dyn_loss=1.0, boundary_loss=100.0),
    )  # fmt: skip
    trained, *_ = jinns.solve(
        init_params=params, data=points, loss=loss, optimizer=optimizer, n_iter=500, verbose=False
    )

    side = jnp.linspace(0.0, 1.0, 33)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)

    def error(params: Any) -> float:
        found = jax.vmap(lambda x: network(x, params)[0])(grid)
        return float(jnp.sqrt(jnp.mean((found - jax.vmap(solution)(grid)) ** 2)))

    return error(params), error(trained)


def solution(x: jax.Array) -> jax.Array:
    """Return u(x), zero on the border."""
    return jnp.sin(jnp.pi * x[0]) * jnp.sin(2 * jnp.pi * x[1])


class Poisson(jinns.loss.PDEStatio):
    """The Laplacian of u is -5 pi^2 u."""

    def equation(self, x: jax.Array, u: Any, params: Any) -> jax.Array:
        """Return the residual [1]."""
        return laplacian_rev(x, u, params)[None] + 5 * jnp.pi**2 * solution(x)


if __name__ == "__main__":
    compare(train)
