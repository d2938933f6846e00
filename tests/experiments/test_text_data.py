"""Text for language models: layouts, lines, tokenizers, the cache of tokens, and windows."""

import io
import itertools
import json
import logging
import random
import re
import sys
import types
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llqr_experiments.data import (
    IGNORE,
    DataError,
    Windows,
    corpus,
    evaluation_batches,
    language,
    lines,
    text,
    token_cache,
    tokenization,
    train_stream,
)
from llqr_experiments.data.tokenization import BytePairs, Characters

PARTS = {
    "train": " \n = Robert = \n \n A film in 2000 . \n" * 3,
    "valid": " = Valid <unk> = \n é 😀 \n",
    "test": " = Test = \n last line without an end",
}
UNICODE = "héllo 😀 👩‍👧\r\n\ttabs\x0b\u2028 it's 3.14 — 你好  \n\n  e\u0301 \x00 end"


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


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


class TestLayouts:
    @pytest.mark.parametrize("make", [wikitext, lambda f: wikitext(f, "tokens")])
    @pytest.mark.parametrize("inside", [".", "wikitext-103-raw", "wikitext-103"])
    def test_wikitext(self, tmp_path, make, inside):
        make(tmp_path / "w" / inside)
        data = load(tmp_path / "w", tokenizer="bpe")
        assert {name: decoded(data, name) for name in PARTS} == PARTS
        assert data.origin == str((tmp_path / "w" / inside).absolute())

    def test_raw_comes_before_tokens(self, tmp_path):
        wikitext(tmp_path / "w")
        for name in PARTS:
            write(tmp_path / "w", {f"wiki.{name}.tokens": "something else"})
        assert decoded(load(tmp_path / "w", tokenizer="bpe"), "test") == PARTS["test"]

    @pytest.mark.parametrize("given", ["folder", "file"])
    @pytest.mark.parametrize(("name", "suffix"), [("raw-v1", "raw"), ("v1", "tokens")])
    def test_archive(self, tmp_path, name, suffix, given):
        folder = write(tmp_path / "w", {})
        path = archive(folder / f"wikitext-103-{name}.zip", suffix)
        data = load(folder if given == "folder" else path, tokenizer="bpe")
        assert {name: decoded(data, name) for name in PARTS} == PARTS
        assert data.origin == str(path)

    def test_wikitext103_is_found_in_the_data_folder(self, tmp_path):
        wikitext(tmp_path / "data" / "wikitext103")
        data = text("wikitext103", tokenizer="char", target_len=4, download=False)
        assert decoded(data, "train") == PARTS["train"]
        assert list((tmp_path / "data" / "tokens").glob("wikitext103-train-*.npy"))

    def test_saved_dataset(self, tmp_path):
        """Blank rows are blank lines, and a row without a line end gets one."""
        data = load(saved(tmp_path / "d"), tokenizer="bpe")
        for name, part in PARTS.items():
            expected = "".join(row if row.endswith("\n") else f"{row}\n" for row in rows(part))
            assert decoded(data, name) == expected

    def test_parquet(self, tmp_path):
        folder = write(tmp_path / "p", {})
        for name, part in zip(("train", "validation", "test"), PARTS.values(), strict=True):
            table = pyarrow.table({"id": range(len(rows(part))), "text": rows(part)})
            half = len(table) // 2
            for i, shard in enumerate((table.slice(0, half), table.slice(half))):
                file = folder / f"{name}-{i:05}-of-00002.parquet"
                pyarrow.parquet.write_table(shard, file, row_group_size=2)
        data = load(folder, tokenizer="bpe")
        assert decoded(data, "train") == PARTS["train"].replace(" \n \n", " \n\n")[1:]

    @pytest.mark.parametrize("valid", ["valid", "validation", "val"])
    def test_text_per_split(self, tmp_path, valid):
        write(tmp_path / "t", {f"{k}.txt": v for k, v in PARTS.items() if k != "valid"})
        write(tmp_path / "t", {f"{valid}.txt": PARTS["valid"]})
        data = load(tmp_path / "t", tokenizer="bpe")
        assert {name: decoded(data, name) for name in PARTS} == PARTS

    def test_files_are_joined_and_cut(self, tmp_path):
        """In the order of their names; a file that ends within a line ends it."""
        files = {"b.txt": "".join(f"b {i}\n" for i in range(50)), "a.txt": "a\na end"}
        data = load(write(tmp_path / "t", files), tokenizer="bpe", held_out=(0.25, 0.125))
        parts = [decoded(data, name) for name in PARTS]
        assert "".join(parts) == files["a.txt"] + "\n" + files["b.txt"]
        total = len("".join(parts))
        assert [round(len(part) / total, 1) for part in parts] == [0.6, 0.2, 0.1]
        assert all(part.startswith("b ") for part in parts[1:])

    def test_one_file_is_cut(self, tmp_path):
        content = "".join(f"line {i}\r\n" for i in range(100))
        path = write(tmp_path / "t", {"book": content}) / "book"
        data = load(path, tokenizer="bpe")
        parts = [decoded(data, name) for name in PARTS]
        assert "".join(parts) == content
        assert all(part.startswith("line ") and part.endswith("\r\n") for part in parts)

    @pytest.mark.parametrize("size", [997, 3 * lines.LONGEST + 1])
    def test_one_line_is_cut_between_characters(self, tmp_path, size):
        content = "".join(random.Random(0).choices("aé€😀", k=size))
        path = write(tmp_path / "t", {"book": content}) / "book"
        data = load(path)
        parts = [getattr(data, name).tokens for name in PARTS]
        assert [len(part) / size for part in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
        assert data.decode(np.concatenate(parts)) == content


class TestMissing:
    def test_no_such_folder(self, tmp_path):
        message = rf"dataset_dir='not/here' does not exist \({tmp_path}/not/here\).*wiki.train.raw"
        with pytest.raises(DataError, match=message):
            load(Path("not/here"))

    def test_nothing_known(self, tmp_path):
        with pytest.raises(DataError, match=r"has no text .*wiki.train.raw.*train.txt"):
            load(write(tmp_path / "t", {"image.png": "x"}))

    def test_a_split(self, tmp_path):
        folder = wikitext(tmp_path / "w")
        (folder / "wiki.valid.raw").unlink()
        with pytest.raises(DataError, match=r"no valid split, there are train, test"):
            load(folder)
        folder = write(tmp_path / "t", {"train.txt": "a", "test.txt": "b"})
        with pytest.raises(DataError, match=r"no valid split.*valid or validation or val"):
            load(folder)
        with pytest.raises(DataError, match=r"no test split, there are train, validation"):
            load(saved(tmp_path / "d", names=("train", "validation")))

    def test_local_needs_a_folder(self):
        with pytest.raises(DataError, match=r"local needs dataset.dataset_dir"):
            text("local")

    def test_name(self):
        with pytest.raises(DataError, match=r"unknown text 'wikitext-103': did you mean 'wikitext"):
            text("wikitext-103")

    def test_wikitext103_without_download(self):
        with pytest.raises(DataError, match=r"not tried, because download=False.\nGet it in one"):
            text("wikitext103", download=False)

    def test_wikitext103_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"needs the package datasets.*--extra hub"):
            text("wikitext103")

    @pytest.mark.parametrize(
        ("package", "options", "make"),
        [("tokenizers", {"tokenizer": "bpe"}, wikitext), ("pyarrow", {}, saved)],
    )
    def test_package(self, monkeypatch, tmp_path, package, options, make):
        make(tmp_path / "w")
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=rf"needs the package {package}.*--extra text"):
            load(tmp_path / "w", **options)


