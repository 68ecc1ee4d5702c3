"""Standard streams that are closed, full, or in an encoding that lacks a character."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.patience import LIMIT
from tests.system.conftest import environment, shell

from shoal.streams import read_text, standard_streams

NO_SPACE = b"shoal: error: standard output: No space left on device: send the output elsewhere\n"
CLOSED = b"shoal: error: standard output: it is closed: send the output elsewhere\n"
NO_INPUT = b"shoal: error: standard input: Bad file descriptor: give the input as an argument\n"
NO_PROMPT = b"shoal: error: there is no prompt: give one as an argument, or on standard input\n"
RUN = "$S run tiny hi -n 2 --raw"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("line", "unbuffered", "code", "errors"),
    [
        ("$S ls >/dev/full", "", 16, NO_SPACE),
        ("$S ls >/dev/full", "1", 16, NO_SPACE),
        ("$S --help >/dev/full", "", 16, NO_SPACE),
        ("$S ls --help >/dev/full", "1", 16, NO_SPACE),
        (f"{RUN} >/dev/full", "", 16, NO_SPACE),
        ("$S ls >&-", "", 16, CLOSED),
        (f"{RUN} >&-", "", 16, CLOSED),
        ("$S --version >&-", "", 16, CLOSED),
        ("$S ls </dev/null >&- 2>&-", "", 16, b""),
        ("$S run tiny <&-", "", 1, NO_PROMPT),
        ("$S run tiny 0>/dev/null", "", 16, NO_INPUT),
        ("$S pull nothing 2>/dev/full", "", 11, b""),
        ("$S pull nothing 2>/dev/full", "1", 11, b""),
        ("$S pull nothing 2>&-", "", 11, b""),
        ("$S fly 2>/dev/full", "", 2, b""),
        ("$S ls | true", "", 0, b""),
    ],
)
def test_no_traceback_and_the_right_code(
    line: str, unbuffered: str, code: int, errors: bytes, cache_home: Path
) -> None:
    done = shell(line, XDG_CACHE_HOME=str(cache_home), PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr, done.stdout) == (code, errors, b"")


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-", "<&-", "<&- 2>&-"])
def test_an_answer_needs_neither_messages_nor_input(redirect: str, cache_home: Path) -> None:
    said = [
        shell(f"{RUN} --stats {how}", XDG_CACHE_HOME=str(cache_home)) for how in ("2>/dev/null", redirect)
    ]
    assert [done.returncode for done in said] == [0, 0]
    assert said[0].stdout == said[1].stdout != b""
    assert shell("$S verify tiny", XDG_CACHE_HOME=str(cache_home)).returncode == 0  # no file was written to


PRINTING = """
import sys
from shoal.cli import main
from shoal.commands import ls
ls.run = lambda args: {body} or 0
sys.exit(main(["ls"]))
"""


def printing(body: str, **changes: str | None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", PRINTING.replace("{body}", body)],
        env=environment(**changes),
        capture_output=True,
        check=False,
        timeout=LIMIT,
    )


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("latin-1", b"\xfc ? \xff\n"),
        ("latin-1:strict", b"\xfc ? \xff\n"),
        ("ascii", b"? ? \xff\n"),
        ("ascii:surrogateescape", b"? ? \xff\n"),
        ("utf-8", b"\xc3\xbc \xe3\x81\x93 \xff\n"),
        ("ascii:backslashreplace", b"\\xfc \\u3053 \\udcff\n"),  # chosen, and never fails
        ("ascii:xmlcharrefreplace", b"&#252; &#12371; &#56575;\n"),
    ],
)
def test_output_never_fails_because_of_a_character(encoding: str, printed: bytes) -> None:
    done = printing(r"print('\u00fc \u3053 \udcff')", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, b"")


def test_a_locale_without_any_other_character() -> None:
    done = printing(r"print('\u3053')", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?\n", b"")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8", "ascii:strict"])
@pytest.mark.parametrize("terminal", [True, False])
def test_half_a_character_typed_is_no_error_of_the_stream(encoding: str, terminal: bool) -> None:
    ours, theirs = os.openpty() if terminal else os.pipe()[::-1]
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTING.replace("{body}", "print(ascii(input()))")],
        env=environment(PYTHONIOENCODING=encoding),
        stdin=theirs,
        stdout=theirs if terminal else subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.write(ours, b"caf\xc3\n")
    if terminal:
        code, said = process.wait(60), b""
        while b"'\r\n" not in said:
            said += os.read(ours, 1000)
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stderr.close()
    else:
        said, errors = process.communicate(timeout=LIMIT)
        code = process.returncode
        assert errors == b""
    os.close(ours)
    os.close(theirs)
    assert code == 0
    assert rb"'caf\udcc3'" in said


@pytest.mark.slow
def test_nothing_is_lost_in_a_pipe_that_does_not_block() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            PRINTING.replace("{body}", "sum(print('x' * 99, flush=True) or 0 for _ in range(3000))"),
        ],
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
    ) as process:
        time.sleep(0.5)  # long enough for the pipe to be full
        os.close(writer)
        with open(reader, "rb") as file:
            assert len(file.read()) == 300_000
        assert process.communicate() == (None, b"")
    assert process.returncode == 0


def test_input_is_read_to_its_end_in_a_pipe_that_does_not_block() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with subprocess.Popen(
        [sys.executable, "-c", READING], env=environment(), stdin=reader, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begin\n"
        os.write(writer, b"one, ")
        time.sleep(0.05)
        os.write(writer, b"two")
        os.close(writer)
        assert process.stdout.read() == b"'one, two'\n"
    assert not os.get_blocking(reader)  # as it was found
    os.close(reader)


READING = """
import sys
from shoal.streams import read_text, standard_streams
with standard_streams():
    print("begin", flush=True)
    print(ascii(read_text(sys.stdin)))
"""


@pytest.mark.parametrize(
    ("given", "encoding", "read"),
    [
        (b"f\xc3\xbcr", "utf-8", r"f\xfcr"),
        (b"f\xc3\xbcr", "latin-1", r"f\xfcr"),  # a file in UTF-8, whatever the terminal is
        (b"f\xfcr", "latin-1", r"f\xfcr"),
        (b"f\xfcr", "utf-8", r"f\udcfcr"),
        (b"f\xfcr", "ascii", r"f\udcfcr"),
    ],
)
def test_standard_input_is_utf_8_or_text_of_the_locale(given: bytes, encoding: str, read: str) -> None:
    assert ascii(read_text(io.TextIOWrapper(io.BytesIO(given), encoding))) == f"'{read}'"


def test_standard_input_that_cannot_be_read_has_a_name(tmp_path: Path) -> None:
    with (tmp_path / "written").open("wb") as file, pytest.raises(OSError, match="standard input"):
        read_text(io.TextIOWrapper(io.BufferedReader(io.FileIO(file.fileno(), "r", closefd=False))))


def test_the_old_streams_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed"))
    with standard_streams():
        assert sys.stdin.read() == "typed"
        assert sys.stdout is not before[1]
    monkeypatch.undo()
    assert (sys.stdin, sys.stdout, sys.stderr) == before
