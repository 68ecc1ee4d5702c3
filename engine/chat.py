"""Chat messages to the text that a model was trained on, by the model's own Jinja template.

Templates come with models, so they run in Jinja's immutable sandbox. The functions that templates expect
(`raise_exception`, `strftime_now`, `tojson`) are those of Hugging Face transformers
(`utils/chat_template_utils.py`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .config import read_config
from .errors import MissingDependencyError, ShoalError, UnsupportedModelError
from .files import read_text
from .index import CHAT_TEMPLATE, CONFIG, INDEX, read_index
from .stamps import Stamps
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: role is system, user or assistant."""

    role: str
    content: str


class Chat:
    """The template of a model directory with its tokenizer. Without a template, messages are plain text."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, special: dict[str, str]) -> None:
        self.tokenizer = tokenizer
        self._template = None if template is None else _compile(template)
        self._special = special

    @classmethod
    def open(cls, directory: Path | str, tokenizer: Tokenizer | None = None) -> Chat:
        """The chat of a model directory. MissingDependencyError: no jinja2; ModelFileError: a damaged file;
        UnsupportedModelError: a template that does not compile."""
        directory = Path(directory)
        index, _ = read_index(directory / INDEX)
        template = None
        if CHAT_TEMPLATE in index.files:
            Stamps(directory).check(directory / CHAT_TEMPLATE, index.files[CHAT_TEMPLATE])
            template = read_text(directory / CHAT_TEMPLATE)
        tokenizer = tokenizer or Tokenizer.open(directory)
        config = read_config(directory / CONFIG)
        ids = {"bos_token": config.bos, "eos_token": config.eos[0] if config.eos else None}
        special = {key: "" if i is None else tokenizer.token(i) or "" for key, i in ids.items()}
        return cls(tokenizer, template, special)

    @property
    def has_template(self) -> bool:
        """Whether the model was made for chats."""
        return self._template is not None

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """The text of the messages; with `generation_prompt`, up to where the assistant's answer begins.

        ShoalError: the template refuses the messages."""
        if self._template is None:
            return "\n\n".join(message.content for message in messages)
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=generation_prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError, OverflowError, RecursionError) as e:
            raise ShoalError(f"the model's chat template refuses these messages: {e}") from e

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the rendered messages, up to where the answer begins."""
        return self.tokenizer.encode(self.render(messages), special=not self.has_template)


def _compile(template: str) -> jinja2.Template:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as e:
        raise MissingDependencyError(
            f"chat templates need the jinja2 package ({e}): pip install jinja2, or give `--raw`"
        ) from e
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as e:
        raise UnsupportedModelError(f"the model's chat template does not compile: {e}; give `--raw`") from e


def _to_json(value: Any, indent: int | None = None) -> str:
    """Unlike Jinja's own filter, nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
