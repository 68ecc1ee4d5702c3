"""A chat on a terminal: messages and commands in, answers out, one session of an engine behind it.

Each turn hands over the whole conversation; the session computes what is new in it (engine.generate.Session).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from .answering import Answer, Session, Settings, answer
from .engine.chat import Chat, Message
from .engine.errors import ContextError, ShoalError
from .engine.generate import check_prompt
from .engine.tokenizer import Tokenizer

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
