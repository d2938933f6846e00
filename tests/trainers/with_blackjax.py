"""blackjax's mean-field VI: the posterior of a softmax regression on handwritten digits."""

import blackjax
import jax
import jax.numpy as jnp
import optax
from compare import compare
from sklearn.datasets import load_digits

STEPS = 300


def train(optimizer: optax.GradientTransformation, seed: int) -> tuple[float, float]:
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16.0, jnp.float32), jnp.asarray(labels)
    keys = jax.random.split(jax.random.key(seed), 2)

    def logdensity(w: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, y)
        return -jnp.sum(losses) + jnp.sum(jax.scipy.stats.norm.logpdf(w))

    vi = blackjax.meanfield_vi(logdensity, optimizer, num_samples=10)
    first = vi.init(jnp.zeros((64, 10)))
    last, info = jax.lax.scan(
        lambda state, key: vi.step(key, state), first, jax.random.split(keys[0], STEPS)
    )

    def loss(state: blackjax.vi.meanfield_vi.MFVIState) -> float:
        """The negative evidence lower bound."""
        w = vi.sample(keys[1], state, 1000)
        entropy = jnp.sum(state.rho + 0.5 * jnp.log(2 * jnp.pi * jnp.e))
        return float(-jnp.mean(jax.lax.map(logdensity, w)) - entropy)

    return loss(first), loss(last)


if __name__ == "__main__":
    compare(train, adam=(3e-3, 1e-2, 3e-2), llqr=(3e-3, 1e-2, 3e-2))
