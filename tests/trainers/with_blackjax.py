"""blackjax's mean-field VI: the posterior of a softmax regression on handwritten digits."""

import blackjax
import jax
import jax.numpy as jnp
import optax
from blackjax.vi.meanfield_vi import MFVIState
from compare import compare
from sklearn.datasets import load_digits


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    """Return the negative ELBO before and after."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16.0, jnp.float32), jnp.asarray(labels)
    keys = jax.random.split(jax.random.key(seed), 2)

    def logdensity(w: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, y)
        return jax.scipy.stats.norm.logpdf(w).sum() - losses.sum()

    vi = blackjax.meanfield_vi(logdensity, optimizer, num_samples=10)
    state = first = vi.init(jnp.zeros((64, 10)))
    step = jax.jit(vi.step)
    for key in jax.random.split(keys[0], 300):
        state, _ = step(key, state)

    def loss(state: MFVIState) -> float:
        w = vi.sample(keys[1], state, 1000)
        entropy = jnp.sum(state.rho + 0.5 * jnp.log(2 * jnp.pi * jnp.e))
        return float(-jnp.mean(jax.lax.map(logdensity, w)) - entropy)

    return loss(first), loss(state)


if __name__ == "__main__":
    compare(train)
