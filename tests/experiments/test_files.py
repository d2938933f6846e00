"""Files that are written whole or not at all."""

from pathlib import Path

import pytest

from llqr_experiments.files import replacing, sha256, write


def test_a_file_is_old_until_it_is_new(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with replacing(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was(tmp_path: Path, there: bool, error: type) -> None:
    target = tmp_path / "file"
    if there:
        target.write_bytes(b"old")

    def fail() -> None:
        with replacing(target) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"old"] if there else [])


def test_who_may_read_it_is_as_for_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write(tmp_path / "written", "x")
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "written")]
    assert modes[0] == modes[1]


def test_text_is_utf8_and_digests_are_the_standard_s(tmp_path: Path) -> None:
    write(tmp_path / "abc", "abc")
    # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    write(tmp_path / "abc", "ä\n")
    assert (tmp_path / "abc").read_bytes() == b"\xc3\xa4\n"
