"""ImageNet: every form that it is kept in, its index, decoding and augmentation, broken files."""

import dataclasses
import io
import json
import os
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llqr_experiments import data
from llqr_experiments.data import DataError, images
from llqr_experiments.data import index as indexing
from llqr_experiments.data.imagenet import MEAN, STD
from llqr_experiments.data.photos import CROP, SIDES, crop
from llqr_experiments.errors import ConfigError
from tests.experiments import archives, support

FORMS = {
    "tree": archives.imagenet_tree,
    "official": archives.imagenet_official,
    "shards": archives.imagenet_shards,
}


@pytest.fixture(autouse=True)
def fresh():
    """Each test sees the index as a new process does."""
    indexing._read_or_build.cache_clear()


def put(root: Path, form: str = "tree", **options) -> Path:
    return archives.write(root, FORMS[form](archives.imagenet(), **options))


def contents(examples) -> list[tuple[bytes, int]]:
    """Return the file and the label of each example."""
    found = [examples.index.read(examples.root, i) for i in range(len(examples))]
    return list(zip(found, examples.index.label.tolist(), strict=True))


def expected(split: str) -> list[tuple[bytes, int]]:
    classes = archives.imagenet()[split].values()
    return [(content, label) for label, x in enumerate(classes) for _, content in x]


