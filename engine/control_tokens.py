"""Encodes texts in which the spelling of a control token may be ordinary text.

The `tokenizers` library recognises added tokens wherever a text spells them. If only some of these are
genuine, the text is encoded by a twin of the tokenizer, whose control tokens have the same ids but private
spellings. Genuine tokens are written in their private spelling; the twin treats everything else as words,
in their usual context."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .errors import ModelFileError, ShoalError

if TYPE_CHECKING:
    import tokenizers

Genuine = Callable[[int, int, int], bool]
"""A function f(id, first, last): whether the characters [first, last) of a text, which spell the token, stand
for the token rather than for ordinary text."""

_MOST_IDS = 1 << 24
_PRIVATE = 0xF0000
"""First of the private-use code points (planes 15 and 16) that private spellings are made of."""
_PRIVATE_MARKS = [*range(0x10FFFD, 0x100000 - 1, -1), *range(0xF8FF, 0xE000 - 1, -1)]


def never(token: int, first: int, last: int) -> bool:
    """The `Genuine` of a text without control tokens."""
    return False


class PlainTwins:
    """Finds spellings of control tokens in texts, and encodes texts in which some are ordinary text. Twins of
    the tokenizer are made on demand."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._twin: tuple[str, frozenset[str], tokenizers.Tokenizer] | None = None

    def find(
        self, encoding: tokenizers.Encoding, text: str, spelled: Mapping[int, tokenizers.AddedToken]
    ) -> Iterator[tuple[int, int, int]]:
        """Occurrences (id, first, last) of the tokens `spelled` in the backend's encoding of a text, as
        character ranges. The unknown token counts only where the text spells it."""
        for token, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if token not in spelled:
                continue
            content, part = spelled[token].content, text[first:last]
            at = part.find(content)  # the token may include white space around its spelling
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
        """The encoding of a text in which the tokens `spelled` are recognised only where genuine. `encoding`
        is the backend's own. ShoalError: the text contains every private-use character."""
        contents = {token.content: i for i, token in spelled.items()}
        names = {content: chr(_PRIVATE + n) for n, content in enumerate(sorted(contents))}
        mark = self._mark(text)
        meant = [found for found in self.find(encoding, text, spelled) if genuine(*found)]
        # A spelling that is not genuine may overlap the start of one that is.
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
        """A private-use character that the text lacks; the last twin's, if possible."""
        if self._twin is not None and self._twin[0] not in text:
            return self._twin[0]
        used = set(text)
        for mark in map(chr, _PRIVATE_MARKS):
            if mark not in used:
                return mark
        raise ShoalError("the text contains every private-use character of Unicode: remove them")

    def _named(self, mark: str, names: Mapping[str, str]) -> tokenizers.Tokenizer:
        """The twin whose control tokens are spelled `mark` + name; `names` has the names by spelling."""
        if self._twin is None or self._twin[0] != mark or self._twin[1] != names.keys():
            highest = max(self._backend.get_vocab().values(), default=0)
            if highest >= _MOST_IDS:  # the library would list all ids below that are no token's
                raise ModelFileError(f"the tokenizer has a token with the id {highest}: fetch it again")
            document = json.loads(self._backend.to_str())
            _rename(document, {content: mark + name for content, name in names.items()})
            made = type(self._backend).from_str(json.dumps(document))
            self._twin = (mark, frozenset(names), made)
        return self._twin[2]


def _search(text: str, contents: Mapping[str, int]) -> Iterator[tuple[int, int, int]]:
    """All occurrences (id, first, last) in a text of the spellings in `contents`, including overlapping
    ones."""
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
    """Changes the spellings of tokens in a tokenizer.json, and removes the merges that would produce them.
    Ids stay the same."""
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
