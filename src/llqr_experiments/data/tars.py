"""What lies where in an uncompressed tar archive, and whether the archive is whole."""

import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from llqr_experiments.errors import DataError

_END = bytes(1024)


class Member(NamedTuple):
    """A file in an archive: its name, where its bytes start, and how many there are."""

    name: str
    offset: int
    size: int


def members(
    file: IO[bytes], where: str, start: int = 0, stop: int | None = None
) -> Iterator[Member]:
    """Yield the files of an archive; only headers are read.

    Args:
      file: holds the archive.
      where: it is, for messages.
      start: first byte of the archive in `file`.
      stop: the byte after its last; None: the end of the file.

    Yields:
      Its regular files in order, with offsets into `file`.

    Raises:
      DataError: the archive is compressed, broken, or ends before it should.
    """
    if stop is None:
        stop = file.seek(0, 2)
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > stop:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isreg():
                    yield Member(member.name, member.offset_data, member.size)
            # tarfile takes a broken header, and the end of a truncated file, for the end of the
            # archive; what marks the end are two blocks of zeros.
            file.seek(tar.offset)
            if file.read(min(len(_END), max(0, stop - tar.offset))) != _END:
                raise tarfile.ReadError(f"no end of archive at byte {tar.offset - start}")
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{where}: not a whole, uncompressed tar archive ({error}). A download or a copy may "
            "have been cut: get the file again."
        ) from error
