"""CIFAR-10 and CIFAR-100 from their official files: the python and the binary version.

  python   pickles of {"data": (n, 3072) uint8, "labels" or "fine_labels": n integers, ...}
  binary   records of the label bytes (CIFAR-100: coarse, then fine) and 3,072 pixels

An image is its red plane, then green, then blue, each 32x32 row by row. Both versions have the
same images in the same order. They are read from the unpacked folder or from the archive.
"""

import dataclasses
import gzip
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llqr_experiments.data import pickles
from llqr_experiments.data.dataset import Dataset, Split, narrow
from llqr_experiments.data.download import fetch
from llqr_experiments.data.idx import REMEDY
from llqr_experiments.errors import DataError

_SITE = "https://www.cs.toronto.edu/~kriz/"
_PIXELS = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class _Version:
    """The files of one version of a set.

    Attributes:
      folder: what the archive unpacks to.
      archive: its name on the official site.
      md5: of the archive there.
      train: names of the files of the training split, in order.
      test: name of the file of the test split.
      read: (content of a file, where it is from) -> (n, 3072) uint8, (n,) int32.
    """

    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    read: Callable[[bytes, str], tuple[np.ndarray, np.ndarray]]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


@dataclasses.dataclass(frozen=True)
class _CifarSet:
    """A dataset: number of classes, mean and standard deviation of `pixel / 255`, versions."""

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    versions: tuple[_Version, ...]


def load(name: str, dataset_dir: str | Path | None, download: bool) -> Dataset:
    """Load a set from `dataset_dir`, or from `./data/<name>`, or from the official site.

    Args:
      name: one of `SETS`.
      dataset_dir: an unpacked folder, an archive, or the folder that one of them is in; nothing
        else is looked at then.
      download: whether the network may be used.

    Raises:
      DataError: the files are missing or broken.
    """
    cifar = SETS[name]
    version, place = _locate(name, dataset_dir, download)
    contents = _unpack(place, version) if place.is_file() else _read_folder(place, version)
    parts = {file: version.read(contents[file], f"{place}: {file}") for file in version.files}
    sizes = {len(parts[file][1]) for file in version.train}
    if len(sizes) > 1:
        counts = ", ".join(f"{file}: {len(parts[file][1])}" for file in version.train)
        raise DataError(
            f"{place}: its files hold unequal numbers of images, expected as many in each "
            f"({counts}). One of them is incomplete. {REMEDY}"
        )
    return Dataset(
        name=name,
        train=_split([parts[file] for file in version.train]),
        test=_split([parts[version.test]]),
        num_classes=cifar.num_classes,
        mean=cifar.mean,
        std=cifar.std,
        scale=255.0,
        origin=str(place.absolute()),
    )


def _split(parts: list[tuple[np.ndarray, np.ndarray]]) -> Split:
    planes, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), labels)


def _locate(name: str, dataset_dir: str | Path | None, download: bool) -> tuple[_Version, Path]:
    """Return which version was found, and its folder or archive."""
    versions = SETS[name].versions
    place = Path("data", name) if dataset_dir is None else Path(dataset_dir).expanduser()
    found, faults = _look_in(place, versions)
    if found is not None:
        return found
    expected = (
        f"the folder {' or '.join(v.folder for v in versions)}, or the archive "
        f"{' or '.join(v.archive for v in versions)}"
    )
    looked = "\n".join(f"  - {fault}" for fault in faults)
    if dataset_dir is not None:
        raise DataError(
            f"dataset.dataset_dir={str(dataset_dir)!r} has no {name} ({place.absolute()}):\n"
            f"{looked}\nName {expected}, or the folder that it is in; or leave it unset to have "
            "it searched for."
        )
    version = versions[0]
    url = _SITE + version.archive
    refused = f"{url}: not tried, because dataset.download=false"
    if download:
        try:
            return version, fetch(url, place, version.md5)
        except DataError as error:
            refused = str(error)
    raise DataError(
        f"{name} was not found. Looked in:\n{looked}\n  - {refused}\n"
        f"Get {expected} from {_SITE}cifar.html and put it into {place.absolute()}, or name its "
        "folder by dataset.dataset_dir."
    )


def _look_in(
    place: Path, versions: tuple[_Version, ...]
) -> tuple[tuple[_Version, Path] | None, list[str]]:
    """Return the version that `place` is or holds, or why there is none.

    Unpacked folders come before archives, which take seconds to unpack.
    """
    if place.is_file():
        version = next((v for v in versions if place.name == v.archive), None)
        legal = " or ".join(v.archive for v in versions)
        return (version, place) if version else None, [f"{place.absolute()}: not named {legal}"]
    if not place.exists():
        return None, [f"{place.absolute()}: does not exist"]
    faults = []
    for version in versions:
        for folder in (place, place / version.folder):
            missing = [file for file in version.files if not (folder / file).is_file()]
            if not missing:
                return (version, folder), []
            if not folder.is_dir():
                faults.append(f"{folder.absolute()}: no such folder")
            elif folder != place or len(missing) < len(version.files):
                faults.append(f"{folder.absolute()}: no {', no '.join(missing)}")
    for version in versions:
        if (place / version.archive).is_file():
            return (version, place / version.archive), []
        faults.append(f"{(place / version.archive).absolute()}: no such file")
    return None, faults