class TestDownload:
    def serve(self, monkeypatch, save) -> list[tuple[str, ...]]:
        """Install a `datasets` whose dataset saves itself with `save`; return what is asked."""
        asked = []

        def load_dataset(*names):
            asked.append(names)
            return types.SimpleNamespace(save_to_disk=lambda path: save(Path(path)))

        module = types.SimpleNamespace(load_dataset=load_dataset)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return asked

    def test_is_kept(self, monkeypatch, tmp_path):
        asked = self.serve(monkeypatch, saved)
        for _ in range(2):
            data = text("wikitext103", tokenizer="char", target_len=4)
        assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1")]
        assert data.origin == str(tmp_path / "data" / "wikitext103" / "wikitext-103-raw-v1")

    def test_half_a_download_is_none(self, monkeypatch, tmp_path):
        def fail(path):
            saved(path)
            raise ConnectionError("cut")

        self.serve(monkeypatch, fail)
        with pytest.raises(DataError, match=r"could not be downloaded \(cut\)"):
            text("wikitext103")
        assert list((tmp_path / "data" / "wikitext103").iterdir()) == []


class TestBroken:
    @pytest.mark.parametrize("before", [0, 10, lines.LONGEST - 1, 3 * lines.LONGEST])
    @pytest.mark.parametrize("good", ["a", "a\n", "é"])
    def test_not_utf8(self, tmp_path, before, good):
        content = (good * before).encode()
        folder = write(tmp_path / "t", {f"{name}.txt": "fine\n" for name in PARTS})
        write(folder, {"valid.txt": content + b"\xffrest"})
        with pytest.raises(DataError, match=rf"valid.txt: not UTF-8 at byte {len(content)} \(0xff"):
            load(folder, tokenizer="bpe", target_len=1)

    def test_cut_character(self, tmp_path):
        folder = write(tmp_path / "t", {f"{name}.txt": "fine\n" for name in PARTS})
        write(folder, {"test.txt": b"ab\n\xe2\x82"})
        with pytest.raises(DataError, match=r"not UTF-8 at byte 3 \(0xe2, unexpected end"):
            load(folder, target_len=1)

    def test_broken_text_is_not_cached(self, tmp_path):
        folder = write(tmp_path / "t", {f"{name}.txt": "fine\n" for name in PARTS})
        write(folder, {"valid.txt": b"x" * 100 + b"\xff"})
        with pytest.raises(DataError, match=r"not UTF-8"):
            load(folder, target_len=1)
        assert not list((tmp_path / "cache").glob("*valid*"))
        assert not list((tmp_path / "cache").glob(".*"))

    def test_archive(self, tmp_path):
        path = archive(tmp_path / "w.zip")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=r"w.zip: cannot be read \(File is not a zip"):
            load(path)
        start = content.index(b"wiki.train.raw") + len("wiki.train.raw")
        path.write_bytes(content[: start + 9] + b"\xff\xff" + content[start + 11 :])
        with pytest.raises(DataError, match=r"w.zip, .*wiki.train.raw: cannot be read"):
            load(path)

    def test_arrow(self, tmp_path):
        folder = saved(tmp_path / "d")
        write(folder / "train", {"data-00000-of-00002.arrow": b"no arrow"})
        with pytest.raises(DataError, match=r"data-00000-of-00002.arrow: cannot be read"):
            load(folder)
        (folder / "train" / "data-00000-of-00002.arrow").unlink()
        with pytest.raises(DataError, match=r"data-00000-of-00002.arrow: cannot be read \(.*No su"):
            load(folder)
        write(folder / "train", {"state.json": "{}"})
        with pytest.raises(DataError, match=r"state.json: expected JSON with an entry '_data_fi"):
            load(folder)

    def test_columns(self, tmp_path):
        for name, table in (("a", {"body": ["x"], "id": [1]}), ("b", {"text": ["x", None]})):
            for split in PARTS:
                file = write(tmp_path / name, {}) / f"{split}-00000-of-00001.parquet"
                pyarrow.parquet.write_table(pyarrow.table(table), file)
        with pytest.raises(DataError, match=r"no column 'text', there are body, id"):
            load(tmp_path / "a")
        with pytest.raises(DataError, match=r"a row of 'text' is None, expected a string"):
            load(tmp_path / "b")


