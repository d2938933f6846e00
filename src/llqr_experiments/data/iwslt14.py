"""IWSLT'14 German-English, prepared as fairseq's recipe does it.

    python -m llqr_experiments.data.iwslt14 download --out data
    python -m llqr_experiments.data.iwslt14 prepare data/de-en.tgz --out FOLDER

  train, valid   train.tags.de-en.{de,en}: tags dropped, tokenised, cleaned, lowercased; every
                 23rd pair is valid, the others are train
  test           the segments of five development and test sets, tokenised and lowercased
  both           split into the sub-words of 10,000 merges learned on train

The archive is published without a checksum; `metadata.json` records the SHA-256 it had. The
tokeniser is sacremoses, a port of the Perl scripts that the recipe calls, so a few of the recipe's
160,239 + 7,283 training and validation pairs may differ. The test set has 6,750.

References:
  Cettolo et al. (2014), "Report on the 11th IWSLT evaluation campaign".
"""

import gzip
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from llqr_experiments.data.download import fetch
from llqr_experiments.data.translation.command import Command
from llqr_experiments.data.translation.files import (
    Stage,
    Track,
    read_lines,
    run_stages,
    untracked,
    write_lines,
)
from llqr_experiments.data.translation.recipe import (
    LANGUAGES,
    PRODUCTS,
    bpe_stages,
    clean,
    tokenizer,
    versions,
)
from llqr_experiments.errors import DataError
from llqr_experiments.files import sha256

URL = "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
FOLDER = "data/iwslt14.tokenized.de-en"
MERGES = 10_000
VALID_EVERY = 23

_TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
_TRAIN = {lang: f"train.tags.de-en.{lang}" for lang in LANGUAGES}
_TEST = {
    lang: tuple(f"IWSLT14.{name}.de-en.{lang}.xml" for name in _TEST_SETS) for lang in LANGUAGES
}
RAW = tuple(name for lang in LANGUAGES for name in (_TRAIN[lang], *_TEST[lang]))
"""The files of the archive that are read."""

_DROPPED = ("<url>", "<talkid>", "<keywords>")
_STRIPPED = re.compile(r"</?(?:title|description)>")
_SEGMENT = re.compile(r'<seg id="[0-9]*">\s*|\s*</seg>\s*')


def prepare(
    source: Path, out: Path, *, merges: int = MERGES, track: Track = untracked
) -> list[str]:
    """Prepare the corpus; a call after an interruption goes on where it stopped.

    Args:
      source: `de-en.tgz`, or a folder that has its files at any depth.
      out: where to; see `llqr_experiments.data.translation.recipe` for what it will hold.
      merges: byte pairs to merge.
      track: shows the progress.

    Returns:
      The names of the stages that were run: none if all was there.

    Raises:
      DataError: a file is missing, broken or not UTF-8, or the two languages do not match.
    """
    recipe = {
        "corpus": "iwslt14_de_en",
        "merges": merges,
        "inputs": _checksums(source),
        "packages": versions(),
    }
    stages = [Stage("extract", (), tuple(f"work/raw/{name}" for name in RAW), _extract(source))]
    for lang in LANGUAGES:
        stages += [
            Stage(
                f"tokenise-train-{lang}",
                (f"work/raw/{_TRAIN[lang]}",),
                (f"work/tokenised.{lang}",),
                _tokenise_train(lang),
            ),
            Stage(
                f"tokenise-test-{lang}",
                tuple(f"work/raw/{name}" for name in _TEST[lang]),
                (f"work/test.{lang}",),
                _tokenise_test(lang),
            ),
        ]
    both = [tuple(f"work/{name}.{lang}" for lang in LANGUAGES) for name in ("tokenised", "clean")]
    parts = tuple(f"work/{split}.{lang}" for split in ("train", "valid") for lang in LANGUAGES)
    stages += [Stage("clean", both[0], both[1], _clean), Stage("split", both[1], parts, _split)]
    return run_stages(out, [*stages, *bpe_stages(merges)], PRODUCTS, recipe, track)


def training_lines(lines: Iterable[str]) -> Iterator[str]:
    """Return the text of a `train.tags` file: some tagged lines go, of others only the tags.

    Example:
      >>> list(training_lines(["<url>http://x</url>", "<title>Hallo</title>", " Welt "]))
      ['Hallo', ' Welt ']
    """
    for line in lines:
        if not any(tag in line for tag in _DROPPED):
            yield _STRIPPED.sub("", line)


def segments(lines: Iterable[str]) -> Iterator[str]:
    """Return the sentences of a development or test set, with plain apostrophes.

    Example:
      >>> list(segments(["<doc>", '<seg id="1"> It\N{RIGHT SINGLE QUOTATION MARK}s on. </seg>']))
      ["It's on."]
    """
    for line in lines:
        if "<seg id" in line:
            yield _SEGMENT.sub("", line).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def _checksums(source: Path) -> dict[str, str]:
    """Return name -> SHA-256 of the archive, or of the files of a folder."""
    if source.is_dir():
        return {path.name: sha256(path) for path in _find(source)}
    try:
        return {source.name: sha256(source)}
    except OSError as error:
        raise DataError(
            f"{source.absolute()}: cannot be read ({error.strerror or error}), expected the "
            "archive de-en.tgz or a folder with its files. Get it with `python -m "
            f"llqr_experiments.data.iwslt14 download`, which fetches {URL}."
        ) from error


