"""ImageNet 2012 in the three forms that it is kept in; nothing is unpacked.

  tree       train/<wnid>/*.JPEG and val/<wnid>/*.JPEG
  official   ILSVRC2012_img_train.tar (one archive for each class), ILSVRC2012_img_val.tar, and
             the classes of the validation images, which are one of
               imagenet_2012_validation_synset_labels.txt   one wnid a line
               ILSVRC2012_devkit_t12.tar.gz                 or what it unpacks to:
               ILSVRC2012_validation_ground_truth.txt       one ILSVRC2012_ID a line, and
               meta.mat                                     which class has which ID
  shards     train-*.tar and val-*.tar with NAME.jpg and NAME.cls, the label in digits

Labels are the places of the wnids in sorted order, which the IDs of the development kit are not;
those of shards are as they say. Tree and official archives have the same training images in the
same order.
"""

import codecs
import functools
import io
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llqr_experiments.data.index import Form, Index, indices, joined, table
from llqr_experiments.data.photos import Photos
from llqr_experiments.data.progress import progress
from llqr_experiments.data.tars import Member, members
from llqr_experiments.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
WNIDS = "imagenet_2012_validation_synset_labels.txt"
KIT, KIT_TAR = "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"

OFFICIAL_COUNTS = (1_281_167, 50_000)

_log = logging.getLogger(__name__)
_IMAGE = re.compile(r"\.(jpe?g|png)$", re.IGNORECASE)
_SHARD_NUMBER = re.compile(r"-(\d+)(?:-of-(\d+))?\.tar$")


def load(dataset_dir: str | Path | None, augment: bool) -> tuple[Photos, Photos, int, str]:
    """Return the splits, the number of classes, and where the images are from.

    Args:
      dataset_dir: folder with one of the three forms; None: `./data/imagenet`.
      augment: whether training sees random crops.

    Raises:
      DataError: no form is there as a whole.
    """
    root = Path("data", "imagenet") if dataset_dir is None else Path(dataset_dir).expanduser()
    form = _detect(root)
    splits = indices(root, form)
    train, test = (
        Photos(root.absolute(), splits[split], MEAN, STD, augment and split == "train")
        for split in ("train", "val")
    )
    classes, counts = int(splits["train"].label.max()) + 1, (len(train), len(test))
    if classes == 1000 and counts != OFFICIAL_COUNTS:
        _log.warning(
            "%s has %d training and %d validation images of 1,000 classes; ImageNet 2012 has %d "
            "and %d. It may not be whole.", root.absolute(), *counts, *OFFICIAL_COUNTS,
        )  # fmt: skip
    return train, test, classes, f"{root.absolute()} ({form.name})"


def _detect(root: Path) -> Form:
    """Return the form that `root` holds."""
    faults: list[str] = []
    for look in (_tree, _official, _shards):
        found = look(root)
        if isinstance(found, Form):
            return found
        faults.append(f"{look.__name__.strip('_')}: no {', no '.join(found)}")
    looked = "\n".join(f"  - {fault}" for fault in faults)
    raise DataError(
        f"imagenet was not found in {root.absolute()}. It can be there in three forms:\n{looked}\n"
        "Get it from https://image-net.org (an account is needed, so it is not downloaded), put "
        "it there, or name its folder by dataset.dataset_dir."
    )


def _missing(root: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (root / name).exists()]


# --- a folder for each class ----------------------------------------------------------------


def _tree(root: Path) -> Form | list[str]:
    missing = [f"{split}/" for split in ("train", "val") if not (root / split).is_dir()]
    if missing:
        return missing
    classes = {split: _folders(root / split) for split in ("train", "val")}
    sources = [f"{split}/{wnid}" for split, wnids in classes.items() for wnid in wnids]
    build = functools.partial(_index_tree, root, classes)
    return Form("tree", ("train", "val", *sources), build)


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _index_tree(root: Path, classes: dict[str, list[str]]) -> dict[str, Index]:
    train, val = classes["train"], classes["val"]
    if set(train) != set(val):
        sides = (("train", set(train) - set(val)), ("val", set(val) - set(train)))
        only = "; ".join(
            f"{len(names)} only in {split}/ ({', '.join(sorted(names)[:3])}, ...)"
            for split, names in sides
            if names
        )
        flat = "" if val else (
            f" val/ must have a folder for each class, as train/ has; {VAL_TAR} can also be left "
            "packed, with its labels beside it."
        )  # fmt: skip
        raise DataError(f"{root.absolute()}: train/ and val/ have unequal classes: {only}.{flat}")
    splits = {}
    with progress("indexing ImageNet", 2 * len(train), in_bytes=False) as advance:
        for split in classes:
            parts = []
            for label, wnid in enumerate(train):
                names = _images(root / split / wnid)
                rows = ((name, -1, -1, label) for name in names)
                parts.append(table(f"{split}/{wnid}", rows))
                advance(1)
            splits[split] = joined(parts)
    return splits


