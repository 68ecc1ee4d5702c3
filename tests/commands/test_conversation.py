"""A chat: commands, what is wrong with one message, the end of the context, and what is computed."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
from tests.models import tiny_chat_model
from tests.patience import LIMIT

from shoal import conversation
from shoal.answering import Settings
from shoal.conversation import Conversation
from shoal.engine.errors import ContextError, ShoalError
from shoal.engine.generate import Session
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.llm import LLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(tiny_chat_model(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def stage(model: Model) -> Iterator[Stage]:
    with Stage(model, 0, model.n_units) as opened:
        yield opened


@dataclass
class Recorded:
    """A session, and the prompts that it was given."""

    inner: Session
    prompts: list[list[int]] = field(default_factory=list)
    fail: Exception | KeyboardInterrupt | None = None

    def answer(
        self, prompt: Sequence[int], *, max_tokens: int, end: Sequence[int], report: object = None
    ) -> Generator[int, None, None]:
        self.prompts.append(list(prompt))
        if self.fail is not None:
            error, self.fail = self.fail, None
            yield from self.inner.answer(prompt, max_tokens=2, end=())
            raise error
        yield from self.inner.answer(prompt, max_tokens=max_tokens, end=end)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self.inner.close()


@dataclass
class OneSession:
    """An engine with one session."""

    inner: Recorded

    def session(self, settings: Settings) -> Recorded:
        return self.inner


class Talk:
    """A conversation with the tiny model, and what it printed."""

    def __init__(self, model: Model, stage: Stage, context: int = 200, max_tokens: int = 4) -> None:
        self.session = Recorded(Session(stage, context=context))
        self.shown = ""
        llm = LLM.over(model, OneSession(self.session), context)  # type: ignore[arg-type]
        self.template = llm.template
        self.conversation = Conversation(llm.session(max_tokens=max_tokens, end=()), self.show)

    def show(self, text: str) -> None:
        self.shown += text

    def type(self, *messages: str | BaseException) -> None:
        waiting = iter(messages)

        def ask(prompt: str) -> str:
            message = next(waiting, EOFError())
            if isinstance(message, BaseException):
                raise message
            return message

        self.conversation.run(ask)
        assert next(waiting, None) is None


@pytest.fixture
def talk(model: Model, stage: Stage) -> Iterator[Talk]:
    made = Talk(model, stage)
    yield made
    made.session.close()


def contents(talk: Talk) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in talk.conversation.turns]


def test_a_turn_hands_over_the_whole_conversation(talk: Talk) -> None:
    talk.type("hello", "again")
    (_, first), (_, answer), (_, second), _ = contents(talk)
    assert (first, second) == ("hello", "again")
    assert [turn.role for turn in talk.conversation.turns] == ["user", "assistant"] * 2
    assert talk.session.prompts[1] == talk.template.encode(talk.conversation.turns[:3])
    assert answer and answer in talk.shown


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("/etc/hosts is what?", "/etc/hosts is what?"),
        ("/etc/hosts", "/etc/hosts"),
        ("//clear", "/clear"),
        ("//etc", "/etc"),
        ("/", "/"),
        ("/ clear", "/ clear"),
        ("/1 is one", "/1 is one"),
        ("say /clear", "say /clear"),
        ("/clear\nand more lines", "/clear\nand more lines"),
        ("  hello  ", "hello"),
    ],
)
def test_what_is_a_message(talk: Talk, typed: str, sent: str) -> None:
    talk.type(typed)
    assert contents(talk)[0] == ("user", sent)


@pytest.mark.parametrize("typed", ["/nosuch", "/nosuch word", "/Clearly", "/tmp"])
def test_an_unknown_command_is_said_and_sent_to_nobody(
    talk: Talk, typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.type(typed)
    assert talk.session.prompts == []
    err = capsys.readouterr().err
    assert f"no command {typed.split()[0].lower()}:" in err and "/help" in err


def test_clear_begins_anew_and_keeps_the_system_message(talk: Talk) -> None:
    talk.type("/system be brief", "hello", "/clear", "again")
    assert contents(talk)[0][1] == "again"
    assert talk.conversation.system == "be brief"
    assert talk.session.prompts[1] != talk.session.prompts[0]


def test_the_system_message_is_set_shown_and_sent(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.type("hello", "/clear", "/system  You are a ferry. ", "/system", "hello")
    without, with_it = talk.session.prompts
    assert len(with_it) > len(without)
    assert "You are a ferry." in capsys.readouterr().err.splitlines()


def test_stats_and_help(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.type("/stats", "hello", "/STATS", "/help")
    err = capsys.readouterr().err
    assert "there is no answer yet" in err
    assert re.search(r"4 tokens, .*; \d+ of 200 tokens of context are used", err)
    for command in ("/clear", "/system", "/stats", "/help", "/exit"):
        assert command in err


def test_exit_and_the_end_of_input_leave(talk: Talk) -> None:
    talk.type("/exit")
    talk.type("", "   ", EOFError())
    assert talk.session.prompts == []


def test_bytes_that_are_no_text_are_said_and_asked_for_again(
    talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.type("caf\udcc3", UnicodeDecodeError("utf-8", b"\xc3", 0, 1, "unexpected end"), "hello")
    assert contents(talk)[0][1] == "hello"
    assert capsys.readouterr().err.count("type it again") == 2


def test_ctrl_c_at_the_prompt_says_how_to_leave(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.type(KeyboardInterrupt(), "hello")
    assert "/exit" in capsys.readouterr().err
    assert len(talk.session.prompts) == 1


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(
    talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.session.fail = KeyboardInterrupt()
    talk.type("hello", "again")
    roles = [turn.role for turn in talk.conversation.turns]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert "[ended by Ctrl-C]" in capsys.readouterr().err
    assert talk.session.prompts[1] == talk.template.encode(talk.conversation.turns[:3])


def test_a_template_that_refuses_a_message_does_not_end_the_chat(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = talk.template.encode

    def refuse(messages: Sequence[object]) -> list[int]:
        if len(messages) == 3:
            raise ShoalError("no third message, please")
        return encode(messages)  # type: ignore[arg-type]

    monkeypatch.setattr(talk.template, "encode", refuse)
    talk.type("hello", "again", "/clear", "more")
    assert "no third message" in capsys.readouterr().err
    assert contents(talk)[0][1] == "more"


def test_a_conversation_that_outgrows_the_context_goes_on_with_its_last_message(
    model: Model, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(model, stage, context=60)
    try:
        talk.type(*(["the ferry was late"] * 8), "x" * 500, "hello")
    finally:
        talk.session.close()
    err = capsys.readouterr().err
    assert "exceeds the context of 60 tokens: this is a new one" in err
    assert "the context holds 60" in err  # the one that fits in no conversation
    assert all(len(prompt) < 60 for prompt in talk.session.prompts)
    assert contents(talk)[-2] == ("user", "hello")


def test_an_answer_that_the_context_ends_says_so(
    model: Model, stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(model, stage, context=40, max_tokens=99)
    try:
        talk.type("hello")
    finally:
        talk.session.close()
    assert "the context of 40 tokens is full" in capsys.readouterr().err


def test_memory_that_runs_out_begins_the_conversation_anew(
    talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.session.fail = ContextError("keys and values have filled it")
    talk.type("hello", "again")
    assert "this is a new conversation" in capsys.readouterr().err
    assert contents(talk)[0][1] == "again"


# --- on a terminal


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "shoal" / "history"


class Pty:
    """A process on a terminal of its own."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", **environment}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.seen = ""

    def wait(self, text: str, seconds: float = LIMIT) -> str:
        """What comes up to a text, which is taken out."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.master], [], [], max(0.0, until - time.monotonic()))[0], self.seen
            try:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended: {self.seen}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def end(self) -> int:
        """Waits for its end, and returns its code."""
        with contextlib.suppress(OSError):  # the end of a terminal
            while os.read(self.master, 4096):
                pass
        return self.process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


ASK = """
import sys
if sys.argv[1] != "readline":
    sys.modules["readline"] = None
