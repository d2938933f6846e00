"""How many images of the size of ImageNet's the pipeline decodes a second.

    uv run python benchmarks/image_decoding.py
    uv run python benchmarks/image_decoding.py --batches 2

JPEG files of 400x350 pixels, quality 90, some 50 KB each: smooth colours with fine noise. Training
resizes, crops and flips each at random; evaluation takes the middle. The first batch is not
counted: it starts the threads.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from reporting import environment, show, write

from llqr_experiments import data

IMAGES, BATCH, CLASSES = 512, 64, 4


def generate(root: Path) -> None:
    """Write a tree of images."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(IMAGES):
            colours = rng.integers(0, 256, (6, 7, 3), np.uint8)
            smooth = Image.fromarray(colours).resize((400, 350), Image.Resampling.BICUBIC)
            noise = rng.normal(0, 12, (350, 400, 3))
            pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
            folder = root / split / f"n{i % CLASSES:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.JPEG", quality=90)


def rate(batches: Iterator[Any], count: int) -> float:
    """Return images a second over `count` batches after the first."""
    next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return BATCH * count / (time.perf_counter() - start)


def measure(images: data.Images, threads: int, count: int) -> dict[str, Any]:
    """Measure training and evaluation with some threads."""
    with closing(
        data.train_stream(images.train, batch_size=BATCH, seed=0, num_threads=threads)
    ) as s:
        training = rate(s, count)
    evaluation = data.evaluation_batches(images.test, BATCH, num_threads=threads)
    return {
        "threads": threads,
        "training (images/s)": training,
        "evaluation (images/s)": rate(evaluation, min(count, IMAGES // BATCH - 1)),
    }


def main() -> None:
    """Measure with 0, 1 and 2 threads, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="How fast are images decoded?")
    parser.add_argument("--batches", type=int, default=14)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        size = np.mean([path.stat().st_size for path in Path(folder).rglob("*.JPEG")])
        images = data.images("imagenet", folder, augment=True)
        rows = [measure(images, threads, arguments.batches) for threads in (0, 1, 2)]
    where = environment(batches=arguments.batches, kilobytes=round(float(size) / 1000))
    show(f"JPEG, 400x350, {where['kilobytes']} KB, {where['cores']} cores", rows)
    write("image_decoding", where, rows)


if __name__ == "__main__":
    main()
