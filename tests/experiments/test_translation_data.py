"""Translation: vocabularies, the reader and its cache, batches of bounded shapes, text."""

import collections
import itertools
import json
import logging
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from llqr_experiments.data import IGNORE
from llqr_experiments.data.translation import (
    EOS,
    PAD,
    UNK,
    UNKNOWN_HYPOTHESIS,
    UNKNOWN_REFERENCE,
    Bucketing,
    Buckets,
    Pairs,
    Sentences,
    Vocabulary,
    bleu,
    corpus,
    detokenise,
    epoch_length,
    evaluation_batches,
    fill_rate,
    load,
    names,
    number_words,
    refit_stream,
    train_stream,
)
from llqr_experiments.data.translation.batching import boundaries, check_lengths
from llqr_experiments.errors import DataError
from tests.experiments.batches import assert_same

SPLITS = ("train", "valid", "test")
TEXT = {
    "train.de": ["das ist gut", "das ist ein te@@ st", "ja", "das te@@ st"],
    "train.en": ["this is good", "this is a test", "yes", "this test"],
    "valid.de": ["das neue"],
    "valid.en": ["this new"],
    "test.de": ["ja ja", "gut"],
    "test.en": ["yes yes", "good"],
}


def write(folder: Path, **changes: list[str] | bytes | None) -> Path:
    """Write a prepared folder; `train_de=...` replaces a file, None leaves it out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (TEXT | {k.replace("_", "."): v for k, v in changes.items()}).items():
        if isinstance(lines, list):
            lines = "".join(f"{line}\n" for line in lines).encode()
        if lines is not None:
            (folder / name).write_bytes(lines)
    return folder


def make_pairs(lengths) -> Pairs:
    """Return pairs of the given (source, target) lengths; the words of pair i are i + 4."""
    sides = [[[i + 4] * (pair[s] - 1) + [EOS] for i, pair in enumerate(lengths)] for s in (0, 1)]
    return Pairs(*map(Sentences.of, sides), np.arange(len(lengths), dtype=np.int32))


def ids(batch: dict[str, np.ndarray]) -> list[int]:
    """Return which pairs of `make_pairs` a batch holds, and check that its sides agree."""
    found = []
    for source, label in zip(batch["source"], batch["label"], strict=True):
        pair = [{int(w) - 4 for w in row if w not in (PAD, IGNORE, EOS)} for row in (source, label)]
        assert pair[0] == pair[1]
        found += pair[0]
    return found


def take(count: int, stream) -> list[dict[str, np.ndarray]]:
    with closing(stream):
        return [next(stream) for _ in range(count)]


def random_lengths(n: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    source = rng.integers(2, 60, n)
    return [(int(s), int(max(2, s + rng.integers(-5, 6)))) for s in source]


class TestVocabulary:
    def test_order_and_fillers(self):
        counts = {"b": 2, "a": 2, "ä": 2, "Z": 2, "häufig": 9, "x": 1}
        words = Vocabulary.of(counts).words
        assert words[:4] == ("<s>", "<pad>", "</s>", "<unk>")
        assert words[4:10] == ("häufig", "Z", "a", "b", "ä", "x")
        assert words[10:] == tuple(f"madeupword{i:04d}" for i in range(6))
        assert len(Vocabulary.of({"a": 1, "b": 1, "c": 1, "d": 1})) == 8

    def test_text_has_no_special_words(self):
        vocabulary = Vocabulary.of({"</s>": 5, "<pad>": 5, "a": 1})
        assert vocabulary.words.count("</s>") == 1
        assert vocabulary.encode(["a", "</s>", "<pad>", "b"]) == [4, UNK, UNK, UNK, EOS]

    def test_decode(self):
        vocabulary = Vocabulary.of({"a": 2, "b": 1})
        assert vocabulary.decode([PAD, 0, 4, 5, UNK, EOS, 4]) == ["a", "b", "<unk>"]
        with pytest.raises(IndexError, match=r"word 8 is not in a vocabulary of 8"):
            vocabulary.decode([8])
        with pytest.raises(IndexError, match=r"word -1"):
            vocabulary.decode([-1])


class TestReader:
    def test_numbers(self, tmp_path):
        data = load("small_de_en", write(tmp_path))
        # Counted by hand from train: das 3; ist, st, te@@ 2; ein, gut, ja 1.
        assert data.source.words[4:11] == ("das", "ist", "st", "te@@", "ein", "gut", "ja")
        assert data.target.words[4:11] == (
            "this",
            "is",
            "test",
            "a",
            "good",
            "yes",
            "madeupword0000",
        )
        assert [data.train.source[i].tolist() for i in range(4)] == [
            [4, 5, 9, EOS],
            [4, 5, 8, 7, 6, EOS],
            [10, EOS],
            [4, 7, 6, EOS],
        ]
        assert data.valid.source[0].tolist() == [4, UNK, EOS]
        assert data.test.target[1].tolist() == [8, EOS]
        assert data.train.source.words.dtype == np.int32
        assert data.train.lines.tolist() == [0, 1, 2, 3]

    def test_white_space(self, tmp_path):
        """Only blanks part words, only line feeds part lines; the last may be missing."""
        text = "a\N{NO-BREAK SPACE}b  c \r\nd\N{LINE SEPARATOR}e\n f".encode()
        pairs = {"train_de": text, "train_en": ["x", "y", "z"]}
        data = load("small_de_en", write(tmp_path, **pairs))
        words = [data.source.decode(data.train.source[i]) for i in range(3)]
        assert words == [["a\N{NO-BREAK SPACE}b", "c"], ["d\N{LINE SEPARATOR}e"], ["f"]]

    def test_the_variable_names_the_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            DataError, match=r"iwslt14_de_en was not found: .*de-en \(the default\)"
        ):
            load("iwslt14_de_en")
        monkeypatch.setenv("IWSLT14_DATA_DIR", str(tmp_path / "there"))
        with pytest.raises(DataError, match=r"(?s)there \(IWSLT14_DATA_DIR\) is no .*iwslt14 prep"):
            load("iwslt14_de_en")
        write(tmp_path / "there")
        assert load("iwslt14_de_en").origin == str(tmp_path / "there")
        write(tmp_path / "data/small.tokenized.de-en")
        assert load("small_de_en").origin.endswith("data/small.tokenized.de-en")
        with pytest.raises(DataError, match=r"nowhere \(dataset.dataset_dir\)"):
            load("small_de_en", "nowhere")

    def test_names(self):
        assert names() == ("iwslt14_de_en", "small_de_en", "numbers_de_en")
        with pytest.raises(
            DataError, match=r"unknown dataset 'iwslt14': did you mean 'iwslt14_de_"
        ):
            load("iwslt14")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"valid_en": None, "test_de": None},
                r"lacks valid.en, test.de; expected train, valid",
            ),
            ({"train_de": ["a"]}, r"train.de has 1 and train.en has 4 lines, expected as many"),
            ({"valid_en": []}, r"valid.de has 1 and valid.en has 0 lines"),
            ({"valid_de": [], "valid_en": []}, r"the valid split is empty \(0 pairs"),
            ({"test_de": ["", "a"], "test_en": ["b", " "]}, r"the test split is empty \(2 pairs"),
            ({"test_en": b"gut\n\nsch\xf6n"}, r"test.en, line 3, byte 4: 0xf6 is not valid UTF-8"),
            ({"test_en": b"\xc3"}, r"test.en, line 1, byte 1: 0xc3 is not valid UTF-8"),
        ],
    )
    def test_bad_files(self, tmp_path, changes, message):
        with pytest.raises(DataError, match=message):
            load("small_de_en", write(tmp_path, **changes))
        assert not (tmp_path / corpus.CACHE).exists()

    def test_an_empty_sentence_drops_its_pair(self, tmp_path, caplog):
        changes = {"train_de": ["a", "", "b", "c", "d"], "train_en": ["A", "B", "C", " ", "D"]}
        for _ in range(2):  # read, and from the cache
            caplog.clear()
            data = load("small_de_en", write(tmp_path, **changes))
            assert (
                "dropped 2 of 5 train pairs, in which a sentence is empty; the first is line 2"
                in (caplog.text)
            )
            assert data.train.lines.tolist() == [0, 2, 4]
            assert data.train.dropped == 2
            sides = (data.source, data.train.source), (data.target, data.train.target)
            text = [[v.decode(side[i])[0] for i in range(3)] for v, side in sides]
            assert text == [["a", "b", "d"], ["A", "C", "D"]]

    def test_longer_than_the_model(self, tmp_path):
        changes = {"train_de": ["", "a", "a a a a", "b"], "train_en": ["a", "b", "c", "d d d d d"]}
        write(tmp_path, **changes)
        assert len(load("small_de_en", tmp_path, max_length=6).train) == 3
        message = r"1 target sentences of the train .* model's 5 words.* first is line 4, with 6"
        with pytest.raises(DataError, match=message):
            load("small_de_en", tmp_path, max_length=5)
        check_lengths(make_pairs([(5, 5)]), "train", 5)


class TestCache:
    @staticmethod
    def same(left, right) -> None:
        assert left.source == right.source
        assert left.target == right.target
        for split in SPLITS:
            a, b = getattr(left, split), getattr(right, split)
            for x, y in ((a.source, b.source), (a.target, b.target)):
                np.testing.assert_array_equal(x.words, y.words)
                np.testing.assert_array_equal(x.offsets, y.offsets)
                assert (x.words.dtype, x.offsets.dtype) == (y.words.dtype, y.offsets.dtype)
            np.testing.assert_array_equal(a.lines, b.lines)

    @staticmethod
    def reads(monkeypatch) -> list:
        """Return a list that grows with each text that is numbered."""
        seen, real = [], corpus.number

        def number(text, where):
            seen.append(where)
            return real(text, where)

        monkeypatch.setattr(corpus, "number", number)
        return seen

    def test_it_is_used(self, tmp_path, monkeypatch):
        reads = self.reads(monkeypatch)
        first = load("small_de_en", write(tmp_path))
        assert len(reads) == 1
        self.same(load("small_de_en", tmp_path), first)
        assert len(reads) == 1

    def test_it_belongs_to_the_content(self, tmp_path, monkeypatch):
        load("small_de_en", write(tmp_path))
        reads = self.reads(monkeypatch)
        data = load("small_de_en", write(tmp_path, test_de=["ja ja", "ein"]))
        assert len(reads) == 1
        assert data.source.decode(data.test.source[1]) == ["ein"]

    @pytest.mark.parametrize(
        "damage", ["flip", "cut", "remove", "replace", "json", "list", "field"]
    )
    def test_a_damaged_one_is_made_anew(self, tmp_path, monkeypatch, caplog, damage):
        first = load("small_de_en", write(tmp_path))
        (cache,) = (tmp_path / corpus.CACHE).iterdir()
        array, metadata = cache / "train.en.words.npy", cache / "metadata.json"
        content = array.read_bytes()
        if damage == "flip":
            array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif damage == "cut":
            array.write_bytes(content[:-1])
        elif damage == "remove":
            array.unlink()
        elif damage == "replace":
            (cache / "dict.de.txt").write_text("a\n")
        else:
            content = {"json": "{", "list": "[]", "field": '{"files": {}, "dropped": {}}'}[damage]
            metadata.write_text(content)
        reads = self.reads(monkeypatch)
        self.same(load("small_de_en", tmp_path), first)
        assert len(reads) == 1
        assert "the cache is damaged" in caplog.text
        caplog.clear()
        self.same(load("small_de_en", tmp_path), first)
        assert len(reads) == 1
        assert caplog.text == ""

    def test_an_interruption_leaves_none(self, tmp_path, monkeypatch):
        save, count = np.save, 0

        def dying(*arguments, **options):
            nonlocal count
            count += 1
            if count == 7:
                raise KeyboardInterrupt
            save(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(np, "save", dying)
            with pytest.raises(KeyboardInterrupt):
                load("small_de_en", write(tmp_path))
        assert list((tmp_path / corpus.CACHE).iterdir()) == []
        self.same(load("small_de_en", tmp_path), load("small_de_en", tmp_path))

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        # A file in the way refuses the superuser too, which permissions do not.
        write(tmp_path / "data")
        (tmp_path / "data" / corpus.CACHE).touch()
        reads = self.reads(monkeypatch)
        first = load("small_de_en", tmp_path / "data")
        assert "no cache can be written here" in caplog.text
        self.same(load("small_de_en", tmp_path / "data"), first)
        assert len(reads) == 1
        assert list((tmp_path / "temporary").glob("llqr_numeric_cache_*/*/metadata.json"))

    def test_nowhere_to_write(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        write(tmp_path / "data")
        first = load("small_de_en", tmp_path / "data", cache_dir=tmp_path / "file/cache")
        self.same(load("small_de_en", tmp_path / "data", cache_dir=tmp_path / "c"), first)
        assert not (tmp_path / "data" / corpus.CACHE).exists()
        assert list((tmp_path / "c").glob("*/metadata.json"))


LENGTHS = st.lists(st.tuples(st.integers(2, 70), st.integers(2, 70)), min_size=1, max_size=80)
BUCKETINGS = st.builds(
    Bucketing,
    max_tokens=st.integers(1, 400),
    percentiles=st.integers(1, 12),
    padding_factor=st.sampled_from([1, 3, 8]),
    left_pad_source=st.booleans(),
)


class TestBatching:
    @given(LENGTHS, BUCKETINGS)
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def test_properties(self, lengths, bucketing):
        pairs = make_pairs(lengths)
        buckets = Buckets(pairs, bucketing)
        widths = self.slow_boundaries(lengths, bucketing)
        assert boundaries(pairs, bucketing).tolist() == widths
        assert len(buckets.shapes) <= len(widths) <= 2 * bucketing.percentiles
        shapes = {(s.rows, s.source, s.target) for s in buckets.shapes}
        length = epoch_length(pairs, bucketing)
        assert isinstance(length, int)
        stream = take(2 * length, train_stream(pairs, bucketing, seed=3, num_threads=0))
        for epoch in (stream[:length], stream[length:]):
            found, seen = [], set()
            for batch in epoch:
                source, label = batch["source"], batch["label"]
                assert source.dtype == label.dtype == batch["target_in"].dtype == np.int32
                assert label.shape == batch["target_in"].shape
                seen.add((len(source), source.shape[1], label.shape[1]))
                members = ids(batch)
                assert 1 <= len(members) <= len(source)
                # No pair would fit into a narrower bucket, and the capacity is what fits.
                width = max(source.shape[1], label.shape[1])
                narrower = [w for w in widths if w < width]
                for i in members:
                    assert all(max(lengths[i]) > w for w in narrower)
                assert len(source) == max(1, bucketing.max_tokens // width)
                found += members
            assert sorted(found) == list(range(len(lengths)))
            assert seen == shapes

    @staticmethod
    def slow_boundaries(lengths, bucketing) -> list[int]:
        """By the definition: a percentile is the length at rank floor(p (n - 1)) of the sorted."""
        found = set()
        for side in zip(*lengths, strict=True):
            ordered = sorted(side)
            for j in range(1, bucketing.percentiles + 1):
                length = ordered[j * (len(side) - 1) // bucketing.percentiles]
                while length % bucketing.padding_factor:
                    length += 1
                found.add(length)
        return sorted(found)

    def test_a_batch(self):
        """Two pairs by hand, padded before the source and after the target."""
        pairs = Pairs(
            Sentences.of([[5, 6, EOS], [7, EOS]]),
            Sentences.of([[8, 9, EOS], [9, EOS]]),
            np.arange(2, dtype=np.int32),
        )
        bucketing = Bucketing(max_tokens=12, percentiles=1, padding_factor=4)
        (batch,) = take(1, train_stream(pairs, bucketing, seed=0, num_threads=0))
        assert batch["source"].tolist() == [[1, 1, 7, 2], [1, 5, 6, 2], [1, 1, 1, 1]]
        assert batch["target_in"].tolist() == [[2, 9, 1, 1], [2, 8, 9, 1], [1, 1, 1, 1]]
        assert batch["label"].tolist() == [[9, 2, -1, -1], [8, 9, 2, -1], [-1] * 4]
        right = Bucketing(max_tokens=12, percentiles=1, padding_factor=4, left_pad_source=False)
        (batch,) = take(1, train_stream(pairs, right, seed=0, num_threads=0))
        assert batch["source"].tolist() == [[7, 2, 1, 1], [5, 6, 2, 1], [1, 1, 1, 1]]

    def test_counted_labels_are_the_words(self):
        """What is not padding in an epoch's labels is every target word once."""
        lengths = random_lengths(300)
        pairs, bucketing = make_pairs(lengths), Bucketing(max_tokens=500)
        epoch = take(epoch_length(pairs, bucketing), train_stream(pairs, bucketing, seed=0))
        words = sum(int((batch["label"] != IGNORE).sum()) for batch in epoch)
        assert words == sum(target for _, target in lengths)
        places = sum(batch["label"].size + batch["source"].size for batch in epoch)
        total = sum(source + target for source, target in lengths)
        assert fill_rate(pairs, bucketing) == pytest.approx(total / places, rel=1e-12)
        for batch in epoch:
            np.testing.assert_array_equal(batch["target_in"] == PAD, batch["label"] == IGNORE)

    def test_defaults_bound_the_shapes(self):
        assert len(Buckets(make_pairs(random_lengths(5000)), Bucketing()).shapes) <= 16

    def test_the_seed_and_the_epoch_decide(self):
        pairs, bucketing = make_pairs(random_lengths(200)), Bucketing(max_tokens=200)
        length = epoch_length(pairs, bucketing)
        five = take(2 * length, train_stream(pairs, bucketing, seed=5))
        assert_same(five, take(2 * length, train_stream(pairs, bucketing, seed=5)))
        six = take(length, train_stream(pairs, bucketing, seed=6))
        epochs = [[tuple(sorted(ids(b))) for b in e] for e in (five[:length], five[length:], six)]
        for a, b in itertools.combinations(epochs, 2):
            assert a != b
            # Another composition, and not only another order.
            assert set(a) != set(b)

    def test_order_is_frozen(self):
        """A seed means the same data in every version: a change here breaks comparisons."""
        bucketing = Bucketing(max_tokens=16, percentiles=2, padding_factor=4)
        pairs = make_pairs([(3, 3)] * 6 + [(8, 8)] * 3 + [(2, 3)])
        batches = take(8, train_stream(pairs, bucketing, seed=0))
        assert [ids(batch) for batch in batches] == [
            [8, 7],
            [5, 2, 0],
            [6],
            [9, 4, 3, 1],
            [8, 7],
            [9, 2, 3, 4],
            [1, 0, 5],
            [6],
        ]

    def test_batches_are_in_random_order(self):
        """Over 300 epochs, each of three batches is first about 100 times."""
        pairs = make_pairs([(8, 8), (16, 16), (24, 24)])
        bucketing = Bucketing(max_tokens=1, percentiles=3)
        stream = take(900, train_stream(pairs, bucketing, seed=1, num_threads=0))
        first = collections.Counter(ids(batch)[0] for batch in stream[::3])
        assert all(abs(first[i] - 100) < 6 * np.sqrt(300 * 2 / 9) for i in range(3))

    @pytest.mark.parametrize("threads", [0, 2])
    def test_resume_from_any_batch(self, threads):
        pairs, bucketing = make_pairs(random_lengths(60)), Bucketing(max_tokens=200)
        options = {"seed": 1, "num_threads": threads, "prefetch": 4}
        states, expected = [], []
        with closing(train_stream(pairs, bucketing, **options)) as stream:
            for _ in range(3 * epoch_length(pairs, bucketing)):
                states.append(json.loads(json.dumps(stream.get_state())))
                expected.append(next(stream))
            stream.set_state(states[5])
            assert_same(expected[5:], [next(stream) for _ in expected[5:]])
        for k, state in enumerate(states):
            with closing(train_stream(pairs, bucketing, **options)) as fresh:
                fresh.set_state(state)
                assert fresh.get_state() == state
                assert_same(expected[k : k + 2], [next(fresh) for _ in expected[k : k + 2]])

    def test_threads_change_nothing_and_end(self):
        pairs, bucketing = make_pairs(random_lengths(300)), Bucketing(max_tokens=300)
        count = 2 * epoch_length(pairs, bucketing)
        alone = take(count, train_stream(pairs, bucketing, seed=2, num_threads=0))
        before = threading.active_count()
        for threads in (1, 4):
            stream = train_stream(pairs, bucketing, seed=2, num_threads=threads, prefetch=8)
            assert_same(alone, take(count, stream))
        deadline = time.monotonic() + 20
        while threading.active_count() > before:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_bad_arguments(self):
        pairs = make_pairs([(2, 2)])
        for name in ("max_tokens", "percentiles", "padding_factor"):
            with pytest.raises(ValueError, match=rf"{name} is 0, expected a whole number of 1"):
                Bucketing(**{name: 0})
            with pytest.raises(ValueError, match=rf"{name} is 2.5"):
                Bucketing(**{name: 2.5})
        with pytest.raises(ValueError, match=r"seed is -1"):
            train_stream(pairs, Bucketing(), seed=-1)
        for empty in (
            lambda: train_stream(make_pairs([]), Bucketing(), seed=0),
            lambda: refit_stream(make_pairs([]), Bucketing(), batch_size=1, seed=0),
            lambda: evaluation_batches(make_pairs([]), Bucketing(), batch_size=1),
        ):
            with pytest.raises(DataError, match=r"the split is empty"):
                empty()


