"""The batches: the endless training stream, the stream of refits, and the evaluation pass."""

import dataclasses
import itertools
import json
import math
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from llqr_experiments.data import (
    DataError,
    Partial,
    Source,
    epoch_length,
    evaluation_batches,
    refit_seed,
    refit_stream,
    stride,
    train_stream,
)
from llqr_experiments.data.examples import normalized
from tests.experiments.batches import assert_same, make_dataset

# n, B, overlap: B divides n, does not, exceeds it, spans epochs; strides of B, B/2, B/4, 1.
SIZES = [(10, 5, 0.0), (10, 4, 0.0), (10, 4, 0.5), (10, 4, 0.75), (3, 8, 0.5), (11, 6, 0.5)]
MODES: tuple[Partial, ...] = ("straddle", "pad", "drop")
# "drop" has no batch where B > n.
CASES = [(*size, mode) for size in SIZES for mode in MODES if mode != "drop" or size[1] <= size[0]]


def ids(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return which examples of `make_dataset` a batch holds."""
    return batch["image"][:, 0, 0, 0].astype(int)


def take(source: Source, count: int, **kwargs) -> list[dict[str, np.ndarray]]:
    with closing(train_stream(source, **kwargs)) as stream:
        return [next(stream) for _ in range(count)]


def slow_batches(n: int, batch_size: int, overlap: float, partial: str, epochs: int) -> list:
    """Return the examples of the batches of some epochs (seed 0), by literal micro-batches.

    An epoch is cut into micro-batches of r examples; a batch is B / r neighbours of them.
    """
    r = round(batch_size * (1 - overlap))
    orders = [
        np.random.RandomState(
            np.random.MT19937(np.random.SeedSequence(0, spawn_key=(epoch,)))
        ).permutation(n)
        for epoch in range(epochs)
    ]
    batches = []
    for order in [np.concatenate(orders)] if partial == "straddle" else orders:
        micro = [list(order[start : start + r]) for start in range(0, len(order), r)]
        if partial != "pad" and len(micro[-1]) < r:
            micro.pop()
        width = batch_size // r
        if partial == "pad":
            micro += [[]] * (width - len(micro))
        for first in range(len(micro) - width + 1):
            batches.append(list(itertools.chain(*micro[first : first + width])))
    return batches


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

    def test_augmentation_is_frozen(self):
        """So is the generator that a batch is augmented with."""
        source = Source.of(make_dataset(), "train", augment)
        _, batch = take(source, 2, batch_size=2, seed=0)
        np.testing.assert_allclose(batch["image"][:, 0, 0, 0], [3.047943244944, 1.397540777377])

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
        source = dataclasses.replace(source, augment=augment)
        jitter = {"batch_size": 8, "seed": 1}
        batches = take(source, 100, num_threads=num_threads, **jitter)
        assert_same(batches, take(source, 100, num_threads=2, prefetch=3, **jitter))

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

    def test_augmentation_differs_between_batches_and_seeds(self):
        source = Source.of(make_dataset(), "train", augment)
        one, two = take(source, 2, batch_size=10, seed=0)
        (other,) = take(source, 1, batch_size=10, seed=1)
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


class TestOverlapAndPartialBatches:
    @pytest.mark.parametrize(("n", "batch_size", "overlap", "partial"), CASES)
    def test_against_literal_micro_batches(self, n, batch_size, overlap, partial):
        expected = slow_batches(n, batch_size, overlap, partial, epochs=12)
        source = Source.of(make_dataset(n), "train")
        options = {"batch_size": batch_size, "seed": 0, "overlap": overlap, "partial": partial}
        batches = take(source, len(expected), **options)
        for batch, kept in zip(batches, expected, strict=True):
            filled = kept + [0] * (batch_size - len(kept))
            assert ids(batch).tolist() == filled
            assert batch["label"].tolist() == [i % 10 for i in filled]
            assert batch.keys() == {"image", "label"} | ({"mask"} if partial == "pad" else set())
            if partial == "pad":
                assert batch["mask"].dtype == bool
                assert batch["mask"].tolist() == [i < len(kept) for i in range(batch_size)]
        length = epoch_length(source, batch_size, overlap=overlap, partial=partial)
        # An endless stream has B / r - 1 batches more that start in the last epoch.
        r = round(batch_size * (1 - overlap))
        cut = batch_size // r - 1 if partial == "straddle" else 0
        assert math.floor(12 * length) - cut == len(expected)

    @pytest.mark.parametrize(("overlap", "shared"), [(0.5, 4), (0.75, 6), (0.99, 7)])
    def test_neighbours_share_examples(self, overlap, shared):
        batches = take(
            Source.of(make_dataset(30), "train"), 40, batch_size=8, seed=2, overlap=overlap
        )
        for one, two in itertools.pairwise(batches):
            np.testing.assert_array_equal(ids(one)[8 - shared :], ids(two)[:shared])

    def test_overlap_moves_through_the_same_stream(self):
        """Each example is in B / r = 4 batches: the first r of each batch are the stream."""
        source = Source.of(make_dataset(30), "train")
        slow = np.concatenate([ids(b) for b in take(source, 10, batch_size=8, seed=2)])
        fast = np.concatenate(
            [ids(b)[:2] for b in take(source, 40, batch_size=8, seed=2, overlap=0.75)]
        )
        np.testing.assert_array_equal(fast, slow)

    def test_defaults_are_no_overlap_and_straddling(self):
        source = Source.of(make_dataset(11), "train")
        same = take(source, 20, batch_size=4, seed=3, overlap=0.0, partial="straddle")
        assert_same(same, take(source, 20, batch_size=4, seed=3))

    def test_a_shared_example_is_augmented_anew(self):
        source = Source.of(make_dataset(30), "train", augment)
        one, two = take(source, 2, batch_size=8, seed=2, overlap=0.5)
        np.testing.assert_array_equal(ids(one)[4:], ids(two)[:4])
        assert not np.allclose(one["image"][4:], two["image"][:4])

    def test_a_padded_batch_is_augmented_and_keeps_its_mask(self):
        source = Source.of(make_dataset(10), "train", augment)
        batch = take(source, 3, batch_size=4, seed=0, partial="pad")[-1]
        assert batch["mask"].tolist() == [True, True, False, False]
        assert (ids(batch)[2:] == 0).all()
        assert (batch["image"] != np.round(batch["image"])).all()

    @pytest.mark.parametrize(
        ("batch_size", "overlap", "expected"),
        [(128, 0.0, 128), (128, 0.5, 64), (128, 0.999, 1), (6, 2 / 3, 2), (1, 0.9, 1), (4, 0.1, 4)],
    )
    def test_stride(self, batch_size, overlap, expected):
        assert stride(batch_size, overlap) == expected

    def test_every_divisor_has_an_overlap(self):
        """As the message prints it: six digits."""
        for batch_size in (12, 128, 1000, 4096):
            for r in (d for d in range(1, batch_size + 1) if batch_size % d == 0):
                assert stride(batch_size, float(f"{1 - r / batch_size:g}")) == r

    def test_bad_overlap(self):
        source = Source.of(make_dataset(), "train")
        message = (
            r"overlap is 0.3: its stride of 90 .* 128\. .* 0.5 \(stride 64\) or 0 \(stride 128"
        )
        with pytest.raises(ValueError, match=message):
            train_stream(source, batch_size=128, seed=0, overlap=0.3)
        for overlap in (-0.1, 1.0, math.nan):
            with pytest.raises(ValueError, match=r"overlap is .*, expected at least 0 and less"):
                train_stream(source, batch_size=4, seed=0, overlap=overlap)

    def test_bad_mode(self):
        with pytest.raises(ValueError, match=r"unknown partial 'dorp': did you mean 'drop'"):
            take(Source.of(make_dataset(), "train"), 1, batch_size=4, seed=0, partial="dorp")

    def test_drop_needs_a_full_batch(self):
        source = Source.of(make_dataset(), "train")
        message = r"epoch of 10 examples has no full batch of 11.*to 10 or less.*'pad' or 'str"
        with pytest.raises(DataError, match=message):
            train_stream(source, batch_size=11, seed=0, partial="drop")
        with pytest.raises(DataError, match=message):
            epoch_length(source, 11, partial="drop")

    @pytest.mark.parametrize(
        ("batch_size", "lengths"), [(4, (2.5, 3, 2)), (5, (2, 2, 2)), (10, (1, 1, 1))]
    )
    def test_epoch_length(self, batch_size, lengths):
        source = Source.of(make_dataset(), "train")
        assert epoch_length(source, batch_size) == lengths[0]
        assert tuple(epoch_length(source, batch_size, partial=m) for m in MODES) == lengths

    def test_epoch_length_of_a_batch_that_exceeds_the_source(self):
        source = Source.of(make_dataset(), "train")
        assert epoch_length(source, 40) == 0.25
        assert epoch_length(source, 40, partial="pad") == 1
        with pytest.raises(ValueError, match=r"batch_size is 0"):
            epoch_length(source, 0)


class TestResume:
    @pytest.mark.parametrize("num_threads", [0, 2])
    @pytest.mark.parametrize("change", [None, augment])
    @pytest.mark.parametrize("partial", MODES)
    @pytest.mark.parametrize("overlap", [0.0, 0.75])
    def test_from_any_batch(self, overlap, partial, change, num_threads):
        source = Source.of(make_dataset(22), "train", change)
        options = {"overlap": overlap, "partial": partial}
        options |= {"batch_size": 8, "seed": 1, "num_threads": num_threads, "prefetch": 4}
        states, expected = [], []
        with closing(train_stream(source, **options)) as stream:
            for _ in range(16):
                states.append(json.loads(json.dumps(stream.get_state())))
                expected.append(next(stream))
            for k in (15, 9, 0):
                stream.set_state(states[k])
                assert_same(expected[k:], [next(stream) for _ in range(16 - k)])
        for k, state in enumerate(states):
            with closing(train_stream(source, **options)) as fresh:
                fresh.set_state(state)
                assert fresh.get_state() == state
                assert_same(expected[k : k + 2], [next(fresh) for _ in expected[k : k + 2]])

    def test_batches_prepared_ahead_do_not_count(self):
        """The state after k batches is position k, however far the workers are."""
        prepared = threading.Semaphore(0)

        def counted(batch, rng):
            prepared.release()
            return augment(batch, rng)

        source = Source.of(make_dataset(22), "train", augment)
        options = {"batch_size": 8, "seed": 1, "num_threads": 2, "prefetch": 6, "overlap": 0.5}
        expected = take(source, 12, **options)
        watched = dataclasses.replace(source, augment=counted)
        with closing(train_stream(watched, **options)) as stream:
            start = stream.get_state()
            assert_same(expected[:3], [next(stream) for _ in range(3)])
            deadline = time.monotonic() + 20
            for _ in range(3 + 6):  # three taken, six ready
                assert prepared.acquire(timeout=max(0, deadline - time.monotonic()))
            state = stream.get_state()
        with closing(train_stream(source, **options)) as fresh:
            for _ in range(3):
                next(fresh)
            assert fresh.get_state() == state != start
            fresh.set_state(state)
            assert_same(expected[3:], [next(fresh) for _ in range(9)])


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


class Sentences:
    """Examples that are no images: n rows of tokens, each filled with its number."""

    def __init__(self, n: int, mask: np.ndarray | None = None):
        self._n, self._mask = n, mask

    def __len__(self) -> int:
        return self._n

    def gather(self, index):
        batch = {"tokens": np.repeat(index[:, None], 3, axis=1)}
        return batch if self._mask is None else batch | {"mask": self._mask[index]}

    def draw(self, index, rng):
        return self.gather(index) | {"noise": rng.random(len(index))}


class TestExamples:
    """The streams take anything that has rows."""

    @pytest.mark.parametrize("partial", MODES)
    def test_keys_are_those_of_the_source(self, partial):
        source = Sentences(10)
        batches = take(source, 6, batch_size=4, seed=0, partial=partial)
        for batch in batches:
            assert batch.keys() - {"mask"} == {"tokens", "noise"}
            assert batch["tokens"].shape == (4, 3)
        plain = take(Source.of(make_dataset(), "train"), 6, batch_size=4, seed=0, partial=partial)
        tokens = [batch["tokens"][:, 0] for batch in batches]
        np.testing.assert_array_equal(tokens, [ids(batch) for batch in plain])

    def test_evaluation_gathers_and_does_not_draw(self):
        batches = list(evaluation_batches(Sentences(10), 4))
        assert all(batch.keys() == {"tokens", "mask"} for batch in batches)
        assert batches[-1]["mask"].tolist() == [True, True, False, False]

    def test_a_row_that_the_source_masks_stays_masked(self):
        source = Sentences(6, mask=np.array([True, True, True, True, True, False]))
        last = list(evaluation_batches(source, 4))[-1]
        assert last["tokens"][:, 0].tolist() == [4, 5, 0, 0]
        assert last["mask"].tolist() == [True, False, False, False]
        for batch in take(source, 3, batch_size=4, seed=0, partial="pad"):
            rows, kept = batch["tokens"][:, 0], batch["mask"]
            assert not kept[rows == 5].any()

    def test_refits_draw_as_training_does(self):
        with closing(refit_stream(Sentences(10), batch_size=4, seed=0)) as stream:
            assert next(stream)["noise"].shape == (4,)

    @pytest.mark.parametrize("num_threads", [0, 2])
    def test_an_error_of_the_source_is_what_is_raised(self, num_threads):
        class Broken(Sentences):
            def gather(self, index):
                raise DataError("photo.jpg is broken")

        with pytest.raises(DataError) as caught:
            take(Broken(10), 1, batch_size=4, seed=0, num_threads=num_threads)
        assert str(caught.value) == "photo.jpg is broken"
        with pytest.raises(DataError) as caught:
            list(evaluation_batches(Broken(10), 4, num_threads=num_threads))
        assert str(caught.value) == "photo.jpg is broken"

    def test_evaluation_ahead_of_time_changes_nothing(self):
        source = Source.of(make_dataset(23), "test")
        one, two = (list(evaluation_batches(source, 4, num_threads=n)) for n in (0, 3))
        assert_same(one, two)

    def test_an_evaluation_that_is_left_ends_its_threads(self):
        before = threading.active_count()
        batches = evaluation_batches(Sentences(100), 4)
        next(batches)
        batches.close()
        deadline = time.monotonic() + 20
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before

    def test_normalization_takes_any_layout(self):
        pixels = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
        expected = normalized(pixels, (0.1, 0.2, 0.3, 0.4, 0.5), 0.7, 255.0)
        turned = np.asfortranarray(pixels)
        np.testing.assert_array_equal(
            normalized(turned, (0.1, 0.2, 0.3, 0.4, 0.5), 0.7, 255.0), expected
        )
        slow = (pixels / np.float32(255) - np.float32([0.1, 0.2, 0.3, 0.4, 0.5])) / np.float32(0.7)
        np.testing.assert_array_equal(expected, slow)
