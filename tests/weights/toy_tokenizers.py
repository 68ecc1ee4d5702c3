"""Small tokenizers of every kind that models use, trained here on the texts of `texts`, with one set of added
tokens: special ones, some of which take the white space beside them, and others."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tests.weights.texts import texts
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im", "[|end|]"]
WIDE = ["<|user|>", "<|assistant|>"]
"""Special tokens that take white space: the first on both sides, the second after it."""
PLAIN = ["<think>", "</think>", "<|turn|>", "\n\n", "<b>"]
"""Added tokens that are not special."""
_CORPUS = [*texts(60, seed=9), *SPECIAL, *WIDE, *PLAIN] * 2


def _byte_level(*, prefix: bool = False) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return backend


def _split_bytes() -> Backend:
    """As Llama 3 has it: a pattern of its own, and words of the vocabulary are taken whole."""
    backend = _byte_level()
    pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(pattern, "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    document = json.loads(backend.to_str())
    document["model"]["ignore_merges"] = True
    return Backend.from_str(json.dumps(document))


def _pieces(scheme: str) -> Backend:
    """sentencepiece's BPE: words begin with a visible space."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    if scheme == "never":
        return backend
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return backend


def _normalised() -> Backend:
    """As Llama 2 has it: the visible spaces come from a normaliser, which prepends one to every part."""
    backend = _pieces("never")
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.pre_tokenizer = None
    return backend


def _unigram() -> Backend:
    """sentencepiece's other model: the most likely pieces, here the longest ones."""
    words = sorted({word for text in _CORPUS for word in f"\u2581{text}".replace(" ", " \u2581").split(" ")})
    pieces = sorted({word[:n] for word in words for n in (2, 4, 6)} | set("".join(words)))
    backend = Backend(models.Unigram([("<unk>", 0.0), *((p, -10.0 / len(p)) for p in pieces if p)], unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def _word_pieces() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return backend


def _lower_case() -> Backend:
    """Text, and the added tokens in it, are found in any case and width."""
    backend = _byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return backend


def _mergeable() -> Backend:
    """Merges make a special token of its letters, as those that scores imply do."""
    document: dict[str, Any] = json.loads(_byte_level().to_str())
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    for token in ("<s", "<s>"):
        if token not in vocabulary:
            vocabulary[token] = len(vocabulary)
        merges.insert(0, [token[:-1], token[-1]])
    return Backend.from_str(json.dumps(document))


KINDS: dict[str, Callable[[], Backend]] = {
    "byte level": _byte_level,
    "byte level with a first space": lambda: _byte_level(prefix=True),
    "byte level, a pattern of its own": _split_bytes,
    "byte level, mergeable": _mergeable,
    "sentencepiece, first": lambda: _pieces("first"),
    "sentencepiece, always": lambda: _pieces("always"),
    "sentencepiece, never": lambda: _pieces("never"),
    "sentencepiece, a normaliser": _normalised,
    "unigram": _unigram,
    "word pieces": _word_pieces,
    "lower case": _lower_case,
}


@cache
def toy(kind: str) -> Backend:
    """A tokenizer of KINDS that begins a text with `<s>`. Made once: training orders ties at random."""
    backend = KINDS[kind]()
    normalized = kind in ("lower case", "unigram")
    special = [AddedToken(token, special=True, normalized=normalized) for token in SPECIAL]
    special.append(AddedToken(WIDE[0], special=True, lstrip=True, rstrip=True, normalized=False))
    special.append(AddedToken(WIDE[1], special=True, rstrip=True, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    begin = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return backend
