"""Text to token ids and back, including decoding token by token without splitting characters.

It wraps Hugging Face's `tokenizers`, imported on first use, because a node does not need it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .control_tokens import Genuine, PlainTwins, never
from .errors import MissingDependencyError, ModelFileError, ShoalError
from .files import read_bytes
from .hash_cache import HashCache
from .index import TOKENIZER, read_index

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"
_REPLACEMENT = "\ufffd"
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_LONG = 1 << 16


class Tokenizer:
    """The tokenizer of a model directory."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._twins = PlainTwins(backend)
        self._added = backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in self._added.items() if token.special)
        found = (backend.token_to_id(spelled) for spelled in _BYTE_TOKENS)
        self._byte_tokens = frozenset(i for i in found if i is not None)
        self._alone: dict[tuple[int, bool], str] = {}
        """Decoded tokens, as far as any was asked for by itself."""

    @classmethod
    def open(cls, directory: Path | str) -> Tokenizer:
        """The tokenizer of the model directory. MissingDependencyError: the `tokenizers` package is missing.
        ModelFileError: the model has no tokenizer, or a damaged one."""
        directory = Path(directory)
        index, _ = read_index(directory / "index.json")
        path = directory / TOKENIZER
        if TOKENIZER not in index.files:
            raise ModelFileError(
                f"{directory} has no tokenizer.json, since its checkpoint had none: give token ids, not text"
            )
        HashCache(directory).check(path, index.files[TOKENIZER])
        return cls.parse(read_bytes(path), str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Tokenizer:
        """The tokenizer in the bytes of tokenizer.json; `where` names the file in errors. Errors: see
        `open`."""
        library = _import_tokenizers()
        try:
            backend = library.Tokenizer.from_str(data.decode("utf-8"))
            backend.no_truncation()  # the file may have settings from training in batches
            backend.no_padding()
            backend.encode("")  # with begin and end tokens, whose settings are not checked before
            return cls(backend)
        except BaseException as e:  # the library raises plain Exception, and its panics are not even that
            if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
                raise
            raise ModelFileError(f"{where} cannot be read by the `tokenizers` package: {e}") from e

    def encode(self, text: str, *, special: bool = True, control: bool = True) -> list[int]:
        """Token ids of a text. `special` adds the begin and end tokens that the model asks for; a rendered
        chat template has its own. `control` recognises special tokens that the text spells, as in a raw
        prompt. Without it their spelling is ordinary text, as it should be in text from other people."""
        if control:
            return list(self._encoded(text, special=special).ids)
        return self.encode_where(text, self._special, never, special=special)

    def encode_where(
        self, text: str, control: frozenset[int], genuine: Genuine, *, special: bool = False
    ) -> list[int]:
        """Token ids of a text. An added token in `control` is recognised only where it is `genuine`;
        elsewhere its spelling is ordinary text. `special` adds begin and end tokens."""
        encoding = self._encoded(text, special=False)
        spelled = {i: self._added[i] for i in control}
        if not all(genuine(*found) for found in self._twins.find(encoding, text, spelled)):
            encoding = self._twins.encode(text, encoding, spelled, genuine)
        return list(self._backend.post_process(encoding, None, special).ids)

    def _encoded(self, text: str, *, special: bool) -> Any:
        """The library's encoding. A long one lets other threads run, which its `encode` does not. ShoalError:
        the text cannot be written as UTF-8."""
        try:
            if len(text) < _LONG:
                return self._backend.encode(text, add_special_tokens=special)
            return self._backend.encode_batch([text], add_special_tokens=special)[0]
        except TypeError as e:
            raise ShoalError("the text holds half of a character (a lone surrogate): remove it") from e

    @property
    def added_tokens(self) -> dict[int, tuple[str, bool]]:
        """The added tokens, which are matched whole before the text is split into words: by id, the spelling
        and whether it is special, so that decoded text leaves it out."""
        return {i: (token.content, token.special) for i, token in self._added.items()}

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Invalid UTF-8 becomes U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def decode_one(self, i: int, *, skip_special: bool = True) -> str:
        """The text of one token id, as `decode` has it; quicker, since it is kept."""
        text = self._alone.get((i, skip_special))
        if text is None:
            text = self._alone[i, skip_special] = self.decode([i], skip_special=skip_special)
        return text

    @property
    def kind(self) -> str:
        """A description for display: the tokenizer's model and the model's symbols."""
        model = type(self._backend.model).__name__
        steps = f"{self._backend.normalizer} {self._backend.pre_tokenizer}"
        if "ByteLevel" in steps:
            return f"{model} over bytes"
        return (
            f"{model} over characters, spaces as {_SPACE}" if _SPACE in steps else f"{model} over characters"
        )

    @property
    def size(self) -> int:
        """Number of tokens, including added tokens."""
        return int(self._backend.get_vocab_size())

    def token(self, i: int) -> str | None:
        """The spelling of a token in the vocabulary; None: no such token."""
        return self._backend.id_to_token(i)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary; None: no such token."""
        return self._backend.token_to_id(token)

    def is_special(self, i: int) -> bool:
        """Whether the token is special: a marker, such as the end of a turn, rather than text."""
        return i in self._special

    def is_byte(self, i: int) -> bool:
        """Whether the token stands for a byte in the way of sentencepiece, such as <0x0A>."""
        return i in self._byte_tokens


class Detokenizer:
    """Decodes token ids one at a time. The pieces, joined, are the decoding of all ids together.

    Decoding depends on earlier ids (a first space is stripped, bytes join into characters), so a window of
    recent ids is decoded with and without the new one, and the new text is the difference. Text is held back
    while it ends within a character, or within a run of byte tokens: sentencepiece decodes such a run to
    characters as a whole, and if one byte is invalid, none of the run."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._ids: list[int] = []
        self._given = 0
        """Number of ids whose text was returned. They stay as the context that decoding needs."""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that has become final, which may be empty."""
        if self._skip and self._tokenizer.is_special(token):
            return ""
        self._ids.append(token)
        return "" if self._tokenizer.is_byte(token) else self._take(hold=True)

    def flush(self) -> str:
        """Returns the text that was held back. Call it after the last token."""
        return self._take(hold=False)

    def _take(self, *, hold: bool) -> str:
        before = self._decode(self._ids[: self._given])
        text = self._decode(self._ids)
        if hold and (text.endswith(_REPLACEMENT) or len(text) <= len(before)):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        if len(ids) == 1:  # nearly always: the token before the new one
            return self._tokenizer.decode_one(ids[0], skip_special=self._skip)
        return self._tokenizer.decode(ids, skip_special=self._skip)


class StopBuffer:
    """Holds back text that may be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False
        """True once a stop string was met and the text before it returned."""

    def push(self, text: str) -> str:
        """Adds text; returns the part that certainly precedes any stop string, which may be empty."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found))
        return self._give(len(self._held) - self._pending())

    def flush(self) -> str:
        """Returns the text that was held back. Call it after the last text."""
        return "" if self.stopped else self._give(len(self._held))

    def _pending(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0

    def _give(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as e:
        raise MissingDependencyError(
            f"converting text to tokens needs the tokenizers package ({e}): pip install tokenizers "
            "(Termux: pkg install tur-repo && pkg install python-tokenizers)"
        ) from e
    return tokenizers