def _images(folder: Path) -> list[str]:
    """Return the names of the images in a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                e.name for e in entries if _IMAGE.search(e.name) and not e.name.startswith(".")
            )
    except OSError as error:
        raise DataError(f"{folder.absolute()}: cannot be read ({error}).") from error
    if not names:
        raise DataError(f"{folder.absolute()}: has no image (.JPEG, .jpg or .png).")
    return names


# --- the official archives ------------------------------------------------------------------


def _official(root: Path) -> Form | list[str]:
    missing = _missing(root, (TRAIN_TAR, VAL_TAR))
    labels = _label_files(root)
    if not labels:
        missing.append(f"{WNIDS} or {KIT_TAR}")
    if missing:
        return missing
    build = functools.partial(_index_official, root, labels)
    return Form("official", (TRAIN_TAR, VAL_TAR, *labels), build)


def _label_files(root: Path) -> tuple[str, ...]:
    """Return the file or two files that say the classes of the validation images."""
    if (root / WNIDS).is_file():
        return (WNIDS,)
    for folder in ("", f"{KIT}/data/", "data/"):
        names = f"{folder}{TRUTH}", f"{folder}{META}"
        if not _missing(root, names):
            return names
    return (KIT_TAR,) if (root / KIT_TAR).is_file() else ()


def _index_official(root: Path, labels: tuple[str, ...]) -> dict[str, Index]:
    total = sum((root / name).stat().st_size for name in (TRAIN_TAR, VAL_TAR))
    with progress("indexing ImageNet", total) as advance:
        with _open(root / TRAIN_TAR) as file:
            found = [m for m in members(file, str(root / TRAIN_TAR)) if m.name.endswith(".tar")]
            classes = sorted(found, key=lambda m: _stem(m.name))
            if not classes:
                raise DataError(f"{root / TRAIN_TAR}: has no archive of a class in it.")
            rows = []
            for label, inner in enumerate(classes):
                where = f"{root / TRAIN_TAR}, member {inner.name}"
                stop = inner.offset + inner.size
                images = _named(members(file, where, inner.offset, stop), where)
                rows += [(f"{inner.name}/{m.name}", m.offset, m.size, label) for m in images]
                advance(inner.size)
        train = table(TRAIN_TAR, rows)
        with _open(root / VAL_TAR) as file:
            images = _named(_members(file, root / VAL_TAR, advance), str(root / VAL_TAR))
    wnids = _validation_wnids(root, labels)
    if len(wnids) != len(images):
        raise DataError(
            f"{root / labels[0]}: {len(wnids)} labels, but {VAL_TAR} has {len(images)} images; "
            "expected as many of each."
        )
    places = {_stem(inner.name): label for label, inner in enumerate(classes)}
    unknown = sorted(set(wnids) - set(places))
    if unknown:
        raise DataError(
            f"{root / labels[0]}: {len(unknown)} classes that {TRAIN_TAR} has not, the first of "
            f"them {unknown[0]}."
        )
    rows = ((m.name, m.offset, m.size, places[w]) for m, w in zip(images, wnids, strict=True))
    return {"train": train, "val": table(VAL_TAR, rows)}


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[-1].split(".", 1)[0]


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path.absolute()}: cannot be read ({error}).") from error


def _members(
    file: io.BufferedReader, path: Path, advance: Callable[[int], None]
) -> Iterator[Member]:
    for member in members(file, str(path)):
        advance(member.size)
        yield member


def _named(found: Iterable[Member], where: str) -> list[Member]:
    """Return the images among the members of an archive, sorted by their names."""
    images = [m for m in found if _IMAGE.search(m.name)]
    if not images:
        raise DataError(f"{where}: has no image (.JPEG, .jpg or .png).")
    return sorted(images, key=lambda m: m.name.rsplit("/", 1)[-1])


def _validation_wnids(root: Path, labels: tuple[str, ...]) -> list[str]:
    """Return the class of each validation image, in the order of their names."""
    if labels == (WNIDS,):
        return _text(root / WNIDS).split()
    if labels == (KIT_TAR,):
        truth, meta = _unpack_kit(root / KIT_TAR)
    else:
        truth, meta = _text(root / labels[0]), _read(root / labels[1])
    names = _synsets(meta, root / labels[-1])
    try:
        return [names[int(line)] for line in truth.split()]
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{root / labels[0]}: {error.args[0]} is no ILSVRC2012_ID of {META}."
        ) from error


def _text(path: Path) -> str:
    return _read(path).decode("utf-8-sig", "replace")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.absolute()}: cannot be read ({error}).") from error


def _unpack_kit(path: Path) -> tuple[str, bytes]:
    found = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                file = tar.extractfile(member) if name in (TRUTH, META) else None
                if file is not None:
                    found[name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{path.absolute()}: truncated or corrupt archive ({error}).") from error
    missing = [name for name in (TRUTH, META) if name not in found]
    if missing:
        raise DataError(f"{path.absolute()}: has no {', no '.join(missing)}.")
    return found[TRUTH].decode("utf-8-sig", "replace"), found[META]


def _synsets(meta: bytes, where: Path) -> dict[int, str]:
    """Return ILSVRC2012_ID -> wnid of the development kit's meta.mat."""
    from scipy.io import loadmat  # late: it takes half a second

    try:
        rows = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    # Whatever scipy stumbles over in broken bytes.
    except Exception as error:
        raise DataError(
            f"{where}: has no table of synsets with ILSVRC2012_ID and WNID ({error})."
        ) from error