def _find(folder: Path) -> list[Path]:
    """Return the raw files below a folder."""
    found = {path.name: path for path in sorted(folder.rglob("*"), reverse=True) if path.is_file()}
    _check_names(folder, found)
    return [found[name] for name in RAW]


def _check_names(where: Path, found: Iterable[str]) -> None:
    missing = sorted(set(RAW) - set(found))
    if missing:
        raise DataError(
            f"{where}: lacks {', '.join(missing)}; expected the {len(RAW)} files of fairseq's "
            "de-en.tgz, at any depth."
        )


def _extract(source: Path):
    """Return the stage that copies the raw files out of an archive or a folder."""

    def run(inputs: Sequence[Path], outputs: Sequence[Path], track: Track) -> None:
        del inputs
        targets = dict(zip(RAW, outputs, strict=True))
        if source.is_dir():
            for path in track(_find(source), len(RAW), "copy"):
                shutil.copyfile(path, targets[path.name])
        else:
            _unpack(source, targets, track)
        _check_counts(targets)

    return run


def _unpack(source: Path, targets: Mapping[str, Path], track: Track) -> None:
    """Copy the files of an archive to their targets; whatever else is in it, nowhere."""
    try:
        # A browser may have uncompressed it and kept the suffix.
        with source.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        with (
            gzip.open(source) if compressed else source.open("rb") as stream,
            tarfile.open(fileobj=stream, mode="r:") as archive,
        ):
            for member in track(archive.getmembers(), len(archive.getmembers()), "unpack"):
                target = targets.get(Path(member.name).name)
                content = archive.extractfile(member) if target and member.isfile() else None
                if target and content:
                    with target.open("wb") as file:
                        shutil.copyfileobj(content, file)
            # The checksum stands after the end of the archive.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{source}: not a whole tar archive ({error}), expected fairseq's de-en.tgz. "
            "Delete the file and download it again."
        ) from error
    _check_names(source, [name for name, target in targets.items() if target.exists()])


def _check_counts(raw: Mapping[str, Path]) -> None:
    """Raise `DataError` if the languages of the training text or of a test set do not match."""
    found = {}
    for lang in LANGUAGES:
        text = training_lines(read_lines(raw[_TRAIN[lang]], _TRAIN[lang]))
        found["training text", lang] = sum(1 for _ in text)
        for name, file in zip(_TEST_SETS, _TEST[lang], strict=True):
            found[name, lang] = sum(1 for _ in segments(read_lines(raw[file], file)))
    for name in ("training text", *_TEST_SETS):
        german, english = (found[name, lang] for lang in LANGUAGES)
        if german != english:
            raise DataError(
                f"{name}: {german} sentences in German and {english} in English, expected as many: "
                "each is the translation of the other. Get the archive again."
            )


def _tokenise_train(language: str):
    def run(inputs: Sequence[Path], outputs: Sequence[Path], track: Track) -> None:
        lines = list(training_lines(read_lines(inputs[0])))
        tokenise = tokenizer(language)
        write_lines(outputs[0], map(tokenise, track(lines, len(lines), f"train {language}")))

    return run


def _tokenise_test(language: str):
    def run(inputs: Sequence[Path], outputs: Sequence[Path], track: Track) -> None:
        lines = [line for path in inputs for line in segments(read_lines(path))]
        tokenise = tokenizer(language)
        tracked = track(lines, len(lines), f"test {language}")
        write_lines(outputs[0], (tokenise(line).lower() for line in tracked))

    return run


def _clean(inputs: Sequence[Path], outputs: Sequence[Path], track: Track) -> None:
    sides = [read_lines(path) for path in inputs]
    pairs = list(clean(track(zip(*sides, strict=True), len(sides[0]), "clean")))
    for i, path in enumerate(outputs):
        write_lines(path, (pair[i].lower() for pair in pairs))


def _split(inputs: Sequence[Path], outputs: Sequence[Path], track: Track) -> None:
    for i, path in enumerate(inputs):
        lines = read_lines(path)
        # The recipe counts lines from 1.
        valid = [number % VALID_EVERY == 0 for number in range(1, len(lines) + 1)]
        kept = list(zip(lines, track(valid, len(lines), "split"), strict=True))
        write_lines(outputs[i], (line for line, held_out in kept if not held_out))
        write_lines(outputs[2 + i], (line for line, held_out in kept if held_out))


def download(folder: Path, console: Console) -> None:
    """Fetch the archive, and say what it is."""
    path = fetch(URL, folder, md5=None)
    if not tarfile.is_tarfile(path):
        path.unlink()
        raise DataError(
            f"{URL}: what was downloaded is no tar archive, and was deleted; a proxy may have "
            "answered instead of the mirror."
        )
    console.print(f"{path.absolute()}", soft_wrap=True)
    console.print(
        f"SHA-256 {sha256(path)}. No checksum is published to compare it with.", soft_wrap=True
    )


main = Command(
    "llqr_experiments.data.iwslt14",
    "Prepare the IWSLT'14 German-English corpus as fairseq's recipe does.",
    prepare,
    "archive or folder",
    FOLDER,
    MERGES,
    "tokenise, clean, split and encode",
    URL,
    download,
).main


if __name__ == "__main__":
    sys.exit(main())
