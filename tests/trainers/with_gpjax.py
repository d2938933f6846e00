"""gpjax's fit: a sparse Gaussian process, its inducing points and its kernel, in batches."""

import gpjax as gpx
import jax
import jax.numpy as jnp
import optax
from compare import compare

jax.config.update("jax_enable_x64", True)  # factors of kernels want it

STEPS = 500


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.uniform(keys[0], (1000, 1), minval=-5.0, maxval=5.0)
    y = jnp.sin(2 * x) + x * jnp.cos(5 * x) / 4 + 0.3 * jax.random.normal(keys[1], x.shape)
    data = gpx.Dataset(X=x, y=y)
    prior = gpx.gps.Prior(kernel=gpx.kernels.RBF(), mean_function=gpx.mean_functions.Zero())
    inducing = jnp.linspace(-5.0, 5.0, 30)[:, None]
    process = gpx.variational_families.VariationalGaussian(
        prior * gpx.likelihoods.Gaussian(), inducing
    )

    def loss(q, batch):
        return -gpx.objectives.elbo(q, batch)

    trained, history = gpx.fit(
        model=process, objective=loss, train_data=data, optim=optimizer,
        num_iters=STEPS, batch_size=128, key=keys[2], verbose=False,
    )  # fmt: skip

    return float(loss(process, data)), float(loss(trained, data))


if __name__ == "__main__":
    compare(train, adam=(3e-3, 1e-2, 3e-2), llqr=(3e-3, 1e-2, 3e-2))
