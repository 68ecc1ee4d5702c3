"""Converts chat messages to token ids with the model's own Jinja template.

The content of messages is data: a control token, such as the end of a turn, is recognised only where the
template wrote it. If a message spells one, the spelling is encoded as ordinary text. All other messages get
the ids of Hugging Face transformers' `apply_chat_template`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import read_config
from .errors import MissingDependencyError, ModelFileError, ShoalError, UnsupportedModelError
from .files import read_text
from .hash_cache import HashCache
from .index import CHAT_TEMPLATE, CONFIG, INDEX, SPECIAL_TOKENS, read_index
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .chat_template import Traced

_ANSWERING = frozenset({"assistant", "model"})
_ASKING = frozenset({"system", "developer", "user", "human", "context", "documents", "critic"})
_TOOLS = frozenset({"tool", "tool_response", "function", "ipython", "environment", "observation"})
_ROLES = _ANSWERING | _ASKING | _TOOLS
"""Roles whose names templates may use in control tokens: '<|' + role + '|>'. Other roles are data."""
MARKER = re.compile(r"[<\[][|\uff5c]\S+?[|\uff5c][>\]]|</?(?:start|end)_of_\w+>")
"""Matches the spelling of a token that starts or ends a turn."""
_TAG = re.compile(r"</?\w+>")
"""Matches the spelling of a token around a part of an answer, such as `<think>` or `</tool_call>`."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; the role is system, user or assistant."""

    role: str
    content: str


Messages = Sequence[Message | Mapping[str, Any]]
"""Chat messages. A mapping may have further keys that the template reads, such as tool_calls."""


class Chat:
    """A chat template with its tokenizer. Without a template, messages are encoded as plain text."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, special: Mapping[str, str | None]) -> None:
        """`special`: spellings of the special tokens that templates use by name (`bos_token`, `eos_token`,
        …); None: the model has no such token. Errors: see `open`."""
        self.tokenizer = tokenizer
        self.special = {name: token for name, token in special.items() if token is not None}
        self.source = template
        """The template as it is written."""
        self._template = None if template is None else _compile(template)
        words = _literals(template)
        self.control = frozenset(  # tokens that are ordinary text when messages spell them
            i
            for i, (content, hidden) in tokenizer.added_tokens.items()
            if hidden or MARKER.fullmatch(content) or (content.strip() and content in words)
        )

    @classmethod
    def open(cls, directory: Path | str, tokenizer: Tokenizer | None = None) -> Chat:
        """The chat template of a model directory. MissingDependencyError: the jinja2 package is missing.
        ModelFileError: a file is damaged. UnsupportedModelError: the template does not compile."""
        directory = Path(directory)
        index, _ = read_index(directory / INDEX)

        def text(name: str) -> str | None:
            if name not in index.files:
                return None
            HashCache(directory).check(directory / name, index.files[name])
            return read_text(directory / name)

        tokenizer = tokenizer or Tokenizer.open(directory)
        config = read_config(directory / CONFIG)
        special: dict[str, str | None] = dict(special_tokens(tokenizer, config.bos, config.eos))
        named = text(SPECIAL_TOKENS)
        if named is not None:
            special |= _parse_special(named, directory / SPECIAL_TOKENS)
        return cls(tokenizer, text(CHAT_TEMPLATE), special)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def render(self, messages: Messages, *, generation_prompt: bool = True, **variables: Any) -> str:
        """The text of the messages; with `generation_prompt`, it ends where the assistant's answer starts.
        `variables` are further inputs of the template: tools, documents, enable_thinking, date_string.

        ShoalError: the template refuses the messages."""
        return "".join(self._render(messages, generation_prompt, variables)[0])

    def encode(self, messages: Messages, *, generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Token ids of the rendered messages. Control tokens that messages or variables spell are encoded as
        ordinary text. Errors and arguments: see `render`."""
        text, data = self._render(messages, generation_prompt, variables)
        if self._template is None:
            return self.tokenizer.encode(text, control=False)
        from .chat_template import ANSWER, TEMPLATE, UNKNOWN, origins

        origin = origins(text)
        tokens = self.tokenizer.added_tokens

        def genuine(token: int, first: int, last: int) -> bool:
            wrote = set(origin[first:last])
            if wrote == {ANSWER}:
                content, hidden = tokens[token]
                return not hidden and _TAG.fullmatch(content) is not None
            spelling = text[first:last]
            return wrote == {TEMPLATE} or (
                wrote <= {TEMPLATE, UNKNOWN} and not any(spelling in said for said in _strings(data))
            )

        return self.tokenizer.encode_where("".join(text), self.control, genuine)

    def _render(
        self, messages: Messages, generation_prompt: bool, variables: Mapping[str, Any]
    ) -> tuple[Traced | str, list[Any]]:
        """The rendered text, and the data that went into it."""
        plain = [asdict(message) if isinstance(message, Message) else dict(message) for message in messages]
        plain = [{key: value for key, value in message.items() if value is not None} for message in plain]
        data = [*plain, dict(variables)]
        if self._template is None:
            return "\n\n".join(str(message.get("content", "")) for message in plain), data
        from .chat_template import DATA, TEMPLATE, traced

        given = {
            "tools": None,
            "documents": None,
            **traced(self.special, TEMPLATE),
            **traced(variables, DATA),
            "messages": [_traced_message(message) for message in plain],
            "add_generation_prompt": generation_prompt,
        }
        try:
            return self._template(**given), data
        except RecursionError as e:
            raise ShoalError("the model's chat template recurses endlessly on these messages") from e
        except Exception as e:  # it is a program, and somebody else's
            raise ShoalError(f"the model's chat template refuses these messages: {e}") from e


def special_tokens(tokenizer: Tokenizer, bos: int | None, eos: Sequence[int]) -> dict[str, str]:
    """Spellings of the special tokens that a template may use by name, from the ids in a configuration."""
    ids = {"bos_token": bos, "eos_token": eos[0] if eos else None}
    spelled = {key: tokenizer.token(i) for key, i in ids.items() if i is not None}
    return {key: token for key, token in spelled.items() if token is not None}


def _parse_special(text: str, path: Path) -> dict[str, str | None]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ModelFileError(f"{path} is not valid JSON ({e}): pull or convert the model again") from e
    if not isinstance(values, dict) or not all(isinstance(value, str | None) for value in values.values()):
        raise ModelFileError(
            f"{path} is not a JSON object of strings and nulls: pull or convert the model again"
        )
    return values


def _traced_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for the template, as traced strings. The name of a usual role counts as the template's, since
    it may be part of a control token."""
    from .chat_template import ANSWER, DATA, TEMPLATE, traced

    role = message.get("role")
    made: dict[str, Any] = traced(message, ANSWER if role in _ANSWERING else DATA)
    if "role" in message:
        made["role"] = traced(role, TEMPLATE if role in _ROLES else DATA)
    return made


def _strings(value: Any) -> Iterator[str]:
    """All strings in JSON-like data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _literals(template: str | None) -> str:
    if template is None:
        return ""
    from .chat_template import literals

    return literals(template)


def _compile(template: str) -> Callable[..., str]:
    try:
        import jinja2  # noqa: F401 is it there?
    except ImportError as e:
        raise MissingDependencyError(
            f"chat templates need the jinja2 package ({e}): pip install jinja2, or use --raw"
        ) from e
    from .chat_template import compile_template

    try:
        return compile_template(template)
    except Exception as e:  # Python, to which it is compiled, limits nested loops and digits, too
        raise UnsupportedModelError(f"the model's chat template does not compile ({e}): use --raw") from e
