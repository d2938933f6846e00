"""optimistix's OptaxMinimiser: a network of three layers fits a curve, the whole of it a step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
from compare import compare

STEPS = 500


def loss(mlp: eqx.nn.MLP, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    return jnp.mean((jax.vmap(mlp)(x) - y) ** 2)


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    x = jnp.linspace(-1.0, 1.0, 128)
    batch = (x[:, None], (jnp.sin(6 * x) + 0.5 * jnp.sin(15 * x))[:, None])
    mlp = eqx.nn.MLP(1, 1, 32, 2, activation=jnp.tanh, key=jax.random.key(seed))
    params, static = eqx.partition(mlp, eqx.is_inexact_array)

    solver = optx.OptaxMinimiser(optimizer, rtol=0.0, atol=0.0)
    solution = optx.minimise(
        lambda params, batch: loss(eqx.combine(params, static), batch),
        solver, params, args=batch, max_steps=STEPS, throw=False,
    )  # fmt: skip

    trained = eqx.combine(solution.value, static)
    return float(loss(mlp, batch)), float(loss(trained, batch))


if __name__ == "__main__":
    compare(train, adam=(3e-3, 1e-2, 3e-2), llqr=(3e-3, 1e-2, 3e-2))
