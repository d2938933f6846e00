"""Text for language models: layouts, what is missing or broken, and lines."""

import random
import re
import sys
import types
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llqr_experiments.data import (
    IGNORE,
    DataError,
    corpus,
    evaluation_batches,
    lines,
    text,
    train_stream,
)
from tests.experiments.text_files import (
    PARTS,
    UNICODE,
    archive,
    decoded,
    load,
    rows,
    saved,
    wikitext,
    write,
)

pytestmark = pytest.mark.usefixtures("empty_folder")


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

    def test_a_byte_order_mark_in_the_first_row_is_no_text(self, tmp_path):
        """The file that a table was made from began with it; further in it is a character."""
        for split in PARTS:
            file = write(tmp_path / "p", {}) / f"{split}-00000-of-00001.parquet"
            table = pyarrow.table({"text": ["\ufeffa b\n", "\ufeffc\n"]})
            pyarrow.parquet.write_table(table, file)
        data = load(tmp_path / "p", tokenizer="char")
        assert decoded(data, "train") == "a b\n\ufeffc\n"

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
        with pytest.raises(
            DataError, match=r"not tried, because dataset.download=false.\nGet it in one"
        ):
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
        assert [size / sum(sizes) for size in sizes] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
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
