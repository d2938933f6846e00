"""Sets of images by name, as the runner asks for them, and the presets."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from llqr_experiments import data
from llqr_experiments.data import DataError, cifar_augmentation, image_names, images
from llqr_experiments.errors import ConfigError
from llqr_experiments.task import tasks
from tests.experiments import archives, support


@pytest.fixture
def small(tmp_path) -> Path:
    """CIFAR-10 of 20 and 6 images."""
    splits = archives.cifar_split(20, 10, 0), archives.cifar_split(6, 10, 1)
    return archives.write(tmp_path / "cifar", archives.cifar10_files(*splits, "python"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """All labels of the CIFAR sets, with black images."""
    folders = {}
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        labels = np.repeat(np.arange(classes), 50000 // classes)
        np.random.RandomState(0).shuffle(labels)
        coarse = 1 if name == "cifar100" else 0
        records = np.zeros((50000, coarse + 3073), np.uint8)
        records[:, coarse] = labels
        pieces = np.split(records, 1 if coarse else 5)
        names = ["train.bin"] if coarse else [f"data_batch_{i}.bin" for i in range(1, 6)]
        files = {n: piece.tobytes() for n, piece in zip(names, pieces, strict=True)}
        files["test.bin" if coarse else "test_batch.bin"] = records[:10].tobytes()
        folders[name] = archives.write(tmp_path_factory.mktemp(name), files)
    return folders


class TestImages:
    def test_names(self):
        assert image_names() == (
            "cifar10", "cifar100", "digits", "digits32", "fashion_mnist", "imagenet", "mnist",
        )  # fmt: skip
        with pytest.raises(DataError, match=r"'cifra10': did you mean 'cifar10'"):
            images("cifra10")

    def test_in_memory(self, small):
        found = images("cifar10", small)
        dataset = data.load("cifar10", small)
        assert (len(found.train), len(found.test)) == (20, 6)
        assert (found.num_classes, found.shape, found.name) == (10, (32, 32, 3), "cifar10")
        assert found.origin == str(small)
        expected = data.Source.of(dataset, "test").gather(np.arange(6))
        np.testing.assert_array_equal(found.test.gather(np.arange(6))["image"], expected["image"])

    def test_cifar_is_augmented_in_training_only(self, small):
        found = images("cifar10", small, augment=True)
        index, plain = np.arange(20), images("cifar10", small)
        change = cifar_augmentation(
            (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, cutout=16
        )
        expected = change(plain.train.gather(index), np.random.default_rng(5))["image"]
        drawn = found.train.draw(index, np.random.default_rng(5))["image"]
        np.testing.assert_array_equal(drawn, expected)
        assert (drawn != plain.train.gather(index)["image"]).any((1, 2, 3)).sum() > 15
        for split, k in ((found.test, 6), (plain.train, 20)):
            same = split.draw(np.arange(k), np.random.default_rng(5))["image"]
            np.testing.assert_array_equal(same, split.gather(np.arange(k))["image"])

    @pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist"])
    def test_a_set_without_augmentation_says_so(self, name):
        with pytest.raises(ConfigError, match=rf"augment=true: {name} has no augmentation, only c"):
            images(name, augment=True)

    def test_truncated_first_then_long_tailed(self, small):
        found = images("cifar10", small, truncate=18, imbalance=2.0)
        dataset = data.long_tailed(data.truncated(data.load("cifar10", small), 18), ratio=2.0)
        np.testing.assert_array_equal(
            found.train.gather(np.arange(len(found.train)))["label"], dataset.train.labels
        )
        assert found.origin == f"{small}, first 18 examples, long tail of ratio 2"


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("cifar10", ("cifar10", True, None, None)),
            ("cifar100", ("cifar100", True, None, None)),
            ("lt_cifar10", ("cifar10", True, 100, None)),
            ("lt_cifar100", ("cifar100", True, 100, None)),
            ("imagenet", ("imagenet", True, None, None)),
            ("truncated_mnist", ("mnist", False, None, 10_000)),
        ],
    )
    def test_options(self, name, options):
        found = support.config(f"dataset={name}").dataset
        assert (found.name, found.augment, found.imbalance, found.truncate) == options

    @pytest.mark.parametrize(
        ("name", "total", "largest", "smallest"),
        [("lt_cifar10", 12408, 5000, 50), ("lt_cifar100", 10899, 500, 5)],
    )
    def test_long_tails_of_the_papers(self, whole, name, total, largest, smallest):
        place = whole[name.removeprefix("lt_")]
        config = support.config(f"dataset={name}", f"dataset.dataset_dir={place}")
        chosen = config.dataset
        found = images(chosen.name, place, augment=chosen.augment, imbalance=chosen.imbalance)
        assert isinstance(found.train, data.Source)
        labels = found.train.labels
        counts = np.bincount(labels)
        assert (counts.sum(), counts[0], counts[-1]) == (total, largest, smallest)
        assert (np.diff(counts) <= 0).all()
        assert len(found.test) == 10

    def test_a_run_sees_augmented_images(self, small):
        """In training and in refits; evaluation of the training set does not."""
        overrides = ("dataset=cifar10", f"dataset.dataset_dir={small}", "architecture.hidden=[4]")
        config = support.config(*overrides, "batch_size=8", "precond_batch_size=8", "rng_seed=0")
        streams = tasks.build(config).material.streams
        plain = data.Source.of(data.load("cifar10", small), "train")
        for ours, make in (
            (streams.training, data.train_stream),
            (streams.refits, data.refit_stream),
        ):
            batches = []
            for stream in (ours(config), make(plain, batch_size=8, seed=0)):
                with closing(stream):
                    batches.append(next(stream))
            np.testing.assert_array_equal(batches[0]["label"], batches[1]["label"])
            assert (batches[0]["image"] != batches[1]["image"]).any((1, 2, 3)).sum() > 5
        evaluations = streams.evaluation("train", 7), data.evaluation_batches(plain, 7)
        for one, two in zip(*evaluations, strict=True):
            np.testing.assert_array_equal(one["image"], two["image"])
