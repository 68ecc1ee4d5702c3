"""The chat of a checkpoint, checked at conversion, before the long work: what is odd is said, or refused.

Sources disagree about end tokens and special tokens: config.json has ids, the tokenizer's settings have
spellings, and the template writes what it writes. Settled here is what a model directory says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .chat import MARKER, Chat, Message, special_tokens
from .checkpoint import Checkpoint
from .config import Config
from .errors import MissingDependencyError, ModelFileError, ShoalError, UnsupportedModelError, Warn
from .tokenizer import Tokenizer

_QUESTION, _ANSWER = "What is three and four?", "Seven."


@dataclass(frozen=True, slots=True)
class ChatParts:
    """What a model directory keeps for its chats."""

    tokenizer: bytes | None
    template: str | None
    special: bytes | None
    """special_tokens_map.json; None where the ids of config.json say the same."""
    bos: int | None
    eos: tuple[int, ...]


def chat_parts(checkpoint: Checkpoint, config: Config, warn: Warn) -> ChatParts:
    """The tokenizer, template, special and end tokens of a checkpoint. `warn` is told what is odd about
    them.

    ModelFileError: they contradict each other. UnsupportedModelError: a tokenizer that is not
    supported."""
    where = str(checkpoint.path)
    data, template = checkpoint.tokenizer_json(), checkpoint.chat_template
    parts = ChatParts(data, template, None, config.bos, config.eos)
    if data is None:
        return parts
    try:
        tokenizer = Tokenizer.parse(data, f"{where}: its tokenizer")
    except MissingDependencyError as e:
        warn(f"the tokenizer was not checked: {e}")
        return parts
    settled = _Settled(tokenizer, config, where, warn)
    bos, eos = settled.tokens([config.bos], "bos_token_id"), settled.tokens(config.eos, "eos_token_id")
    names = checkpoint.special_tokens
    ends = settled.spelled(names, "eos_token")
    eos = _once([*ends, *eos] if "eos_token" in (template or "") else [*eos, *ends])
    special = special_tokens(tokenizer, bos[0] if bos else None, eos)
    named = {
        key: token
        for key, token in names.items()
        if re.search(rf"\b{re.escape(key)}\b", template or "") and token != special.get(key)
    }
    chat = _opened(tokenizer, template, {**special, **named}, warn)
    if chat is not None:
        eos = _once([*eos, *_check(chat, settled, eos)])
    if not eos:
        warn(f"{where} has no end token: answers end only where the context or --max-tokens does")
    return replace(
        parts,
        special=json.dumps(named, indent=1, sort_keys=True).encode() + b"\n" if named else None,
        bos=bos[0] if bos else None,
        eos=tuple(eos),
    )


class _Settled:
    """Tokens that the tokenizer can write and the model can read; others are named in a warning."""

    def __init__(self, tokenizer: Tokenizer, config: Config, where: str, warn: Warn) -> None:
        self.tokenizer, self.vocab, self.where, self.warn = tokenizer, config.vocab, where, warn

    def tokens(self, ids: Iterable[int | None], key: str) -> list[int]:
        """Those of the ids that are tokens."""
        known = []
        for i in ids:
            if i is not None and i < self.vocab and self.tokenizer.token(i) is not None:
                known.append(i)
            elif i is not None:
                self.warn(f"{self.where}: {key} {i} is not in the vocabulary and is ignored")
        return known

    def spelled(self, names: Mapping[str, str | None], key: str) -> list[int]:
        """The id of the token called `key`, if it has one."""
        for name, token in names.items():
            if name in ("bos_token", key) and token and self.tokenizer.token_id(token) is None:
                self.warn(
                    f"{self.where}: {name} {token!r} is not in the vocabulary, so that it is plain text"
                )
        token = names.get(key)
        i = None if token is None else self.tokenizer.token_id(token)
        return self.tokens([i], key)


def _once(ids: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def _opened(
    tokenizer: Tokenizer, template: str | None, special: Mapping[str, str | None], warn: Warn
) -> Chat | None:
    """The chat; None, with a warning, where there is none or it cannot be checked."""
    if template is None:
        return None
    try:
        return Chat(tokenizer, template, special)
    except MissingDependencyError as e:
        warn(f"the chat template was not checked: {e}")
    except UnsupportedModelError as e:
        warn(str(e))
    return None


def _check(chat: Chat, settled: _Settled, eos: list[int]) -> list[int]:
    """Renders and encodes a chat of two messages, and returns the tokens that end the answer in it as far
    as they are not in `eos`. ModelFileError: it has tokens that the embedding lacks."""
    warn, where, tokenizer = settled.warn, settled.where, settled.tokenizer
    messages = [Message("user", _QUESTION), Message("assistant", _ANSWER)]
    try:
        text = chat.render(messages, generation_prompt=False)
        prompt = chat.render(messages[:1])
        ids = [*chat.encode(messages[:1]), *chat.encode(messages, generation_prompt=False)]
    except ShoalError as e:
        warn(f"{where}: a question and its answer cannot be rendered: {e}")
        return []
    beyond = [tokenizer.token(i) for i in ids if i >= settled.vocab]
    if beyond:
        raise ModelFileError(f"{where}: its chat template writes {beyond[0]!r}, which its embedding lacks")
    if _QUESTION.casefold() not in prompt.casefold():
        warn(f"{where}: its chat template leaves out what the user says")
    markers = dict.fromkeys(MARKER.findall(prompt + text))
    split = [marker for marker in markers if tokenizer.token_id(marker) not in ids]
    if split:
        warn(
            f"{where}: its chat template writes {', '.join(split)}, which the tokenizer splits into several "
            "tokens; if the model was trained with them as single tokens, the tokenizer is another's"
        )
    bos = tokenizer.token_id(chat.special.get("bos_token", ""))
    if bos is not None and ids[:2] == [bos, bos]:
        warn(f"{where}: its chat template begins with {chat.special['bos_token']!r} twice")
    return _unlisted_end(chat, settled, text, eos)


def _unlisted_end(chat: Chat, settled: _Settled, text: str, eos: list[int]) -> list[int]:
    """The token after the answer in the rendered chat, unless it is an end token already."""
    at = text.rfind(_ANSWER)
    if at < 0:
        return []
    after = text[at + len(_ANSWER) :].lstrip()
    end = chat.tokenizer.encode(after, special=False)[:1]
    known = " and ".join(repr(settled.tokenizer.token(i)) for i in eos) or "none"
    if not after or end[0] not in chat.control:
        if eos and not any((settled.tokenizer.token(i) or "") in after for i in eos):
            said = repr(after.splitlines()[0]) if after else "nothing"
            settled.warn(
                f"{settled.where}: its chat template writes {said} after an answer, and none of the end "
                f"tokens ({known}): answers may not end; --stop ends them at a text"
            )
        return []
    if end[0] in eos:
        return []
    settled.warn(
        f"{settled.where}: its chat template ends an answer with {settled.tokenizer.token(end[0])!r}, which "
        f"is not among its end tokens ({known}); it is taken as one of them"
    )
    return end
