"""flowjax's fit_to_data: a masked autoregressive flow learns two moons."""

import jax
import jax.numpy as jnp
import optax
from compare import compare
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import fit_to_data


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    """Return the negative log-likelihood of unseen examples before and after."""
    keys = jax.random.split(jax.random.key(seed), 4)
    data, unseen = moons(keys[0], 4000), moons(keys[1], 4000)

    flow = masked_autoregressive_flow(keys[2], base_dist=Normal(jnp.zeros(2)), flow_layers=4)
    trained, losses = fit_to_data(
        keys[3], flow, data, optimizer=optimizer, max_epochs=10, show_progress=False
    )

    assert len(losses["train"]) == 10, "no patience was lost"
    return float(-flow.log_prob(unseen).mean()), float(-trained.log_prob(unseen).mean())


def moons(key: jax.Array, examples: int) -> jax.Array:
    """Return points [examples, 2]."""
    angle, side, noise = jax.random.split(key, 3)
    angles = jnp.pi * jax.random.uniform(angle, (examples,))
    sign = jnp.where(jax.random.bernoulli(side, shape=(examples,)), 1.0, -1.0)
    curve = jnp.stack([jnp.cos(angles) + 0.5, jnp.sin(angles) - 0.25], axis=1)
    return sign[:, None] * curve + 0.1 * jax.random.normal(noise, (examples, 2))


if __name__ == "__main__":
    compare(train, structure="auto")  # the flow's layers are stacked
