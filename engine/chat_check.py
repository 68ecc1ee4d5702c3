"""Checks the tokenizer and chat template of a checkpoint at conversion, before the long work, and decides on
end tokens and special tokens.

Their sources can disagree: config.json has ids, the tokenizer's settings have spellings, and the template
may write yet other tokens. Oddities are warnings, contradictions are errors."""

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
    """The parts of a checkpoint that a model directory keeps for text and chats."""

    tokenizer: bytes | None
    template: str | None
    special: bytes | None
    """special_tokens_map.json; None if the ids in config.json are enough."""
    bos: int | None
    eos: tuple[int, ...]


def chat_parts(checkpoint: Checkpoint, config: Config, warn: Warn) -> ChatParts:
    """The tokenizer, template, special tokens and end tokens of a checkpoint. `warn` is called for each
    oddity.

    ModelFileError: they contradict each other. UnsupportedModelError: the tokenizer is not supported."""
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
        warn(f"{where} has no end token, so answers end only at the end of the context or at --max-tokens")
    return replace(
        parts,
        special=json.dumps(named, indent=1, sort_keys=True).encode() + b"\n" if named else None,
        bos=bos[0] if bos else None,
        eos=tuple(eos),
    )


class _Settled:
    """Finds tokens that are in both the tokenizer and the model's embedding; warns about others."""

    def __init__(self, tokenizer: Tokenizer, config: Config, where: str, warn: Warn) -> None:
        self.tokenizer, self.vocab, self.where, self.warn = tokenizer, config.vocab, where, warn

    def tokens(self, ids: Iterable[int | None], key: str) -> list[int]:
        """The ids that are tokens, without None; warns about the others. `key` names them in warnings."""
        known = []
        for i in ids:
            if i is not None and i < self.vocab and self.tokenizer.token(i) is not None:
                known.append(i)
            elif i is not None:
                self.warn(f"{self.where}: {key} {i} is not in the vocabulary and is ignored")
        return known

    def spelled(self, names: Mapping[str, str | None], key: str) -> list[int]:
        """The id, in a list, of the token that the setting `key` spells; empty if there is none."""
        for name, token in names.items():
            if name in ("bos_token", key) and token and self.tokenizer.token_id(token) is None:
                self.warn(
                    f"{self.where}: {name} {token!r} is not in the vocabulary, so it will be plain text"
                )
        token = names.get(key)
        i = None if token is None else self.tokenizer.token_id(token)
        return self.tokens([i], key)


def _once(ids: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def _opened(
    tokenizer: Tokenizer, template: str | None, special: Mapping[str, str | None], warn: Warn
) -> Chat | None:
    """The chat of a template; None if there is no template, or, with a warning, if it cannot be checked."""
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
    """Renders and encodes a chat of two messages. Returns the token that ends the answer in it, in a list,
    unless `eos` has it. ModelFileError: the chat has tokens that the embedding lacks."""
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
        raise ModelFileError(
            f"{where}: its chat template writes {beyond[0]!r}, which its embedding lacks: the files are of "
            "different models; fetch the checkpoint again"
        )
    if _QUESTION.casefold() not in prompt.casefold():
        warn(f"{where}: its chat template leaves out the user's message")
    markers = dict.fromkeys(MARKER.findall(prompt + text))
    split = [marker for marker in markers if tokenizer.token_id(marker) not in ids]
    if split:
        warn(
            f"{where}: its chat template writes {', '.join(split)}, which the tokenizer splits into several "
            "tokens; if the model was trained with them as single tokens, the tokenizer is another model's"
        )
    bos = tokenizer.token_id(chat.special.get("bos_token", ""))
    if bos is not None and ids[:2] == [bos, bos]:
        warn(f"{where}: its chat template starts with {chat.special['bos_token']!r} twice")
    return _unlisted_end(chat, settled, text, eos)


def _unlisted_end(chat: Chat, settled: _Settled, text: str, eos: list[int]) -> list[int]:
    """The token after the answer in the rendered chat `text`, in a list; empty if `eos` has it."""
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
                f"tokens ({known}), so answers may not end; --stop ends them at a given text"
            )
        return []
    if end[0] in eos:
        return []
    settled.warn(
        f"{settled.where}: its chat template ends an answer with {settled.tokenizer.token(end[0])!r}, which "
        f"is not among its end tokens ({known}); it is used as one of them"
    )
    return end
