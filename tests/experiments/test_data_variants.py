"""Variants of a dataset: long tails, truncation, and the augmentation of the CIFAR sets."""

import dataclasses
from contextlib import closing

import numpy as np
import pytest

from llqr_experiments.data import (
    DataError,
    Dataset,
    Source,
    Split,
    cifar_augmentation,
    long_tailed,
    train_stream,
    truncated,
    validate,
)
from llqr_experiments.data.variants import _crop_and_flip, _squares, long_tail_sizes

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def make_dataset(counts: list[int]) -> Dataset:
    """Return a dataset with shuffled classes of these sizes, whose image i is filled with i."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    labels = np.random.RandomState(0).permutation(labels)
    images = np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1)
    split = Split(images, labels)
    test = Split(images[:5], labels[:5])
    return Dataset("toy", split, test, len(counts), mean=0.5, std=2.0, scale=1.0, origin="here")


class TestLongTailed:
    @pytest.mark.parametrize(
        ("classes", "size", "total", "smallest"), [(10, 5000, 12408, 50), (100, 500, 10899, 5)]
    )
    def test_sizes_of_the_papers(self, classes, size, total, smallest):
        data = make_dataset([size] * classes)
        tail = long_tailed(data)
        counts = np.bincount(tail.train.labels)
        assert counts.sum() == len(tail.train) == total
        assert (counts[0], counts[-1]) == (size, smallest)
        assert (np.diff(counts) <= 0).all()
        validate(tail)

    def test_against_one_class_after_the_other(self):
        """Wanted are 55, 20.3, 7.5 and 2.75, of the 40, 55, 5 and 50 that there are."""
        data = make_dataset([40, 55, 5, 50])
        images, labels = [], []
        for c, size in enumerate([40, 20, 5, 3]):
            own = [i for i in range(len(data.train)) if data.train.labels[i] == c]
            chosen = np.random.RandomState(7 + c).permutation(own)[:size]
            images += [data.train.images[i] for i in chosen]
            labels += [c] * size
        tail = long_tailed(data, ratio=20, seed=7)
        np.testing.assert_array_equal(tail.train.images, images)
        np.testing.assert_array_equal(tail.train.labels, labels)
        assert tail.train.labels.dtype == np.int32

    def test_only_the_training_split_changes(self):
        data = make_dataset([40, 50])
        tail = long_tailed(data, ratio=2.5)
        assert tail.test is data.test
        assert tail.origin == "here, long tail of ratio 2.5"
        assert dataclasses.replace(tail, train=data.train, origin="here") == data
        assert len(data.train) == 90

    def test_ratio_of_one_keeps_everything(self):
        data = make_dataset([7, 7, 7])
        kept = long_tailed(data, ratio=1).train.images
        np.testing.assert_array_equal(np.sort(kept.ravel()), data.train.images.ravel())

    def test_the_seed_decides(self):
        data = make_dataset([50, 50])
        kept = [long_tailed(data, ratio=5, seed=seed).train.images for seed in (1, 1, 2)]
        np.testing.assert_array_equal(kept[0], kept[1])
        assert (kept[0] != kept[2]).any()

    def test_sizes(self):
        # At least one of a class that has any; nothing of one that has none.
        assert long_tail_sizes(np.array([9, 0, 9, 9]), 1000) == [9, 0, 1, 1]

    @pytest.mark.parametrize("ratio", [0.5, 0, -100, np.nan, np.inf])
    def test_bad_ratio(self, ratio):
        with pytest.raises(ValueError, match=rf"ratio is {ratio}, expected a finite number of 1"):
            long_tailed(make_dataset([3, 3]), ratio=ratio)

    def test_one_class(self):
        with pytest.raises(DataError, match=r"long tail of 1 class: expected 2 classes or more"):
            long_tailed(make_dataset([3]))


class TestTruncated:
    def test_the_first_in_the_order_of_the_file(self):
        data = make_dataset([40, 50])
        short = truncated(data, 12)
        np.testing.assert_array_equal(short.train.images, data.train.images[:12])
        np.testing.assert_array_equal(short.train.labels, data.train.labels[:12])
        assert short.test is data.test
        assert short.origin == "here, first 12 examples"
        assert dataclasses.replace(short, train=data.train, origin="here") == data
        assert len(truncated(data, 90).train) == 90
        validate(short)

    def test_bad_number(self):
        data = make_dataset([40, 50])
        message = r"toy: cannot be truncated to 91 training examples, there are 90\."
        with pytest.raises(DataError, match=message):
            truncated(data, 91)
        with pytest.raises(ValueError, match=r"examples is 0, expected 1 or more"):
            truncated(data, 0)


def random_images(count: int, size: int = 32, channels: int = 3) -> np.ndarray:
    shape = (count, size, size, channels)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def augmented(images: np.ndarray, seed: int = 1, **options) -> np.ndarray:
    batch = {"image": images, "label": np.arange(len(images))}
    return cifar_augmentation(MEAN, STD, **options)(batch, np.random.default_rng(seed))["image"]


def slow_crop(image: np.ndarray, offset: np.ndarray, flipped: bool, pad: int) -> np.ndarray:
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    crop = padded[offset[0] : offset[0] + image.shape[0], offset[1] : offset[1] + image.shape[1]]
    return crop[:, ::-1] if flipped else crop


class TestCifarAugmentation:
    @pytest.mark.parametrize("pad", [0, 1, 4])
    def test_crop_and_flip_against_padded_images(self, pad):
        images = random_images(40, channels=2)[:, :20]  # not square
        rng = np.random.default_rng(3)
        offsets = rng.integers(0, 2 * pad + 1, (40, 2))
        offsets[:2] = [0, 2 * pad], [2 * pad, 0]
        flipped = rng.random(40) < 0.5
        result = _crop_and_flip(images, offsets, flipped, pad)
        for i in range(40):
            expected = slow_crop(images[i], offsets[i], flipped[i], pad)
            np.testing.assert_array_equal(result[i], expected)

    @pytest.mark.parametrize("side", [0, 1, 4, 5, 100])
    def test_squares_against_a_slice(self, side):
        centres = np.array([[y, x] for y in range(9) for x in range(7)])
        result = _squares(centres, side, 9, 7)
        for square, (y, x) in zip(result, centres, strict=True):
            expected = np.zeros((9, 7), bool)
            top, left = y - side // 2, x - side // 2
            expected[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = True
            np.testing.assert_array_equal(square, expected)

    def test_each_image_is_a_crop_of_its_own(self):
        """Found by search among all 81 offsets and both orientations, one per image."""
        images = random_images(200)
        result = augmented(images, cutout=0)
        assert result.shape == images.shape
        assert result.dtype == np.float32
        found = np.array([self.find(*pair) for pair in zip(images, result, strict=True)])
        # 6 standard deviations of a fair coin; of 81 offsets, 200 draws miss few.
        np.testing.assert_allclose(found[:, 2].mean(), 0.5, atol=6 * np.sqrt(0.25 / 200))
        assert len({tuple(offset) for offset in found[:, :2]}) > 60
        assert (found[:, :2].min(0) == 0).all()
        assert (found[:, :2].max(0) == 8).all()

    @staticmethod
    def find(image: np.ndarray, crop: np.ndarray) -> tuple[int, int, bool]:
        """Return the one (row, column, flipped) that makes `crop` of `image`."""
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, image.shape[:2], axis=(0, 1))
        matches = []
        for flipped in (False, True):
            wanted = np.moveaxis(crop[:, ::-1] if flipped else crop, -1, 0)
            # One corner first: comparing whole windows takes long.
            corner = (windows[..., 0, 0] == wanted[:, 0, 0]).all(-1)
            for y, x in np.argwhere(corner):
                if (windows[y, x] == wanted).all():
                    matches.append((int(y), int(x), flipped))
        assert len(matches) == 1
        return matches[0]

    def test_flip_rate(self):
        """An image that gets darker to the right tells its orientation."""
        ramp = np.linspace(1, 0, 32, dtype=np.float32)[:, None]  # (w, c)
        images = np.broadcast_to(ramp, (4000, 32, 32, 1))
        result = cifar_augmentation(0.5, 0.5, pad=0, cutout=0)(
            {"image": images}, np.random.default_rng(0)
        )["image"]
        flips = result[:, 0, 0, 0] < result[:, 0, -1, 0]
        np.testing.assert_allclose(flips.mean(), 0.5, atol=6 * np.sqrt(0.25 / 4000))

    def test_cutout_is_a_clipped_square_of_half_of_the_images(self):
        images = np.ones((4000, 32, 32, 3), np.float32)
        black = augmented(images) != 1
        assert (black == black[..., :1]).all()
        hole = black[..., 0]
        cut = hole.any((1, 2))
        np.testing.assert_allclose(cut.mean(), 0.5, atol=6 * np.sqrt(0.25 / 4000))
        rows, columns = hole.any(2)[cut].sum(1), hole.any(1)[cut].sum(1)
        np.testing.assert_array_equal(hole[cut].sum((1, 2)), rows * columns)
        # A centre at row y has rows max(0, y - 8) .. min(31, y + 7).
        sides = [min(31, y + 7) - max(0, y - 8) + 1 for y in range(32)]
        for found in (rows, columns):
            assert (found.min(), found.max()) == (8, 16)
            np.testing.assert_allclose(
                found.mean(), np.mean(sides), atol=6 * np.std(sides) / np.sqrt(cut.sum())
            )
        # Every pixel is inside some square, and none in all.
        assert hole[cut].any(0).all()
        assert not hole[cut].all(0).any()

    def test_what_is_cut_out_is_black(self):
        """The very number that a raw pixel of zero is normalised to."""
        raw = np.zeros((16, 32, 32, 3), np.uint8)
        source = Source(raw, np.zeros(16, np.int32), MEAN, STD, 255.0)
        normalised = source.gather(np.arange(16))["image"]
        np.testing.assert_array_equal(augmented(normalised), normalised)
        assert (augmented(normalised + 1) == normalised).any((1, 2, 3)).sum() > 2

    def test_the_generator_decides(self):
        images = random_images(16)
        np.testing.assert_array_equal(augmented(images, seed=5), augmented(images, seed=5))
        assert (augmented(images, seed=5) != augmented(images, seed=6)).any()

    def test_nothing_to_do(self):
        images = random_images(8)
        result = augmented(images, pad=0, cutout=0)
        same = (result == images).all((1, 2, 3))
        flipped = (result == images[:, :, ::-1]).all((1, 2, 3))
        assert (same ^ flipped).all()

    def test_the_rest_of_a_batch_is_kept_and_the_input_not_written_to(self):
        images = random_images(8)
        batch = {"image": images.copy(), "label": np.arange(8), "mask": np.ones(8, bool)}
        result = cifar_augmentation(MEAN, STD)(batch, np.random.default_rng(0))
        assert result["label"] is batch["label"]
        assert result["mask"] is batch["mask"]
        np.testing.assert_array_equal(batch["image"], images)

    def test_in_a_stream(self):
        """The same batches with and without threads, and from the middle on."""
        source = Source(
            (random_images(20) * 40 + 128).astype(np.uint8),
            np.arange(20, dtype=np.int32),
            MEAN,
            STD,
            255.0,
            cifar_augmentation(MEAN, STD),
        )
        options = {"batch_size": 8, "seed": 0}
        with closing(train_stream(source, num_threads=2, **options)) as stream:
            threaded = [next(stream)["image"] for _ in range(6)]
        with closing(train_stream(source, num_threads=0, **options)) as stream:
            stream.set_state({"next_index": 2})
            np.testing.assert_array_equal(threaded[2:], [next(stream)["image"] for _ in range(4)])
        assert threaded[0].dtype == np.float32

    @pytest.mark.parametrize("option", [{"pad": -1}, {"cutout": -1}])
    def test_bad_arguments(self, option):
        with pytest.raises(ValueError, match=r"is -1, expected 0 or more"):
            cifar_augmentation(MEAN, STD, **option)