class TestRefits:
    def test_one_shape_without_the_longest(self, caplog):
        lengths = [(length, 21 - length) for length in range(2, 20)] + [(100, 5), (5, 100)]
        pairs = make_pairs(lengths)
        bucketing = Bucketing(padding_factor=4)
        with caplog.at_level(logging.INFO):
            stream = refit_stream(pairs, bucketing, batch_size=7, seed=0, coverage=0.9)
        assert "refits use 90.00% of the training pairs, of 20 source and 20 target" in caplog.text
        batches = take(18, stream)
        assert {b["source"].shape for b in batches} == {(7, 20)}
        assert {b["label"].shape for b in batches} == {(7, 20)}
        found = [i for batch in batches for i in ids(batch)]
        # Full batches that straddle epochs of 18 pairs: 126 places are 7 epochs.
        assert [sorted(found[e * 18 : (e + 1) * 18]) for e in range(7)] == [list(range(18))] * 7

    def test_everything(self):
        pairs = make_pairs([*random_lengths(30), (300, 2)])
        stream = refit_stream(pairs, Bucketing(), batch_size=31, seed=0, coverage=1)
        (batch,) = take(1, stream)
        assert batch["source"].shape == (31, 304)
        assert sorted(ids(batch)) == list(range(31))

    def test_its_order_is_its_own(self):
        """Neither that of training with the same seed, nor that of refits with another."""
        pairs, bucketing = make_pairs([(5, 5)] * 50), Bucketing(max_tokens=80)
        (train,) = take(1, train_stream(pairs, bucketing, seed=4))
        options = {"batch_size": len(train["source"]), "coverage": 1.0}
        four, again, five = (
            take(3, refit_stream(pairs, bucketing, seed=s, **options)) for s in (4, 4, 5)
        )
        assert_same(four, again)
        assert ids(four[0]) != ids(train)
        assert ids(four[0]) != ids(five[0])

    def test_resume(self):
        pairs = make_pairs(random_lengths(40))
        with closing(refit_stream(pairs, Bucketing(), batch_size=6, seed=0)) as stream:
            for _ in range(9):
                next(stream)
            state = json.loads(json.dumps(stream.get_state()))
            expected = [next(stream) for _ in range(9)]
        with closing(
            refit_stream(pairs, Bucketing(), batch_size=6, seed=0, num_threads=2)
        ) as fresh:
            fresh.set_state(state)
            assert_same(expected, [next(fresh) for _ in range(9)])

    def test_bad_arguments(self):
        pairs = make_pairs([(2, 30), (30, 2)])
        for coverage in (0, 1.1, float("nan")):
            with pytest.raises(
                ValueError, match=r"coverage is .*, expected more than 0 and at most"
            ):
                refit_stream(pairs, Bucketing(), batch_size=1, seed=0, coverage=coverage)
        with pytest.raises(ValueError, match=r"batch_size is 0"):
            refit_stream(pairs, Bucketing(), batch_size=0, seed=0)
        with pytest.raises(DataError, match=r"none of 2 pairs has a source of 8 words or fewer"):
            refit_stream(pairs, Bucketing(), batch_size=1, seed=0, coverage=0.5)