class TestTooShort:
    def files(self, tmp_path, **parts) -> Path:
        parts = {"train": "abcdef\n", "valid": "abcdef\n", "test": "abcdef\n", **parts}
        return write(tmp_path / "t", {f"{k}.txt": v for k, v in parts.items()})

    @pytest.mark.parametrize(("content", "found"), [("", 0), ("x", 1)])
    @pytest.mark.parametrize("which", ["train", "valid", "test"])
    @pytest.mark.parametrize("kind", ["char", "bpe"])
    def test_no_target(self, tmp_path, kind, which, content, found):
        folder = self.files(tmp_path, **{which: content})
        message = rf"local, {which} split: {found} tokens, expected .*Give more text"
        with pytest.raises(DataError, match=message):
            load(folder, tokenizer=kind)

    def test_two_tokens_are_evaluated(self, tmp_path):
        batch = load(self.files(tmp_path, test="ab")).test.gather(np.array([0]))
        np.testing.assert_array_equal(batch["tokens"], [[2, 3, 0, 0]])
        np.testing.assert_array_equal(batch["label"], [[3, IGNORE, IGNORE, IGNORE]])

    def test_train_needs_a_full_window(self, tmp_path):
        message = r"train split: 7 tokens, expected 8 or more .* target_len 7. .*_len to 6 or less"
        with pytest.raises(DataError, match=message):
            load(self.files(tmp_path), target_len=7)
        assert len(load(self.files(tmp_path), target_len=6).train) == 1

    def test_one_empty_file_is_cut(self, tmp_path):
        with pytest.raises(DataError, match=r"train split: 0 tokens"):
            load(write(tmp_path / "e", {"x.txt": ""}))


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target_len": 0}, r"target_len is 0, expected 1 or more"),
            ({"tokenizer": "chr"}, r"unknown tokenizer 'chr': did you mean 'char'"),
            ({"tokenizer": "bpe", "vocabulary": 255}, r"255 tokens, expected 256 or more"),
            ({"held_out": (0.5, 0.5)}, r"held_out=\[0.5, 0.5\]: expected two shares above 0"),
            ({"held_out": (0.5,)}, r"held_out=\[0.5\]: expected two"),
            ({"held_out": (0.5, float("nan"))}, r"held_out=.*: expected two"),
        ],
    )
    def test_illegal(self, tmp_path, options, message):
        with pytest.raises(DataError, match=message):
            load(write(tmp_path / "t", {"x.txt": "some text\n" * 9}), **options)

    def test_python_topics_have_no_folder(self, tmp_path):
        with pytest.raises(DataError, match=r"python_topics comes with Python.*Leave dataset"):
            text("python_topics", tmp_path)


