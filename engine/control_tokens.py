"""Encoding of texts in which a control token's spelling may be ordinary text.

The `tokenizers` library recognises added tokens wherever a text spells them. Where only some of them are
meant, the text is encoded by a twin of the tokenizer, in which control tokens have the same ids and
private spellings. Those that are meant are written in their private spelling. To the twin everything else
is words, in their usual context."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .errors import ShoalError

if TYPE_CHECKING:
    import tokenizers

Genuine = Callable[[int, int, int], bool]
"""Whether a token that is spelled by the characters [first, last) of a text is meant: f(id, first,
last)."""

_PRIVATE = 0xF0000
"""First of the code points for private use (planes 15 and 16) of which private spellings are made."""
_PRIVATE_MARKS = [*range(0x10FFFD, 0x100000 - 1, -1), *range(0xF8FF, 0xE000 - 1, -1)]


def never(token: int, first: int, last: int) -> bool:
    """Genuine where no spelling is meant."""
    return False


class PlainTwins:
    """The twins of a tokenizer, made when they are needed, and what they are needed for."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._twin: tuple[str, frozenset[str], tokenizers.Tokenizer] | None = None

    def find(
        self, encoding: tokenizers.Encoding, text: str, spelled: Mapping[int, tokenizers.AddedToken]
    ) -> Iterator[tuple[int, int, int]]:
        """Ids and characters of the tokens `spelled` in the backend's encoding of a text. The token for
        what the vocabulary lacks is among them only where the text spells it."""
        for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if token not in spelled:
                continue
            content, part = spelled[token].content, text[first:last]
            at = part.find(content)  # white space around it may belong to the token
            if at >= 0:
                yield token, first + at, first + at + len(content)
            elif spelled[token].normalized and self._normalised(content) in self._normalised(part):
                yield token, first + len(part) - len(part.lstrip()), first + len(part.rstrip())

    def encode(
        self,
        text: str,
        encoding: tokenizers.Encoding,
        spelled: Mapping[int, tokenizers.AddedToken],
        genuine: Genuine,
    ) -> tokenizers.Encoding:
        """Encoding of the text with only the genuine ones of the tokens `spelled`. `encoding` is that of
        the backend. ShoalError: the text has every character for private use."""
        contents = {token.content: i for i, token in spelled.items()}
        names = {content: chr(_PRIVATE + n) for n, content in enumerate(sorted(contents))}
        mark = self._mark(text)
        meant = [found for found in self.find(encoding, text, spelled) if genuine(*found)]
        # A spelling that is not meant may have swallowed the beginning of one that is.
        meant += [found for found in _search(text, contents) if genuine(*found)]
        pieces, at = [], 0
        for token, first, last in sorted(meant, key=lambda found: (found[1], -found[2])):
            if first >= at:
                pieces += [text[at:first], mark, names[spelled[token].content]]
                at = last
        twin = self._named(mark, names)
        return twin.encode("".join([*pieces, text[at:]]), add_special_tokens=False)

    def _normalised(self, text: str) -> str:
        normalizer = self._backend.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _mark(self, text: str) -> str:
        """A character that the text lacks; that of the last twin, if possible."""
        if self._twin is not None and self._twin[0] not in text:
            return self._twin[0]
        used = set(text)
        for mark in map(chr, _PRIVATE_MARKS):
            if mark not in used:
                return mark
        raise ShoalError("the text has every character for private use: remove them")

    def _named(self, mark: str, names: Mapping[str, str]) -> tokenizers.Tokenizer:
        """The twin whose tokens have the spellings `names`, each after `mark`."""
        if self._twin is None or self._twin[0] != mark or self._twin[1] != names.keys():
            document = json.loads(self._backend.to_str())
            _rename(document, {content: mark + name for content, name in names.items()})
            made = type(self._backend).from_str(json.dumps(document))
            self._twin = (mark, frozenset(names), made)
        return self._twin[2]


def _search(text: str, contents: Mapping[str, int]) -> Iterator[tuple[int, int, int]]:
    """Every token that is spelled in the text as in `contents`, overlapping ones too."""
    longest_first = sorted(filter(None, contents), key=len, reverse=True)
    anywhere = re.compile("|".join(map(re.escape, longest_first)))
    match = anywhere.search(text)
    while match is not None:
        first = match.start()
        for content in longest_first:
            if text.startswith(content, first):
                yield contents[content], first, first + len(content)
        match = anywhere.search(text, first + 1)


def _rename(document: dict[str, Any], names: Mapping[str, str]) -> None:
    """Gives tokens of a tokenizer.json other spellings and the same ids; no text is merged into them."""
    for token in document["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = document["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    else:  # pairs of a token and its score
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("merges"):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    document["post_processor"] = None
