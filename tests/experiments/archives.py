"""Small files in the official formats of the image sets, made from arrays."""

import io
import pickle
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as Python 2 wrote its strings: as they are in the official files."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        size = len(value)
        head = b"U" + bytes([size]) if size < 256 else b"T" + size.to_bytes(4, "little")
        self.write(head + value)

    def save_str(self, value: str) -> None:
        self.save_bytes(value.encode("latin1"))

    dispatch[bytes], dispatch[str] = save_bytes, save_str


def python2_pickle(value: object) -> bytes:
    """Pickle as Python 2.7 with numpy 1 did, protocol 2."""
    file = io.BytesIO()
    _Python2Pickler(file, 2).dump(value)
    content = file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    return content


def cifar_split(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 32, 32, 3) uint8 and labels (n,)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, classes, count)


def _planes(images: np.ndarray) -> np.ndarray:
    """One row of 3,072 bytes an image: red, green, blue."""
    return np.stack([np.concatenate([image[..., c].ravel() for c in range(3)]) for image in images])


def cifar10_files(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], version: str
) -> dict[str, bytes]:
    """Return name -> content of the files of CIFAR-10; `train` is cut into five."""
    pieces = zip(np.split(train[0], 5), np.split(train[1], 5), strict=True)
    parts = {f"data_batch_{i}": piece for i, piece in enumerate(pieces, 1)} | {"test_batch": test}
    if version == "binary":
        return {
            f"{name}.bin": np.column_stack([labels.astype(np.uint8), _planes(images)]).tobytes()
            for name, (images, labels) in parts.items()
        } | {"batches.meta.txt": b"airplane\nautomobile\n"}
    return {
        name: python2_pickle(
            {
                "batch_label": name,
                "labels": labels.tolist(),
                "data": _planes(images),
                "filenames": [f"{i}.png" for i in range(len(labels))],
            }
        )
        for name, (images, labels) in parts.items()
    } | {"batches.meta": python2_pickle({"label_names": ["airplane"], "num_vis": 3072})}


def cifar100_files(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], version: str
) -> dict[str, bytes]:
    """Return name -> content of the files of CIFAR-100; coarse labels are fine // 5."""
    parts = {"train": train, "test": test}
    if version == "binary":
        return {
            f"{name}.bin": np.column_stack(
                [(labels // 5).astype(np.uint8), labels.astype(np.uint8), _planes(images)]
            ).tobytes()
            for name, (images, labels) in parts.items()
        }
    return {
        name: python2_pickle(
            {
                "coarse_labels": (labels // 5).tolist(),
                "fine_labels": labels.tolist(),
                "data": _planes(images),
            }
        )
        for name, (images, labels) in parts.items()
    }


def tar_bytes(files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    """Return a tar archive; `mode` is "w" or "w:gz"."""
    archive = io.BytesIO()
    items = files.items() if isinstance(files, Mapping) else files
    with tarfile.open(fileobj=archive, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in items:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files, in folders of their own where their names say so."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def image_bytes(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options) -> bytes:
    """Return an image of (width, height) pixels that differs from that of any other seed.

    A JPEG file, or what `format` says; blocks of random colours, so that crops of it differ.
    """
    rng = np.random.default_rng(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (4, 5, bands), np.uint8)
    image = Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode if bands > 1 else None)
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BILINEAR).save(file, **{"format": "JPEG", **options})
    return file.getvalue()


WNIDS = ("n01440764", "n01443537", "n02119789")
IDS = (3, 1, 2)
"""The development kit's, which are not in the order of the wnids."""


def imagenet(train: int = 4, val: int = 2) -> dict[str, dict[str, list[tuple[str, bytes]]]]:
    """Return split -> wnid -> (name, JPEG) of a set of three classes, names in order.

    Class c has `train + c` training images. Validation images are numbered across classes.
    """
    splits: dict[str, dict[str, list[tuple[str, bytes]]]] = {"train": {}, "val": {}}
    for c, wnid in enumerate(WNIDS):
        splits["train"][wnid] = [
            (f"{wnid}_{i}.JPEG", image_bytes(100 * c + i)) for i in range(train + c)
        ]
        splits["val"][wnid] = [
            (f"ILSVRC2012_val_{3 * i + c + 1:08d}.JPEG", image_bytes(1000 + 100 * c + i))
            for i in range(val)
        ]
    return splits


def imagenet_tree(splits) -> dict[str, bytes]:
    """Return path -> content of the folders."""
    return {
        f"{split}/{wnid}/{name}": content
        for split, classes in splits.items()
        for wnid, images in classes.items()
        for name, content in images
    }


def imagenet_official(splits, labels: str = "kit") -> dict[str, bytes]:
    """Return name -> content of the official archives, members not in order.

    Labels: "kit" (the archive), "unpacked kit", "files", or "wnids" (one a line).
    """
    val = sorted((name, wnid, jpeg) for wnid, x in splits["val"].items() for name, jpeg in x)
    inner = {f"{w}.tar": tar_bytes(reversed(images)) for w, images in splits["train"].items()}
    files = {
        "ILSVRC2012_img_train.tar": tar_bytes(reversed(inner.items())),
        "ILSVRC2012_img_val.tar": tar_bytes((name, jpeg) for name, _, jpeg in reversed(val)),
    }
    if labels == "wnids":
        text = "".join(f"{wnid}\n" for _, wnid, _ in val)
        return files | {"imagenet_2012_validation_synset_labels.txt": text.encode()}
    ids = dict(zip(WNIDS, IDS, strict=True))
    kit = {
        "ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{ids[wnid]}\n" for _, wnid, _ in val
        ).encode(),
        "meta.mat": synsets(dict(sorted((i, w) for w, i in ids.items())) | {1001: "n00000001"}),
    }
    folder = {"files": "", "unpacked kit": "ILSVRC2012_devkit_t12/data/"}.get(labels)
    if folder is not None:
        return files | {f"{folder}{name}": content for name, content in kit.items()}
    inside = {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in kit.items()}
    return files | {"ILSVRC2012_devkit_t12.tar.gz": tar_bytes(inside, "w:gz")}


def synsets(wnids: Mapping[int, str]) -> bytes:
    """Return meta.mat with a table of ILSVRC2012_ID and WNID."""
    rows = np.zeros(len(wnids), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    for row, (number, wnid) in zip(rows, wnids.items(), strict=True):
        row["ILSVRC2012_ID"], row["WNID"], row["num_children"] = float(number), wnid, 0.0
    file = io.BytesIO()
    savemat(file, {"synsets": rows[:, None]})
    return file.getvalue()


def imagenet_shards(splits, shards: int = 2) -> dict[str, bytes]:
    """Return name -> content of shards in the manner of WebDataset, shuffled."""
    files = {}
    for split, classes in splits.items():
        images = [(n, label, j) for label, x in enumerate(classes.values()) for n, j in x]
        np.random.default_rng(0).shuffle(images)
        for k in range(shards):
            entries = []
            for name, label, content in images[k::shards]:
                stem = name.removesuffix(".JPEG")
                entries += [(f"{stem}.cls", str(label).encode()), (f"{stem}.jpg", content)]
                entries += [(f"{stem}.json", b"{}")]
            files[f"{split}-{k:06d}.tar"] = tar_bytes(entries)
    return files
