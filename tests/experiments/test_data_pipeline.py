"""The batches: the endless training stream, the stream of refits, and the evaluation pass."""

import dataclasses
from contextlib import closing

import numpy as np
import pytest

from llqr_experiments.data import (
    DataError,
    Dataset,
    Source,
    Split,
    epoch_length,
    evaluation_batches,
    refit_seed,
    refit_stream,
    train_stream,
)


def make_dataset(n: int = 10) -> Dataset:
    """Return a dataset whose image i is filled with i and has label i % 10."""
    images = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, 2, 3, 1))
    split = Split(images.copy(), (np.arange(n) % 10).astype(np.int32))
    return Dataset("toy", split, split, num_classes=10, mean=0.0, std=1.0, scale=1.0)


def ids(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return which examples of `make_dataset` a batch holds."""
    return batch["image"][:, 0, 0, 0].astype(int)


def take(source: Source, count: int, **kwargs) -> list[dict[str, np.ndarray]]:
    with closing(train_stream(source, **kwargs)) as stream:
        return [next(stream) for _ in range(count)]


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def augment(batch, rng):
    """Add noise below 1/2, so that rounding an image still tells which one it was."""
    return {**batch, "image": batch["image"] + rng.uniform(0, 0.4, batch["image"].shape)}


class TestTrainStream:
    # 7 does not divide 10; 25 exceeds it and spans three epochs.
    @pytest.mark.parametrize("batch_size", [5, 7, 25])
    def test_each_epoch_has_every_example_once(self, batch_size):
        n, epochs = 10, 70
        batches = take(
            Source.of(make_dataset(), "train"),
            n * epochs // batch_size,
            batch_size=batch_size,
            seed=0,
        )
        assert all(ids(batch).shape == (batch_size,) for batch in batches)
        stream = np.concatenate([ids(batch) for batch in batches]).reshape(epochs, n)
        np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(n), (epochs, 1)))
        # Reshuffled: of 70 orders out of 3.6 million, two alike would be an accident.
        assert len({tuple(order) for order in stream}) == epochs

    def test_shuffle_is_uniform(self):
        """Over 2,000 epochs, each example is at each place about 1/10 of the time."""
        batches = take(Source.of(make_dataset(), "train"), 200, batch_size=100, seed=3)
        orders = np.concatenate([ids(batch) for batch in batches]).reshape(-1, 10)
        counts = np.stack([np.bincount(place, minlength=10) for place in orders.T])
        # 6 standard deviations of a binomial with 2,000 draws of 1/10.
        np.testing.assert_allclose(counts, 200, atol=6 * np.sqrt(2000 * 0.1 * 0.9))

    def test_order_is_frozen(self):
        """A seed means the same data in every version: a change here breaks comparisons."""
        (batch,) = take(Source.of(make_dataset(), "train"), 1, batch_size=15, seed=0)
        assert ids(batch).tolist() == [4, 8, 3, 1, 5, 7, 2, 0, 6, 9, 2, 3, 4, 1, 9]

    def test_the_seed_decides(self):
        source = Source.of(make_dataset(100), "train")
        first = take(source, 8, batch_size=32, seed=5)
        assert_same(first, take(source, 8, batch_size=32, seed=5))
        other = np.concatenate([ids(b) for b in take(source, 8, batch_size=32, seed=6)])
        assert (np.concatenate([ids(b) for b in first]) == other).mean() < 0.1

    def test_neighbouring_seeds_are_not_shifted_copies(self):
        """Epoch 1 of seed 5 must not be epoch 0 of seed 6, as for seeds that are added up."""
        source = Source.of(make_dataset(100), "train")
        five = ids(take(source, 2, batch_size=100, seed=5)[1])
        six = ids(take(source, 1, batch_size=100, seed=6)[0])
        assert (five == six).mean() < 0.1

    @pytest.mark.parametrize("num_threads", [0, 1, 4])
    def test_threads_change_nothing(self, num_threads):
        source = Source.of(make_dataset(50), "train")
        jitter = {"transform": augment, "batch_size": 8, "seed": 1}
        batches = take(source, 100, num_threads=num_threads, **jitter)
        assert_same(batches, take(source, 100, num_threads=2, prefetch=3, **jitter))

    @pytest.mark.parametrize("num_threads", [0, 3])
    def test_resume(self, num_threads):
        source = Source.of(make_dataset(50), "train")
        arguments = {"batch_size": 8, "seed": 1, "transform": augment, "num_threads": num_threads}
        with closing(train_stream(source, **arguments)) as stream:
            for _ in range(9):
                next(stream)
            state = stream.get_state()
            expected = [next(stream) for _ in range(20)]
            stream.set_state(state)
            assert_same(expected, [next(stream) for _ in range(20)])
        with closing(train_stream(source, **arguments)) as fresh:
            fresh.set_state(state)
            assert_same(expected, [next(fresh) for _ in range(20)])

    def test_normalisation(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (6, 4, 5, 3)).astype(np.uint8)
        labels = np.arange(6, dtype=np.int32)
        source = Source(images, labels, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), scale=255.0)
        (batch,) = take(source, 1, batch_size=6, seed=0)
        assert batch["image"].dtype == np.float32
        assert batch["label"].dtype == np.int32
        raw = images[batch["label"]].astype(np.float64)
        expected = (raw / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
        np.testing.assert_allclose(batch["image"], expected, rtol=1e-5, atol=1e-6)
        assert images.dtype == np.uint8
        assert source.images is images

    def test_float_images_are_not_written_to(self):
        data = make_dataset()
        source = dataclasses.replace(Source.of(data, "train"), mean=3.0, std=2.0)
        take(source, 3, batch_size=10, seed=0)
        np.testing.assert_array_equal(data.train.images, make_dataset().train.images)

    def test_transform_differs_between_batches_and_seeds(self):
        source = Source.of(make_dataset(), "train")
        one, two = take(source, 2, batch_size=10, seed=0, transform=augment)
        (other,) = take(source, 1, batch_size=10, seed=1, transform=augment)
        noise = [batch["image"] - np.round(batch["image"]) for batch in (one, two, other)]
        assert all(np.abs(part).max() > 0 for part in noise)
        assert not np.allclose(noise[0], noise[1])
        assert not np.allclose(noise[0], noise[2])

    def test_refits_have_a_stream_of_their_own(self):
        source = Source.of(make_dataset(100), "train")
        expected = np.random.SeedSequence(7, spawn_key=(0, 2)).generate_state(1)[0]
        assert refit_seed(7) == expected
        with closing(refit_stream(source, batch_size=32, seed=7)) as stream:
            refits = [next(stream) for _ in range(8)]
        assert_same(refits, take(source, 8, batch_size=32, seed=refit_seed(7)))
        training = np.concatenate([ids(b) for b in take(source, 8, batch_size=32, seed=7)])
        assert (np.concatenate([ids(b) for b in refits]) == training).mean() < 0.1

    def test_epoch_length(self):
        assert epoch_length(Source.of(make_dataset(), "train"), 4) == 2.5

    @pytest.mark.parametrize("make", [train_stream, refit_stream])
    def test_bad_arguments(self, make):
        source = Source.of(make_dataset(), "train")
        with pytest.raises(ValueError, match=r"batch_size is 0, expected 1 or more"):
            make(source, batch_size=0, seed=0)
        with pytest.raises(ValueError, match=r"seed is -1, expected 0 or more"):
            make(source, batch_size=1, seed=-1)
        empty = dataclasses.replace(source, images=source.images[:0], labels=source.labels[:0])
        with pytest.raises(DataError, match=r"source is empty"):
            make(empty, batch_size=1, seed=0)


class TestEvaluation:
    @pytest.mark.parametrize(("batch_size", "count"), [(1, 10), (5, 2), (4, 3), (25, 1)])
    def test_each_example_once_in_one_shape(self, batch_size, count):
        batches = list(evaluation_batches(Source.of(make_dataset(), "test"), batch_size))
        assert len(batches) == count
        for batch in batches:
            assert batch["image"].shape == (batch_size, 2, 3, 1)
            assert batch["label"].shape == batch["mask"].shape == (batch_size,)
            assert batch["mask"].dtype == bool
            assert (ids(batch)[~batch["mask"]] == 0).all()
        kept = np.concatenate([ids(batch)[batch["mask"]] for batch in batches])
        np.testing.assert_array_equal(kept, np.arange(10))
        labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
        np.testing.assert_array_equal(labels, np.arange(10))

    def test_bad_arguments_fail_before_the_first_batch(self):
        with pytest.raises(ValueError, match=r"batch_size is 0"):
            evaluation_batches(Source.of(make_dataset(), "test"), 0)

    def test_of_takes_the_named_split(self):
        data = dataclasses.replace(make_dataset(), test=make_dataset(4).test)
        assert len(Source.of(data, "train")) == 10
        assert len(Source.of(data, "test")) == 4
