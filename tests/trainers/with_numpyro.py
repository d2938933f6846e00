"""numpyro's SVI: the posterior of a logistic regression, by a normal guide with all covariances."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from compare import compare
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

STEPS = 1000


def model(x: jax.Array, y: jax.Array) -> None:
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([10]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    keys = jax.random.split(jax.random.key(seed), 5)
    mixed = jax.random.normal(keys[0], (10, 10))
    x = jax.random.normal(keys[1], (200, 10)) @ mixed
    y = jax.random.bernoulli(keys[2], jax.nn.sigmoid(x @ jnp.linspace(-1.0, 1.0, 10))).astype(int)

    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    result = svi.run(keys[3], STEPS, x, y, progress_bar=False)

    first = svi.get_params(svi.init(keys[3], x, y))
    elbo = Trace_ELBO(num_particles=1000)
    before, after = (elbo.loss(keys[4], p, model, guide, x, y) for p in (first, result.params))
    return float(before), float(after)


if __name__ == "__main__":
    compare(train, adam=(3e-3, 1e-2, 3e-2), llqr=(3e-3, 1e-2, 3e-2))
