"""CIFAR-10 and CIFAR-100: every official form of the files, broken ones, and the download.

No test touches the network: `urlopen` is replaced for all of them.
"""

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llqr_experiments.data import DataError, cifar, load, pickles
from llqr_experiments.data.progress import progress
from tests.experiments import archives

SETS = {
    "cifar10": (10, archives.cifar10_files, ("cifar-10-batches-py", "cifar-10-batches-bin")),
    "cifar100": (100, archives.cifar100_files, ("cifar-100-python", "cifar-100-binary")),
}
ARCHIVES = {
    "cifar-10-batches-py": "cifar-10-python.tar.gz",
    "cifar-10-batches-bin": "cifar-10-binary.tar.gz",
    "cifar-100-python": "cifar-100-python.tar.gz",
    "cifar-100-binary": "cifar-100-binary.tar.gz",
}
CASES = [(name, version) for name in SETS for version in ("python", "binary")]


pytestmark = pytest.mark.usefixtures("requests")


def splits(name: str) -> tuple:
    classes = SETS[name][0]
    return archives.cifar_split(20, classes, 0), archives.cifar_split(6, classes, 1)


def official(name: str, version: str) -> tuple[dict[str, bytes], str, str]:
    """Return files, name of their folder, and name of their archive."""
    _, files, folders = SETS[name]
    folder = folders[version == "binary"]
    return files(*splits(name), version), folder, ARCHIVES[folder]


def packed(files: dict[str, bytes], folder: str) -> bytes:
    return archives.tar_bytes({f"{folder}/{k}": v for k, v in files.items()}, "w:gz")


def put(root: Path, name: str, version: str, form: str) -> Path:
    """Write a set; return what `dataset_dir` names."""
    files, folder, archive = official(name, version)
    if form == "folder":
        return archives.write(root / "anything", files)
    if form == "parent":
        archives.write(root / folder, files)
        return root
    archives.write(root, {archive: packed(files, folder)})
    return root / archive if form == "archive" else root


def assert_is(data, name: str) -> None:
    classes = SETS[name][0]
    for split, (images, labels) in zip((data.train, data.test), splits(name), strict=True):
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        assert split.labels.dtype == np.int32
    assert (data.name, data.num_classes, data.scale) == (name, classes, 255)


class TestFormats:
    @pytest.mark.parametrize("form", ["folder", "parent", "archive", "archive's parent"])
    @pytest.mark.parametrize(("name", "version"), CASES)
    def test_every_form(self, tmp_path, requests, name, version, form):
        place = put(tmp_path / "here", name, version, form)
        data = load(name, place)
        assert_is(data, name)
        assert data.origin.startswith(str(place))
        assert requests == []

    @pytest.mark.parametrize(("name", "version"), CASES)
    def test_in_the_data_folder(self, tmp_path, requests, name, version):
        put(tmp_path / "data" / name, name, version, "parent")
        assert_is(load(name), name)
        assert requests == []

    def test_constants(self, tmp_path):
        ten = load("cifar10", put(tmp_path / "ten", "cifar10", "binary", "folder"))
        hundred = load("cifar100", put(tmp_path / "hundred", "cifar100", "binary", "folder"))
        assert (ten.mean, ten.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        assert (hundred.mean, hundred.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))

    def test_an_archive_comes_after_a_folder(self, tmp_path):
        put(tmp_path, "cifar10", "python", "archive's parent")
        put(tmp_path, "cifar10", "binary", "parent")
        assert load("cifar10", tmp_path).origin.endswith("cifar-10-batches-bin")

    def test_pickles_of_python_3(self, tmp_path):
        """As a tool writes them that has unpacked and packed them again."""
        files, *_ = official("cifar100", "python")
        for protocol, file in ((2, "train"), (4, "test")):
            files[file] = pickle.dumps(pickles.loads(files[file], "here"), protocol)
        assert_is(load("cifar100", archives.write(tmp_path, files)), "cifar100")


