"""Answers that must be JSON: a grammar says after each token which may follow (`Settings.allow`).

The library is llguidance, in Rust: a mask takes some tens of microseconds, and it holds schemas to limits. A
grammar is a text, so that a process which asks the head sends it there, and the head makes the masks."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from .engine.errors import MissingDependencyError
from .engine.model_directory import Model
from .engine.tokenizer import Tokenizer
from .token_bytes import TokenBytes

MOST_BYTES = 1 << 20
"""The size of a grammar."""
MOST_SECONDS = 1.0
"""CPU time for one mask."""
MOST_REPEATED = 10_000
"""Characters of a pattern whose repetitions are written out. The library takes seconds for a mask of some
that have a million."""
MOST_DIVISOR = 100_000
"""What all numbers of a schema must be multiples of, added up: the library finds each remainder, which takes
minutes for some millions, and more memory than there is."""
MOST_PROPERTIES = 1000
"""Properties of one object. Time grows with their cube: 5000 take minutes."""
_PARTS = re.compile(
    r"(?P<count>\{(?P<least>\d{1,9})(,(?P<most>\d{0,9}))?\})|(?P<open>\()|(?P<close>\))"
    r"|\\.|\[\^?\]?(\\.|[^\]\\])*(\]|\Z)|.",
    re.DOTALL,
)

_JSON = re.compile(r"%(?:json|regex|llguidance)\s*(?=\{)")
"""What precedes a value of JSON in the text of a grammar."""
_LITERALS = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?P<pattern>(?:\\.|[^/\\\n])+)/')
"""A string, or a regular expression, in the text of a grammar."""
_TEXTS = {"lark_grammar", "rx", "regex"}
"""Keys whose values are text, in a grammar that is JSON."""


class GrammarError(ValueError):
    """A grammar or a schema that cannot be used, or that an answer cannot keep to."""


class Grammars:
    """Makes masks for one model."""

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        """MissingDependencyError: the package is not there."""
        try:
            import llguidance
        except ImportError:
            raise MissingDependencyError(
                'JSON schemas need the package llguidance: pip install "shoal[serve]"'
            ) from None
        self._library: Any = llguidance
        vocab = model.program.vocab
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(model, tokenizer, vocab))
        self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=list(model.config.eos) or None)
        self._vocab = vocab

    def json(self, schema: Mapping[str, Any]) -> str:
        """The grammar of JSON by a schema. GrammarError: the schema cannot be used."""
        options = {"whitespace_pattern": r"[\x20\x0A]{0,2}"}  # a model could write spaces for ever
        make = self._library.LLMatcher.grammar_from_json_schema
        try:
            made: str = make(json.dumps(schema), overrides=options)
        except ValueError as error:
            raise _unusable(error) from None
        return made

    def masks(self, grammar: str) -> Masks:
        """The masks of one answer. It may take a second. GrammarError: the grammar cannot be used."""
        check_grammar(grammar)
        limits = self._library.LLParserLimits(verbose_errors=False)  # they would quote the answer
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _unusable(matcher.get_error())
        made = Masks(grammar, matcher, self._vocab)
        made(())  # a loop of references is noticed only here
        return made


def check_grammar(grammar: str) -> None:
    """GrammarError: a grammar is too large, or the library would take minutes for the schemas and patterns in
    it."""
    if len(grammar.encode()) > MOST_BYTES:
        raise _unusable(f"it is larger than {MOST_BYTES} bytes")
    try:
        schemas, texts = _contents(grammar)
        check_sizes(schemas)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _unusable(error) from None
    for text in texts:
        _check_repeated(text)


def _contents(grammar: str) -> tuple[list[Any], list[str]]:
    """The JSON values in a grammar of the library, most of which are schemas, and the text between them."""
    if grammar.lstrip().startswith("{"):
        values, texts = [json.loads(grammar)], list[str]()
        for one in _objects(values):
            for name in _TEXTS & one.keys():
                if isinstance(one[name], str):
                    more = _contents(one[name])
                    values, texts = values + more[0], texts + more[1]
        return values, texts
    values, texts, at = [], [], 0
    while found := _JSON.search(grammar, at):
        texts.append(grammar[at : found.start()])
        value, at = json.JSONDecoder().raw_decode(grammar, found.end())
        values.append(value)
    return values, [*texts, grammar[at:]]


def _check_repeated(text: str) -> None:
    """GrammarError: the rules and patterns of a grammar repeat too many characters."""
    left = len(text) + MOST_REPEATED

    def shown(found: re.Match[str]) -> str:
        nonlocal left
        size = len(found[0]) if found["pattern"] is None else written_out(found["pattern"])
        left -= size
        return f"({'x' * size})" if left >= 0 else ""

    plain = _LITERALS.sub(shown, text).translate({ord("["): "(", ord("]"): ")"})
    if left < 0 or written_out(plain) > len(text) + MOST_REPEATED:
        raise _unusable(f"it repeats more than {MOST_REPEATED} characters")


def check_sizes(schema: object) -> None:
    """GrammarError: the library would take minutes for a schema, or for several of one grammar."""
    divisor = 0
    for one in _objects(schema):
        keys, names, multiple = (one.get(name) for name in ("patternProperties", "properties", "multipleOf"))
        for pattern in (one.get("pattern"), *(keys if isinstance(keys, Mapping) else ())):
            if isinstance(pattern, str) and written_out(pattern) > MOST_REPEATED:
                raise _unusable(f"a pattern repeats more than {MOST_REPEATED} characters")
        if isinstance(names, Mapping) and len(names) > MOST_PROPERTIES:
            raise _unusable(f"an object has more than {MOST_PROPERTIES} properties")
        if isinstance(multiple, int | float):
            divisor += remainders(multiple)
    if divisor > MOST_DIVISOR:
        raise _unusable(f"the values of multipleOf are more than {MOST_DIVISOR} together")


def _objects(value: object) -> Iterator[Mapping[str, Any]]:
    """All JSON objects in a value, with itself."""
    if isinstance(value, Mapping):
        yield value
        value = tuple(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from _objects(one)


def remainders(divisor: float) -> int:
    """How many remainders of a division by a number in decimal there are, about: 1 if its last digits say
    whether a number is a multiple."""
    size = left = int("".join(map(str, Decimal(str(divisor)).as_tuple().digits)))
    for factor in (2, 5):
        while left and not left % factor:
            left //= factor
    return size if left > 1 else 1


def written_out(pattern: str) -> int:
    """The characters of a regular expression whose counted repetitions are written out, about."""
    sizes, last = [0], 0
    """Sizes: of each group that is open, and of the part that may be repeated next."""
    for part in _PARTS.finditer(pattern):
        if part["count"]:
            most = max(int(part["least"]), int(part["most"] or 0))
            sizes[-1] += last * (most - 1)
            last *= most
        elif part["open"]:
            sizes.append(0)
        elif part["close"] and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        else:
            last = 1
            sizes[-1] += 1
    return sum(sizes)


class LateGrammars:
    """Grammars that are made when somebody first needs them, in any thread: what the library keeps for a
    model takes tens of MB."""

    def __init__(self, model: Model) -> None:
        self._model, self._lock = model, threading.Lock()
        self._made: Grammars | None = None

    def get(self) -> Grammars:
        """The grammars. Errors as for Grammars, and of a model without a tokenizer."""
        with self._lock:
            if self._made is None:
                self._made = Grammars(self._model, Tokenizer.open(self._model.path))
            return self._made


def _unusable(why: object) -> GrammarError:
    return GrammarError(f"the schema cannot be used: {' '.join(str(why).split())[:500]}")


class Masks:
    """An engine.sampler.Allow, by a grammar."""

    def __init__(self, grammar: str, matcher: Any, vocab: int) -> None:
        self.grammar = grammar
        self._matcher, self._vocab = matcher, vocab
        self._seen: list[int] = []

    def copy(self) -> Masks:
        """The masks of another answer with the same grammar."""
        return Masks(self.grammar, self._matcher.deep_copy(), self._vocab)

    def __call__(self, tokens: Sequence[int]) -> Collection[int]:
        if list(tokens[: len(self._seen)]) != self._seen:  # an answer that is computed again
            self._matcher.reset()
            self._seen = []
        begun = time.thread_time()
        for token in tokens[len(self._seen) :]:
            if not self._matcher.consume_token(token):
                raise self._ended()
            self._seen.append(token)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._ended()
        if time.thread_time() - begun > MOST_SECONDS:  # other answers wait meanwhile
            raise _unusable("its masks take too long")
        return np.flatnonzero(np.unpackbits(bits, count=self._vocab, bitorder="little"))

    def _ended(self) -> GrammarError:
        return _unusable(self._matcher.get_error())


class _Vocabulary:
    """A tokenizer as the library takes it."""

    def __init__(self, model: Model, tokenizer: Tokenizer, vocab: int) -> None:
        token_bytes = TokenBytes(tokenizer)
        self._tokenizer = tokenizer
        self.eos_token_id = model.config.eos[0] if model.config.eos else 0
        self.bos_token_id = model.config.bos
        self.tokens = [token_bytes.bytes(i) for i in range(vocab)]
        self.special_token_ids = [i for i in range(vocab) if tokenizer.is_special(i)]

    def __call__(self, text: str | bytes) -> list[int]:
        given = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(given, special=False)
