"""gpjax's fit: a sparse Gaussian process, with its inducing points and its kernel, in batches."""

import gpjax as gpx
import jax
import jax.numpy as jnp
import optax
from compare import compare

jax.config.update("jax_enable_x64", True)  # factors of kernels want it


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    """Return the negative ELBO of all examples before and after."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.uniform(keys[0], (1000, 1), minval=-5.0, maxval=5.0)
    y = jnp.sin(2 * x) + x * jnp.cos(5 * x) / 4 + 0.3 * jax.random.normal(keys[1], x.shape)
    data = gpx.Dataset(X=x, y=y)
    kernel, mean = gpx.kernels.RBF(), gpx.mean_functions.Zero()
    prior = gpx.gps.Prior(kernel=kernel, mean_function=mean)
    inducing = jnp.linspace(-5.0, 5.0, 30)[:, None]

    posterior = prior * gpx.likelihoods.Gaussian()
    q = gpx.variational_families.VariationalGaussian(posterior, inducing)
    trained, _ = gpx.fit(
        model=q, objective=loss, train_data=data, optim=optimizer,
        num_iters=500, batch_size=128, key=keys[2], verbose=False,
    )  # fmt: skip

    return float(loss(q, data)), float(loss(trained, data))


def loss(q: gpx.variational_families.VariationalGaussian, batch: gpx.Dataset) -> jax.Array:
    """Return the negative ELBO."""
    return -gpx.objectives.elbo(q, batch)


if __name__ == "__main__":
    compare(train)