class TestBroken:
    def fail(self, place: Path, message: str, name: str = "cifar10") -> None:
        with pytest.raises(DataError, match=message):
            load(name, place)

    @pytest.mark.parametrize("cut", [1000, 20])
    def test_truncated_archive(self, tmp_path, cut):
        files, folder, archive = official("cifar10", "binary")
        content = packed(files, folder)
        (tmp_path / archive).write_bytes(content[: -len(content) // 2 if cut > 20 else -cut])
        self.fail(tmp_path, rf"{archive}: truncated or corrupt archive .*Delete the file and down")

    def test_archive_with_a_flipped_bit(self, tmp_path):
        """In the last bytes, the checksum of the whole; tar has read what it wants by then."""
        files, folder, archive = official("cifar10", "binary")
        content = bytearray(packed(files, folder))
        content[-6] ^= 1
        (tmp_path / archive).write_bytes(content)
        self.fail(tmp_path, r"corrupt archive \(CRC check failed")

    def test_truncated_tar_in_a_sound_gzip(self, tmp_path):
        files, folder, archive = official("cifar10", "binary")
        tar = gzip.decompress(packed(files, folder))
        (tmp_path / archive).write_bytes(gzip.compress(tar[: len(tar) // 3]))
        self.fail(tmp_path, r"truncated or corrupt archive|has no data_batch")

    def test_no_archive_at_all(self, tmp_path):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"<html>log in</html>")
        self.fail(tmp_path, r"cifar-10-python.tar.gz: truncated or corrupt archive \(Not a gzip")

    def test_archive_that_lacks_a_file(self, tmp_path):
        files, folder, archive = official("cifar10", "python")
        del files["data_batch_3"]
        (tmp_path / archive).write_bytes(packed(files, folder))
        self.fail(tmp_path, r"python.tar.gz: has no data_batch_3\. Delete")

    def test_binary_file_of_another_size(self, tmp_path):
        files, *_ = official("cifar100", "binary")
        files["test.bin"] = files["test.bin"][:-1]
        archives.write(tmp_path, files)
        self.fail(tmp_path, r"test.bin: 18443 bytes, expected a multiple of 3074", "cifar100")

    def test_files_of_unequal_length(self, tmp_path):
        """Cut at the border of a record, which nothing else can tell."""
        files, *_ = official("cifar10", "binary")
        files["data_batch_4.bin"] = files["data_batch_4.bin"][: 3 * 3073]
        archives.write(tmp_path, files)
        self.fail(tmp_path, r"unequal numbers of images.*data_batch_3.bin: 4, data_batch_4.bin: 3")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"broken pickle \(EOFError"),
            (b"\x80\x02}q\x01(U\x04da", r"broken pickle"),
            (b"\x80\x02c__main__\nnothing\n.", r"asks for __main__\.nothing"),
            (pickle.dumps([1, 2]), r"holds a list, expected a dictionary"),
            (
                pickle.dumps({"data": 1, "labels": [1]}),
                r"data is int64 of shape \(\), expected uint8 \(n, 3072\)",
            ),
            (pickle.dumps({"labels": [1]}), r"has no entry 'data', only \['labels'\]"),
            (
                pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2, 3]}),
                r"labels are int64 of shape \(3,\), expected 2 integers",
            ),
            (
                pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [[1], [2, 3]]}),
                r"labels is no array",
            ),
        ],
    )
    def test_bad_pickle(self, tmp_path, content, message):
        files, *_ = official("cifar10", "python")
        files["data_batch_2"] = content
        archives.write(tmp_path, files)
        self.fail(tmp_path, rf"data_batch_2: .*{message}")

    def test_labels_out_of_range(self, tmp_path):
        files, *_ = official("cifar10", "binary")
        files["data_batch_1.bin"] = b"\x0b" + files["data_batch_1.bin"][1:]
        archives.write(tmp_path, files)
        self.fail(tmp_path, r"cifar10, train split: labels go from \d to 11, expected 0 to 9")

    def test_folder_that_lacks_files(self, tmp_path, requests):
        files, folder, _ = official("cifar10", "python")
        del files["test_batch"]
        archives.write(tmp_path / folder, files)
        self.fail(tmp_path, rf"{folder}: no test_batch\n.*batches-bin: no such folder")
        self.fail(tmp_path / folder, rf"{folder}: no test_batch\n")
        assert requests == []

    @pytest.mark.parametrize(("place", "state"), [("nowhere", "does not exist"), ("x.zip", "not")])
    def test_nothing_there(self, tmp_path, place, state):
        (tmp_path / "x.zip").touch()
        self.fail(tmp_path / place, rf"{place}: {state}.*\n.*cifar-10-python.tar.gz")


class Evil:
    def __init__(self, call, *arguments):
        self._call = call, arguments

    def __reduce__(self):
        return self._call