class TestPythonTopics:
    def test_is_prose_and_leaks_nothing(self):
        found = corpus.python_topics()
        parts = ["".join(getattr(found, name).read()) for name in PARTS]
        sizes = [len(part.encode()) for part in parts]
        assert sizes == [getattr(found, name).size for name in PARTS]
        assert sum(sizes) > 300_000
        assert [size / sum(sizes) for size in sizes] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
        paragraphs = [set(re.split(r"\n\s*\n", part.strip())) for part in parts]
        assert not (paragraphs[0] & paragraphs[1])
        assert not (paragraphs[0] | paragraphs[1]) & paragraphs[2]
        assert len(re.findall(r"\bthe\b", parts[0])) > 1000

    def test_python_without_them(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(DataError, match=r"packaged without it.*dataset.name=local"):
            text("python_topics")

    def test_in_the_pipeline(self):
        data = text("python_topics", target_len=32)
        with closing(train_stream(data.train, batch_size=8, seed=0, num_threads=2)) as stream:
            batch = next(stream)
        assert batch.keys() == {"tokens", "label"}
        assert batch["tokens"].shape == batch["label"].shape == (8, 32)
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["label"][:, :-1])
        batches = list(evaluation_batches(data.test, 16))
        targets = sum(int((b["label"][b["mask"]] >= 0).sum()) for b in batches)
        assert targets == data.test.targets == len(data.test.tokens) - 1