from shoal.conversation import Terminal
terminal = Terminal()
while True:
    try:
        print(repr(terminal.ask("> ")))
    except EOFError:
        break
print("end", "readline" in sys.modules and sys.modules["readline"] is not None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "term", "paste"),
    [
        ("readline", "xterm", b"\x1b[200~one\rtwo\r\rthree\x1b[201~\r"),
        ("readline", "dumb", b"one\rtwo\r\rthree\r"),
        ("plain", "xterm", b"one\rtwo\r\rthree\r"),
    ],
)
def test_a_paste_of_several_lines_is_one_message(state: Path, how: str, term: str, paste: bytes) -> None:
    with Pty(sys.executable, "-c", ASK, how, TERM=term) as process:
        process.wait("> ")
        process.type(paste)
        process.wait(r"'one\ntwo\n\nthree'")
        process.wait("> ")
        process.type(b"alone\r")
        process.wait("'alone'")
        process.wait("> ")
        process.type(b"\x04")
        process.wait(f"end {how == 'readline'}")
        assert process.end() == 0


@pytest.mark.slow
def test_history_is_kept_for_its_owner_and_edited_with_arrows(state: Path) -> None:
    state.parent.mkdir(parents=True)
    state.write_text('"the first"\nno JSON\n17\n')
    state.chmod(0o644)
    with Pty(sys.executable, "-c", ASK, "readline") as process:
        process.wait("> ")
        process.type(b"\x1b[A\r")  # up: from the chat before
        process.wait("'the first'")
        process.wait("> ")
        process.type(b"the secnd\x1b[D\x1b[Do\r")  # mended on the way
        process.wait("'the second'")
        process.wait("> ")
        process.type(b"\x04")
        assert process.end() == 0
    lines = state.read_text().splitlines()
    assert lines[-2:] == ['"the first"', '"the second"']
    assert stat.S_IMODE(state.stat().st_mode) == 0o600


