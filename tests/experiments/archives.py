"""Small files in the official formats of the image sets, made from arrays."""

import io
import pickle
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np


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
