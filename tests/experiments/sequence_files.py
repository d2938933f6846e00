"""Folders of invented sentence pairs and texts, and the options by which runs use them."""

from pathlib import Path

import numpy as np

from tests.experiments.text_files import write

SIZES = {"train": 40, "valid": 7, "test": 6}


def pairs(folder: Path, longest: int = 9, sizes: dict[str, int] = SIZES, seed: int = 0) -> Path:
    """A language that writes words backwards, in sentences of 1 to `longest` words."""
    random, files = np.random.RandomState(seed), {}
    for split, size in sizes.items():
        lengths = random.randint(1, longest + 1, size)
        lengths[:2] = 1, longest
        words = [random.randint(0, 7, n) for n in lengths]
        files[f"{split}.de"] = "".join(" ".join(f"a{i}" for i in w) + "\n" for w in words)
        files[f"{split}.en"] = "".join(" ".join(f"b{i}" for i in w[::-1]) + "\n" for w in words)
    return write(folder, files)  # type: ignore[arg-type]


def text(folder: Path) -> Path:
    """A text with a pattern, of a few characters; the splits end within a window."""
    line = "a bad cab, a dab. "
    lengths = {"train": 41, "valid": 6, "test": 5}
    return write(folder, {f"{name}.txt": (line * n)[:-4] for name, n in lengths.items()})


TRANSLATION = (
    "dataset=small_de_en", "dataset.max_tokens=40", "dataset.percentiles=2",
    "dataset.padding_factor=2", "architecture=transformer-iwslt-de-en", "architecture.width=4",
    "architecture.heads=2", "architecture.mlp=6", "architecture.depth=1",
)  # fmt: skip
TEXT = (
    "dataset=python_topics", "dataset.name=local", "dataset.target_len=8",
    "architecture=gpt2-small", "architecture.width=4", "architecture.heads=2",
    "architecture.depth=1", "architecture.tied=true", "architecture.positions=learned",
)  # fmt: skip
