"""IWSLT'14 from its archive, and the small corpus from its packages: every stage, interruptions."""

import collections
import fcntl
import gzip
import io
import itertools
import json
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from llqr_experiments.data import iwslt14, small_translation, translation
from llqr_experiments.data.iwslt14 import prepare
from llqr_experiments.data.translation import files, recipe
from llqr_experiments.data.translation.text import join_subwords
from llqr_experiments.errors import DataError

MERGES = 60
PRODUCTS = recipe.PRODUCTS
SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")

# German, English, and what the recipe makes of them, or None where it drops the pair.
SPECIAL = [
    (
        "<title>Über die Äpfel</title>",
        "<title>About the apples</title>",
        ("über die äpfel", "about the apples"),
    ),
    (
        "<description>Er sagte: \N{LEFT DOUBLE QUOTATION MARK}Ja\N{RIGHT DOUBLE QUOTATION MARK}"
        "</description>",
        '<description>He said: "Yes".</description>',
        (
            "er sagte : \N{LEFT DOUBLE QUOTATION MARK} ja \N{RIGHT DOUBLE QUOTATION MARK}",
            "he said : &quot; yes &quot; .",
        ),
    ),
    ("Z. B. das.", "It's this.", ("z. b. das .", "it &apos;s this .")),
    # A separator that str.splitlines would take for the end of the line.
    ("Eins\N{LINE SEPARATOR}zwei.", "One two.", ("eins zwei .", "one two .")),
    ("Eins zwei drei vier", "One two", None),
    ("", "Nothing there.", None),
    ("wort " * 175, "word " * 175, ("wort " * 174 + "wort", "word " * 174 + "word")),
    ("wort " * 176, "word " * 176, None),
    ("Eins zwei drei", "One two", ("eins zwei drei", "one two")),
]
PLAIN = [
    (f"Das ist Satz Nummer {i} von hier.", f"This is line number {i} of it.") for i in range(80)
]


def expected() -> list[tuple[str, ...]]:
    """Return the clean training pairs: by hand for the special ones."""
    plain = [tuple(side.lower()[:-1] + " ." for side in pair) for pair in PLAIN]
    return [pair for *_, pair in SPECIAL if pair] + plain


def raw_files() -> dict[str, str]:
    """Return the twelve files of the archive."""
    made = {}
    for side, lang in enumerate(("de", "en")):
        lines = []
        for i, pair in enumerate([*SPECIAL, *PLAIN]):
            if i % 30 == 0:
                lines += [f"<url>http://{i}</url>", "<keywords>talks</keywords>"]
                lines += [f"<talkid>{i}</talkid>"] * (1 + side)  # dropped, so no matter how many
            lines.append(pair[side])
        made[f"train.tags.de-en.{lang}"] = "\n".join(lines) + "\n"
        for name in SETS:
            text = {"de": "Test \N{EN DASH} {}!", "en": "It\N{RIGHT SINGLE QUOTATION MARK}s {}!"}[
                lang
            ]
            made[f"IWSLT14.{name}.de-en.{lang}.xml"] = (
                '<?xml version="1.0" encoding="UTF-8"?>\n<refset><doc docid="1">\n'
                "<title>not used</title>\n"
                f'<seg id="1"> {text.format(name[-6:])} </seg>\n'
                '<seg id="2">zwei</seg>\n</doc></refset>\n'
            )
    return made