class TestEvaluation:
    @pytest.mark.parametrize("batch_size", [1, 7, 128])
    def test_every_pair_once_and_where_it_stood(self, batch_size):
        pairs, bucketing = make_pairs(random_lengths(100)), Bucketing()
        batches = list(evaluation_batches(pairs, bucketing, batch_size=batch_size))
        assert len({(b["source"].shape, b["label"].shape) for b in batches}) <= 16
        restored = {}
        for batch in batches:
            assert len(batch["source"]) == len(batch["index"]) == batch_size
            assert batch["index"].dtype == np.int32
            for i, source, label in zip(
                batch["index"], batch["source"], batch["label"], strict=True
            ):
                if i < 0:
                    assert i == -1
                    assert (source == PAD).all()
                    assert (label == IGNORE).all()
                else:
                    assert i not in restored
                    restored[int(i)] = source[source != PAD], label[label != IGNORE]
        assert sorted(restored) == list(range(100))
        for i, (source, label) in restored.items():
            np.testing.assert_array_equal(source, pairs.source[i])
            np.testing.assert_array_equal(label, pairs.target[i])

    def test_bad_arguments_fail_before_the_first_batch(self):
        with pytest.raises(ValueError, match=r"batch_size is 0"):
            evaluation_batches(make_pairs([(2, 2)]), Bucketing(), batch_size=0)


