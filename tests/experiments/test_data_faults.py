"""Files that read well and hold something else: each is told, or read as what it means."""

import codecs
import pickle

import numpy as np
import pytest

from llqr_experiments.data import dataset, lines
from llqr_experiments.data.cifar import _read_python
from llqr_experiments.data.dataset import Dataset, Split
from llqr_experiments.data.imagenet import WNIDS, _label, _text
from llqr_experiments.data.language import text
from llqr_experiments.data.translation import files
from llqr_experiments.errors import DataError
from tests.experiments import text_files


@pytest.mark.parametrize("label", [2**32, 2**32 + 3, 2**40, -(2**33)])
def test_a_label_of_more_than_32_bits_does_not_wrap_to_a_legal_one(label):
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [3, label]}
    with pytest.raises(DataError, match=rf"label {label} of example 1 has more than 32 bits"):
        _read_python(pickle.dumps(batch), "file", labels="labels")
    batch["labels"] = [3, 4]
    assert _read_python(pickle.dumps(batch), "file", labels="labels")[1].tolist() == [3, 4]


@pytest.mark.parametrize("label", [b"4294967299", b"99999999999999999999", b"-1"])
def test_nor_does_one_of_a_shard(label):
    with pytest.raises(DataError, match="expected a label in digits"):
        _label(label, "member")


def test_splits_of_different_sizes_are_two_sets():
    def split(*shape):
        return Split(np.zeros((2, *shape), np.uint8), np.zeros(2, np.int32))

    def of(test):
        return Dataset("mixed", split(28, 28, 1), test, 10, 0.0, 1.0, 255.0)

    dataset.validate(of(split(28, 28, 1)))
    for shape in ((32, 32, 1), (28, 28, 3)):
        with pytest.raises(DataError, match="images of 28x28x1 to train on and of"):
            dataset.validate(of(split(*shape)))


def test_a_byte_order_mark_is_no_text(tmp_path):
    plain = text_files.write(tmp_path / "plain", {"a.txt": "äb\nc\n" * 9, "b.txt": "d\ne\n" * 9})
    marked = text_files.write(
        tmp_path / "marked",
        {
            "a.txt": codecs.BOM_UTF8 + "äb\nc\n".encode() * 9,
            "b.txt": codecs.BOM_UTF8 + b"d\ne\n" * 9,
        },
    )
    given = {"held_out": (0.3, 0.3), "tokenizer": "char", "target_len": 4}
    found = [text("local", dataset_dir=str(folder), **given) for folder in (plain, marked)]
    assert found[0].vocabulary == found[1].vocabulary, "no token for the mark"
    first = [one.train.tokens[:9].tolist() for one in found]
    assert first[0] == first[1]
    assert lines.of_text("\ufeffone\n").digest == lines.of_text("one\n").digest
    (tmp_path / "pairs").write_bytes(codecs.BOM_UTF8 + b"one\ntwo\n")
    assert files.read_lines(tmp_path / "pairs") == ["one", "two"]
    (tmp_path / WNIDS).write_bytes(codecs.BOM_UTF8 + b"n01440764\n")
    assert _text(tmp_path / WNIDS).split() == ["n01440764"]
    assert _label(codecs.BOM_UTF8 + b"3\n", "member") == 3


def test_the_place_of_a_bad_byte_counts_the_mark(tmp_path):
    folder = text_files.write(tmp_path, {"a.txt": codecs.BOM_UTF8 + b"a\xff\n"})
    with pytest.raises(DataError, match="not UTF-8 at byte 4"):
        text("local", dataset_dir=str(folder), held_out=(0.1, 0.1), tokenizer="char", target_len=4)