def _read_folder(folder: Path, version: _Version) -> dict[str, bytes]:
    """Return the contents of the files of an unpacked version by their names."""
    try:
        return {file: (folder / file).read_bytes() for file in version.files}
    except OSError as error:
        raise DataError(f"{folder.absolute()}: cannot be read ({error}).") from error


def _unpack(archive: Path, version: _Version) -> dict[str, bytes]:
    """Return the contents of the files in an archive by their names; nothing is written."""
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    name = member.name.rsplit("/", 1)[-1]
                    file = tar.extractfile(member) if name in version.files else None
                    if file is not None:
                        contents[name] = file.read()
            # The checksum of the whole is at the end, which tar does not read.
            while stream.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(
            f"{archive.absolute()}: truncated or corrupt archive ({error}). {REMEDY}"
        ) from error
    missing = [file for file in version.files if file not in contents]
    if missing:
        raise DataError(f"{archive.absolute()}: has no {', no '.join(missing)}. {REMEDY}")
    return contents


def _read_python(content: bytes, where: str, *, labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one pickle whose labels have the key `labels`."""
    batch = pickles.loads(content, where)
    if not isinstance(batch, dict):
        raise DataError(f"{where}: holds a {type(batch).__name__}, expected a dictionary. {REMEDY}")
    planes, classes = (_entry(batch, key, where) for key in ("data", labels))
    if planes.dtype != np.uint8 or planes.ndim != 2 or planes.shape[1] != _PIXELS:
        raise DataError(
            f"{where}: data is {planes.dtype} of shape {planes.shape}, expected uint8 "
            f"(n, {_PIXELS}). {REMEDY}"
        )
    if classes.ndim != 1 or classes.dtype.kind not in "iu" or len(classes) != len(planes):
        raise DataError(
            f"{where}: {labels} are {classes.dtype} of shape {classes.shape}, expected "
            f"{len(planes)} integers, one for each image. {REMEDY}"
        )
    return planes, narrow(classes, where)


def _entry(batch: dict[Any, Any], key: str, where: str) -> np.ndarray:
    """Return an entry as an array; Python 2 wrote its key as bytes."""
    for spelling in (key, key.encode()):
        if spelling in batch:
            value = batch[spelling]
            break
    else:
        raise DataError(f"{where}: has no entry {key!r}, only {list(batch)}. {REMEDY}")
    try:
        return np.asarray(value)
    except ValueError as error:  # lists of unequal lengths
        raise DataError(f"{where}: {key} is no array ({error}). {REMEDY}") from error


def _read_binary(content: bytes, where: str, *, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read records that start with `label_bytes` bytes of labels, the last of which counts."""
    size = label_bytes + _PIXELS
    if len(content) % size or not content:
        raise DataError(
            f"{where}: {len(content)} bytes, expected a multiple of {size}, the size of a record. "
            f"{REMEDY}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int32)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

SETS = MappingProxyType(
    {
        "cifar10": _CifarSet(
            10,
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
            (
                _Version(
                    "cifar-10-batches-py",
                    "cifar-10-python.tar.gz",
                    "c58f30108f718f92721af3b95e74349a",
                    _BATCHES,
                    "test_batch",
                    partial(_read_python, labels="labels"),
                ),
                _Version(
                    "cifar-10-batches-bin",
                    "cifar-10-binary.tar.gz",
                    "c32a1d4ab5d03f1284b67883e8d87530",
                    tuple(f"{batch}.bin" for batch in _BATCHES),
                    "test_batch.bin",
                    partial(_read_binary, label_bytes=1),
                ),
            ),
        ),
        "cifar100": _CifarSet(
            100,
            (0.5071, 0.4867, 0.4408),
            (0.2675, 0.2565, 0.2761),
            (
                _Version(
                    "cifar-100-python",
                    "cifar-100-python.tar.gz",
                    "eb9058c3a382ffc7106e4002c42a8d85",
                    ("train",),
                    "test",
                    partial(_read_python, labels="fine_labels"),
                ),
                _Version(
                    "cifar-100-binary",
                    "cifar-100-binary.tar.gz",
                    "03b5dce01913d631647c71ecec9e9cb8",
                    ("train.bin",),
                    "test.bin",
                    partial(_read_binary, label_bytes=2),
                ),
            ),
        ),
    }
)
"""The sets by name."""
