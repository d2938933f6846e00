"""Text for language models: tokenizers, the cache of tokens, windows, and the progress bar."""

import io
import itertools
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest

from llqr_experiments.data import (
    IGNORE,
    DataError,
    Windows,
    corpus,
    language,
    lines,
    text,
    token_cache,
    tokenization,
)
from llqr_experiments.data.tokenization import BytePairs, Characters
from tests.experiments.text_files import (
    PARTS,
    UNICODE,
    decoded,
    load,
    wikitext,
    write,
)

pytestmark = pytest.mark.usefixtures("empty_folder")


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
