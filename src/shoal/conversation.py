"""A chat on a terminal: messages and commands are typed, and one session of an engine answers.

Each turn passes the whole conversation to the session, which computes only what is new
(engine.generate.Session). Messages are kept from chat to chat in `$XDG_STATE_HOME/shoal/history`
(`~/.local/state/shoal/history`), one JSON string a line, readable by its owner only.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from .answering import Answer, Session, Settings, answer
from .engine.chat import Chat, Message
from .engine.errors import ContextError, ShoalError
from .engine.generate import check_prompt
from .engine.tokenizer import Tokenizer

_HISTORY = 1000
"""Messages of the history that are offered; a file of twice as many is cut down to these."""
_PASTE_SECONDS = 0.05
"""Lines of a paste follow each other closer than this."""
_COMMAND = re.compile(r"/([A-Za-z]+)(?:[ \t]+(.*))?")
"""A whole message of one line. "/etc/hosts" is none, and "//word" sends "/word"."""
HELP = """\
/clear          forget the conversation
/system TEXT    set the system message (alone: show it)
/stats          how long the last answer took, and how much of the context is used
/help           this list
/exit           leave (or Ctrl-D)
Ctrl-C ends an answer. A message that begins with / is a command; begin it with // to send it."""


@dataclass(slots=True)
class Conversation:
    """The state of a chat. `template` None: messages are continued as they are."""

    session: Session
    tokenizer: Tokenizer
    template: Chat | None
    settings: Settings
    show: Callable[[str], None]
    system: str | None = None
    stats: bool = False
    """Say after each answer how long it took."""
    turns: list[Message] = field(default_factory=list)
    last: Answer | None = None

    def run(self, ask: Callable[[str], str]) -> None:
        """Asks for messages and answers them until the input ends or /exit; `ask` as Terminal.ask."""
        while True:
            try:
                text = ask("> ")
                text.encode("utf-8")
            except EOFError:
                print(file=sys.stderr)
                return
            except UnicodeError:
                say("that message has bytes that are no text in the terminal's encoding: type it again")
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
        """Carries out /name."""
        match name:
            case "clear":
                self.turns, self.last = [], None
                say("the conversation begins anew")
            case "system" if rest:
                self.system = rest
                say("the system message is set")
            case "system":
                say(self.system or "there is no system message but the model's own, if it has one")
            case "stats":
                say("nothing has been answered yet" if self.last is None else self._summary(self.last))
            case "help":
                say(HELP)
            case _:
                say(f"there is no command /{name}: /help lists them, and //{name} sends it as text")

    def turn(self, text: str) -> None:
        """Answers a message. What is wrong with it alone is said, and the chat goes on; NetError: it
        cannot."""
        self.turns.append(Message("user", text))
        try:
            prompt = self._prompt()
        except (ShoalError, KeyboardInterrupt) as error:  # the template refuses it, say
            del self.turns[-1:]
            say(str(error) or "[ended by Ctrl-C]")
            return
        try:
            self.last = answer(
                self.session, self.tokenizer, prompt, self.settings, self.show, interruptible=True
            )
        except ContextError as error:
            self.turns = []
            say(f"{error}; the conversation begins anew")
            return
        self.turns.append(Message("assistant", self.last.text))
        print(flush=True)
        if self.last.interrupted:
            say("[ended by Ctrl-C]")
        elif len(prompt) + len(self.last.tokens) >= self.settings.context:
            say(f"[the context of {self.settings.context} tokens is full; /clear begins anew]")
        if self.stats:
            say(f"[{self.last.summary()}]")

    def _prompt(self) -> list[int]:
        """The conversation as token ids. When it has outgrown the context, only its last message is kept."""
        tokens = self._encoded()
        if len(tokens) >= self.settings.context and len(self.turns) > 1:
            self.turns = self.turns[-1:]
            say(
                f"the conversation has outgrown the context of {self.settings.context} tokens and begins anew"
            )
            tokens = self._encoded()
        check_prompt(tokens, self.settings.context, self.settings.vocab)
        return tokens

    def _encoded(self) -> list[int]:
        if self.template is None:
            return self.tokenizer.encode(self.turns[-1].content)
        system = [Message("system", self.system)] if self.system else []
        return self.template.encode([*system, *self.turns])

    def _summary(self, made: Answer) -> str:
        used = made.prompt_tokens + len(made.tokens)
        return f"{made.summary()}; {used} of {self.settings.context} tokens of context are used"


def say(text: str) -> None:
    """A line that is no part of an answer."""
    print(text, file=sys.stderr, flush=True)


class Terminal:
    """Asks for messages on standard input."""

    def __init__(self) -> None:
        self._readline = _readline()
        # GNU readline takes a bracketed paste as one line; others get what a terminal sends after the first.
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
                self._readline.add_history(line)

    def ask(self, prompt: str) -> str:
        """The next message; one that was pasted may have several lines. EOFError: there is none.
        UnicodeDecodeError: bytes that are no text in the terminal's encoding."""
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
    """The readline module: imported here, since that alone makes input() use it."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def _more_waits() -> bool:
    """Whether input is there that nobody has read."""
    try:
        return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])
    except (OSError, ValueError):  # no file
        return False


def _history() -> Path:
    """RuntimeError: there is no home directory."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # The XDG rules say that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "shoal" / "history"


def _read_history() -> list[str]:
    """The latest messages; none where they cannot be read: history is a convenience."""
    try:
        lines = _history().read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) > 2 * _HISTORY:
            _write_history("".join(f"{line}\n" for line in lines[-_HISTORY:]), os.O_TRUNC)
    except (OSError, RuntimeError):
        return []
    found = []
    for line in lines[-_HISTORY:]:
        with suppress(ValueError, RecursionError):  # a line that somebody else wrote
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
        os.fchmod(file.fileno(), 0o600)  # one that was there may have been open to others
        file.write(text)
