"""Lines of any bytes: what counts as one, and what is said about those without a text."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import lines as module
from shoal.engine.errors import OperatingSystemError, ShoalError
from shoal.lines import Line, Lines, open_lines


def lines(data: bytes) -> Lines:
    return Lines(io.BytesIO(data), "test")


def texts(data: bytes) -> list[str]:
    return [line.text for line in lines(data).take(1000)]


def test_a_line_ends_with_lf_or_cr_lf_or_with_the_stream() -> None:
    assert texts(b"one\ntwo\r\nthree") == ["one", "two", "three"]
    assert texts("\ufeffone\n\ufefftwo\n".encode()) == ["one", "\ufefftwo"]
    # What other programs call the end of a line is text here.
    odd = "a\x0bb\x0cc\x1cd\x85e\u2028f\rg\x00h"
    assert texts(odd.encode()) == [odd]
    assert texts(b"") == []


def test_lines_without_a_text_say_why() -> None:
    assert lines(b"good\n\nb\xffd\n\r\n\xef\xbb\xbf").take(10) == [
        Line(1, "good"),
        Line(2, "", "the line is empty"),
        Line(3, "", "the line is not UTF-8: byte 1 is 0xff"),
        Line(4, "", "the line is empty"),
        Line(5, "\ufeff"),
    ]
    assert lines(b"\xed\xa0\x80").take(1)[0].error == "the line is not UTF-8: byte 0 is 0xed"  # a surrogate


def test_a_line_that_is_too_long_is_skipped_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 8)
    data = b"12345678\n123456789\n" + b"x" * 100 + b"\r\nshort\n" + b"y" * 17
    found = lines(data).take(10)
    assert [line.text for line in found] == ["12345678", "", "", "short", ""]
    assert [line.error is None for line in found] == [True, False, False, True, False]
    assert [line.number for line in found] == [1, 2, 3, 4, 5]


@given(st.binary(max_size=60), st.lists(st.integers(1, 4), min_size=60, max_size=60), st.integers(3, 9))
def test_batches_of_any_size_give_the_same_lines(data: bytes, sizes: list[int], longest: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LONGEST", longest)
        whole, parts = lines(data), lines(data)
        expected = whole.take(1000)
        found = [line for size in sizes for line in parts.take(size)]
        assert found == expected
        assert (parts.digest, parts.taken) == (whole.digest, whole.taken)
        assert lines(data).left() == len(expected)
    assert len(expected) == data.count(b"\n") + (not data.endswith(b"\n") and data != b"")


def test_the_digest_is_that_of_the_lines_and_not_of_their_ends() -> None:
    def digest(data: bytes) -> str:
        source = lines(data)
        source.take(100)
        return source.digest

    assert digest(b"one\ntwo") == digest(b"one\r\ntwo\n") == digest(b"\xef\xbb\xbfone\ntwo\r\n")
    different = [b"one\ntwo\n\n", b"onetwo\n", b"one\n\ntwo", b"one\n", b"one \ntwo\n", b"\none\ntwo\n"]
    assert len({digest(data) for data in [b"one\ntwo\n", *different]}) == 7


def test_what_is_left_of_a_file_and_of_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(b"one\ntwo\nthree")
    with open_lines(str(tmp_path / "some")) as some:
        assert some.left() == 3
        assert some.take(1) == [Line(1, "one")]
        assert some.left() == 2
        assert [line.text for line in some.take(5)] == ["two", "three"]
        assert some.left() == 0
    read, write = os.pipe()
    os.close(write)
    with open(read, "rb") as pipe:
        assert Lines(pipe, "pipe").left() is None


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OperatingSystemError, match="none: No such file"), open_lines(str(tmp_path / "none")):
        pass
    with pytest.raises(OperatingSystemError, match="Is a directory"), open_lines(str(tmp_path)):
        pass
    master, terminal = os.openpty()
    with open(terminal) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(ShoalError, match="give a FILE of them"), open_lines("-"):
            pass
    os.close(master)