class TestLines:
    @pytest.mark.parametrize("longest", [1, 2, 3, 5, 7, 64])
    def test_reading_in_pieces_is_reading(self, monkeypatch, tmp_path, longest):
        monkeypatch.setattr(lines, "LONGEST", longest)
        file = lines.TextFile(write(tmp_path, {"x": UNICODE * 3}) / "x")
        pieces = list(lines.of_file(file).read())
        assert "".join(pieces) == UNICODE * 3
        assert all(len(piece.encode()) <= longest + 3 for piece in pieces)
        assert all("\n" not in piece[:-1] for piece in pieces)
        assert "".join(lines.split(UNICODE * 3)) == UNICODE * 3

    def test_whole_lines_when_they_are_short(self, tmp_path):
        expected = UNICODE.split("\n")
        expected = [f"{line}\n" for line in expected[:-1]] + expected[-1:]
        file = lines.TextFile(write(tmp_path, {"x": UNICODE}) / "x")
        assert list(lines.of_file(file).read()) == expected == list(lines.split(UNICODE))

    @pytest.mark.parametrize("seed", range(20))
    def test_parts_are_the_whole(self, monkeypatch, tmp_path, seed):
        rng = random.Random(seed)
        monkeypatch.setattr(lines, "LONGEST", rng.choice([4, 20, 1000]))
        contents = ["".join(rng.choices("aé😀\n", k=rng.choice([0, 1, 5, 40]))) for _ in range(3)]
        files = [write(tmp_path, {f"{i}": c}) / f"{i}" for i, c in enumerate(contents)]
        parts = lines.of_files(files, (0.5, 0.3, 0.2))
        (whole,) = lines.of_files(files, (1.0,))
        *first, last = [content for content in contents if content] or [""]
        ended = "".join(c if c.endswith("\n") else f"{c}\n" for c in first)
        assert "".join(whole.read()) == ended + last
        # A cut at the end of a file leaves out the line end that joins it to the next.
        joined = "".join("".join(part.read()) for part in parts)
        assert joined.replace("\n", "") == "".join(contents).replace("\n", "")
        assert len({part.digest for part in parts if part.size}) == sum(p.size > 0 for p in parts)

    def test_groups(self, monkeypatch):
        monkeypatch.setattr(lines, "_GROUP", 10)
        groups = list(lines.of_text("12345\n" * 5).groups())
        assert [len(group) for group in groups] == [2, 2, 1]


