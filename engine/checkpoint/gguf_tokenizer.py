"""Converts the tokenizer in a GGUF's metadata to a `tokenizer.json` for the `tokenizers` package.

It encodes texts to the same ids as the tokenizer that Hugging Face transformers builds from the same file
(`make oracle` compares them)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import ModelFileError, UnsupportedModelError, Warn, ignore
from .gguf_names import BYTE_LEVEL, PRE_TOKENIZERS, SENTENCEPIECE

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Values of tokenizer.ggml.token_type for tokens that are matched whole and never produced by merges."""

_SPACE = "\u2581"


def tokenizer_json(values: Mapping[str, Any], where: str, warn: Warn = ignore) -> bytes | None:
    """The bytes of a tokenizer.json made from GGUF metadata; None, with a warning, if they have no tokenizer.
    `where` names the file in errors.

    UnsupportedModelError: the kind of tokenizer is not supported. ModelFileError: contradictory metadata."""
    kind = values.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        warn(f"{where} has no tokenizer, so the model will accept token ids only, not text")
        return None
    metadata = _Metadata(values, where)
    if kind == BYTE_LEVEL:
        parts = _byte_level(metadata, warn)
    elif kind == SENTENCEPIECE:
        parts = _sentencepiece(metadata)
    else:
        raise UnsupportedModelError(
            f"{where}: its tokenizer {kind!r} is not supported; {BYTE_LEVEL!r} and {SENTENCEPIECE!r} are"
        )
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": metadata.added_tokens(),
        "normalizer": None,
        "post_processor": metadata.post_processor(default_bos=kind == SENTENCEPIECE),
        **parts,
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


class _Metadata:
    """The checked tokenizer metadata of a GGUF file."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.tokens: list[str] = self._list("tokens", str) or []
        if not self.tokens:
            raise ModelFileError(f"{where}: tokenizer.ggml.tokens is missing; fetch the file again")
        self.types: list[int] = self._list("token_type", int) or [1] * len(self.tokens)
        self.scores: list[float] | None = self._list("scores", float)
        for name, listed in (("token_type", self.types), ("scores", self.scores)):
            if listed is not None and len(listed) != len(self.tokens):
                raise ModelFileError(
                    f"{where}: tokenizer.ggml.{name} has {len(listed)} values for {len(self.tokens)} tokens"
                )

    def _list(self, key: str, kind: type) -> Any:
        value = self.values.get(f"tokenizer.ggml.{key}")
        if value is not None and not (isinstance(value, list) and all(type(v) is kind for v in value)):
            raise ModelFileError(f"{self.where}: tokenizer.ggml.{key} must be a list of {kind.__name__}")
        return value

    def vocabulary(self) -> dict[str, int]:
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        if len(vocabulary) != len(self.tokens):
            twice, first = next((i, t) for i, t in enumerate(self.tokens) if vocabulary[t] != i)[::-1]
            raise ModelFileError(
                f"{self.where}: the token {twice!r} has two ids, {first} and {vocabulary[twice]}, so its "
                "encoding is ambiguous: use another conversion of the model to GGUF, or its safetensors"
            )
        return vocabulary

    def merges(self) -> list[list[str]]:
        """Pairs of tokens to merge, best first: listed in the file, or derived from scores."""
        listed = self._list("merges", str)
        if listed is None:
            if self.scores is None:
                raise ModelFileError(f"{self.where}: tokenizer.ggml has neither merges nor scores")
            return _merges_of_scores(self.vocabulary(), self.scores)
        pairs = [merge.split(" ") for merge in listed]
        vocabulary = self.vocabulary()
        for pair in pairs:
            if len(pair) != 2 or not {pair[0], pair[1], "".join(pair)} <= vocabulary.keys():
                raise ModelFileError(
                    f"{self.where}: tokenizer.ggml.merges has {' '.join(pair)!r}, which does not join two "
                    "tokens to a third"
                )
        return pairs

    def added_tokens(self) -> list[dict[str, Any]]:
        return [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]

    def token_id(self, key: str) -> int | None:
        value = self.values.get(f"tokenizer.ggml.{key}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise ModelFileError(
                f"{self.where}: tokenizer.ggml.{key}_token_id is {value!r}, which is not a token id"
            )
        return value

    def post_processor(self, *, default_bos: bool) -> dict[str, Any]:
        """The post-processor that adds begin and end tokens to a text, if the file asks for them."""
        special: dict[str, Any] = {}

        def around(key: str, default: bool) -> list[dict[str, Any]]:
            token = self.token_id(key)
            if token is None or not self.values.get(f"tokenizer.ggml.add_{key}_token", default):
                return []
            text = self.tokens[token]
            special[text] = {"id": text, "ids": [token], "tokens": [text]}
            return [{"SpecialToken": {"id": text, "type_id": 0}}]

        text = {"Sequence": {"id": "A", "type_id": 0}}
        single = [*around("bos", default_bos), text, *around("eos", False)]
        return {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        }


def _byte_level(metadata: _Metadata, warn: Warn) -> dict[str, Any]:
    """Parts of a tokenizer.json for byte-level BPE, which spells bytes as printable characters."""
    pre = metadata.values.get("tokenizer.ggml.pre")
    if pre is None:
        pre = "default"
        warn(
            f"{metadata.where} names no pre-tokenizer (tokenizer.ggml.pre), so text is split into words as "
            "by GPT-2; if answers look wrong, use a newer conversion of the model to GGUF"
        )
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{metadata.where}: its pre-tokenizer {pre!r} is not supported; supported are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}"
        )
    pattern = PRE_TOKENIZERS[pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pre_tokenizer: dict[str, Any] = byte_level
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        bytes_only = {**byte_level, "use_regex": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, bytes_only]}
    return {
        "pre_tokenizer": pre_tokenizer,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": _bpe(metadata, unknown=None, byte_fallback=False),
    }


def _sentencepiece(metadata: _Metadata) -> dict[str, Any]:
    """Parts of a tokenizer.json for sentencepiece BPE: over characters, with spaces spelled as U+2581 and a
    fallback to byte tokens for characters outside the vocabulary."""
    prefix = bool(metadata.values.get("tokenizer.ggml.add_space_prefix", True))
    unknown = metadata.token_id("unknown")
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": _SPACE,
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            metadata, unknown=None if unknown is None else metadata.tokens[unknown], byte_fallback=True
        ),
    }


def _bpe(metadata: _Metadata, *, unknown: str | None, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": metadata.vocabulary(),
        "merges": metadata.merges(),
    }


def _merges_of_scores(vocabulary: Mapping[str, int], scores: list[float]) -> list[list[str]]:
    """Merges that are equivalent to sentencepiece scores. sentencepiece joins the pair whose token has the
    best score, so every split of a token into two tokens is a merge, ordered by the token's score."""
    merges: list[tuple[float, int, int, int, int, str, str]] = []
    lengths = set(map(len, vocabulary))  # a file may have a token of a megabyte, with a million of splits
    for token, i in vocabulary.items():
        for at in range(1, len(token)):
            if at not in lengths or len(token) - at not in lengths:
                continue
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary:
                # Best score first. Ties are as in transformers: longer parts, then order of appearance.
                rank = (-scores[i], -len(left), -len(right), i, vocabulary[left])
                merges.append((*rank, left, right))
    merges.sort(key=lambda merge: merge[:5])
    return [[left, right] for *_, left, right in merges]