class TestText:
    @pytest.mark.parametrize(
        ("words", "text"),
        [
            ("it &apos;s the be@@ st , isn &apos;t it ?", "it's the best, isn't it?"),
            ("( yes ) : 5 % &amp; more", "(yes): 5% & more"),
            ("cut sho@@", "cut sho"),
            ("", ""),
        ],
    )
    def test_detokenise(self, words, text):
        vocabulary = Vocabulary.of(collections.Counter(words.split()))
        numbers = [PAD, 0, *vocabulary.encode(words.split()), 4, EOS]
        assert detokenise(np.array(numbers), vocabulary) == text

    def test_spaces(self):
        vocabulary = Vocabulary.of({"a": 2, "b@@": 1, ".": 1})
        text = detokenise(vocabulary.encode(["b@@", "a", "."]), vocabulary, detokeniser="space")
        assert text == "ba ."
        with pytest.raises(ValueError, match=r"unknown detokeniser 'mosse': did you mean 'moses'"):
            detokenise([EOS], vocabulary, detokeniser="mosse")  # type: ignore[arg-type]

    def test_unknown_words_never_match(self):
        vocabulary = Vocabulary.of({"a": 1})
        hypothesis = detokenise([4, UNK, EOS], vocabulary)
        reference = detokenise([4, UNK, EOS], vocabulary, unknown=UNKNOWN_REFERENCE)
        assert (hypothesis, reference) == (f"a {UNKNOWN_HYPOTHESIS}", f"a {UNKNOWN_REFERENCE}")
        assert bleu([hypothesis], [reference]).counts[0] == 1

    def test_bleu_is_sacrebleu(self):
        hypotheses = ["the cat sat on the mat.", "there is a dog here, I think"]
        references = ["the cat is on the mat.", "there is a dog in here, I think"]
        ours, theirs = bleu(hypotheses, references), sacrebleu.corpus_bleu(hypotheses, [references])
        assert ours.score == theirs.score
        assert (ours.hypothesis_length, ours.reference_length) == (theirs.sys_len, theirs.ref_len)
        assert ours.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
        # Unigrams by hand: 6 of "the cat sat on the mat .", 8 of 8.
        assert ours.counts[0] == 14
        assert ours.totals == (15, 13, 11, 9)

    @pytest.mark.parametrize(("left", "right"), [([], []), (["a"], []), (["a"], ["a", "b"])])
    def test_bleu_of_no_pairs(self, left, right):
        with pytest.raises(
            ValueError, match=rf"{len(left)} hypotheses and {len(right)} references"
        ):
            bleu(left, right)