def slow_byte_pairs(vocabulary: dict[str, int], merges: list[str], line: str) -> list[int]:
    """Encode as GPT-2's published code does: the pair of lowest rank first, one at a time."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    letters = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    ids = []
    for word in re.findall(pattern, line):
        parts = [letters[b] for b in word.encode()]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append("".join(parts[i : i + 1 + both]))
                i += 1 + both
            parts = merged
        ids += [vocabulary[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def byte_pairs() -> BytePairs:
    return tokenization.learn("bpe", corpus.python_topics().valid.groups(), 600)


class TestTokenizers:
    def test_characters(self):
        made = tokenization.learn("char", iter([["ba", "c😀\n"], ["b"]]), 0)
        assert made == Characters("\nabc😀")
        assert made.vocabulary == 6
        assert made.encode(["a?", "😀"]).tolist() == [2, tokenization.UNKNOWN, 5]
        assert made.decode(np.array([5, 0, 1])) == "😀\N{REPLACEMENT CHARACTER}\n"

    def test_unknown_characters_are_those_outside_of_training(self, tmp_path):
        files = {"train.txt": "abc" * 9, "valid.txt": "abxca", "test.txt": "aé"}
        data = load(write(tmp_path / "t", files))
        assert data.valid.tokens.tolist() == [1, 2, 0, 3, 1]
        assert decoded(data, "test") == "a\N{REPLACEMENT CHARACTER}"

    @pytest.mark.parametrize("kind", ["char", "bpe"])
    def test_round_trip(self, kind, byte_pairs):
        made = byte_pairs if kind == "bpe" else tokenization.learn(kind, [[UNICODE]], 0)
        pieces = list(lines.split(UNICODE))
        ids = made.encode(pieces)
        assert ids.dtype == np.int32
        assert ids.max() < made.vocabulary
        assert made.decode(ids) == UNICODE
        same = tokenization.from_json(made.to_json())
        np.testing.assert_array_equal(same.encode(pieces), ids)
        assert same.vocabulary == made.vocabulary
        assert same.to_json() == made.to_json()

    def test_a_part_of_a_character_can_be_decoded(self, byte_pairs):
        ids = byte_pairs.encode(["😀"])
        assert len(ids) == 4
        assert byte_pairs.decode(ids[:2]) == "\N{REPLACEMENT CHARACTER}"

    def test_learning_is_deterministic(self, byte_pairs):
        again = tokenization.learn("bpe", corpus.python_topics().valid.groups(), 600)
        assert again.to_json() == byte_pairs.to_json()
        assert again.vocabulary == 600

    def test_lines_are_encoded_alone(self, byte_pairs):
        pieces = ["one\n", "\n", " two"]
        together = byte_pairs.encode(pieces)
        np.testing.assert_array_equal(
            together, np.concatenate([byte_pairs.encode([piece]) for piece in pieces])
        )

    def test_few_pairs_make_fewer_tokens(self):
        """Only (a, a) occurs twice in a a a a; (aa, aa) occurs once."""
        assert tokenization.learn("bpe", [["aaaa"]], 1000).vocabulary == 256 + 1

    @pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
    def test_gpt2_files_against_its_algorithm(self, tmp_path, byte_pairs, names):
        saved_files = byte_pairs.tokenizer.model.save(str(tmp_path))
        for old, new in zip(saved_files, names, strict=True):
            Path(old).rename(tmp_path / new)
        vocabulary = json.loads((tmp_path / names[0]).read_text())
        merges = (tmp_path / names[1]).read_text().splitlines()[1:]
        made = tokenization.read_gpt2(tmp_path)
        assert made.vocabulary == len(vocabulary) == 600
        for line in (UNICODE, *corpus.python_topics().test.read()):
            expected = slow_byte_pairs(vocabulary, merges, line)
            assert made.encode([line]).tolist() == expected
            assert made.decode(np.array(expected)) == line

    def test_gpt2_adds_no_tokens(self, tmp_path, byte_pairs):
        byte_pairs.tokenizer.model.save(str(tmp_path))
        path = tmp_path / "vocab.json"
        vocabulary = json.loads(path.read_text())
        path.write_text(json.dumps(vocabulary | {"<|endoftext|>": 600}))
        made = tokenization.read_gpt2(tmp_path)
        assert made.vocabulary == 601
        assert 600 not in made.encode(["<|endoftext|>"])
        assert made.decode(np.array([600])) == "<|endoftext|>"

    def test_gpt2_files_lie_with_the_text(self, tmp_path, byte_pairs):
        folder = wikitext(tmp_path / "data" / "wikitext103")
        byte_pairs.tokenizer.model.save(str(folder))
        data = text("wikitext103", target_len=5)
        assert {name: decoded(data, name) for name in PARTS} == PARTS
        other = load(folder / "wiki.train.raw", tokenizer="gpt2")
        assert other.vocabulary == 600

    def test_gpt2_files_are_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"has neither vocab.json and merges.txt nor encoder"):
            load(wikitext(tmp_path / "w"), tokenizer="gpt2")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v, m: (v[:100], m), r"no tokenizer of byte pairs: Error while reading"),
            (lambda v, m: (v, m + "a b c\n"), r"Merges text file invalid at line"),
            (lambda v, m: (v.replace('"!":', '"!!!!!":'), m), r"1 of 256 bytes have no token"),
            (lambda v, m: (v.replace(":599", ":700"), m), r"not numbered 0 to 599"),
            (lambda v, m: (v, m + "@ qq\n"), r"merge 345, '@' and 'qq', is of or to something"),
        ],
    )
    def test_gpt2_files_are_broken(self, tmp_path, byte_pairs, change, message):
        vocabulary, merges = map(Path, byte_pairs.tokenizer.model.save(str(tmp_path)))
        one, two = change(vocabulary.read_text(), merges.read_text())
        vocabulary.write_text(one)
        merges.write_text(two)
        with pytest.raises(DataError, match=message):
            tokenization.read_gpt2(tmp_path)


class TestCache:
    @pytest.fixture
    def encoded(self, monkeypatch) -> list[str]:
        """Record what work is done, by its label."""
        done = []
        watched = language._watched

        def record(part, what):
            done.append(what)
            return watched(part, what)

        monkeypatch.setattr(language, "_watched", record)
        return done

    ALL = ("learning bpe tokens", "tokenising train", "tokenising valid", "tokenising test")

    def test_second_time_is_free(self, tmp_path, encoded):
        folder = wikitext(tmp_path / "w")
        first = load(folder, tokenizer="bpe")
        assert encoded == list(self.ALL)
        second = load(folder, tokenizer="bpe")
        assert encoded == list(self.ALL)
        for name in PARTS:
            one, two = getattr(first, name), getattr(second, name)
            np.testing.assert_array_equal(one.tokens, two.tokens)
            assert isinstance(two.tokens, np.memmap)
            assert two.tokens.dtype == np.uint16
            assert not two.tokens.flags.writeable
        load(folder, tokenizer="bpe", target_len=2)
        assert encoded == list(self.ALL)

    def test_other_text_or_options_are_other_entries(self, tmp_path, encoded):
        folder = wikitext(tmp_path / "w")
        load(folder, tokenizer="bpe")
        encoded.clear()
        write(folder, {"wiki.test.raw": "other words"})
        assert decoded(load(folder, tokenizer="bpe"), "test") == "other words"
        assert encoded == ["tokenising test"]
        encoded.clear()
        load(folder, tokenizer="bpe", vocabulary=260)
        assert encoded == list(self.ALL)
        encoded.clear()
        write(folder, {"wiki.train.raw": "a new alphabet " * 9})
        load(folder, tokenizer="char")
        assert encoded == ["learning char tokens", *self.ALL[1:]]

    def test_the_place_of_the_text_is_no_part_of_the_key(self, tmp_path, encoded):
        load(wikitext(tmp_path / "w"))
        encoded.clear()
        (tmp_path / "w").rename(tmp_path / "v")
        load(tmp_path / "v")
        assert encoded == []

    @pytest.mark.parametrize(
        "damage",
        [
            lambda f: f.write_bytes(f.read_bytes()[:-3]),
            lambda f: f.write_bytes(f.read_bytes()[:-1] + bytes([f.read_bytes()[-1] ^ 1])),
            lambda f: f.write_bytes(b""),
            lambda f: f.unlink(),
            lambda f: f.with_name(f"{f.name}.json").unlink(),
            lambda f: f.with_name(f"{f.name}.json").write_text("{"),
            lambda f: f.with_name(f"{f.name}.json").write_text("[]"),
        ],
    )
    @pytest.mark.parametrize("which", ["*valid*.npy", "*.tokenizer"])
    def test_damage_is_repaired(self, tmp_path, encoded, damage, which, caplog):
        folder = wikitext(tmp_path / "w")
        load(folder, tokenizer="bpe")
        (file,) = (tmp_path / "cache").glob(which)
        content = file.read_bytes()
        encoded.clear()
        damage(file)
        with caplog.at_level(logging.WARNING):
            data = load(folder, tokenizer="bpe")
        assert decoded(data, "valid") == PARTS["valid"]
        assert encoded == [self.ALL[0 if "tokenizer" in which else 2]]
        assert file.read_bytes() == content
        assert {p.name for p in (tmp_path / "cache").glob(".*")} == set()

    def test_damage_is_told(self, tmp_path, caplog):
        folder = wikitext(tmp_path / "w")
        load(folder)
        (file,) = (tmp_path / "cache").glob("*valid*.npy")
        file.write_bytes(file.read_bytes()[:-1])
        with caplog.at_level(logging.WARNING):
            load(folder)
        assert [r.getMessage() for r in caplog.records] == [
            f"cache/{file.name} is not what its note says: it is made again"
        ]

    @pytest.mark.parametrize("count", [0, 1, 9, 10, 12345])
    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_files_are_those_of_numpy(self, tmp_path, count, dtype):
        expected = np.arange(count).astype(dtype)
        pieces = np.array_split(expected, 3)
        made = token_cache.tokens(tmp_path / "x.npy", lambda: iter(pieces), np.dtype(dtype))
        np.testing.assert_array_equal(made, expected)
        buffer = io.BytesIO()
        np.save(buffer, expected)
        assert (tmp_path / "x.npy").read_bytes() == buffer.getvalue()

    def test_many_tokens_take_four_bytes(self, tmp_path):
        alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 20000))) + "".join(
            map(chr, range(0x20000, 0x20000 + 46000))
        )
        files = {f"{name}.txt": alphabet[-100:] for name in PARTS} | {"train.txt": alphabet}
        data = load(write(tmp_path / "t", files))
        assert data.vocabulary == 66001
        assert data.test.tokens.dtype == np.int32
        assert decoded(data, "test") == alphabet[-100:]

    def test_folder_that_is_a_file(self, tmp_path):
        write(tmp_path, {"cache": "x"})
        with pytest.raises(DataError, match=r"cannot be written .*dataset.cache_dir"):
            load(wikitext(tmp_path / "w"))

    def test_full_disk(self, monkeypatch, tmp_path):
        def fail(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(DataError, match=r"cannot be written \(No space left on device\). Make"):
            load(wikitext(tmp_path / "w"))
        assert list((tmp_path / "cache").iterdir()) == []


class TestWindows:
    @pytest.mark.parametrize("length", [1, 2, 3, 7, 10, 11, 20])
    @pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 11, 12])
    @pytest.mark.parametrize("whole", [False, True])
    def test_against_one_after_the_other(self, n, length, whole):
        tokens = (100 + np.arange(n)).astype(np.uint16)
        inputs, labels = [], []
        for start in range(0, n - 1, length):
            pairs = [(tokens[j], tokens[j + 1]) for j in range(start, min(start + length, n - 1))]
            if whole and len(pairs) < length:
                break
            # The last token is no input that has a target, but it is there.
            rest = length - len(pairs)
            last = [tokens[n - 1]] if rest else []
            inputs.append([a for a, _ in pairs] + (last + [0] * rest)[:rest])
            labels.append([b for _, b in pairs] + [IGNORE] * rest)
        windows = Windows(tokens, length, whole)
        assert len(windows) == len(inputs)
        batch = windows.gather(np.arange(len(windows)))
        np.testing.assert_array_equal(batch["tokens"], np.reshape(inputs, (-1, length)))
        np.testing.assert_array_equal(batch["label"], np.reshape(labels, (-1, length)))
        assert batch["tokens"].dtype == batch["label"].dtype == np.int32
        real = batch["label"][batch["label"] != IGNORE]
        np.testing.assert_array_equal(real, tokens[1 : 1 + windows.targets])
        if not whole:
            assert windows.targets == max(0, n - 1)

    def test_any_order(self):
        windows = Windows(np.arange(50, dtype=np.uint16), 4, whole=True)
        batch = windows.gather(np.array([7, 0, 7]))
        np.testing.assert_array_equal(batch["tokens"][:, 0], [28, 0, 28])
        drawn = windows.draw(np.array([7, 0, 7]), np.random.default_rng(0))
        np.testing.assert_array_equal(drawn["label"], batch["label"])

    @pytest.mark.parametrize("index", [-1, 12])
    def test_outside(self, index):
        windows = Windows(np.arange(50, dtype=np.uint16), 4, whole=True)
        with pytest.raises(IndexError, match=r"windows \[.*\] of 12"):
            windows.gather(np.array([index]))

    def test_decode_leaves_out_what_is_no_target(self, tmp_path):
        data = load(wikitext(tmp_path / "w"), tokenizer="bpe", target_len=35)
        label = data.test.gather(np.array([0]))["label"][0]
        assert (label == IGNORE).any()
        first = data.decode(data.test.tokens[:1])
        assert first + data.decode(label) == PARTS["test"]


class TestProgress:
    @pytest.mark.parametrize(("patience", "shown"), [(-1.0, True), (60.0, False)])
    def test_bar_only_when_it_takes_long(self, monkeypatch, tmp_path, patience, shown):
        from rich.console import Console

        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=80)
        monkeypatch.setattr(language, "Console", lambda: console)
        monkeypatch.setattr(language, "_PATIENCE_SECONDS", patience)
        load(wikitext(tmp_path / "w"))
        assert ("tokenising train" in screen.getvalue()) == shown

    def test_no_bar_without_a_terminal(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(language, "_PATIENCE_SECONDS", -1.0)
        load(wikitext(tmp_path / "w"))
        assert capsys.readouterr().out == ""