def normalized(pixels: np.ndarray) -> np.ndarray:
    return (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_image_has_its_label(self, tmp_path, form):
        found = images("imagenet", put(tmp_path, form))
        assert sorted(contents(found.train)) == sorted(expected("train"))
        assert sorted(contents(found.test)) == sorted(expected("val"))
        assert (found.num_classes, found.shape, found.name) == (3, (224, 224, 3), "imagenet")
        assert found.origin == f"{tmp_path} ({form})"

    @pytest.mark.parametrize("labels", ["kit", "unpacked kit", "files", "wnids"])
    def test_labels_of_the_official_validation_images(self, tmp_path, labels):
        """The kit's IDs are in another order than the wnids, whose order is that of labels."""
        found = images("imagenet", put(tmp_path, "official", labels=labels))
        assert sorted(contents(found.test)) == sorted(expected("val"))

    @pytest.mark.parametrize("form", ["tree", "official"])
    def test_training_images_are_in_the_same_order(self, tmp_path, form):
        assert contents(images("imagenet", put(tmp_path, form)).train) == expected("train")

    def test_in_the_data_folder(self, tmp_path, monkeypatch):
        put(tmp_path / "data" / "imagenet")
        monkeypatch.chdir(tmp_path)
        found = images("imagenet")
        monkeypatch.chdir("/")
        assert len(contents(found.train)) == 15

    def test_what_is_no_image_is_left_out(self, tmp_path):
        put(tmp_path)
        for name in (".DS_Store", "._n01440764_0.JPEG", "Thumbs.db"):
            (tmp_path / "train" / "n01440764" / name).write_bytes(b"x")
        (tmp_path / "train" / ".cache").mkdir()
        assert contents(images("imagenet", tmp_path).train) == expected("train")


class TestIndex:
    @pytest.mark.parametrize("form", FORMS)
    def test_it_is_built_once(self, tmp_path, form, monkeypatch):
        first = images("imagenet", put(tmp_path, form))
        assert (tmp_path / indexing.FILE_NAME).is_file()
        indexing._read_or_build.cache_clear()
        monkeypatch.setattr(indexing, "table", None)  # a second build would call it
        monkeypatch.setattr("llqr_experiments.data.imagenet.table", None)
        second = images("imagenet", tmp_path)
        for one, two in ((first.train, second.train), (first.test, second.test)):
            assert contents(one) == contents(two)
            assert one.index.containers == two.index.containers

    @pytest.mark.parametrize("form", FORMS)
    def test_it_follows_the_data(self, tmp_path, form):
        before = images("imagenet", put(tmp_path, form))
        splits = archives.imagenet(train=5)
        archives.write(tmp_path, FORMS[form](splits))
        for path in tmp_path.rglob("*"):  # clocks of file systems are coarse
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
        after = images("imagenet", tmp_path)
        assert (len(before.train), len(after.train)) == (15, 18)

    def test_it_moves_with_the_data(self, tmp_path, monkeypatch):
        images("imagenet", put(tmp_path / "here", "official"))
        (tmp_path / "here").rename(tmp_path / "there")
        monkeypatch.setattr("llqr_experiments.data.imagenet.table", None)
        assert contents(images("imagenet", tmp_path / "there").train) == expected("train")

    @pytest.mark.parametrize("content", [b"", b"PK broken", None])
    def test_a_broken_file_is_made_again(self, tmp_path, content, caplog):
        path = put(tmp_path) / indexing.FILE_NAME
        images("imagenet", tmp_path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
        indexing._read_or_build.cache_clear()
        assert contents(images("imagenet", tmp_path).train) == expected("train")
        assert "is made again" in caplog.text
        assert indexing._read(path, self.key(path)) is not None

    @staticmethod
    def key(path: Path) -> str:
        with np.load(path) as file:
            return str(file["key"])

    def test_where_it_cannot_be_written_it_is_made_once(self, tmp_path, monkeypatch, caplog):
        def fail(*_):
            raise PermissionError("read-only")

        monkeypatch.setattr(indexing, "replacing", fail)
        put(tmp_path)
        assert contents(images("imagenet", tmp_path).train) == expected("train")
        assert "the index is not kept (read-only)" in caplog.text
        assert not (tmp_path / indexing.FILE_NAME).exists()
        monkeypatch.setattr("llqr_experiments.data.imagenet.table", None)
        assert len(images("imagenet", tmp_path).train) == 15


class TestBroken:
    def fail(self, place: Path, message: str) -> None:
        with pytest.raises(DataError, match=message) as caught:
            images("imagenet", place)
        assert not (place / indexing.FILE_NAME).exists()
        assert caught.value.code == 2

    def test_nothing_there(self, tmp_path):
        self.fail(tmp_path / "none", r"was not found in .*none.*three forms(.|\n)*account is need")

    def test_what_is_missing_is_named(self, tmp_path):
        files = FORMS["official"](archives.imagenet())
        del files["ILSVRC2012_devkit_t12.tar.gz"]
        archives.write(tmp_path, files)
        self.fail(tmp_path, r"official: no imagenet_2012_validation_synset_labels.txt or ILSVRC20")

    def test_classes_are_unequal(self, tmp_path):
        put(tmp_path)
        (tmp_path / "val" / "n02119789").rename(tmp_path / "val" / "n09999999")
        message = r"unequal classes: 1 only in train/ \(n02119789.*; 1 only in val/ \(n09999999"
        self.fail(tmp_path, message)

    def test_validation_images_without_folders(self, tmp_path):
        put(tmp_path)
        for path in list((tmp_path / "val").rglob("*.JPEG")):
            path.rename(tmp_path / "val" / path.name)
        for folder in archives.WNIDS:
            (tmp_path / "val" / folder).rmdir()
        self.fail(tmp_path, r"3 only in train/ .*val/ must have a folder for each class")

    def test_class_without_images(self, tmp_path):
        put(tmp_path)
        for path in (tmp_path / "train" / "n01440764").iterdir():
            path.unlink()
        self.fail(tmp_path, r"train/n01440764: has no image")

    @pytest.mark.parametrize(
        "name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "train-000001.tar"]
    )
    @pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, "end"])
    def test_truncated_tar(self, tmp_path, name, keep):
        path = put(tmp_path, "shards" if "train-" in name else "official") / name
        whole = path.read_bytes()
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        # At the end of a member, which is where tarfile notices nothing.
        end = last.offset_data + (last.size + 511) // 512 * 512
        path.write_bytes(whole[: end if keep == "end" else int(keep * len(whole))])
        self.fail(tmp_path, rf"{name}.*: not a whole, uncompressed tar archive")

    def test_tar_with_a_broken_header(self, tmp_path):
        """Which tarfile takes for the end of the archive."""
        path = put(tmp_path, "official") / "ILSVRC2012_img_val.tar"
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            third = tar.getmembers()[2]
        content[third.offset + 20] ^= 0xFF
        path.write_bytes(content)
        self.fail(tmp_path, rf"no end of archive at byte {third.offset}")

    def test_truncated_class_in_a_sound_tar(self, tmp_path):
        """The archive of one class must not run on into that of the next."""
        files = FORMS["official"](archives.imagenet())
        with tarfile.open(fileobj=io.BytesIO(files["ILSVRC2012_img_train.tar"])) as tar:
            inner = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        with tarfile.open(fileobj=io.BytesIO(inner["n01440764.tar"])) as tar:
            second = tar.getmembers()[1]
        inner["n01440764.tar"] = inner["n01440764.tar"][: second.offset]
        files["ILSVRC2012_img_train.tar"] = archives.tar_bytes(inner)
        archives.write(tmp_path, files)
        self.fail(tmp_path, r"ILSVRC2012_img_train.tar, member n01440764.tar: not a whole")

    def test_labels_and_images_are_unequal(self, tmp_path):
        path = put(tmp_path, "official", labels="wnids")
        path /= "imagenet_2012_validation_synset_labels.txt"
        path.write_text(path.read_text() + "n01440764\n")
        self.fail(tmp_path, r"synset_labels.txt: 7 labels, but .*val.tar has 6 images")

    def test_label_of_no_class(self, tmp_path):
        path = put(tmp_path, "official", labels="wnids")
        path /= "imagenet_2012_validation_synset_labels.txt"
        path.write_text(path.read_text().replace("n01440764", "n77777777"))
        self.fail(tmp_path, r"1 classes that ILSVRC2012_img_train.tar has not, .* n77777777")

    @pytest.mark.parametrize(("text", "fault"), [("1\nx\n", "'x'"), ("1\n77\n", "77")])
    def test_ground_truth_that_is_no_id(self, tmp_path, text, fault):
        path = put(tmp_path, "official", labels="files")
        (path / "ILSVRC2012_validation_ground_truth.txt").write_text(text)
        self.fail(tmp_path, rf"ground_truth.txt: .*{fault}.* is no ILSVRC2012_ID of meta.mat")

    def test_broken_kit(self, tmp_path):
        path = put(tmp_path, "official", labels="files")
        (path / "meta.mat").write_bytes(b"MATLAB 5.0 not")
        self.fail(tmp_path, r"meta.mat: has no table of synsets")
        put(tmp_path / "b", "official")
        kit = tmp_path / "b" / "ILSVRC2012_devkit_t12.tar.gz"
        kit.write_bytes(kit.read_bytes()[:50])
        self.fail(tmp_path / "b", r"devkit_t12.tar.gz: truncated or corrupt archive")

    def test_missing_shard(self, tmp_path):
        (put(tmp_path, "shards", shards=3) / "train-000001.tar").unlink()
        self.fail(tmp_path, r"000000.tar to train-000002.tar, 1 are missing, .* number 1")

    def test_missing_last_shard_of_an_announced_number(self, tmp_path):
        put(tmp_path, "shards")
        for k in range(2):
            (tmp_path / f"train-{k:06d}.tar").rename(tmp_path / f"train-{k}-of-3.tar")
        self.fail(tmp_path, r"1 are missing, .* number 2")

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ([("a.jpg", b"x")], r"image or label alone: a; expected NAME.jpg and NAME.cls"),
            ([("a.cls", b"0")], r"image or label alone: a;"),
            ([("a.cls", b"cat"), ("a.jpg", b"x")], r"member a.cls: holds b'cat', expected a label"),
            ([("a.txt", b"0")], r"val-000000.tar: no image"),
            ([("a.jpg", b"x"), ("a.png", b"x")], r"two members for the same thing, a.png"),
            ([("a.cls", b"1"), ("a.cls", b"2")], r"two members for the same thing, a.cls"),
            (
                [("a.cls", b"3"), ("a.jpg", b"x")],
                r"val-\*.tar go up to 3, those of train-\*.t.* 2;",
            ),
        ],
    )
    def test_broken_shard(self, tmp_path, entries, message):
        put(tmp_path, "shards")
        (tmp_path / "val-000000.tar").write_bytes(archives.tar_bytes(entries))
        self.fail(tmp_path, message)

    def test_a_set_of_all_classes_that_is_not_whole_is_told(self, tmp_path, caplog):
        """A tree that was not unpacked to its end looks like any other."""
        entries = [(f"{k}.{kind}", str(k).encode()) for k in range(1000) for kind in ("jpg", "cls")]
        for split in ("train", "val"):
            archives.write(tmp_path, {f"{split}-0.tar": archives.tar_bytes(entries)})
        assert images("imagenet", tmp_path).num_classes == 1000
        assert "1000 training and 1000 validation images of 1,000 classes" in caplog.text
        images("imagenet", put(tmp_path / "small"))
        assert caplog.text.count("may not be whole") == 1

    @pytest.mark.parametrize("content", [b"", b"<html>", "cut", "flipped"])
    @pytest.mark.parametrize("num_threads", [0, 2])
    def test_corrupt_image_is_named(self, tmp_path, content, num_threads):
        """Where training stops is when the image is asked for."""
        path = put(tmp_path) / "train" / "n01443537" / "n01443537_2.JPEG"
        whole = path.read_bytes()
        if content == "flipped":
            content = whole[:2] + bytes(20) + whole[22:]
        path.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
        train = images("imagenet", tmp_path).train
        stream = data.train_stream(train, batch_size=15, seed=0, num_threads=num_threads)
        message = r"n01443537/n01443537_2.JPEG: cannot be decoded \(.+\)\. Get the file again"
        with closing(stream), pytest.raises(DataError, match=message):
            next(stream)

    def test_corrupt_image_in_a_tar_is_named(self, tmp_path):
        path = put(tmp_path, "official") / "ILSVRC2012_img_train.tar"
        train = images("imagenet", tmp_path).train
        with path.open("r+b") as file:
            file.seek(train.index.offset[7])
            file.write(bytes(100))
        message = r"train.tar, member n01443537.tar/n01443537_3.JPEG: cannot be decoded"
        with pytest.raises(DataError, match=message):
            train.gather(np.arange(15))

    def test_files_that_vanish(self, tmp_path):
        train = images("imagenet", put(tmp_path / "a")).train
        (tmp_path / "a" / "train" / "n01440764" / "n01440764_0.JPEG").unlink()
        with pytest.raises(DataError, match=r"n01440764_0.JPEG: cannot be read .*No such file"):
            train.gather(np.arange(1))
        train = images("imagenet", put(tmp_path / "b", "shards")).train
        os.truncate(tmp_path / "b" / "train-000000.tar", 600)
        with pytest.raises(DataError, match=r"bytes, expected \d+. The archive has changed"):
            train.gather(np.arange(1))


