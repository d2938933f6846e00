"""numpyro's SVI: the posterior of a logistic regression, by a normal guide with all covariances."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from compare import compare
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    """Return the negative ELBO before and after."""
    keys = jax.random.split(jax.random.key(seed), 2)
    x, y = logistic(seed)

    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    result = svi.run(keys[0], 1000, x, y, progress_bar=False)

    first = svi.get_params(svi.init(keys[0], x, y))
    elbo = Trace_ELBO(num_particles=1000)
    before, after = (elbo.loss(keys[1], p, model, guide, x, y) for p in (first, result.params))
    return float(before), float(after)


def model(x: jax.Array, y: jax.Array) -> None:
    """Weights [10] of inputs [n, 10], labels [n]."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def logistic(seed: int) -> tuple[jax.Array, jax.Array]:
    """Return correlated inputs [200, 10] and labels [200]."""
    keys = jax.random.split(jax.random.key(seed + 1000), 3)
    x = jax.random.normal(keys[0], (200, 10)) @ jax.random.normal(keys[1], (10, 10))
    chances = jax.nn.sigmoid(x @ jnp.linspace(-1.0, 1.0, 10))
    return x, jax.random.bernoulli(keys[2], chances).astype(int)


if __name__ == "__main__":
    compare(train)