class TestNumberWords:
    @pytest.mark.parametrize(
        ("number", "german", "english"),
        [
            (0, "null", "zero"),
            (1, "eins", "one"),
            (7, "sieben", "seven"),
            (10, "zehn", "ten"),
            (11, "elf", "eleven"),
            (12, "zwölf", "twelve"),
            (16, "sechzehn", "sixteen"),
            (17, "siebzehn", "seventeen"),
            (20, "zwanzig", "twenty"),
            (21, "einundzwanzig", "twenty-one"),
            (30, "dreißig", "thirty"),
            (43, "dreiundvierzig", "forty-three"),
            (66, "sechsundsechzig", "sixty-six"),
            (77, "siebenundsiebzig", "seventy-seven"),
            (99, "neunundneunzig", "ninety-nine"),
            (100, "einhundert", "one hundred"),
            (101, "einhunderteins", "one hundred and one"),
            (112, "einhundertzwölf", "one hundred and twelve"),
            (500, "fünfhundert", "five hundred"),
            (999, "neunhundertneunundneunzig", "nine hundred and ninety-nine"),
            (1000, "eintausend", "one thousand"),
            (1001, "eintausendeins", "one thousand and one"),
            (1099, "eintausendneunundneunzig", "one thousand and ninety-nine"),
            (1100, "eintausendeinhundert", "one thousand one hundred"),
            (
                2345,
                "zweitausenddreihundertfünfundvierzig",
                "two thousand three hundred and forty-five",
            ),
            (21_000, "einundzwanzigtausend", "twenty-one thousand"),
            (101_000, "einhunderteintausend", "one hundred and one thousand"),
            (
                999_999,
                "neunhundertneunundneunzigtausendneunhundertneunundneunzig",
                "nine hundred and ninety-nine thousand nine hundred and ninety-nine",
            ),
        ],
    )
    def test_table(self, number, german, english):
        assert "".join(number_words.german(number)) == german
        assert " ".join(number_words.english(number)).replace(" - ", "-") == english

    def test_every_number_below_100_000_has_words_of_its_own(self):
        numbers = range(100_000)
        assert len({"".join(number_words.german(n)) for n in numbers}) == 100_000
        assert len({" ".join(number_words.english(n)) for n in numbers}) == 100_000

    @pytest.mark.parametrize("number", [-1, 1_000_000])
    def test_out_of_range(self, number):
        for words in (number_words.german, number_words.english):
            with pytest.raises(ValueError, match=rf"number is {number}, expected 0 to 999999"):
                words(number)

    def test_corpus(self):
        text = number_words.corpus()
        every = [line for split in SPLITS for line in text[split]["de"]]
        assert len(every) == len(set(every)) == 9000
        assert [len(text[split]["en"]) for split in SPLITS] == [8000, 500, 500]
        # The words of the two sides mean the same number.
        value = {}
        for n in range(1000):
            value["".join(number_words.german(n))] = n
            value[" ".join(number_words.english(n)).replace(" - ", "-")] = n

        def parse(text: str) -> int:
            head, mark, tail = text.partition("thousand" if "thousand" in text else "tausend")
            if not mark:
                return value[text]
            tail = tail.strip().removeprefix("and ")
            return 1000 * value.get(head.strip(), 1) + (value[tail] if tail else 0)

        for split in SPLITS:
            for german, english in zip(text[split]["de"], text[split]["en"], strict=True):
                joined = [side.replace("@@ ", "") for side in (german, english)]
                # Before "tausend", one is "ein".
                joined[0] = joined[0].replace("eintausend", "einstausend")
                assert parse(joined[0]) == parse(joined[1])

    def test_corpus_is_frozen(self):
        text = number_words.corpus()
        assert [text[split]["en"][0] for split in SPLITS] == [
            "six hundred and eighty@@ -@@ two",
            "ninety@@ -@@ three thousand one hundred and ninety@@ -@@ nine",
            "nine hundred and forty@@ -@@ three thousand three hundred and twenty@@ -@@ three",
        ]

    def test_loaded(self):
        data = load("numbers_de_en")
        i = int(np.argmax(data.test.source.lengths))
        german, english = (
            detokenise(side[i], vocabulary)
            for side, vocabulary in (
                (data.test.source, data.source),
                (data.test.target, data.target),
            )
        )
        assert " " not in german
        assert "hundred and " in english
        assert not any((getattr(data, split).source.words == UNK).any() for split in SPLITS)
        with pytest.raises(DataError, match=r"dataset.dataset_dir='x': number words are made"):
            load("numbers_de_en", "x")
