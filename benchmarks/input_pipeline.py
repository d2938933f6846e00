"""Whether the input pipeline starves the step: seconds waited for batches / seconds of training.

    uv run python benchmarks/input_pipeline.py
    uv run python benchmarks/input_pipeline.py --steps 20

The residual CNN on 32x32x3 images of noise, batch 128, with the augmentation of CIFAR (crop,
flip, cutout) in the pipeline's threads. The first batch is not counted: it starts the threads.
"""

import argparse
import time
from typing import Any

import jax
import numpy as np
import optax
from models import MODELS
from reporting import environment, show, write

from llqr_experiments import data

EXAMPLES, BATCH = 5000, 128
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def source() -> data.Source:
    """Return noise in the shape of CIFAR-10."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (EXAMPLES, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, EXAMPLES, dtype=np.int32)
    return data.Source(images, labels, MEAN, STD, 255.0, data.cifar_augmentation(MEAN, STD))


def measure(threads: int, steps: int) -> dict[str, Any]:
    """Train, and time how long each batch is waited for."""
    model = MODELS["cnn"]
    tx, params = optax.sgd(0.01), model.init()
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(model.objective)(params, batch)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    stream = data.train_stream(source(), batch_size=BATCH, seed=0, num_threads=threads)
    waited, start = 0.0, 0.0
    for i in range(steps + 1):
        before = time.perf_counter()
        batch = next(stream)
        now = time.perf_counter()
        params, state = step(params, state, {"x": batch["image"], "y": batch["label"]})
        jax.block_until_ready(params)
        if i:
            waited += now - before
        else:
            start = time.perf_counter()
    whole = time.perf_counter() - start
    stream.close()
    return {
        "threads": threads,
        "step (ms)": 1e3 * whole / steps,
        "waited (ms)": 1e3 * waited / steps,
        "share (%)": 100 * waited / whole,
    }


def main() -> None:
    """Measure with and without threads, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="Does the input pipeline starve the step?")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    rows = [measure(threads, arguments.steps) for threads in (2, 0)]
    where = environment(steps=arguments.steps)
    show(f"residual CNN, batch {BATCH}, {where['device']}, {where['cores']} cores", rows)
    write("input_pipeline", where, rows)


if __name__ == "__main__":
    main()