@pytest.mark.slow
def test_history_of_another_locale_ends_nothing(state: Path) -> None:
    state.parent.mkdir(parents=True)
    state.write_text('"plain"\n"f\\u00fcr"\n"\\ud83d\\ude00"\n')
    with Pty(sys.executable, "-c", ASK, "readline", LC_ALL="C", PYTHONUTF8="1") as process:
        process.wait("> ")
        process.type(b"\x1b[A\r")
        process.wait("'plain'")
        process.wait("> ")
        process.type(b"\x04")
        assert process.end() == 0


def test_a_long_history_is_cut_down(state: Path) -> None:
    state.parent.mkdir(parents=True)
    state.write_text("".join(f'"{i}"\n' for i in range(2001)))
    assert conversation._read_history() == [str(i) for i in range(1001, 2001)]
    assert len(state.read_text().splitlines()) == 1000
    conversation._add_to_history("two\nlines")
    assert conversation._read_history()[-1] == "two\nlines"


def test_a_history_that_cannot_be_kept_ends_nothing(state: Path) -> None:
    state.parent.parent.mkdir()
    state.parent.write_text("a file where the directory would be")
    assert conversation._read_history() == []
    conversation._add_to_history("x")


CHAT = "import sys; sys.modules['readline'] = None; from shoal.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_chat_on_a_terminal_from_its_first_line_to_its_end(model: Model, state: Path) -> None:
    with Pty(sys.executable, "-m", "shoal", "run", str(model.path), "-n", "4", "--threads", "1") as process:
        first = process.wait("leaves")
        assert model.path.name in first and "1 thread" in first and "/help" in first and "Ctrl-D" in first
        process.wait("> ")
        process.type(b"hello\r")
        process.wait("hello\r\n")
        process.wait("> ")
        time.sleep(0.3)  # readline loses a signal between its prompt and its wait for a key
        process.process.send_signal(signal.SIGINT)
        process.wait("/exit leaves")
        process.wait("> ")
        process.type(b"/stats\r")
        process.wait("tokens of context are used")
        process.type(b"/exit\r")
        assert process.end() == 0
    assert state.read_text().splitlines()[0] == '"hello"'


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])  # strict, and with surrogates
def test_half_a_character_does_not_end_a_chat(model: Model, state: Path, locale: str) -> None:
    with Pty(sys.executable, "-c", CHAT, "run", str(model.path), "-n", "4", LC_ALL=locale) as process:
        process.wait("> ")
        process.type(b"caf\xc3\n")
        process.wait("type it again")
        process.wait("> ")
        process.type(b"hello\n")
        process.wait("hello\r\n")
        process.wait("> ")
        process.type(b"\x04")
        assert process.end() == 0


SLOW = """import sys, time
from shoal.cli import main
from shoal.engine.stage import Stage
run = Stage.run
Stage.run = lambda stage, batch: (time.sleep(0.05), run(stage, batch))[1]
sys.exit(main())
"""
"""The command line with a token each 50 ms: an answer of 400 tokens has not ended when Ctrl-C comes."""


@pytest.mark.slow
def test_ctrl_c_in_an_answer_ends_the_answer_and_not_the_chat(model: Model, state: Path) -> None:
    line = ("run", str(model.path), "-n", "400", "--seed", "1", "--temperature", "5", "--top-k", "200")
    with Pty(sys.executable, "-c", SLOW, *line) as process:
        process.wait("> ")
        process.type(b"hello\r")
        process.wait("hello\r\n\x1b[?2004l")  # readline has returned the line
        assert select.select([process.master], [], [], 60)[0]  # it answers
        process.process.send_signal(signal.SIGINT)
        process.wait("[ended by Ctrl-C]")
        process.wait("> ")
        process.type(b"/exit\r")
        assert process.end() == 0
