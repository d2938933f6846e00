"""optimistix's OptaxMinimiser: an Equinox network of three layers fits a curve."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from compare import compare


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    """Return the mean squared error before and after."""
    x = jnp.linspace(-1.0, 1.0, 128)
    batch = (x[:, None], (jnp.sin(6 * x) + 0.5 * jnp.sin(15 * x))[:, None])
    mlp = eqx.nn.MLP(1, 1, 32, 2, activation=jnp.tanh, key=jax.random.key(seed))

    params, static = eqx.partition(mlp, eqx.is_inexact_array)

    def loss(params: eqx.nn.MLP, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.mean((jax.vmap(eqx.combine(params, static))(batch[0]) - batch[1]) ** 2)

    solver = optx.OptaxMinimiser(optimizer, rtol=1e-9, atol=1e-9)
    solution = optx.minimise(loss, solver, params, args=batch, max_steps=500, throw=False)

    return float(loss(params, batch)), float(loss(solution.value, batch))


if __name__ == "__main__":
    compare(train)
