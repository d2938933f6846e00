"""Small texts in the official layouts, and the text of their tokens."""

import json
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet

from llqr_experiments.data import text

PARTS = {
    "train": " \n = Robert = \n \n A film in 2000 . \n" * 3,
    "valid": " = Valid <unk> = \n é 😀 \n",
    "test": " = Test = \n last line without an end",
}
UNICODE = "héllo 😀 👩‍👧\r\n\ttabs\x0b\u2028 it's 3.14 — 你好  \n\n  e\u0301 \x00 end"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def wikitext(folder: Path, suffix: str = "raw") -> Path:
    return write(folder, {f"wiki.{name}.{suffix}": part for name, part in PARTS.items()})


def archive(path: Path, suffix: str = "raw", folder: str = "wikitext-103-raw/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(folder, "")
        for name, part in PARTS.items():
            file.writestr(f"{folder}wiki.{name}.{suffix}", part)
    return path


def rows(part: str) -> list[str]:
    """Return the rows that Hugging Face makes of WikiText's lines: the blank ones are empty."""
    return [line if line.strip() else "" for line in part.splitlines(keepends=True)]


def saved(folder: Path, shards: int = 2, names=("train", "validation", "test")) -> Path:
    """Write what `DatasetDict.save_to_disk` writes, as its version 5 does."""
    write(folder, {"dataset_dict.json": json.dumps({"splits": list(names)})})
    for name, part in zip(names, PARTS.values(), strict=False):
        files = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
        state = {"_data_files": [{"filename": file} for file in files], "_split": name}
        write(folder / name, {"state.json": json.dumps(state), "dataset_info.json": "{}"})
        table = pyarrow.table({"text": rows(part)})
        for i, file in enumerate(files):
            shard = table.slice(i * len(table) // shards, len(table) // shards + i)
            with pyarrow.ipc.new_stream(str(folder / name / file), table.schema) as stream:
                stream.write_table(shard, max_chunksize=3)
    return folder


def decoded(data, which: str) -> str:
    """Return the text of a split from its tokens."""
    return data.decode(getattr(data, which).tokens)


def load(folder: Path, **options):
    return text("local", folder, **{"target_len": 4, "cache_dir": "cache", **options})