def archive(path: Path, content: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in content.items():
            body = text.encode() if isinstance(text, str) else text
            member = tarfile.TarInfo(f"de-en/{name}")
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return path


@pytest.fixture(scope="module")
def tgz(tmp_path_factory) -> Path:
    return archive(tmp_path_factory.mktemp("archive") / "de-en.tgz", raw_files())


@pytest.fixture(scope="module")
def prepared(tgz, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    prepare(tgz, out, merges=MERGES)
    return out


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").removesuffix("\n").split("\n")


def products(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PRODUCTS if (folder / name).exists()}


def slow_merges(text: list[str], count: int) -> list[tuple[str, str]]:
    """Return byte pairs by the definition: count all, merge the commonest, begin again."""
    words = collections.Counter(word for line in text for word in line.split(" "))
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(split[word], split[word][1:], strict=False):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        split = {word: slow_merge(symbols, best) for word, symbols in split.items()}
    return merges


def slow_merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    result = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def slow_segment(line: str, merges: list[tuple[str, str]]) -> str:
    parts = []
    for word in line.split(" "):
        symbols = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            symbols = slow_merge(symbols, pair)
        parts += [s + "@@" for s in symbols[:-1]] + [symbols[-1].removesuffix("</w>")]
    return " ".join(parts)


class TestRecipe:
    def test_training_pairs(self, prepared):
        pairs = list(
            zip(lines(prepared / "work/clean.de"), lines(prepared / "work/clean.en"), strict=True)
        )
        assert pairs == expected()

    def test_every_23rd_pair_is_valid(self, prepared):
        for side, lang in enumerate(("de", "en")):
            clean = [pair[side] for pair in expected()]
            assert lines(prepared / f"work/valid.{lang}") == clean[22::23]
            del clean[22::23]
            assert lines(prepared / f"work/train.{lang}") == clean

    def test_test_is_five_sets_in_order(self, prepared):
        german = [[f"test \N{EN DASH} {name[-6:].lower()} !", "zwei"] for name in SETS]
        english = [[f"it &apos;s {name[-6:].lower()} !", "zwei"] for name in SETS]
        assert lines(prepared / "work/test.de") == list(itertools.chain(*german))
        assert lines(prepared / "work/test.en") == list(itertools.chain(*english))

    def test_byte_pairs(self, prepared):
        """Learned on train of both languages, applied to everything."""
        train = lines(prepared / "work/train.de") + lines(prepared / "work/train.en")
        merges = slow_merges(train, MERGES)
        assert lines(prepared / "code") == ["#version: 0.2", *map(" ".join, merges)]
        assert len(merges) == MERGES
        for name in PRODUCTS[1:]:
            before = lines(prepared / "work" / name)
            assert lines(prepared / name) == [slow_segment(line, merges) for line in before]
            assert [join_subwords(line.split(" ")) for line in lines(prepared / name)] == before

    def test_merges_run_out(self):
        code = recipe.learn_bpe(["ab ab", "cd"], 50, files.untracked)
        assert code == ["#version: 0.2", "a b</w>"]
        with pytest.raises(DataError, match=r"none of 2 sentences has a word of two letters"):
            recipe.learn_bpe(["a b", ""], 50, files.untracked)

    def test_a_folder_does_as_well(self, prepared, tmp_path):
        (tmp_path / "in/deep").mkdir(parents=True)
        for name, text in raw_files().items():
            (tmp_path / "in/deep" / name).write_text(text, "utf-8")
        prepare(tmp_path / "in", tmp_path / "out", merges=MERGES)
        assert products(tmp_path / "out") == products(prepared)

    def test_metadata_has_the_checksums(self, tgz, prepared):
        metadata = json.loads((prepared / files.METADATA).read_text())
        assert metadata["recipe"]["inputs"] == {"de-en.tgz": files.sha256(tgz)}
        assert metadata["stages"]["learn"] == {"code": files.sha256(prepared / "code")}
        assert metadata["complete"] is True

    def test_the_reader_takes_it(self, prepared, tmp_path):
        data = translation.load("iwslt14_de_en", prepared, cache_dir=tmp_path)
        assert len(data.train) + len(data.valid) == len(expected())
        text = translation.detokenise(data.train.target[0], data.target)
        assert text == "about the apples"


class Killed(BaseException):
    """What a kill looks like to a test: nothing catches it."""


class Bomb:
    """A `Track` that raises in the middle of its call number `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, items, total, description):
        self.calls += 1
        return self._explode(items, total) if self.calls - 1 == self.at else items

    @staticmethod
    def _explode(items, total):
        for i, item in enumerate(items):
            if i == total // 2:
                raise Killed
            yield item


@pytest.fixture(scope="module")
def bombs(tgz, tmp_path_factory) -> int:
    """Return how many times a full preparation calls `track`."""
    bomb = Bomb()
    prepare(tgz, tmp_path_factory.mktemp("bombs"), merges=MERGES, track=bomb)
    return bomb.calls


class TestInterruption:
    def check(self, tgz, out, prepared):
        """Nothing half or mixed is taken for whole, and nothing is done twice."""
        reference = products(prepared)
        found = products(out)
        assert found == {name: reference[name] for name in found}
        done = json.loads((out / files.METADATA).read_text())["stages"]
        if len(found) == len(PRODUCTS):
            with pytest.raises(DataError, match=r"its preparation was interrupted"):
                translation.load("iwslt14_de_en", out)
        ran = prepare(tgz, out, merges=MERGES)
        assert ran
        assert not set(ran) & set(done)
        assert products(out) == reference
        assert not list(out.glob(".partial-*"))
        assert prepare(tgz, out, merges=MERGES) == []

    def test_in_the_middle_of_every_stage(self, tgz, prepared, bombs, tmp_path):
        stages = set()
        for at in range(bombs):
            out = tmp_path / str(at)
            with pytest.raises(Killed):
                prepare(tgz, out, merges=MERGES, track=Bomb(at))
            stages.add(len(json.loads((out / files.METADATA).read_text())["stages"]))
            self.check(tgz, out, prepared)
        # One stage more was done each time: all 11 were interrupted.
        assert stages == set(range(11))

    def test_before_every_record(self, tgz, prepared, tmp_path, monkeypatch):
        """The files of a stage are in place, and `metadata.json` does not know."""
        write, count = files.write_json, 0

        def dying(path, value):
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            write(path, value)

        # The first says that the folder is incomplete, the last that it is complete.
        for at in range(2, 14):
            out, count = tmp_path / str(at), 0
            with monkeypatch.context() as patch:
                patch.setattr(files, "write_json", dying)
                with pytest.raises(Killed):
                    prepare(tgz, out, merges=MERGES)
            if at < 13:
                self.check(tgz, out, prepared)
            else:
                with pytest.raises(DataError, match=r"its preparation was interrupted"):
                    translation.load("iwslt14_de_en", out)
                assert prepare(tgz, out, merges=MERGES) == []
                assert translation.load("iwslt14_de_en", out).name == "iwslt14_de_en"

    def test_a_temporary_folder_that_was_left_goes(self, tgz, prepared, tmp_path):
        (tmp_path / ".partial-x").mkdir()
        (tmp_path / ".partial-x/0").write_text("half")
        prepare(tgz, tmp_path, merges=MERGES)
        assert not (tmp_path / ".partial-x").exists()

    @pytest.mark.parametrize("damage", ["cut", "gone"])
    def test_a_damaged_product_is_made_again(self, tgz, prepared, tmp_path, damage):
        prepare(tgz, tmp_path, merges=MERGES)
        path = tmp_path / "valid.en"
        path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-1])
        assert prepare(tgz, tmp_path, merges=MERGES) == ["apply-valid"]
        assert products(tmp_path) == products(prepared)

    def test_work_may_be_deleted(self, tgz, prepared, tmp_path):
        prepare(tgz, tmp_path, merges=MERGES)
        for path in (tmp_path / "work").rglob("*"):
            if path.is_file():
                path.unlink()
        assert prepare(tgz, tmp_path, merges=MERGES) == []
        (tmp_path / "test.de").unlink()
        assert "apply-train" not in prepare(tgz, tmp_path, merges=MERGES)
        assert products(tmp_path) == products(prepared)

    def test_another_recipe_begins_again(self, tgz, prepared, tmp_path):
        prepare(tgz, tmp_path, merges=MERGES - 10)
        assert products(tmp_path)["code"] != products(prepared)["code"]
        with pytest.raises(Killed):
            prepare(tgz, tmp_path, merges=MERGES, track=Bomb(0))
        with pytest.raises(DataError, match=r"its preparation was interrupted"):
            translation.load("iwslt14_de_en", tmp_path)
        prepare(tgz, tmp_path, merges=MERGES)
        assert products(tmp_path) == products(prepared)

    @pytest.mark.parametrize("content", ["", "[]", '{"format": 0}', '{"format": 1'])
    def test_metadata_of_no_use(self, tgz, prepared, tmp_path, content):
        (tmp_path / files.METADATA).write_text(content)
        prepare(tgz, tmp_path, merges=MERGES)
        assert products(tmp_path) == products(prepared)

    def test_two_at_once(self, tgz, tmp_path):
        with (tmp_path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(DataError, match=r"another process prepares data in this folder"):
                prepare(tgz, tmp_path, merges=MERGES)


class TestBadInput:
    def refuse(self, source, out, message):
        with pytest.raises(DataError, match=message):
            prepare(source, out, merges=MERGES)
        assert products(out) == {}

    def test_no_archive(self, tmp_path):
        message = r"nowhere.tgz: cannot be read \(No such file .*iwslt14 download"
        self.refuse(tmp_path / "nowhere.tgz", tmp_path / "out", message)

    def test_no_tar(self, tmp_path):
        (tmp_path / "a.tgz").write_text("<!DOCTYPE html>")
        message = r"a.tgz: not a whole tar archive .*download it again"
        self.refuse(tmp_path / "a.tgz", tmp_path / "out", message)

    # The members are small, so half of the bytes are in the headers' and half in the texts' part.
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
    def test_truncated(self, tgz, tmp_path, share):
        content = tgz.read_bytes()
        (tmp_path / "a.tgz").write_bytes(content[: int(share * len(content))])
        self.refuse(tmp_path / "a.tgz", tmp_path / "out", r"a.tgz: not a whole tar archive")

    def test_checksum_of_gzip(self, tgz, tmp_path):
        content = gzip.decompress(tgz.read_bytes())
        packed = bytearray(gzip.compress(content, compresslevel=0))
        packed[1500] ^= 1
        (tmp_path / "a.tgz").write_bytes(packed)
        self.refuse(tmp_path / "a.tgz", tmp_path / "out", r"a.tgz: not a whole tar archive")

    def test_a_member_is_missing(self, tmp_path):
        content = raw_files()
        del content["IWSLT14.TED.tst2011.de-en.en.xml"]
        path = archive(tmp_path / "a.tgz", content)
        self.refuse(path, tmp_path / "out", r"a.tgz: lacks IWSLT14.TED.tst2011.de-en.en.xml; expec")
        (tmp_path / "empty").mkdir()
        self.refuse(tmp_path / "empty", tmp_path / "out", r"empty: lacks .*train.tags.de-en.de")

    def test_unequal_training_text(self, tmp_path):
        content = raw_files()
        content["train.tags.de-en.en"] += "One more.\n"
        path = archive(tmp_path / "a.tgz", content)
        message = r"training text: 89 sentences in German and 90 in English"
        self.refuse(path, tmp_path / "out", message)

    def test_unequal_test_set(self, tmp_path):
        content = raw_files()
        name = "IWSLT14.TEDX.dev2012.de-en.de.xml"
        content[name] = content[name].replace('<seg id="2">zwei</seg>', "")
        path = archive(tmp_path / "a.tgz", content)
        self.refuse(path, tmp_path / "out", r"TEDX.dev2012: 1 sentences in German and 2 in Eng")

    def test_not_utf8(self, tmp_path):
        content: dict[str, str | bytes] = dict(raw_files())
        content["train.tags.de-en.de"] = b"gut\nsch\xf6n\n"
        path = archive(tmp_path / "a.tgz", content)
        message = r"train.tags.de-en.de, line 2, byte 4: 0xf6 is not valid UTF-8"
        self.refuse(path, tmp_path / "out", message)

    def test_folder_that_cannot_be_made(self, tgz, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=r"cannot be written .*--out"):
            prepare(tgz, tmp_path / "file/out", merges=MERGES)


class TestCommandLine:
    def test_prepare(self, tgz, prepared, tmp_path, capsys):
        arguments = ["prepare", str(tgz), "--out", str(tmp_path / "out"), "--merges", str(MERGES)]
        assert iwslt14.main(arguments) == 0
        assert f"code: {MERGES} merges" in capsys.readouterr().out
        assert products(tmp_path / "out") == products(prepared)
        assert iwslt14.main(arguments) == 0
        assert "nothing to do: every file is whole" in capsys.readouterr().out

    def test_an_error_is_a_message(self, tmp_path, capsys):
        assert iwslt14.main(["prepare", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
        assert "Error: " in capsys.readouterr().err
        with pytest.raises(SystemExit):
            iwslt14.main(["prepare", str(tmp_path), "--merges", "0"])
        assert "0 is below 1" in capsys.readouterr().err

    def test_an_interruption_says_how_to_go_on(self, tgz, tmp_path, capsys, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(iwslt14, "run_stages", interrupt)
        assert iwslt14.main(["prepare", str(tgz), "--out", str(tmp_path)]) == 130
        assert "goes on where it stopped" in capsys.readouterr().err

    def test_download(self, tgz, tmp_path, capsys, monkeypatch):
        body = tgz.read_bytes()
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(body))
        assert iwslt14.main(["download", "--out", str(tmp_path)]) == 0
        assert (tmp_path / "de-en.tgz").read_bytes() == body
        assert f"SHA-256 {files.sha256(tgz)}. No checksum is" in capsys.readouterr().out

    def test_download_of_something_else(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>"))
        assert iwslt14.main(["download", "--out", str(tmp_path)]) == 2
        assert "is no tar archive, and was deleted" in capsys.readouterr().err
        assert not (tmp_path / "de-en.tgz").exists()

    def test_download_without_network(self, tmp_path, capsys, monkeypatch):
        def refuse(url, timeout):
            raise urllib.error.URLError("no network here")

        monkeypatch.setattr(urllib.request, "urlopen", refuse)
        assert iwslt14.main(["download", "--out", str(tmp_path)]) == 2
        assert "download failed" in capsys.readouterr().err


def help_pages(root: Path) -> Path:
    """Write help pages as LibreOffice's packages have them, 60 of them."""
    for folder, hello, words in (("de", "Seite", "Satz"), ("en-US", "Page", "Line")):
        for i in range(60):
            path = root / f"usr/share/libreoffice/help/{folder}/text/shared/{i % 3}/p{i}.html"
            path.parent.mkdir(parents=True, exist_ok=True)
            body = [
                f'<h1 id="hd_1" dir="auto">{hello} {i}</h1>',
                '<p id="par_1" class="paragraph">'
                f"Ein <b>{words}</b> {i} so.<br>{words} {i} &amp; mehr.</p>",
                '<p id="par_2" class="code">Print 1 + 2</p>',
                f'<p id="par_3" class="paragraph">{words} mit Ende. Und wieder.</p>',
                f'<p class="paragraph">{words} ohne Nummer</p>',
                f'<p id="par_{folder}" class="paragraph">{words} nur hier</p>',
                '<p id="par_4" class="paragraph">OK so</p>',
            ]
            path.write_text("<html><body>" + "\n".join(body) + "</body></html>", "utf-8")
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small")
    small_translation.prepare(help_pages(out / "in"), out / "out", merges=30)
    return out


class TestSmallCorpus:
    def test_pairs(self, small):
        found = {}
        for split in recipe.SPLITS:
            sides = [lines(small / f"out/work/{split}.{lang}") for lang in ("de", "en")]
            found |= dict.fromkeys(zip(*sides, strict=True), split)
        wanted = [("satz mit ende .", "line mit ende .")]
        for i in range(60):
            wanted.append((f"seite {i}", f"page {i}"))
            wanted.append((f"ein satz {i} so .", f"ein line {i} so ."))
            wanted.append((f"satz {i} &amp; mehr .", f"line {i} &amp; mehr ."))
        assert sorted(found) == sorted(wanted)
        # Whole pages are held out.
        for i in range(60):
            split = small_translation.split_of(f"text/shared/{i % 3}/p{i}.html")
            assert (
                found[f"seite {i}", f"page {i}"]
                == found[f"ein satz {i} so .", f"ein line {i} so ."]
            )
            assert found[f"seite {i}", f"page {i}"] == split
        assert set(found.values()) == set(recipe.SPLITS)

    def test_nothing_to_do(self, small):
        assert small_translation.prepare(small / "in", small / "out", merges=30) == []

    def test_a_changed_page_is_noticed(self, small, tmp_path):
        root = help_pages(tmp_path / "in")
        small_translation.prepare(root, tmp_path / "out", merges=30)
        path = root / "usr/share/libreoffice/help/de/text/shared/0/p0.html"
        path.write_text(path.read_text().replace("Seite", "Blatt"))
        assert "extract" in small_translation.prepare(root, tmp_path / "out", merges=30)
        assert "blatt 0" in (tmp_path / "out/work/train.de").read_text()

    def test_command_line(self, small, tmp_path, capsys):
        arguments = ["prepare", str(small / "in"), "--out", str(tmp_path / "out"), "--merges", "30"]
        assert small_translation.main(arguments) == 0
        assert products(tmp_path / "out") == products(small / "out")
        (tmp_path / "empty").mkdir()
        assert small_translation.main(["prepare", str(tmp_path / "empty")]) == 2
        assert "apt-get download libreoffice-help-de" in capsys.readouterr().err

    def test_a_pair_whose_side_is_known_is_dropped(self, tmp_path):
        texts = [
            ("p1", "ja gut", "yes good"),
            ("p2", "ja gut", "yes fine"),
            ("p3", "na gut", "yes fine"),
        ]
        texts += [("p4", "nein danke", "no thanks")]
        paths = [tmp_path / str(i) for i in range(9)]
        for path, column in zip(paths, zip(*texts, strict=True), strict=False):
            files.write_lines(path, column)
        small_translation._clean(paths[:3], paths[3:], files.untracked)
        german = itertools.chain(*(files.read_lines(path) for path in paths[3::2]))
        assert sorted(german) == ["ja gut", "nein danke"]
