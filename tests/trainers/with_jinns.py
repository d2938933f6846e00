"""jinns's solve: a physics-informed network for Poisson's equation on a square."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jinns
import optax
from compare import compare
from jinns.loss import laplacian_rev

STEPS = 500


def solution(x: jax.Array) -> jax.Array:
    return jnp.sin(jnp.pi * x[0]) * jnp.sin(2 * jnp.pi * x[1])


class Poisson(jinns.loss.PDEStatio):
    def equation(self, x: jax.Array, u, params) -> jax.Array:
        force = 5 * jnp.pi**2 * solution(x)
        return laplacian_rev(x, u, params)[None] + force


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    keys = jax.random.split(jax.random.key(seed), 2)
    network, first = jinns.nn.PINN_MLP.create(
        key=keys[0],
        eq_type="PDEStatio",
        eqx_list=(
            (eqx.nn.Linear, 2, 32),
            (jnp.tanh,),
            (eqx.nn.Linear, 32, 32),
            (jnp.tanh,),
            (eqx.nn.Linear, 32, 1),
        ),
    )
    params = jinns.parameters.Params(nn_params=first, eq_params={})
    data = jinns.data.CubicMeshPDEStatio(
        key=keys[1], n=1024, nb=256, omega_batch_size=256, omega_border_batch_size=64,
        dim=2, min_pts=(0.0, 0.0), max_pts=(1.0, 1.0),
    )  # fmt: skip
    loss = jinns.loss.LossPDEStatio(
        u=network,
        dynamic_loss=Poisson(),
        boundary_condition=jinns.loss.Dirichlet(),
        loss_weights=jinns.loss.LossWeightsPDEStatio(dyn_loss=1.0, boundary_loss=100.0),
        params=params,
    )

    trained, *_ = jinns.solve(
        init_params=params, data=data, loss=loss, optimizer=optimizer, n_iter=STEPS, verbose=False
    )

    side = jnp.linspace(0.0, 1.0, 33)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)

    def error(params):
        found = jax.vmap(lambda x: network(x, params)[0])(grid)
        return float(jnp.sqrt(jnp.mean((found - jax.vmap(solution)(grid)) ** 2)))

    return error(params), error(trained)


if __name__ == "__main__":
    compare(train, adam=(3e-3, 1e-2, 3e-2), llqr=(3e-3, 1e-2, 3e-2))