# --- shards ---------------------------------------------------------------------------------


def _shards(root: Path) -> Form | list[str]:
    shards = {split: sorted(root.glob(f"{split}-*.tar")) for split in ("train", "val")}
    missing = [f"{split}-*.tar" for split, paths in shards.items() if not paths]
    if missing:
        return missing
    sources = tuple(path.name for paths in shards.values() for path in paths)
    return Form("shards", sources, functools.partial(_index_shards, root, shards))


def _index_shards(root: Path, shards: dict[str, list[Path]]) -> dict[str, Index]:
    for paths in shards.values():
        _check_numbers(paths)
    splits = {}
    total = sum(path.stat().st_size for paths in shards.values() for path in paths)
    with progress("indexing ImageNet", total) as advance:
        for split, paths in shards.items():
            splits[split] = joined([_index_shard(path, advance) for path in paths])
    classes = int(splits["train"].label.max()) + 1
    if (highest := int(splits["val"].label.max())) >= classes:
        raise DataError(
            f"{root.absolute()}: labels of val-*.tar go up to {highest}, those of train-*.tar to "
            f"{classes - 1}; expected none that is not in training."
        )
    return splits


def _check_numbers(paths: Sequence[Path]) -> None:
    """Raise `DataError` if the numbers in the names of shards have a gap."""
    matches = [_SHARD_NUMBER.search(path.name) for path in paths]
    numbers = {int(match[1]) for match in matches if match}
    if len(numbers) != len(paths):
        return  # not numbered
    announced = [int(match[2]) for match in matches if match and match[2]]
    first = min(numbers)
    expected = range(first, first + max([*announced, max(numbers) - first + 1]))
    gaps = sorted(set(expected) - numbers)
    if gaps:
        raise DataError(
            f"{paths[0].parent.absolute()}: of the shards {paths[0].name} to {paths[-1].name}, "
            f"{len(gaps)} are missing, the first of them number {gaps[0]}."
        )


def _index_shard(path: Path, advance: Callable[[int], None]) -> Index:
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    with _open(path) as file:
        for member in list(_members(file, path, advance)):
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            name = f"{folder}/{stem}"
            is_image = _IMAGE.search(f".{kind}") is not None
            if name in (images if is_image else labels if kind == "cls" else ()):
                raise DataError(f"{path}: has two members for the same thing, {member.name}.")
            if is_image:
                images[name] = member
            elif kind == "cls":
                file.seek(member.offset)
                labels[name] = _label(file.read(member.size), f"{path}, member {member.name}")
    alone = sorted(images.keys() ^ labels.keys())
    if alone or not images:
        fault = f"image or label alone: {alone[0].lstrip('/')}" if alone else "no image"
        raise DataError(f"{path}: {fault}; expected NAME.jpg and NAME.cls of each image.")
    return table(path.name, ((m.name, m.offset, m.size, labels[n]) for n, m in images.items()))


def _label(content: bytes, where: str) -> int:
    text = content.removeprefix(codecs.BOM_UTF8).strip()
    if not text.isdigit() or len(text) > 6:
        raise DataError(f"{where}: holds {content[:20]!r}, expected a label in digits.")
    return int(text)
