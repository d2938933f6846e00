r"""Lines of text from files, archives and memory, a few at a time.

A line ends behind its "\n", which belongs to it; everything else, "\r" too, is as in the file. A
line longer than `LONGEST` is cut there, so that a text without lines fits in memory as well.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import io
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llqr_experiments.errors import DataError

LONGEST = 1 << 16
"""Most bytes of a line in a file, most characters of one in memory."""

_GROUP = 1 << 20


@dataclasses.dataclass(frozen=True)
class Lines:
    """A text that can be read any number of times.

    Attributes:
      size: bytes in UTF-8, for progress.
      digest: names the content: another content has another one.
      read: returns an iterator of the lines from the first on. It raises `DataError` at what
        cannot be read.
    """

    size: int
    digest: str
    read: Callable[[], Iterator[str]]

    def groups(self) -> Iterator[list[str]]:
        """Return the lines in groups of about a megabyte."""
        group, size = [], 0
        for line in self.read():
            group.append(line)
            size += len(line)
            if size >= _GROUP:
                yield group
                group, size = [], 0
        if group:
            yield group


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file, or a member of a zip archive."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path.absolute()) + (f", {self.member}" if self.member else "")

    @contextlib.contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """Open it to read bytes.

        Raises:
          DataError: it cannot be opened, or what the `with` statement reads is unreadable.
        """
        try:
            if self.member is None:
                with self.path.open("rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
                    # Its own `readline` is slow.
                    yield io.BufferedReader(member)  # type: ignore[arg-type]
        except (OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(
                f"{self}: cannot be read ({error}). Check the path and its permissions, or get "
                "the file again."
            ) from error

    def size(self) -> int:
        """Return its number of bytes, uncompressed."""
        if self.member is None:
            with self.open() as file:
                return file.seek(0, io.SEEK_END)
        with TextFile(self.path).open(), zipfile.ZipFile(self.path) as archive:
            return archive.getinfo(self.member).file_size

    def digest(self) -> str:
        """Return what names its content: for a member, that of the archive and its name."""
        with TextFile(self.path).open() as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return found if self.member is None else f"{found} {self.member}"


@dataclasses.dataclass(frozen=True)
class _Span:
    """Bytes start .. stop - 1 of a file."""

    file: TextFile
    start: int
    stop: int


def of_file(file: TextFile) -> Lines:
    """Return the lines of a file or a member of an archive.

    Raises:
      DataError: it cannot be read.
    """
    size = file.size()
    return Lines(size, file.digest(), lambda: _read([_Span(file, 0, size)]))


def of_files(files: Sequence[Path], shares: Sequence[float]) -> list[Lines]:
    """Return the lines of all files one after the other, cut into parts.

    Where a file ends in the middle of a line, the next one starts a new line. A part starts at the
    first line behind its share of the bytes, and in a file without lines at the first character.

    Args:
      files: at least one.
      shares: of each part, with the sum 1.

    Raises:
      DataError: a file cannot be read.
    """
    texts = [TextFile(path) for path in files]
    sizes = [text.size() for text in texts]
    total, contents = sum(sizes), " ".join(text.digest() for text in texts)
    cuts, share = [0], 0.0
    for part in shares[:-1]:
        share += part
        cuts.append(max(cuts[-1], _line_start(texts, sizes, round(share * total))))
    cuts.append(total)
    return [
        Lines(
            stop - start,
            hashlib.sha256(f"{contents} {start} {stop}".encode()).hexdigest(),
            lambda start=start, stop=stop: _read(_spans(texts, sizes, start, stop)),
        )
        for start, stop in itertools.pairwise(cuts)
    ]


def of_text(text: str) -> Lines:
    """Return the lines of a text in memory."""
    text = text.removeprefix("\ufeff")
    content = text.encode()
    return Lines(len(content), hashlib.sha256(content).hexdigest(), lambda: split(text))


def split(text: str) -> Iterator[str]:
    r"""Return the lines of a text; only "\n" ends one.

    Example:
      >>> list(split("one\r\n\x0btwo"))
      ['one\r\n', '\x0btwo']
    """
    start = 0
    while start < len(text):
        end = text.find("\n", start, start + LONGEST)
        stop = start + LONGEST if end < 0 else end + 1
        yield text[start:stop]
        start = stop


def _spans(texts: list[TextFile], sizes: list[int], start: int, stop: int) -> list[_Span]:
    """Return bytes start .. stop - 1 of the files one after the other."""
    spans, before = [], 0
    for text, size in zip(texts, sizes, strict=True):
        first, last = max(start - before, 0), min(stop - before, size)
        if first < last:
            spans.append(_Span(text, first, last))
        before += size
    return spans


def _line_start(texts: list[TextFile], sizes: list[int], position: int) -> int:
    """Return the first start of a line from a position on, of a character if there is none."""
    before = 0
    for text, size in zip(texts, sizes, strict=True):
        if before < position < before + size:
            with text.open() as file:
                file.seek(position - before - 1)  # a line that starts here has its "\n" before
                rest = file.readline(LONGEST)
                end = position - 1 + len(rest)
                ended = rest.endswith(b"\n") or end == before + size
                if ended and end < sum(sizes):
                    return end
                file.seek(position - before)
                # Bytes 10xxxxxx go on with a character: at most three, or to the end of the file.
                tail = file.read(3)
                starts = (i for i, byte in enumerate(tail) if byte & 0xC0 != 0x80)
                return position + next(starts, len(tail))
        before += size
    return position


def _read(spans: Sequence[_Span]) -> Iterator[str]:
    """Return the lines of spans; each span starts a line."""
    line = ""
    for span in spans:
        if line and not line.endswith("\n"):
            yield "\n"
        for line in _read_span(span):
            yield line


def _read_span(span: _Span) -> Iterator[str]:
    """Return the lines of a span.

    Raises:
      DataError: a byte is not UTF-8, or the file is shorter than it was.
    """
    # It keeps the bytes of a character that a cut goes through.
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = span.start
    with span.file.open() as file:
        file.seek(position)
        while position < span.stop:
            content = file.readline(min(LONGEST, span.stop - position))
            first = position - len(decoder.getstate()[0])
            position += len(content)
            if first == 0 and content.startswith(codecs.BOM_UTF8):  # says UTF-8, and is no text
                content, first = content[3:], 3
            if not content:
                raise DataError(f"{span.file}: ends at byte {position}, and changed while read.")
            try:
                line = decoder.decode(content, final=position == span.stop)
            except UnicodeDecodeError as error:
                bad = error.object[error.start]
                raise DataError(
                    f"{span.file}: not UTF-8 at byte {first + error.start} (0x{bad:02x}, "
                    f"{error.reason}). Convert the file to UTF-8."
                ) from error
            if line:
                yield line
