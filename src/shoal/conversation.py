"""A chat on a terminal: messages and commands are typed, and one session of an LLM answers.

Messages are kept from chat to chat in `$XDG_STATE_HOME/shoal/history`
(`~/.local/state/shoal/history`), one JSON string a line, readable by its owner only.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .answer_text import AnswerText
from .chat_session import ChatSession
from .engine.chat import Message
from .engine.errors import ContextError, ShoalError
from .results import Completion

_HISTORY = 1000
"""Messages of the history that can be recalled. A file with twice as many is cut down to these."""
_PASTE_SECONDS = 0.05
"""Lines of a paste follow each other closer than this."""
_COMMAND = re.compile(r"/([A-Za-z]+)(?:[ \t]+(.*))?")
"""A message that is a command. "/etc/hosts" is not one, and "//word" sends "/word" as text."""
HELP = """\
/clear          start a new conversation
/system TEXT    set the system message (without TEXT: show it)
/stats          show the times of the last answer, and how much of the context is used
/help           show this list
/exit           leave the chat (or Ctrl-D)
Ctrl-C ends an answer. To send a message that begins with /, type // first."""


@dataclass(slots=True)
class Conversation:
    """A chat. `show` is called with each piece of an answer."""

    session: ChatSession
    show: Callable[[str], None]
    stats: bool = False
    """Whether the times of each answer are printed."""
    last: Completion | None = None

    @property
    def turns(self) -> list[Message]:
        """The messages and answers."""
        return [turn for turn in self.session.messages if turn.role != "system"]

    @property
    def system(self) -> str | None:
        """The system message."""
        return next((turn.content for turn in self.session.messages if turn.role == "system"), None)

    def _begin_anew(self, system: str | None, *turns: Message) -> None:
        self.session.messages[:] = [*([Message("system", system)] if system else []), *turns]

    def run(self, ask: Callable[[str], str]) -> None:
        """Answers messages until the input ends or /exit. `ask` is called like Terminal.ask."""
        while True:
            try:
                text = ask("> ")
                text.encode("utf-8")
            except EOFError:
                print(file=sys.stderr)
                return
            except UnicodeError:
                say("that message is not text in the terminal's encoding: type it again")
                continue
            except KeyboardInterrupt:
                say("\nCtrl-D or /exit leaves the chat")
                continue
            text = text.strip()
            command = _COMMAND.fullmatch(text)
            if command is not None:
                if command[1].lower() == "exit":
                    return
                self.command(command[1].lower(), (command[2] or "").strip())
            elif text:
                self.turn(text[1:] if text.startswith("//") else text)

    def command(self, name: str, rest: str) -> None:
        """Carries out the command /name."""
        match name:
            case "clear":
                self._begin_anew(self.system)
                self.last = None
                say("this is a new conversation")
            case "system" if rest:
                self._begin_anew(rest, *self.turns)
                say("the system message is set")
            case "system":
                say(self.system or "no system message is set; the model may have one of its own")
            case "stats":
                say("there is no answer yet" if self.last is None else self._summary(self.last))
            case "help":
                say(HELP)
            case _:
                say(f"there is no command /{name}: /help lists them, and //{name} sends it as text")

    def turn(self, text: str) -> None:
        """Answers a message. The chat goes on after an error that concerns only this message. NetError: it
        cannot go on."""
        try:
            made = self._begun(text)
        except (ShoalError, KeyboardInterrupt) as error:  # such as one that the template rejects
            say(str(error) or "[ended by Ctrl-C]")
            return
        shown, interrupted = 0, False
        try:
            with closing(self.session._stream(text, made)) as pieces:
                for piece in pieces:
                    self.show(piece)
                    shown += len(piece)
        except KeyboardInterrupt:
            interrupted = True
        except ContextError as error:
            self._begin_anew(self.system)
            say(f"{error}; this is a new conversation")
            return
        self.last = completion = made.completion()
        self.show(completion.text[shown:])
        print(flush=True)
        if interrupted:
            say("[ended by Ctrl-C]")
        elif _used(completion) >= self.session.context:
            say(f"[the context of {self.session.context} tokens is full; /clear starts a new conversation]")
        if self.stats:
            say(f"[{completion.summary()}]")

    def _begun(self, text: str) -> AnswerText:
        """An answer to a message, before its first token. If the conversation is too long for the context,
        only this message is kept."""
        try:
            return self.session._answer(text)
        except ContextError:
            if not self.turns:
                raise
        self._begin_anew(self.system)
        say(f"the conversation exceeds the context of {self.session.context} tokens: this is a new one")
        return self.session._answer(text)

    def _summary(self, made: Completion) -> str:
        return f"{made.summary()}; {_used(made)} of {self.session.context} tokens of context are used"


def _used(made: Completion) -> int:
    """The tokens of a prompt and its answer."""
    return made.usage.prompt_tokens + made.usage.completion_tokens


def say(text: str) -> None:
    """Prints a line that is not part of an answer."""
    print(text, file=sys.stderr, flush=True)


class Terminal:
    """Reads messages from standard input, with line editing and history if Python has readline."""

    def __init__(self) -> None:
        self._readline = _readline()
        # GNU readline returns a bracketed paste as one line. Otherwise its lines arrive one by one.
        self._whole = (
            self._readline is not None
            and "libedit" not in (self._readline.__doc__ or "")
            and os.environ.get("TERM", "dumb") != "dumb"
        )
        self._last = ""
        if self._readline is not None:
            if self._whole:
                self._readline.parse_and_bind("set enable-bracketed-paste on")
            for line in _read_history():
                with suppress(
                    UnicodeEncodeError
                ):  # the locale lacks a character; another locale's terminal has it
                    self._readline.add_history(line)

    def ask(self, prompt: str) -> str:
        """The next message; a pasted one may have several lines. EOFError: the input has ended.
        UnicodeDecodeError: the message is not text in the terminal's encoding."""
        lines = [input(prompt)]
        while not self._whole and _more_waits():
            try:
                lines.append(input())
            except EOFError:
                break
        message = "\n".join(lines)
        if self._readline is not None and message.strip() and message != self._last:
            _add_to_history(message)
            self._last = message
        return message


def _readline() -> ModuleType | None:
    """The readline module, if there is one. Importing it makes input() use it."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def _more_waits() -> bool:
    """Whether there is input to read within _PASTE_SECONDS."""
    try:
        return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])
    except (OSError, ValueError):  # standard input is not a file
        return False


def _history() -> Path:
    """The file of the history. RuntimeError: there is no home directory."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # The XDG rules say that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "shoal" / "history"


def _read_history() -> list[str]:
    """The latest messages. There are none if the file cannot be read: history is a convenience."""
    try:
        lines = _history().read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) > 2 * _HISTORY:
            _write_history("".join(f"{line}\n" for line in lines[-_HISTORY:]), os.O_TRUNC)
    except (OSError, RuntimeError):
        return []
    found = []
    for line in lines[-_HISTORY:]:
        with suppress(ValueError, RecursionError):  # a line that another program wrote
            message = json.loads(line)
            if isinstance(message, str) and "\0" not in message:
                found.append(message)
    return found


def _add_to_history(message: str) -> None:
    with suppress(OSError, RuntimeError):  # a full or read-only disk does not end a chat
        _write_history(json.dumps(message) + "\n", os.O_APPEND)


def _write_history(text: str, how: int) -> None:
    path = _history()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)  # an existing file may be readable by others
        file.write(text)