class TestUnpickler:
    """A pickle that calls anything is refused before the call."""

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize(
        "call", [(os.mkdir, "made"), (eval, "open('made', 'w')"), (getattr, "text", "upper")]
    )
    def test_calls(self, tmp_path, protocol, call):
        content = pickle.dumps({"data": Evil(*call)}, protocol)
        with pytest.raises(DataError, match=r"^file: the pickle asks for \S+\.\S+, .* malicious"):
            pickles.loads(content, "file")
        assert list(tmp_path.iterdir()) == []

    def test_official_files_do_not_run_it_either(self, tmp_path):
        files, *_ = official("cifar10", "python")
        files["data_batch_5"] = pickle.dumps({"data": Evil(os.mkdir, "made")})
        place = archives.write(tmp_path / "set", files)
        with pytest.raises(DataError, match=r"data_batch_5: the pickle asks for posix.mkdir"):
            load("cifar10", place)
        assert not (tmp_path / "made").exists()

    def test_arrays_of_objects(self):
        content = pickle.dumps({"data": np.array([None, "x"], object)}, 4)
        with pytest.raises(DataError, match=r"array of type 'O8', expected numbers"):
            pickles.loads(content, "file")

    def test_the_mark_of_an_array_is_no_function(self):
        content = b"cnumpy\nndarray\n(I1000000000000\ntR."
        with pytest.raises(DataError, match=r"broken pickle \(TypeError"):
            pickles.loads(content, "file")

    @pytest.mark.parametrize("dtype", ["u1", ">i4", "<f8", "?"])
    @pytest.mark.parametrize("protocol", [2, 3, 4])
    def test_arrays_survive(self, dtype, protocol):
        value = {"a": np.arange(6).reshape(2, 3).astype(dtype), b"b": [1, "x", (2.5, None, b"y")]}
        found = pickles.loads(pickle.dumps(value, protocol), "file")
        np.testing.assert_array_equal(found["a"], value["a"])
        assert found[b"b"] == value[b"b"]


class Response(io.BytesIO):
    """A connection that announces a length and may be cut."""

    def __init__(self, content: bytes, announced: int | None):
        super().__init__(content)
        self.length = announced

    def read(self, size=-1):
        piece = super().read(min(size, 1000))
        if self.length is not None:
            self.length -= len(piece)
        return piece


class TestDownload:
    @pytest.fixture
    def site(self, monkeypatch, requests) -> dict[str, bytes]:
        files, folder, archive = official("cifar10", "python")
        served = {archive: packed(files, folder)}
        version = dataclasses.replace(
            cifar.SETS["cifar10"].versions[0], md5=hashlib.md5(served[archive]).hexdigest()
        )
        changed = dataclasses.replace(cifar.SETS["cifar10"], versions=(version,))
        monkeypatch.setattr(cifar, "SETS", {"cifar10": changed})

        def serve(url, timeout):
            requests.append(url)
            content = served[url.rsplit("/", 1)[-1]]
            return Response(content, len(content))

        monkeypatch.setattr(urllib.request, "urlopen", serve)
        return served

    def test_the_archive_is_kept(self, tmp_path, site, requests):
        assert_is(load("cifar10"), "cifar10")
        assert requests == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]
        folder = tmp_path / "data" / "cifar10"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == site
        assert_is(load("cifar10"), "cifar10")
        assert len(requests) == 1

    def test_other_bytes_are_refused(self, tmp_path, site):
        site["cifar-10-python.tar.gz"] += b"x"
        with pytest.raises(DataError, match=r"MD5 \w{32}, expected \w{32}"):
            load("cifar10")
        assert list((tmp_path / "data" / "cifar10").iterdir()) == []

    def test_connection_that_is_cut(self, monkeypatch, tmp_path, site):
        content = site["cifar-10-python.tar.gz"]
        response = Response(content[:5000], len(content))
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: response)
        with pytest.raises(DataError, match=r"download failed \(IncompleteRead"):
            load("cifar10")
        assert list((tmp_path / "data" / "cifar10").iterdir()) == []
        assert response.closed

    def test_full_disk(self, monkeypatch, tmp_path, site):
        def fail(handle):
            raise OSError("disk full")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(DataError, match=r"python.tar.gz: cannot be written \(disk full\)"):
            load("cifar10")
        assert list((tmp_path / "data" / "cifar10").iterdir()) == []

    def test_no_network(self, tmp_path, requests):
        with pytest.raises(DataError, match=r"cifar100 was not found") as caught:
            load("cifar100")
        for part in (
            f"{tmp_path}/data/cifar100: does not exist",
            "cifar-100-python.tar.gz: download failed (<urlopen error no network here>)",
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            "dataset.dataset_dir",
        ):
            assert part in str(caught.value)
        assert len(requests) == 1
        assert list(tmp_path.iterdir()) == []

    def test_download_can_be_forbidden(self, site, requests):
        with pytest.raises(DataError, match=r"not tried, because dataset.download=false"):
            load("cifar10", download=False)
        assert requests == []


class TestProgress:
    def show(self, delay: float, monkeypatch, terminal: bool = True) -> str:
        monkeypatch.setattr("llqr_experiments.data.progress.DELAY_SECONDS", delay)
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with progress("reading", 100, console=console) as advance:
            deadline = time.monotonic() + (20 if delay < 1 and terminal else 0.1)
            while time.monotonic() < deadline and "reading" not in console.file.getvalue():  # type: ignore[attr-defined]
                time.sleep(0.01)
            advance(40)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def test_only_what_takes_long_has_a_bar(self, monkeypatch):
        assert "reading" in self.show(0.01, monkeypatch)
        assert self.show(100, monkeypatch) == ""
        assert self.show(0.01, monkeypatch, terminal=False) == ""
