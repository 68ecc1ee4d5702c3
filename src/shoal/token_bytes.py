"""The bytes that a token stands for. It may be a part of a character, so its text alone does not say them."""

from __future__ import annotations

import re

from .engine.tokenizer import Tokenizer

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_OTHERS = [*range(33), *range(127, 161), 173]
_BYTES = {chr(b): b for b in range(256)} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
"""How tokenizers over bytes spell each byte."""


class TokenBytes:
    """The bytes of the tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: content for i, (content, _) in tokenizer.added_tokens.items()}
        self._over_bytes = tokenizer.kind.endswith("over bytes")

    def bytes(self, token: int) -> bytes:
        """The bytes of a token. Those of a special token are its name."""
        spelled = self._added.get(token)
        if spelled is not None:
            return spelled.encode()
        spelled = self._tokenizer.token(token) or ""
        if self._over_bytes:
            return bytes(_BYTES[c] for c in spelled if c in _BYTES)
        if found := _BYTE.fullmatch(spelled):
            return bytes([int(found[1], 16)])
        return spelled.replace("\u2581", " ").encode()

    def text(self, token: int) -> str:
        """The bytes as text; where they are a part of a character, as OpenAI's API writes them:
        `bytes:\\xe2\\x82`."""
        spelled = self.bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in spelled)