def resized(content: bytes, side: int) -> np.ndarray:
    """The whole of an image at `side` x `side`, decoded at its full size."""
    with Image.open(io.BytesIO(content)) as image:
        whole = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(whole)


class TestDecoding:
    @pytest.mark.parametrize("size", [(40, 30), (500, 375), (224, 224), (300, 1000)])
    @pytest.mark.parametrize(("side", "corner"), [(256, (16, 16)), (480, (0, 256)), (256, (32, 5))])
    def test_a_crop_is_a_part_of_the_resized_image(self, size, side, corner):
        content = archives.image_bytes(3, size)
        top, left = corner
        whole = resized(content, side)[top : top + CROP, left : left + CROP].astype(int)
        assert np.abs(crop(content, side, corner) - whole).max() <= 1

    def test_large_images_are_decoded_smaller(self):
        """Which may not be seen: on average by less than a level, at edges by a few."""
        content = archives.image_bytes(3, (1400, 1100), quality=95)
        whole = resized(content, 256)[16:240, 16:240].astype(int)
        difference = np.abs(crop(content, 256, (16, 16)) - whole)
        assert 0 < difference.mean() < 1
        assert difference.max() < 8
        with Image.open(io.BytesIO(content)) as image:
            image.draft(None, (512, 512))
            assert image.size == (700, 550)

    @pytest.mark.parametrize(
        ("mode", "format"),
        [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG")],
    )
    def test_every_kind_becomes_rgb(self, mode, format):
        if mode == "P":
            image = Image.new("P", (50, 40), 1)
            image.putpalette([0, 0, 0, 10, 20, 30])
            file = io.BytesIO()
            image.save(file, "PNG", transparency=bytes([0, 100]))
            content = file.getvalue()
        else:
            content = archives.image_bytes(0, (50, 40), mode, format=format)
        pixels = crop(content, 256, (16, 16))
        assert pixels.shape == (224, 224, 3)
        assert pixels.dtype == np.uint8
        if mode in ("L", "LA"):
            assert (pixels == pixels[..., :1]).all()
        if mode == "P":
            assert (pixels == [10, 20, 30]).all()

    @pytest.mark.parametrize("form", FORMS)
    def test_evaluation_sees_the_middle(self, tmp_path, form):
        test = images("imagenet", put(tmp_path, form), augment=True).test
        batch = test.gather(np.array([4, 1, 4]))
        assert batch["image"].dtype == np.float32
        assert batch["label"].dtype == np.int32
        for image, i in zip(batch["image"], (4, 1, 4), strict=True):
            whole = resized(test.index.read(test.root, i), SIDES[0])[16:240, 16:240]
            np.testing.assert_allclose(image, normalized(whole), atol=1.1 / 255 / min(STD))
        np.testing.assert_array_equal(batch["label"], test.index.label[[4, 1, 4]])


class TestAugmentation:
    @pytest.fixture
    def train(self, tmp_path):
        return images("imagenet", put(tmp_path), augment=True).train

    def test_each_image_has_a_crop_of_its_own(self, train):
        """Red says the column and green the row: a crop tells where it is from."""
        rows, columns = np.mgrid[:256, :256].astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.stack([columns, rows, 0 * rows], -1)).save(file, "PNG")
        (train.root / "train" / "n01440764" / "n01440764_0.JPEG").write_bytes(file.getvalue())
        draws = train.draw(np.zeros(200, int), np.random.default_rng(0))["image"]
        pixels = (draws * np.float32(STD) + np.float32(MEAN)) * 255
        across = pixels[:, 0, -1, 0] - pixels[:, 0, 0, 0]
        large, flipped = np.abs(across) < 150, across < 0
        np.testing.assert_allclose(np.abs(across[~large]), 223, atol=0.1)
        np.testing.assert_allclose(np.abs(across[large]), 223 * 256 / 480, atol=1.1)
        for chosen in (large, flipped):  # fair coins, 6 standard deviations
            np.testing.assert_allclose(chosen.mean(), 0.5, atol=6 * 0.5 / np.sqrt(200))
        corners = pixels[:, 0, [0, -1]][..., :2].min(1)  # (column, row) in the file
        for k, limit in ((~large, 32), (large, 256 - 224 * 256 / 480)):
            low, high = corners[k].min(0), corners[k].max(0)
            assert (low >= -0.1).all()
            assert (high <= limit + 1.1).all()
            # Uniform: the least and the greatest of some 100 are near the ends, the mean is in
            # the middle, and rows and columns are not tied.
            assert (low < 0.15 * limit).all()
            assert (high > 0.85 * limit).all()
            np.testing.assert_allclose(corners[k].mean(0), limit / 2, atol=0.2 * limit)
            assert abs(np.corrcoef(corners[k].T)[0, 1]) < 0.5
        assert len({tuple(row) for row in corners.round(1)}) > 180

    def test_the_generator_decides(self, train):
        index = np.arange(6)
        one, two, other = (
            train.draw(index, np.random.default_rng(seed))["image"] for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(one, two)
        assert (one != other).any((1, 2, 3)).all()

    def test_without_augmentation_training_sees_what_evaluation_sees(self, train):
        plain = dataclasses.replace(train, augment=False)
        drawn = plain.draw(np.arange(3), np.random.default_rng(0))
        np.testing.assert_array_equal(drawn["image"], plain.gather(np.arange(3))["image"])


class TestStreams:
    @pytest.mark.parametrize("partial", ["straddle", "pad", "drop"])
    def test_threads_and_resuming_change_nothing(self, tmp_path, partial):
        train = images("imagenet", put(tmp_path, "official"), augment=True).train
        options = {"batch_size": 4, "seed": 3, "partial": partial}
        with closing(data.train_stream(train, num_threads=2, **options)) as stream:
            first = next(stream)
            state = json.loads(json.dumps(stream.get_state()))
            batches = [next(stream) for _ in range(4)]
        for threads in (0, 1):
            with closing(data.train_stream(train, num_threads=threads, **options)) as stream:
                np.testing.assert_array_equal(next(stream)["image"], first["image"])
                stream.set_state(state)
                for batch in batches:
                    again = next(stream)
                    assert again.keys() == batch.keys()
                    for key, value in batch.items():
                        np.testing.assert_array_equal(again[key], value)

    def test_trees_and_official_archives_train_alike(self, tmp_path):
        batches = []
        for form in ("tree", "official"):
            train = images("imagenet", put(tmp_path / form, form), augment=True).train
            with closing(data.train_stream(train, batch_size=8, seed=0)) as stream:
                batches.append(next(stream))
        np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])
        np.testing.assert_array_equal(batches[0]["label"], batches[1]["label"])

    def test_evaluation_takes_every_example_once(self, tmp_path):
        test = images("imagenet", put(tmp_path, "shards")).test
        batches = list(data.evaluation_batches(test, 4))
        assert [batch["image"].shape for batch in batches] == [(4, 224, 224, 3)] * 2
        labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
        np.testing.assert_array_equal(labels, test.index.label)
        # Those that fill up are copies of the first.
        for image in batches[1]["image"][2:]:
            np.testing.assert_array_equal(image, batches[0]["image"][0])


