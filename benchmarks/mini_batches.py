"""Exact steps on mini-batches of data with noise, beside streaming refits and AdamW: by steps.

    OPENBLAS_NUM_THREADS=1 uv run python -m benchmarks.mini_batches [--repeats N]

Digits (64 examples a step, also with a fifth of the labels drawn at random) and the diabetes table
(32 a step): loss of the whole training set and of unseen examples after 20, 80 and 160 steps. Rates
of streaming and AdamW are the best of seven by the loss at the end, on a seed of its own, and
constant. Exact steps have no rate: `llqr.Trust(noisy=True)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_diabetes, load_digits

import llqr
from benchmarks import reporting

SEEN, WIDTH, TUNING = (20, 80, 160), 32, 99
RATES = [1e-3 * 2.0**i for i in range(-1, 9)]


@dataclass(frozen=True)
class Problem:
    """What is fitted.

    Attributes:
      x: inputs.
      y: classes, or numbers.
      size: of a batch.
      noise: share of training labels that are drawn at random.
    """

    x: np.ndarray
    y: np.ndarray
    size: int
    noise: float = 0.0

    @property
    def classes(self) -> bool:
        """Whether labels are classes."""
        return self.y.dtype.kind == "i"

    def loss(self, z: Any, batch: Any) -> Any:
        """Cross-entropy, or half the mean square."""
        if self.classes:
            return optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean()
        return jnp.mean((z[:, 0] - batch["y"]) ** 2) / 2

    def split(self, seed: int) -> tuple[Any, Any]:
        """Training and unseen examples."""
        rng = np.random.default_rng(seed)
        order, count = rng.permutation(len(self.y)), int(0.8 * len(self.y))
        x, y = self.x[order].astype(np.float32), self.y[order]
        drawn = rng.random(count) < self.noise
        labels = np.where(drawn, rng.permutation(y[:count]), y[:count]) if self.noise else y[:count]
        return {"x": x[:count], "y": labels}, {"x": x[count:], "y": y[count:]}


def _digits(noise: float) -> Problem:
    x, y = map(np.asarray, load_digits(return_X_y=True))
    return Problem(x / 16 - 0.3, y.astype(np.int32), 64, noise)


def _diabetes() -> Problem:
    x, y = map(np.asarray, load_diabetes(return_X_y=True))
    return Problem((x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std()).astype(np.float32), 32)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "digits": lambda: _digits(0.0),
    "digits, a fifth of the labels at random": lambda: _digits(0.2),
    "diabetes": _diabetes,
}
METHODS: dict[str, Callable[[float, str], Any]] = {
    "exact": lambda rate, metric: llqr.exact(damping=llqr.Trust(noisy=True)),
    "streaming": lambda rate, metric: llqr.streaming(rate, metric=metric),
    "AdamW": lambda rate, metric: optax.adamw(rate),
}


def _forward(p: Any, b: Any) -> Any:
    return jnp.tanh(b["x"] @ p["a"] + p["b"]) @ p["c"] + p["d"]


def train(problem: Problem, method: str, rate: float, seed: int) -> list[tuple[float, float]]:
    """Return losses of training and unseen examples after `SEEN` steps."""
    objective = llqr.Objective(_forward, problem.loss)
    tx = METHODS[method](rate, "ngd" if problem.classes else "gaussian")
    own = isinstance(tx, optax.GradientTransformationExtraArgs)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        bound = objective.bind(batch)
        grads = jax.grad(bound)(params)
        more = {"objective": bound} if own else {}
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    known, unseen = problem.split(seed)
    keys, n = jax.random.split(jax.random.key(seed), 2), problem.x.shape[1]
    outputs = 10 if problem.classes else 1
    params = {
        "a": jax.random.normal(keys[0], (n, WIDTH)) / n**0.5, "b": jnp.zeros(WIDTH),
        "c": jax.random.normal(keys[1], (WIDTH, outputs)) / WIDTH**0.5, "d": jnp.zeros(outputs),
    }  # fmt: skip
    rng, state, found = np.random.default_rng(seed), tx.init(params), []
    for i in range(1, max(SEEN) + 1):
        index = rng.integers(0, len(known["y"]), problem.size)
        params, state = step(params, state, jax.tree.map(lambda x, i=index: x[i], known))
        if i in SEEN:
            found.append(tuple(float(objective(params, batch)) for batch in (known, unseen)))
    return found


def _tuned(problem: Problem, method: str) -> float:
    if method == "exact":
        return 1.0
    ends = {rate: train(problem, method, rate, TUNING)[-1][0] for rate in RATES}
    best = min(ends, key=lambda rate: ends[rate] if np.isfinite(ends[rate]) else np.inf)
    if best in (RATES[0], RATES[-1]):
        raise ValueError(f"{method}: the best rate {best} is at an end of the grid.")
    return best


def main() -> None:
    """Measure, print and write."""
    names, repeats, _ = reporting.ask(__doc__ or "", PROBLEMS, repeats=5, quick="one seed")
    rows = []
    for name in names:
        problem = PROBLEMS[name]()
        for method in METHODS:
            rate = _tuned(problem, method)
            trials = [train(problem, method, rate, seed) for seed in range(repeats)]
            row: dict[str, Any] = {"problem": name, "method": method, "rate": rate}
            for i, count in enumerate(SEEN):
                for j, what in enumerate(("train", "unseen")):
                    row[f"{what} {count}"] = reporting.spread(t[i][j] for t in trials)
            rows.append(row)
    reporting.show("loss after some steps, median (least - most)", rows)
    reporting.write("mini_batches", reporting.environment(seeds=repeats), rows)


if __name__ == "__main__":
    main()
