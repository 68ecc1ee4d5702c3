"""Text from anywhere is a dataclass exactly, or refused with the place and the fault."""

import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from shoal.engine.strict import AtMost, Between, Printable, convert, decode, encode


@dataclass(frozen=True, slots=True)
class Inner:
    rows: Annotated[int, Between(1, 9)]
    rate: float

    def __post_init__(self) -> None:
        if self.rate == 7:
            raise ValueError("seven is no rate")


@dataclass(frozen=True, slots=True)
class Outer:
    name: Annotated[str, Printable(1, 8)]
    kind: Literal["a", "b"]
    inner: Inner | None
    pairs: Annotated[tuple[tuple[int, float], ...], AtMost(3)] = ()
    many: tuple[Inner, ...] = field(default_factory=tuple)
    sure: bool = True


GOOD = Outer("x", "a", Inner(2, 1.5), ((1, 1e9), (8, 8e9)), (Inner(1, 1.0),), False)


def test_what_was_encoded_is_decoded_equal() -> None:
    assert decode(Outer, encode(GOOD)) == GOOD
    assert decode(Outer, encode(Outer("x", "b", None))) == Outer("x", "b", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairs": 3}, "Outer.pairs = 3 is not a list"),
        ({"pairs": [[1, 1.0], 5]}, "Outer.pairs[1] = 5 is not a list"),
        ({"pairs": [[1, 1.0, 2]]}, "Outer.pairs[0] has 3 items, not 2"),
        ({"pairs": [[True, 1.0]]}, "Outer.pairs[0][0] = True is not an integer"),
        ({"pairs": [[1, "x"]]}, "Outer.pairs[0][1] = 'x' is not a number"),
        ({"pairs": [[1, 1.0]] * 4}, "Outer.pairs has 4 items, more than 3"),
        ({"many": [{"rows": 0, "rate": 1}]}, "Outer.many[0].rows = 0 is not between 1 and 9"),
        ({"many": [{"rows": 1, "rate": 7}]}, "Outer.many[0]: seven is no rate"),
        ({"many": [{"rows": 1}]}, "Outer.many[0] lacks 'rate'"),
        (
            {"many": [{"rows": 1, "rate": 1, "x": 2}]},
            "Outer.many[0] has an unknown key 'x'; known: rate, rows",
        ),
        ({"many": [5]}, "Outer.many[0] is not an object"),
        ({"inner": []}, "Outer.inner is not an object"),
        ({"kind": "c"}, "Outer.kind = 'c' is none of a, b"),
        ({"name": ""}, "Outer.name has 0 characters, not 1 to 8"),
        ({"name": "a\nb"}, "Outer.name holds a character that cannot be printed"),
        ({"name": 5}, "Outer.name = 5 is not a string"),
        ({"sure": 1}, "Outer.sure = 1 is not true or false"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change: dict[str, Any], words: str) -> None:
    body = {**json.loads(encode(GOOD)), **change}
    with pytest.raises(ValueError, match=re.escape(words)):
        decode(Outer, json.dumps(body).encode())


def test_defaults_may_be_left_out_only_where_that_is_asked_for() -> None:
    body = {"name": "x", "kind": "a", "inner": {"rows": 1, "rate": 2}}
    assert convert(Outer, body, "the file", defaults=True) == Outer("x", "a", Inner(1, 2.0))
    with pytest.raises(ValueError, match="the file lacks 'many', 'pairs', 'sure'"):
        convert(Outer, body, "the file")
    with pytest.raises(ValueError, match="the file lacks 'inner'"):
        convert(Outer, {"name": "x", "kind": "a"}, "the file", defaults=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"name": "x", "name": "y"}', "duplicate key"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"rows": NaN}', "NaN is not a number"),
        (b'{"rows": 1, "rate": 1e999}', "Inner.rate is not finite"),
        (b"\xff", "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_text_that_is_no_json_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(Inner, text)


def test_what_would_be_refused_is_not_sent() -> None:
    with pytest.raises(ValueError, match=r"Inner\.rate is not finite"):
        encode(Inner(1, float("inf")))