class TestVariants:
    def test_long_tail(self, tmp_path):
        """Classes of 4, 5 and 6 images; wanted are 6, 3.46 and 2."""
        train = images("imagenet", put(tmp_path), imbalance=3).train
        assert train.index.label.tolist() == [0] * 4 + [1] * 3 + [2] * 2
        kept = np.random.RandomState(43).permutation(np.arange(4, 9))[:3]
        whole = expected("train")
        assert contents(train)[4:7] == [whole[i] for i in kept]
        assert len(images("imagenet", tmp_path, imbalance=3).test) == 6

    def test_truncation_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"dataset.truncate=5: .* class by class"):
            images("imagenet", put(tmp_path), truncate=5)


class TestRuns:
    @pytest.mark.slow
    def test_a_run_trains_on_it(self, tmp_path):
        put(tmp_path / "set")
        rows = support.run(
            tmp_path / "run", "dataset=imagenet", f"dataset.dataset_dir={tmp_path / 'set'}",
            "architecture.hidden=[2]", "batch_size=4", "max_steps=2", "partial_batch=drop",
            "precond_batch_size=4", "precond_steps=1", "learning_rate=1e-4", "logging_freq=1",
        )  # fmt: skip
        assert np.isfinite([row["train loss"] for row in rows if "train loss" in row]).all()
        assert {"test loss", "test accuracy"} <= set().union(*rows)
