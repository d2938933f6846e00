"""Images that can be told apart, and batches compared."""

import numpy as np

from llqr_experiments.data import Dataset, Split


def make_dataset(n: int = 10) -> Dataset:
    """Return a dataset whose image i is filled with i and has label i % 10."""
    images = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, 2, 3, 1))
    split = Split(images.copy(), (np.arange(n) % 10).astype(np.int32))
    return Dataset("toy", split, split, num_classes=10, mean=0.0, std=1.0, scale=1.0)


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    """Check that batches are equal in every array."""
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
